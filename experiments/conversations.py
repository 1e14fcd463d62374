"""What a language model is to answer, read from JSON lines or drawn.

    load("orders")       the packaged task of `orders.py`: 400 rows to train on, 100 held out
    load("FILE.jsonl")   a row a line; a tenth of them, at most 100, is held out, unless a number is given

A row is {"messages": [{"role": ..., "content": ...}, ...]}, whose last message is the assistant's, or {"prompt": ...,
"completion": ...}. What is learned is that last message, or the completion; all before it is only read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core.errors import FileFormatError
from lora_core.files.reading import parse_json, read_bytes

from .data import MAX_BYTES
from .errors import ExperimentError
from .orders import INSTRUCTION, orders

PACKAGED = "orders"
TRAIN, HELD_OUT = 400, 100
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """Messages, each (role, content), and what is to be answered; `where` says where they come from."""

    prompt: tuple[tuple[str, str], ...]
    completion: str
    where: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages before the answer, as chat templates take them."""
        return [{"role": role, "content": content} for role, content in self.prompt]


@dataclass(frozen=True)
class Conversations:
    """Conversations to train on, and others to be judged on; `why` says how the choice fell on them."""

    name: str
    source: str
    why: str
    train: tuple[Conversation, ...]
    validation: tuple[Conversation, ...]

    @functools.cached_property
    def sha256(self) -> str:
        """A hash of every message, which tells these data from others of the same name and size; 16 digits."""
        rows = [[(c.prompt, c.completion) for c in split] for split in (self.train, self.validation)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.name}, {len(self.train):,} rows to train on, {len(self.validation):,} held out (from {self.source})"


def load(choice: str = PACKAGED, held_out: int | None = None) -> Conversations:
    """Read the data that `choice` names (see the top of this file); `held_out` rows are kept to be judged on.

    Raises:
        ExperimentError: it is missing, too small, or a row is not in the form that it should have.
    """
    if choice == PACKAGED:
        if held_out is not None:
            raise ExperimentError(f"--held-out: the task {PACKAGED!r} has its own {HELD_OUT} rows; leave it out")
        rows = [
            Conversation((("system", INSTRUCTION), ("user", sentence)), record, f"{PACKAGED}:{number}")
            for number, (sentence, record) in enumerate(orders(TRAIN + HELD_OUT), start=1)
        ]
        return Conversations("orders", "a generator", "--data orders", tuple(rows[:TRAIN]), tuple(rows[TRAIN:]))
    rows = read_lines(Path(choice))
    size = min(HELD_OUT, max(1, len(rows) // 10)) if held_out is None else held_out
    if not 0 < size < len(rows):
        raise ExperimentError(f"data: {choice} has {len(rows)} rows; {size} can't be held out and leave some to train on")
    random.Random(0).shuffle(rows)  # whatever the seed of the run: its results must be comparable
    return Conversations(Path(choice).stem, choice, "--data", tuple(rows[size:]), tuple(rows[:size]))


def read_lines(path: Path) -> list[Conversation]:
    """Read a file of JSON lines.

    Raises:
        ExperimentError: with the file, the line and what is wrong there.
    """
    try:
        lines = read_bytes(path, MAX_BYTES).decode("utf-8-sig").split("\n")
    except FileFormatError as error:
        raise ExperimentError(f"data: {error}; give orders or a .jsonl file") from None
    except UnicodeDecodeError as error:
        raise ExperimentError(f"data: {path} is not UTF-8 text (byte {error.start}); convert it first") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                rows.append(_conversation(parse_json(line, once=False), where))
            except ValueError as error:
                if isinstance(error, ExperimentError):
                    raise
                raise ExperimentError(f"data: {where}: the line is not JSON: {error}") from None
    if not rows:
        raise ExperimentError(f"data: {path} holds no row; at least two are needed")
    return rows


def _conversation(row: Any, where: str) -> Conversation:
    if not isinstance(row, dict) or not ({"messages"} <= row.keys() or {"prompt", "completion"} <= row.keys()):
        keys = f"the keys {', '.join(map(repr, row))[:80]}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise ExperimentError(f"data: {where}: {keys}; a row has 'messages', or 'prompt' and 'completion'")
    messages = row.get("messages") or [
        {"role": "user", "content": row.get("prompt")},
        {"role": "assistant", "content": row.get("completion")},
    ]
    pairs = _pairs(messages, where)
    if len(pairs) < 2 or pairs[-1][0] != "assistant":
        raise ExperimentError(f"data: {where}: the last of at least two messages must be the assistant's, which is learned")
    return Conversation(tuple(pairs[:-1]), pairs[-1][1], where)


def _pairs(messages: Any, where: str) -> Sequence[tuple[str, str]]:
    if not isinstance(messages, list):
        raise ExperimentError(f"data: {where}: 'messages' is a {type(messages).__name__}; a list is expected")
    pairs = []
    for message in messages:
        role, content = (message.get(key) for key in ("role", "content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES:
            raise ExperimentError(f"data: {where}: a role is {str(role)[:40]!r}; there are {', '.join(ROLES)}")
        if not isinstance(content, str) or not content.strip():
            raise ExperimentError(f"data: {where}: what the {role} says must be text that is not empty")
        pairs.append((role, content))
    return pairs
