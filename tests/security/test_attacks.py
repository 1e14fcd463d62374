"""A stranger's directories, a line each: one clear line is the answer, within three seconds, and nothing is left behind.

pytest tests/security/test_attacks.py -s -k how_many      how many there are of each kind
"""

import contextlib
import re
import shutil
import signal
import time

import pytest
import yaml
from transformers import AutoConfig

from experiments import checkpoints as runs, models
from lora_core import LoraError, load_adapter
from lora_core.__main__ import main
from lora_core.errors import one_line
from tests.support.attacks import ATTACKS, STEP, build

SECONDS = 3.0  # of this process, on a slow machine: matching names alone may take one, whatever the machine
HANGS = 30.0


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("good")
    build(root)
    return root


@pytest.fixture(scope="module", autouse=True)
def imported(good, tmp_path_factory):
    """What the commands import takes seconds, and is not theirs to answer for."""
    out = tmp_path_factory.mktemp("first")
    base, adapter = str(good / "base"), str(good / "adapter")
    assert main(["merge", "--base", base, "--adapter", adapter, "--output", str(out / "merged")]) == 0
    assert main(["convert", adapter, "--dtype", "float16", "--output", str(out / "converted")]) == 0
    assert main(["inspect", adapter]) == 0
    AutoConfig.from_pretrained(base)
    with pytest.raises(LoraError):  # its tokenizer is none
        models.load_classifier(models.resolve(base))


@pytest.fixture(scope="module")
def model(good):
    """A model that the adapter fits: the names and shapes of the base."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(good / "base")


@contextlib.contextmanager
def in_time():
    def stop(*_):
        raise TimeoutError(f"hangs for {HANGS} s")

    before, start = signal.signal(signal.SIGALRM, stop), time.process_time()
    signal.setitimer(signal.ITIMER_REAL, HANGS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - start < SECONDS


def listing(root):
    return {str(path.relative_to(root)): path.lstat().st_size for path in root.rglob("*")}


def knock(door, root, model):
    """(exit code, what a function's error says) of what one door does with the directories."""
    base, adapter, out = (str(root / name) for name in ("base", "adapter", "out"))
    below = str(root / "out-file" / "new")
    commands = {
        "inspect": ["inspect", adapter],
        "inspect-escaped": ["inspect", adapter],
        "merge": ["merge", "--base", base, "--adapter", adapter, "--output", out],
        "merge-16": ["merge", "--base", base, "--adapter", adapter, "--output", out, "--dtype", "float16"],
        "merge-below": ["merge", "--base", base, "--adapter", adapter, "--output", below],
        "card": ["merge", "--base", base, "--adapter", adapter, "--output", out],
        "convert": ["convert", adapter, "--dtype", "float16", "--output", out],
        "convert-below": ["convert", adapter, "--dtype", "float16", "--output", below],
        "verify": ["verify", adapter, "--base", base],
    }
    if door in commands:
        return main(commands[door]), ""
    calls = {
        "load": lambda: load_adapter(model, adapter),
        "resume": lambda: runs.read(root / STEP),
        "train": lambda: models.load_classifier(models.resolve(base)),
    }
    try:
        calls[door]()
    except LoraError as error:
        return 2, f"error: {error}\n"
    return 0, ""


CASES = [(category, name) for category, attacks in ATTACKS.items() for name in attacks]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("category", "name"), CASES, ids=lambda text: one_line(text)[:80])
def test_an_attack_ends_in_one_line_and_leaves_nothing(category, name, good, model, tmp_path, monkeypatch, capfd):
    attack, root = ATTACKS[category][name], tmp_path / "root"
    shutil.copytree(good, root)
    attack.spoil(root)
    monkeypatch.chdir(tmp_path)
    before = listing(tmp_path)
    capfd.readouterr()
    with in_time():
        code, said = knock(attack.door, root, model)
    out, err = capfd.readouterr()
    err = said or err
    if attack.door == "inspect-escaped":
        return assert_escaped(code, out, err)
    if attack.door == "card":
        return assert_card(code, (root / "out" / "README.md").read_text())
    if code == 0 and attack.may_pass:
        assert not {path.name for path in root.iterdir() if path.name.startswith(".")}
        return None
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, (code, err[-2_000:])
    assert err[:-1].isprintable() and 20 < len(err) < 1_100, err
    assert attack.says is None or attack.says in err, err
    assert listing(tmp_path) == before
    assert not hasattr(model, "lora_registry")


def assert_escaped(code, out, err):
    """What is printed are lines to be read, as many as there are facts and kinds of layers."""
    text = out + err
    assert code in (0, 2) and all(line.isprintable() for line in text.split("\n")), text
    if code == 0:
        facts, _, table = out.partition("\n\n")
        assert [line.split(" ")[0] for line in facts.split("\n")] == [
            *("adapter", "format", "base", "task", "variant", "targets", "rank", "alpha"),
            *("dtype", "parameters", "size", "whole", "tokens", "fingerprint"),
        ]
        counts = [int(n) for n in re.findall(r"  (\d+)     4  .*\d\.\d\d$", table, re.MULTILINE)]  # of rank 4
        assert table.startswith("modules ") and sum(counts) == 8, table


def assert_card(code, text):
    """The card says no more than what is meant."""
    _, facts, body = text.split("---\n", 2)
    assert code == 0 and yaml.safe_load(facts).keys() == {"library_name", "base_model", "base_model_relation"}
    assert [line for line in body.split("\n") if line.startswith("#")] == [body.split("\n")[1]]
    assert all(line.isprintable() for line in text.split("\n"))


def test_links_into_the_hub_s_cache_are_followed(good, tmp_path):
    """Snapshots are made of links to blobs, some folders up."""
    repository = tmp_path / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    shutil.copytree(good / "base", blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    (tmp_path / "link").symlink_to(snapshot)
    for i, base in enumerate((snapshot, tmp_path / "link")):
        out = tmp_path / f"out{i}"
        assert main(["merge", "--base", str(base), "--adapter", str(good / "adapter"), "--output", str(out)]) == 0
        assert (out / "vocab.txt").read_bytes() == (blobs / "vocab.txt").read_bytes() and not (out / "vocab.txt").is_symlink()


def test_how_many_there_are(capsys):
    counts = {category: len(attacks) for category, attacks in ATTACKS.items()}
    with capsys.disabled():
        print("\n" + "\n".join(f"{count:5d} {category}" for category, count in counts.items()))
        print(f"{sum(counts.values()):5d} attacks")
    assert sum(counts.values()) >= 300 and min(counts.values()) >= 10
