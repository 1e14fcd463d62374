"""Rows of a data set as the Hub and other tools keep them, read by Hugging Face's `datasets`: Parquet, CSV, JSON Lines.

rows([Path("train.csv")], ("sentence", "label"), "train.csv")     each row's columns, in this order
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .command import show_again
from .errors import ExperimentError

#: {what a file's name ends with: the reader of `datasets.Dataset`}.
READERS = {".parquet": "from_parquet", ".csv": "from_csv", ".jsonl": "from_json", ".json": "from_json"}


def rows(paths: Sequence[Path], columns: Sequence[str], origin: str) -> Iterator[tuple[int, Any]]:
    """(row number from 0, *the values of `columns`) of the rows of some files of one kind; `origin` names them in errors.

    Raises:
        ExperimentError: `datasets` is not installed, a file can't be read, or has no such column.
    """
    show_again("datasets")  # 95 MiB that only these files need
    try:
        import datasets
    except ImportError:
        raise ExperimentError(f"data: {origin} is read by `datasets`; run pip install 'lora-core[experiments]'") from None
    datasets.disable_progress_bars()
    read = getattr(datasets.Dataset, READERS[paths[0].suffix])
    with tempfile.TemporaryDirectory() as cache:  # or each file that was read once would lie in ~/.cache for good
        try:
            table = read([str(path) for path in paths], cache_dir=cache, keep_in_memory=True)
        except Exception as error:  # of many kinds
            cause = error.__cause__ or error
            reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            raise ExperimentError(f"data: {origin} can't be read: {reason}") from None
    if missing := [name for name in columns if name not in table.column_names]:
        found = ", ".join(table.column_names)
        raise ExperimentError(f"data: {origin} has no column {missing[0]!r}; expected {', '.join(columns)}, found {found}")
    for number, row in enumerate(table):
        yield number, *(row[name] for name in columns)
