"""What a run says of its sources: a statement that changes is noticed, a comment is not."""

import pytest

from experiments import predictions, provenance
from experiments.errors import ExperimentError

SOURCE = '''"""A docstring
of two lines."""

import os

# A comment.
class A:
    """Another."""

    def f(self):
        """One more."""
        return """no docstring"""  # said beside it
'''


def test_docstrings_comments_and_empty_lines_do_not_count():
    kept = provenance.statements(SOURCE).splitlines()
    assert [line.strip() for line in kept] == [
        "import os", "class A:", "def f(self):", 'return """no docstring"""  # said beside it',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "differs"),
    [("x = 1\n", False), ("# why\n\nx = 1\n", False), ('"""What."""\nx = 1\n', False), ("x = 2\n", True)],
)
def test_a_hash_is_of_statements(tmp_path, changed, differs):
    hashes = []
    for text in ("x = 1\n", changed):
        (tmp_path / "a.py").write_text(text)
        hashes.append(provenance.code_hash([tmp_path / "a.py"], tmp_path))
    assert (hashes[0] != hashes[1]) is differs


def test_a_file_s_name_is_part_of_the_hash(tmp_path):
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("x = 1\n")
    assert len({provenance.code_hash([tmp_path / name], tmp_path) for name in ("a.py", "b.py")}) == 2


def test_what_a_run_imports_is_followed(tmp_path):
    files = {
        "start.py": "from . import a, os\n",
        "a.py": "def f():\n    from .b import g\n",
        "b.py": "from .start import x\n",
        "other.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert [path.name for path in provenance.imported(tmp_path / "start.py")] == ["a.py", "b.py", "start.py"]
    names = {path.name for path in provenance.imported(provenance.HERE / "train.py")}
    assert {"trainer.py", "batches.py", "data.py"} <= names and not names & {"report.py", "figures.py", "sft.py", "recipes.py"}


def test_a_run_of_other_code_or_of_none_is_told():
    present = provenance.here()
    assert provenance.differing({"provenance": present}) == ()
    assert provenance.differing({"provenance": {**present, "engine": "0" * 16}}) == ("engine",)
    assert provenance.differing({}) == provenance.differing({"provenance": None}) == ("engine", "experiments")


@pytest.mark.parametrize("text", ["01\n", "01\n012\n", "0a\n01\n", "01\n01\n01\n", "", "0é\n011\n"])
def test_predictions_that_are_not_as_written_are_refused(tmp_path, text):
    (tmp_path / predictions.PREDICTIONS).write_text(text, encoding="utf-8")
    with pytest.raises(ExperimentError, match="must hold two lines"):
        predictions.read(tmp_path)


def test_a_run_without_predictions_has_none(tmp_path):
    assert predictions.read(tmp_path) is None
