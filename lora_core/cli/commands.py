"""The commands of `python -m lora_core`: each calls the library with its arguments, prints, and returns the exit code."""

from __future__ import annotations

import logging
import warnings
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import torch

from ..cpu.heap import keep_freed_memory
from ..deploy.inspection import inspect_adapter
from ..deploy.programs import findings
from ..deploy.recipe import Recipe
from ..deploy.stream import StreamMerge
from ..deploy.updates import read_updates
from ..errors import CheckFailedError, ConfigError, FileFormatError
from ..files.adapter import read_adapter
from ..files.checkpoint import open_checkpoint
from ..files.disk import expanded, is_directory
from ..files.shards import check_free, new_directory
from ..files.storage import load_adapter, save_adapter
from ..progress import counted
from ..spec.config import ALL_LINEAR, LoraConfig
from .command_line import CHECK_FAILED, DONE, show


def inspect(args: Namespace) -> int:
    if args.program is None:
        view = inspect_adapter(args.adapter)
        show(view, args.json)
        if not args.json:
            print(f"\n{view.table()}" if args.all else f"--all lists each of the {len(view.layers)} layers.")
        return DONE
    obstacles = findings(args.adapter, args.program, max_lora_rank=args.max_lora_rank)
    if args.json:
        found = {"adapter": str(args.adapter), "program": args.program, "findings": [asdict(one) for one in obstacles]}
        show(found, as_json=True)
    else:
        print("\n".join(f"{args.program} {one}" for one in obstacles) or f"{args.program} takes {args.adapter}")
    return CHECK_FAILED if obstacles else DONE


def merge(args: Namespace) -> int:
    if args.tolerance is not None and not args.check:
        raise ConfigError("--tolerance is for --check; give that too")
    check_free(args.output)
    keep_freed_memory()
    texts = _lines(args.check) if isinstance(args.check, str) else None
    weights = tuple(args.weights) if args.weights else None
    recipe = Recipe(_dtype(args.dtype), args.base_as, weights, allow_loss=args.allow_loss)
    adapters = [read_updates(path) for path in args.adapters]
    stream = StreamMerge(open_checkpoint(_base(args.base, args.adapters[0])), adapters, recipe)
    deviations = []
    with new_directory(args.output) as directory:
        with counted(stream.nbytes, "merging") as progress:
            report = stream.write(directory, progress)
        if args.check:
            deviations = _checked(stream, directory, texts, args)
    if args.json:
        found = {"output": str(args.output), "base_as": stream.base_as, **asdict(report)}
        show(found | {"check": [asdict(deviation) for deviation in deviations]}, as_json=True)
        return DONE
    print(f"{report}\nfolded into the base as {stream.base_as} (--base-as); wrote {args.output}")
    for deviation in deviations:
        print(deviation)
    return DONE


def _checked(stream: StreamMerge, directory: Path, texts: list[str] | None, args: Namespace) -> list:
    from ..deploy.check import check_merge  # builds models: transformers

    try:
        return check_merge(stream, directory, texts, args.tolerance)
    except CheckFailedError as error:
        measured = error.args[1] if len(error.args) > 1 else []
        if args.json:
            show({"output": None, "base_as": stream.base_as, "check": [asdict(d) for d in measured]}, as_json=True)
        else:
            print("\n".join(map(str, measured)))
        raise


def verify(args: Namespace) -> int:
    if args.server is not None:
        return _verify_server(args)
    if unused := [flag for flag in ("model", "timeout") if getattr(args, flag) is not None]:
        raise ConfigError(f"--{unused[0]} is for --server; give that too")
    from ..deploy.verification import verify

    result = verify(args.adapter, _base(args.base, args.adapter), _dtype(args.dtype), args.tolerance)
    show({**asdict(result), "passed": result.passed} if args.json else result, args.json)
    return DONE if result.passed else CHECK_FAILED


def _verify_server(args: Namespace) -> int:
    from ..deploy.serving import TIME_LIMIT, verify_server

    if unused := [flag for flag in ("base", "dtype") if getattr(args, flag) is not None]:
        raise ConfigError(f"--{unused[0]} is for a model that is loaded here; leave it out with --server")
    seconds = TIME_LIMIT if args.timeout is None else args.timeout
    result = verify_server(args.adapter, args.server, args.model, args.tolerance, seconds)
    show({**asdict(result), "passed": result.passed} if args.json else result, args.json)
    return DONE if result.passed else CHECK_FAILED


def combine(args: Namespace) -> int:
    from ..deploy.basis import load_base
    from ..model.combine import combine_adapters

    if len(args.adapters) < 2:
        raise ConfigError("give two or more adapters, each with --adapter")
    check_free(args.output)
    first = StreamMerge(open_checkpoint(_base(args.base, args.adapters[0])), [read_updates(args.adapters[0])])
    model = load_base(first.base.directory, first.adapters, *first.trained_form())
    names = [f"adapter{i}" for i in range(len(args.adapters))]
    for name, directory in zip(names, args.adapters, strict=True):
        load_adapter(model, directory, name)
    weights = args.weights or [1.0] * len(names)
    report = combine_adapters(model, names, weights, "combined", args.method, r=args.rank, density=args.density)
    with new_directory(args.output) as directory:
        save_adapter(model, directory, "combined")
    show(report, args.json)
    return DONE


def extract(args: Namespace) -> int:
    from ..integrations.pretrained import find_base, load_model
    from ..model.extract import extract_adapter

    if args.base is None:
        raise ConfigError("name the base with --base")
    check_free(args.output)
    names = args.target_modules
    targets = ALL_LINEAR if names == [ALL_LINEAR] else names
    config = LoraConfig(
        r=args.rank, lora_alpha=args.rank, target_modules=targets, task_type=args.task_type, base_model_name_or_path=args.base
    )
    tuned, base = (find_base(reference) for reference in (args.tuned, args.base))
    stored = open_checkpoint(base).tensors.values()
    dtype = next((t.dtype for t in stored if t.dtype.is_floating_point), torch.float32)
    theirs = load_model(tuned, args.task_type, dtype, strict=False)
    ours = load_model(base, args.task_type, dtype, strict=False, num_labels=getattr(theirs.config, "num_labels", 2))
    report = extract_adapter(ours, theirs, config)
    with new_directory(args.output) as directory:
        save_adapter(ours, directory)
    show(report, args.json)
    return DONE


def convert(args: Namespace) -> int:
    from ..deploy.convert import convert_adapter

    hints = {"lora_alpha": args.lora_alpha, "component": args.component, "enable_lora": args.enable_lora}
    report = convert_adapter(
        args.adapter,
        args.output,
        plain=args.plain,
        dtype=_dtype(args.dtype),
        base=_base(args.base, args.adapter) if args.base else None,
        r=args.rank,
        initial=args.initial,
        to=args.to,
        hints={name: value for name, value in hints.items() if value is not None},
    )
    show(report, args.json)
    return DONE


# --- what they share --------------------------------------------------------------------------------------------------


def _base(reference: str | None, adapter: Path) -> Path:
    """The directory of the base that is given, or that the adapter's file names."""
    reference = reference or read_adapter(adapter).config.base_model_name_or_path
    if not reference:
        raise ConfigError(f"{adapter} does not name its base; name it with --base")
    if is_directory(expanded(reference)):
        return expanded(reference)
    from ..integrations.pretrained import find_base

    return find_base(reference)


def _dtype(name: str | None) -> torch.dtype | None:
    return getattr(torch, name) if name else None


def _lines(path: str) -> list[str]:
    try:
        texts = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise FileFormatError(f"--check: {path} can't be read: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    if not texts:
        raise FileFormatError(f"--check: {path} holds no text; put one on each line")
    return texts


def quieten() -> None:
    """Silences what the libraries say to their developers."""
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
