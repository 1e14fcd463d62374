"""LoRA adapters on disk: look at them, merge them into a base's files, verify them, make new ones of them.

    python -m lora_core inspect adapter/ --for vllm
    python -m lora_core merge --base BASE --adapter adapter/ --output merged/ --check
    python -m lora_core verify adapter/ --base BASE
    python -m lora_core verify adapter/ --server http://localhost:8000
    python -m lora_core COMMAND --help

BASE is a directory with config.json and safetensors weights, or the name of a model of the Hugging Face Hub. Exit codes:
0 done, 1 a check failed, 2 a wrong argument or file. Nothing is ever left half written.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .cli.command_line import Parser, finite, run, switches, tolerance

DTYPES = ("float32", "float16", "bfloat16")
FORMATS = ("peft", "kohya", "diffusers", "mlx", "torchtune", "litgpt", "loralib", "gguf", "vllm")
ANY_ADAPTER = "directory with adapter_config.json, or another tool's file"
BASES = ("original", "nf4-dequantized", "nf4", "int8-dequantized", "int8")


def parser() -> Parser:
    """The command line."""
    p = Parser(prog="python -m lora_core", description=__doc__)
    p.add_argument("--version", action="version", version=f"lora-core {__version__}")
    commands = p.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Command)
    _inspect(commands.add_parser("inspect", help="what an adapter is, and how much it changes on each layer"))
    _merge(commands.add_parser("merge", help="fold adapters into a base's files: a plain checkpoint for any library"))
    _verify(commands.add_parser("verify", help="run the inputs that an adapter carries: is it still the same model?"))
    _combine(commands.add_parser("combine", help="several adapters into one"))
    _extract(commands.add_parser("extract", help="a fine-tuned model into an adapter of its base"))
    _convert(commands.add_parser("convert", help="an adapter into plain LoRA, another dtype, or another tool's format"))
    return p


class _Command(Parser):
    """The parser of one command, with what each of them takes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_argument("--json", action="store_true", help="print one JSON object, for machines")


def _inspect(p: Parser) -> None:
    p.description = """What an adapter directory holds: rank, targets, variant, dtype, size, the base it belongs to; and
for each kind of module how much it changes the weights (|D|) and in how many directions (the effective
rank). The files of other tools (kohya, diffusers, MLX, torchtune, litgpt, loralib, llama.cpp) are told by
what is in them. Warns if the adapter changes nothing, or holds values that are no numbers. Needs no base."""
    p.add_argument("adapter", type=Path, metavar="ADAPTER", help=ANY_ADAPTER)
    p.add_argument("--all", action="store_true", help="list every layer, too")
    p.add_argument(
        "--for", dest="program", choices=("vllm", "llama.cpp", "peft"), help="say what that program would refuse, and the "
        "command that mends it; exit code 1 if there is anything"
    )  # fmt: skip
    p.add_argument("--max-lora-rank", type=int, default=16, metavar="R", help="with --for vllm: what vllm serve is given")


def _merge(p: Parser) -> None:
    p.description = """Fold adapters into the files of their base. The base is read and written tensor by tensor, so that a
model of any size merges in little memory; sums are made in float32 and cast once. OUTPUT gets the
weights, config.json, the tokenizer and a model card, and loads with transformers' from_pretrained.
It must not exist yet, and it is there whole or not at all.

What the adapter is folded into (--base-as): for an adapter that was trained on a 4-bit base
(QLoRA), nf4-dequantized gives exactly the model that was trained; original gives the base's own
weights with an update that was made for others; nf4 gives a 4-bit checkpoint, and loses a part of
the update. int8-dequantized and int8 are the same for an 8-bit base. --check measures all three
that concern the adapter. If less than half of the update would be left in some layer,
nothing is merged, unless --allow-loss is given."""
    _base(p)
    _adapters(p, "adapter to fold in; may be given several times")
    p.add_argument(
        "--weights", type=finite, nargs="+", metavar="W", help="a factor for each adapter's update, in order; 1 if not given"
    )
    _output(p)
    p.add_argument("--allow-loss", action="store_true", help="merge although rounding loses most of the update in some layer")
    p.add_argument("--dtype", choices=DTYPES, help="what to cast the weights to; as they are in the base if not given")
    p.add_argument(
        "--base-as", choices=BASES, help="what to fold into; if not given, nf4-dequantized or int8-dequantized for an adapter "
        "that says that it was trained on such a base, else original"
    )  # fmt: skip
    p.add_argument(
        "--check", nargs="?", const=True, metavar="FILE", help="run the adapted and the merged model, and compare: on the "
        "texts in FILE, one a line; else on the inputs that the adapter carries; else on random tokens. Needs transformers"
    )  # fmt: skip
    _tolerance(p, "with --check: ")


def _verify(p: Parser) -> None:
    p.description = """Load an adapter onto a base, run the probe inputs that it carries, and compare the logits with those
it gave when it was saved. Says what drifted: the adapter's or the base's weights, the tokenizer,
the dtype, a library. Exit code 1 if the logits are others, or weights or tokens are. Needs
transformers. A language model is judged by the tokens of its answers too.

With --server no model is loaded: an OpenAI-compatible server (vLLM, llama.cpp's, TGI) is asked for
the answers to the probe's prompts, with log-probabilities. Says whether it serves the adapter, the
base alone, or something else; exit code 1 if it does not serve the adapter. If the server asks for
a key, put it into LORA_CORE_SERVER_KEY."""
    p.add_argument("adapter", type=Path, metavar="ADAPTER", help="directory with adapter_config.json and probe.safetensors")
    _base(p)
    p.add_argument("--dtype", choices=DTYPES, help="dtype of the base's weights; what it was if not given")
    _tolerance(p, last="; with --server: mean difference of a log-probability, 0.15 if not given")
    p.add_argument("--server", metavar="URL", help="ask this server instead, such as http://localhost:8000")
    p.add_argument("--model", metavar="NAME", help="with --server: which of its models; its only one if not given, or else "
                   "the one that is called as the adapter's directory")  # fmt: skip
    p.add_argument(
        "--timeout", type=finite, metavar="S", help="with --server: seconds that an answer may take; 120 if not given"
    )


def _combine(p: Parser) -> None:
    p.description = """Make one adapter of several for the same base: their weighted sum, or a combination that keeps them
from getting in each other's way. Needs transformers."""
    _base(p)
    _adapters(p, "adapter to combine; give two or more")
    p.add_argument("--weights", type=finite, nargs="+", metavar="W", help="a factor for each adapter; 1 if not given")
    _output(p)
    p.add_argument("--method", default="linear", help="linear, cat, svd, ties, dare_linear, dare_ties or magnitude_prune")
    p.add_argument("--rank", type=int, metavar="R", help="rank of the result, for the methods that cut it")
    p.add_argument("--density", type=finite, metavar="P", help="share of values to keep, for the methods that prune")


def _extract(p: Parser) -> None:
    p.description = """Make an adapter of what a fine-tuned model has over its base: on each layer that is named, the
nearest update of the given rank. Says how much of the difference it keeps. Needs transformers."""
    _base(p)
    p.add_argument("--tuned", required=True, metavar="DIR_OR_ID", help="the fine-tuned model")
    p.add_argument("--rank", type=int, default=16, metavar="R", help="rank of the adapter")
    p.add_argument(
        "--target-modules", nargs="+", default=["all-linear"], metavar="NAME", help="layers to adapt: names, or all-linear"
    )
    p.add_argument("--task-type", metavar="TASK", help="SEQ_CLS, CAUSAL_LM, ...; a classification head is then copied whole")
    _output(p)


def _convert(p: Parser) -> None:
    p.description = """Write an adapter anew: as plain LoRA, which every library reads (--plain), or in another dtype
(--dtype). Rank-stabilised scaling becomes plain exactly. DoRA becomes the nearest plain LoRA, for
which its base is needed; the share of the update that is kept is printed. PEFT's PiSSA, OLoRA, CorDA
and LoRA-GA become plain exactly, with the adapter as it was before training; PiSSA and OLoRA with the
base as well. An adapter_model.bin, which older versions of PEFT wrote, becomes safetensors with or
without these flags; no code in it is run.

--to writes the format of another tool, and an adapter of another tool becomes PEFT's if nothing
else is asked for. Names of layers and the order of rows depend on the base's architecture: name
it with --base, a directory with config.json. What has no place in a format is refused."""
    p.add_argument("adapter", type=Path, metavar="ADAPTER", help=ANY_ADAPTER)
    _output(p)
    p.add_argument("--plain", action="store_true", help="make it plain LoRA")
    p.add_argument("--dtype", choices=DTYPES, help="what to cast its tensors to")
    p.add_argument("--to", metavar="FORMAT", help=f"format to write: {', '.join(FORMATS)}")
    p.add_argument("--base", metavar="DIR_OR_ID", help="for DoRA, PiSSA, OLoRA and other tools' formats: the base")
    p.add_argument("--lora-alpha", type=finite, metavar="X", help="for files that don't say it (loralib)")
    p.add_argument("--component", metavar="NAME", help="which model of a diffusion pipeline: unet, text_encoder, ...")
    p.add_argument("--enable-lora", type=switches, metavar="1,0,1", help="for loralib's MergedLinear: which parts are adapted")
    p.add_argument("--rank", type=int, metavar="R", help="for DoRA: the rank of the result; that of the adapter if not given")
    p.add_argument("--initial", type=Path, metavar="DIR", help="for PiSSA and OLoRA of PEFT: the adapter before training")


def _base(p: Parser) -> None:
    p.add_argument("--base", metavar="DIR_OR_ID", help="the base model; if not given, the one that the adapter's file names")


def _adapters(p: Parser, text: str) -> None:
    p.add_argument("--adapter", type=Path, action="append", required=True, dest="adapters", metavar="DIR", help=text)


def _output(p: Parser) -> None:
    p.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to make")


def _tolerance(p: Parser, when: str = "", last: str = "") -> None:
    text = "largest deviation of a logit that passes, as a share of the largest logit; by the dtype if not given"
    p.add_argument("--tolerance", type=tolerance, metavar="X", help=when + text + last)


def call(args: argparse.Namespace) -> int:
    """Does what the arguments say; returns the exit code."""
    from .cli import commands  # after the arguments have been checked: what follows takes seconds to import

    commands.quieten()
    return getattr(commands, args.command)(args)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run(lambda: call(args))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a polite end: what was begun is removed
    sys.exit(main())
