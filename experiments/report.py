"""What the runs below a directory came to: a Markdown table for each budget, what the study claims, and figures.

    python -m experiments.report --output-dir experiments/results

Writes DIR/report.md and DIR/figures/*.png. Never trains: what is shown is read from the runs' files, and from
bench/results/reference.json of peft's runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from .command import Parser, leave_out_unused, run


def parser() -> Parser:
    """The command line of the report."""
    p = Parser(__doc__, prog="python -m experiments.report")
    p.add_argument("--output-dir", type=Path, metavar="DIR", default=Path("runs", "compare"), help="where the runs are")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)

    def command() -> None:
        from .reporting import write

        print(f"report: {write(args.output_dir)}")

    return run(command)


if __name__ == "__main__":
    leave_out_unused()
    sys.exit(main())
