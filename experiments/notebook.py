"""Run the study's notebook from top to bottom and store its outputs: experiments/lora_sst2.ipynb.

    python -m experiments.notebook

It takes some minutes, needs no network, and what it shows of the study are the committed results. `make results` ends with it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .command import Parser, run
from .errors import ExperimentError

NOTEBOOK = Path(__file__).with_name("lora_sst2.ipynb")


def parser() -> Parser:
    """The command line."""
    p = Parser(__doc__, prog="python -m experiments.notebook")
    p.add_argument("--notebook", type=Path, default=NOTEBOOK, metavar="FILE", help="which one")
    return p


def execute(path: Path) -> None:
    """Runs every cell in a kernel of its own, and writes the notebook with what they gave.

    Raises:
        ExperimentError: what runs it is not installed, or a cell failed; the file is then as it was.
    """
    try:
        import nbformat
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError
    except ImportError:
        raise ExperimentError("the notebook is run by nbclient; pip install 'lora-core[notebook]'") from None
    from lora_core.files.disk import write_whole

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(path.resolve().parents[1])}})
    try:
        client.execute()
    except CellExecutionError as error:
        raise ExperimentError(f"{path}: {error.ename}: {error.evalue.splitlines()[0] if error.evalue else ''}") from None
    for cell in notebook.cells:
        _settle(cell)
    write_whole(path, (nbformat.writes(notebook).rstrip("\n") + "\n").encode())


def _settle(cell: Any) -> None:
    """Leaves out of a cell what is of this execution alone, so that the file changes only where an output did."""
    cell.metadata.pop("execution", None)
    cell.pop("id", None)
    if cell.cell_type == "code":
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run(lambda: execute(args.notebook))


if __name__ == "__main__":
    sys.exit(main())
