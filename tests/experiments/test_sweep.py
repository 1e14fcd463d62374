"""The search: where its settings lie, what they are judged on, and that it goes on where it stopped."""

import csv
import itertools
import random

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from experiments import data, measured, sweep, train
from experiments.data import SentimentData, Split
from experiments.errors import ExperimentError
from experiments.recipes import METHODS
from experiments.sweep import Setting, Space


def test_random_settings_lie_in_the_ranges_and_depend_on_the_seed_alone():
    space = Space()
    drawn = space.sample(40, seed=1)
    assert len(set(drawn)) == 40
    for setting in drawn:
        assert setting.rank in (4, 8, 16, 32) and setting.alpha in (16, 32, 64)
        assert 0.05 <= setting.dropout <= 0.3 and 1e-4 <= setting.learning_rate <= 5e-4
    assert {setting.rank for setting in drawn} == {4, 8, 16, 32}
    assert space.sample(12, seed=1) == drawn[:12]  # asking for more goes on with the same ones
    assert space.sample(12, seed=2) != drawn[:12]


def test_a_grid_is_every_combination():
    grid = Space((4, 8), (16,), (0.1, 0.2), (1e-4,)).grid()
    assert grid == [Setting(4, 16, 0.1, 1e-4), Setting(4, 16, 0.2, 1e-4), Setting(8, 16, 0.1, 1e-4), Setting(8, 16, 0.2, 1e-4)]


def test_a_space_of_few_settings_gives_no_more():
    with pytest.raises(ExperimentError, match="hold 2 different settings at most; ask for fewer than 3"):
        Space((4, 8), (16,), (0.1,), (1e-4,)).sample(3, seed=0)


def test_a_setting_changes_its_method_and_nothing_else():
    lora = METHODS["lora"]
    changed = Setting(4, 64, 0.3, 2e-4).applied(lora)
    assert (changed.r, changed.lora_alpha, changed.lora_dropout, changed.learning_rate) == (4, 64, 0.3, 2e-4)
    assert (changed.name, changed.roles, changed.quantize) == (lora.name, lora.roles, lora.quantize)


def test_targets_and_lora_plus_can_be_searched_too():
    space = Space(lora_plus=(1, 8), targets=((), ("query", "value"), ("all-linear",)))
    drawn = space.sample(30, seed=0)
    assert {setting.lora_plus for setting in drawn} == {1, 8}
    assert {setting.targets for setting in drawn} == {(), ("query", "value"), ("all-linear",)}
    lora = METHODS["lora"]
    assert Setting(4, 64, 0.3, 2e-4).applied(lora).target_modules is lora.target_modules
    changed = Setting(4, 64, 0.3, 2e-4, 8, ("query", "value")).applied(lora)
    assert (changed.lora_plus_ratio, changed.target_modules) == (8, ("query", "value"))
    assert Setting(4, 64, 0.3, 2e-4, 8, ("query", "value")).name == "r4-alpha64-dropout0.3-lr0.0002-plus8-query-value"


def sentiment(texts):
    train_split = Split(tuple(texts), np.arange(len(texts), dtype=np.uint8) % 2)
    return SentimentData("D", "here", "test", train_split, Split(("never this one",), np.array([1], dtype=np.uint8)))


def test_trials_are_judged_on_training_sentences_that_they_have_not_seen():
    texts = [f"text {i}" for i in range(100)]
    found = sweep.split(sentiment(texts), train=60, held_out=30, seed=0)
    assert (len(found.train), len(found.validation)) == (60, 30)
    assert not set(found.train.texts) & set(found.validation.texts)
    assert set(found.train.texts) | set(found.validation.texts) <= set(texts)
    labels = {text: i % 2 for i, text in enumerate(texts)}
    assert [labels[text] for text in found.validation.texts] == found.validation.labels.tolist()
    assert found.name == "D's training set"  # so that no result of it passes for one on the validation set


def test_repeated_sentences_lie_on_one_side():
    texts = [f"{word} {i % 40}" for i, word in zip(range(120), itertools.cycle(["text", "TEXT"]), strict=False)]
    found = sweep.split(sentiment(texts), train=20, held_out=20, seed=0)
    assert not {t.lower() for t in found.train.texts} & {t.lower() for t in found.validation.texts}


def test_it_is_judged_on_whole_sentences_and_learns_from_no_phrase_of_them():
    rng = random.Random(0)
    sentences = [" ".join(rng.choices("abcdefghij", k=rng.randint(6, 9))) for _ in range(60)]
    texts = list(sentences)
    for sentence in sentences * 4:
        words = sentence.split()
        start = rng.randrange(len(words))
        texts.append(" ".join(words[start : rng.randint(start + 1, len(words))]).upper())
    rng.shuffle(texts)
    found = sweep.split(sentiment(texts), train=60, held_out=30, seed=0)

    def within(text, other):
        return f" {text.lower()} " in f" {other.lower()} "

    held = {text.lower() for text in found.validation.texts}
    assert len(held) == 30 and held <= set(sentences)
    for judged in held:
        assert not any(within(text, judged) for text in found.train.texts)
        assert not any(within(judged, text) for text in texts if text.lower() != judged)


def test_too_few_sentences_are_refused():
    with pytest.raises(ExperimentError, match="--train-samples 90 and --held-out 20 are more than the 100"):
        sweep.split(sentiment([f"text {i}" for i in range(100)]), train=90, held_out=20, seed=0)


@pytest.fixture
def call(capfd, small_data):
    """Runs the command on tiny trials; returns (exit code, standard output, standard error)."""

    def run(*argv):
        common = (
            "--model",
            "packaged",
            "--data",
            small_data,
            "--device",
            "cpu",
            "--precision",
            "fp32",
            "--max-steps",
            1,
            "--max-length",
            32,
        )
        sizes = ("--train-samples", 32, "--held-out", 32)
        capfd.readouterr()
        try:
            code = sweep.main([str(arg) for arg in (*common, *sizes, *argv)])
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return run


def test_a_sweep_leaves_a_table_and_a_figure_and_goes_on_where_it_stopped(call, tmp_path, monkeypatch):
    grid = ("--search", "grid", "--alphas", 16, "--dropouts", 0.1, "--learning-rates", "5e-4", "--output-dir", tmp_path)
    code, out, _ = call(*grid, "--ranks", "4,8")
    assert code == 0
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(sweep.COLUMNS) and {row["rank"] for row in rows} == {"4", "8"}
    assert [float(row["accuracy"]) for row in rows] == sorted((float(row["accuracy"]) for row in rows), reverse=True)
    assert {row["trained"] for row in rows} == {str(6 * 4 * r * 768 + 770) for r in (4, 8)}
    assert (tmp_path / "sweep.png").is_file()
    assert f"best: rank {rows[0]['rank']}, alpha 16, dropout 0.1, learning_rate 0.0005, lora_plus 1: accuracy" in out
    assert measured.read(tmp_path) == []  # trials are no results of the study

    done = []
    real = train.train
    monkeypatch.setattr(train, "train", lambda job, output: done.append(job.method.r) or real(job, output))
    code, out, _ = call(*grid, "--ranks", "4,8,16")
    assert code == 0 and done == [16]
    assert "trial 1 of 3: r4-alpha16-dropout0.1-lr0.0005, done already" in out
    assert len((tmp_path / "sweep.csv").read_text().splitlines()) == 4
    assert not sweep.made_by_other_code(tmp_path / "sweep.csv")


def test_a_trial_on_other_data_is_refused_or_done_again(call, tmp_path):
    grid = ("--search", "grid", "--ranks", 4, "--alphas", 16, "--dropouts", 0.1, "--learning-rates", "5e-4")
    assert call(*grid, "--output-dir", tmp_path)[0] == 0
    code, _, err = call(*grid, "--output-dir", tmp_path, "--held-out", 16)
    assert code == 2 and "holds another run (its data differ)" in err
    code, out, _ = call(*grid, "--output-dir", tmp_path, "--held-out", 16, "--refresh")
    assert code == 0 and "done already" not in out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--trials", 0], "--trials must be at least 1, not 0"),
        (["--held-out", 0], "--held-out must be at least 1, not 0"),
        (["--method", "full"], "--method full has no adapter, so there is nothing to search"),
        (["--ranks", "4,x"], "'4,x' is no comma-separated list of numbers"),
        (["--ranks", "0", "--trials", 1], "r must be a positive integer, not 0"),
        (["--lora-plus", "0"], "lora_plus_ratio must be a number above 0, not 0"),
        (["--target-modules", "query/"], "'' is no comma-separated list of names"),
        (["--learning-rates", "0"], "learning rates must be above 0"),
        (["--train-samples", 96], "are more than the 96 training sentences give"),
    ],
)
def test_a_mistake_is_one_line(call, argv, says, tmp_path):
    code, _, err = call(*argv, "--output-dir", tmp_path / "out")
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and says in err
    assert not (tmp_path / "out").exists()


def test_the_real_training_set_gives_what_the_defaults_ask_for():
    args = sweep.parser().parse_args([])
    found = sweep.split(data.load("packaged"), args.train_samples, args.held_out, args.seed)
    assert (len(found.train), len(found.validation)) == (4000, 1000)
