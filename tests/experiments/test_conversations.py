"""What a language model is to learn: the files that are read, their faults, and the packaged task."""

import json
import re

import pytest

from experiments import conversations
from experiments.errors import ExperimentError
from experiments.orders import VALUES, orders


def lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def turn(role, content):
    return {"role": role, "content": content}


def test_the_packaged_task_is_the_same_each_time_and_holds_no_sentence_twice():
    data = conversations.load("orders")
    assert (len(data.train), len(data.validation)) == (400, 100)
    sentences = [c.prompt[-1][1] for c in (*data.train, *data.validation)]
    assert len(set(sentences)) == 500
    assert conversations.load().sha256 == data.sha256
    assert orders(20, seed=1) != orders(20, seed=0)


def test_a_record_says_what_the_sentence_says():
    numbers = VALUES["count"].split()
    for sentence, text in orders(200):
        record = json.loads(text)
        assert list(record) == ["name", "item", "color", "count", "city"] and json.dumps(record) == text
        words = re.findall(r"\w+", sentence.lower())
        assert {record["name"].lower(), record["item"] + "s", record["color"], record["city"].lower()} <= set(words)
        assert {str(record["count"]), numbers[record["count"] - 2]} & set(words)


def test_both_forms_of_a_row_are_read(tmp_path):
    messages = [turn("system", "s"), turn("user", "u"), turn("assistant", "a"), turn("user", "v"), turn("assistant", "b")]
    path = lines(tmp_path / "rows.jsonl", {"prompt": "p", "completion": "c"}, "", {"messages": messages, "id": 7})
    first, second = conversations.read_lines(path)
    assert (first.messages, first.completion) == ([turn("user", "p")], "c")
    assert (second.messages, second.completion) == (messages[:-1], "b") and second.where == f"{path}:3"


def test_some_rows_are_held_out_always_the_same(tmp_path):
    path = lines(tmp_path / "rows.jsonl", *({"prompt": str(i), "completion": "c"} for i in range(30)))
    data = conversations.load(str(path))
    assert (data.name, len(data.train), len(data.validation)) == ("rows", 27, 3)
    assert not {c.where for c in data.train} & {c.where for c in data.validation}
    assert conversations.load(str(path)) == data and len(conversations.load(str(path), 10).validation) == 10


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "rows.jsonl:2: the line is not JSON"),
        ("[" * 100_000, "rows.jsonl:2: the line is not JSON"),
        ([1], "rows.jsonl:2: a list; a row has 'messages', or 'prompt' and 'completion'"),
        ({"text": "x"}, "the keys 'text'; a row has"),
        ({"prompt": "x"}, "the keys 'prompt'; a row has"),
        ({"prompt": "x", "completion": 3}, "what the assistant says must be text that is not empty"),
        ({"prompt": " ", "completion": "c"}, "what the user says must be text that is not empty"),
        ({"messages": "hello"}, "'messages' is a str; a list is expected"),
        ({"messages": [turn("user", "x")]}, "the last of at least two messages must be the assistant's"),
        ({"messages": [turn("assistant", "x")]}, "the last of at least two messages must be the assistant's"),
        ({"messages": [turn("bot", "x"), turn("assistant", "y")]}, "a role is 'bot'; there are system, user"),
        ({"messages": ["x", turn("assistant", "y")]}, "a role is 'None'"),
    ],
)
def test_a_broken_row_is_named(tmp_path, row, says):
    path = lines(tmp_path / "rows.jsonl", {"prompt": "p", "completion": "c"}, row)
    with pytest.raises(ExperimentError) as error:
        conversations.load(str(path))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_files_that_can_t_be_used_are_one_clear_line(tmp_path):
    for path, says in (
        (tmp_path / "none.jsonl", "can't be read"),
        (lines(tmp_path / "empty.jsonl"), "holds no row"),
        (lines(tmp_path / "one.jsonl", {"prompt": "p", "completion": "c"}), "has 1 rows; 1 can't be held out"),
    ):
        with pytest.raises(ExperimentError, match=says):
            conversations.load(str(path))
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ExperimentError, match=r"is not UTF-8 text \(byte 0\)"):
        conversations.load(str(tmp_path / "latin.jsonl"))
    with pytest.raises(ExperimentError, match="has its own 100 rows"):
        conversations.load("orders", held_out=5)
