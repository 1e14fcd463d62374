"""What a run said of each validation sentence: a byte a sentence, so that runs can be compared sentence by sentence.

    OUTPUT/predictions.txt      two lines of the digits 0 and 1: the sentences' labels, and what the model called them

A run of several epochs keeps those of the last one, as it keeps its accuracy.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np

from lora_core.errors import FileFormatError
from lora_core.files.disk import write_whole
from lora_core.files.reading import read_bytes

from .errors import ExperimentError

PREDICTIONS = "predictions.txt"
MAX_BYTES = 2**27


def require_scikit_learn() -> None:
    """Raises an ExperimentError where nothing can be scored: better before a training than after. Imports nothing."""
    try:
        importlib.metadata.version("scikit-learn")
    except importlib.metadata.PackageNotFoundError:
        raise ExperimentError("scores need scikit-learn; run pip install 'lora-core[experiments]'") from None


def write(directory: Path, labels: np.ndarray, predicted: np.ndarray) -> None:
    """Write `labels` and `predicted`, (N,) integers 0 or 1, in the order of the validation sentences."""
    lines = ("".join(map(str, values.tolist())) for values in (labels, predicted))
    write_whole(directory / PREDICTIONS, ("\n".join(lines) + "\n").encode())


def read(directory: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """(labels, predicted) of a run, each (N,) uint8; None for a run that kept none.

    Raises:
        ExperimentError: the file is not as written here.
    """
    path = directory / PREDICTIONS
    if not path.exists():
        return None
    try:
        labels, predicted = (np.frombuffer(line, np.uint8) - ord("0") for line in read_bytes(path, MAX_BYTES).split())
    except FileFormatError as error:
        raise ExperimentError(str(error)) from None
    except ValueError:
        raise ExperimentError(f"{path} must hold two lines of the digits 0 and 1; run it again") from None
    if len(labels) != len(predicted) or not set(np.unique([*labels, *predicted])) <= {0, 1}:
        raise ExperimentError(f"{path} must hold two lines of as many digits, each 0 or 1; run it again")
    return labels, predicted


def accuracy_and_f1(labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Accuracy, and the F1 of the positive class, as scikit-learn has them; F1 is 0 where nothing is or was called positive."""
    from .command import show_again

    show_again("scipy", "sklearn")  # 140 MiB that a run does not hold while its peak is measured
    from sklearn.metrics import accuracy_score, f1_score

    return {"accuracy": float(accuracy_score(labels, predicted)), "f1": float(f1_score(labels, predicted, zero_division=0.0))}
