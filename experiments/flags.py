"""The flags that the commands share: what to train on what, and the schedule. Free of torch, so that --help is quick."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .errors import ExperimentError
from .methods import PRECISIONS, QUANTIZE, Method, Schedule
from .recipes import METHODS

#: What --resume means without a value.
AUTO = "auto"
ADAPTER_FLAGS = ("--quantize", "--rank", "--alpha", "--dropout", "--target-modules", "--bias", "--lora-plus")
#: Every part of a `Schedule`: (field, type, help).
SCHEDULE = (
    ("epochs", int, "times that each sentence is seen"),
    ("batch_size", int, "sentences in a step"),
    ("learning_rate", float, "peak learning rate of AdamW; the method's own if not given"),
    ("weight_decay", float, "decoupled weight decay"),
    ("warmup", float, "share of the steps in which the learning rate rises; then it falls to 0"),
    ("max_grad_norm", float, "gradients are clipped to this norm; 0 for no clipping"),
    ("max_length", int, "tokens of a sentence that are read"),
    ("train_samples", int, "train on so many sentences, drawn at random"),
    ("max_steps", int, "stop after so many steps"),
    ("seed", int, "of the head, the adapters, the order and the dropout"),
)


MODEL = (
    "auto (distilbert-base-uncased, else packaged), packaged (MiniLM), packaged-base (MPNet), packaged-lm (SmolLM2-135M), a "
    "Hub name or a directory"
)
DATA = "auto ($SST2_DIR, else hub, else packaged), hub, packaged or a directory"


def source_flags(parser: argparse._ActionsContainer, model: str = MODEL, data: str = DATA) -> None:
    """--model, --data, --device, --precision. What is said of the first two begins with their defaults."""
    for name, text in (("--model", model), ("--data", data)):
        parser.add_argument(name, default=text.split()[0], help=text)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes CUDA when there is one")
    parser.add_argument(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="auto takes bf16 where that multiplies faster",
    )


def output_flags(parser: argparse._ActionsContainer) -> None:
    """--output-dir, --overwrite, --report-to."""
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="where the results go; one of its own under runs/ if not given"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run left in the output directory")
    parser.add_argument(
        "--report-to", type=names, default=(), metavar="NAMES", help="loggers of the Trainer, such as tensorboard or wandb"
    )


def adapter_flags(parser: argparse._ActionsContainer) -> None:
    """Those of `ADAPTER_FLAGS`."""
    parser.add_argument("--quantize", choices=QUANTIZE, help="how the base's linear layers are held in training")
    parser.add_argument("--rank", type=int, metavar="R", help="rank of each update")
    parser.add_argument("--alpha", type=float, help="the update is scaled by alpha / rank")
    parser.add_argument("--dropout", type=float, metavar="P", help="chance that an adapter's input is zeroed in training")
    parser.add_argument(
        "--target-modules", type=names, metavar="NAMES", help="layers to adapt, comma-separated: query,value; or all-linear"
    )
    parser.add_argument("--bias", choices=("none", "lora_only", "all"), help="which of the base's biases are trained too")
    parser.add_argument("--lora-plus", type=float, metavar="RATIO", help="B's learning rate over A's; 1 for plain LoRA")


def chosen_method(args: argparse.Namespace, methods: Mapping[str, Method] = METHODS) -> Method:
    """The method that is named, with the settings that were given in place of its own.

    Raises:
        ExperimentError: settings of an adapter are given, and the method has none.
    """
    given = {
        "r": args.rank,
        "lora_alpha": args.alpha,
        "lora_dropout": args.dropout,
        "target_modules": args.target_modules,
        "bias": args.bias,
        "lora_plus_ratio": args.lora_plus,
        "quantize": None if args.quantize is None else QUANTIZE[args.quantize],
    }
    changes = {name: value for name, value in given.items() if value is not None}
    method = methods[args.method]
    if changes and not method.adapts:
        raise ExperimentError(f"--method {method.name} has no adapter; leave out {', '.join(ADAPTER_FLAGS)}")
    return replace(method, **changes)


def schedule_flags(parser: argparse._ActionsContainer, without: Sequence[str] = (), **defaults: Any) -> None:
    """A flag for each field of `Schedule`, but for those in `without`; `defaults` stand in for the fields' own."""
    own = {field.name: field.default for field in fields(Schedule)} | {"learning_rate": None} | defaults
    for name, kind, text in SCHEDULE:
        if name not in without:
            metavar = "N" if kind is int else "X"
            parser.add_argument(flag(name), type=kind, default=own[name], metavar=metavar, help=text)


def checkpoint_flags(parser: argparse._ActionsContainer) -> None:
    """--save-steps, --keep-checkpoints, --resume."""
    parser.add_argument(
        "--save-steps", type=int, metavar="N", help="write a checkpoint every N steps, besides the one on Ctrl-C or SIGTERM"
    )
    parser.add_argument(
        "--keep-checkpoints", type=int, default=2, metavar="K", help="the newest K stay; none when the run is finished"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const=AUTO,
        metavar="CHECKPOINT",
        help="go on from a checkpoint, the newest whole one of the output directory if none is named; start if there is none",
    )


def flag(name: str) -> str:
    """The flag that sets `name`."""
    return "--" + name.replace("_", "-")


def schedule_of(args: argparse.Namespace, method: Method, **changes: Any) -> Schedule:
    """The schedule that the flags ask for; a learning rate that is not given is the method's.

    Raises:
        ExperimentError: a value makes no sense.
    """
    given = {field.name: getattr(args, field.name) for field in fields(Schedule) if hasattr(args, field.name)} | changes
    if given["learning_rate"] is None:
        given["learning_rate"] = method.learning_rate
    return Schedule(**given)


def listed(kind: type) -> Any:
    """A type for argparse: "a,b" -> (a, b), each a `kind`."""

    def parse(text: str) -> tuple:
        values = tuple(value.strip() for value in text.split(","))
        if not all(values):
            raise argparse.ArgumentTypeError(f"{text!r} is no comma-separated list of names")
        try:
            return tuple(map(kind, values))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no comma-separated list of numbers") from None

    return parse


names = listed(str)


def positive(text: str) -> int:
    """A type for argparse: a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def methods_of(chosen: Iterable[str]) -> list[Method]:
    """The methods of these names, each once, in the order of `METHODS`.

    Raises:
        ExperimentError: there is no such method.
    """
    chosen = list(chosen)
    if unknown := [name for name in chosen if name not in METHODS]:
        raise ExperimentError(f"--methods: there is no {unknown[0]!r}; there are {', '.join(METHODS)}")
    return [method for name, method in METHODS.items() if name in chosen]
