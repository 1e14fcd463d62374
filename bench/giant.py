"""A large checkpoint to try a merge on: a Llama of 1.1 billion random numbers in DIR/base (2.2 GB), an adapter in DIR/adapter.

Example:
    python -m bench.giant DIR
    python -m lora_core merge --base DIR/base --adapter DIR/adapter --output DIR/merged
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lora_core.cli.command_line import Parser


def parser() -> Parser:
    """The command line."""
    p = Parser(prog="python -m bench.giant", description=__doc__)
    p.add_argument("directory", type=Path, metavar="DIR", help="where they go; it must not hold a base or an adapter yet")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    directory = parser().parse_args(argv).directory
    import torch

    from .checkpoints import LLAMA_1B, adapter, llama

    torch.set_num_threads(1)  # the same numbers on every machine
    llama(directory / "base", LLAMA_1B, shards=5)
    adapter(directory / "adapter", LLAMA_1B)
    return 0


if __name__ == "__main__":
    sys.exit(main())
