"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest

from tests.support import ROOT


@pytest.fixture(scope="session")
def sst2() -> Path:
    """GLUE's SST-2 files: $SST2_DIR, or ../shared/sst2 beside the checkout. They are not part of the project."""
    directory = Path(os.environ.get("SST2_DIR") or ROOT.parent / "shared" / "sst2")
    if not (directory / "train.tsv").is_file():
        pytest.skip(f"SST-2 is not at {directory}; set SST2_DIR to GLUE's files")
    return directory


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    """96 training and 48 validation sentences of the packaged data, as GLUE's files."""
    from experiments import data

    loaded = data.load("packaged")
    directory = tmp_path_factory.mktemp("small_data")
    for name, split, size in (("train.tsv", loaded.train, 96), ("dev.tsv", loaded.validation, 48)):
        sample = split.sample(size, seed=0)
        rows = [f"{text}\t{label}\n" for text, label in zip(sample.texts, sample.labels, strict=True)]
        (directory / name).write_text("sentence\tlabel\n" + "".join(rows), encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def runs(tmp_path_factory, small_data) -> dict[str, Path]:
    """{method: output directory} of a short run of each method on the packaged model."""
    from experiments.sst2 import main

    root = tmp_path_factory.mktemp("runs")
    common = [
        "--model",
        "packaged",
        "--data",
        str(small_data),
        "--epochs",
        "2",
        "--max-length",
        "64",
        "--device",
        "cpu",
        "--precision",
        "fp32",
    ]
    methods = ("base", "head-only", "full", "lora", "qlora")
    for method in methods:
        assert main(["--method", method, "--output-dir", str(root / method), *common]) == 0
    return {method: root / method for method in methods}
