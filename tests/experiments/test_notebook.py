"""The notebook runs from top to bottom in its quick form, and is stored with the outputs that its text speaks of."""

import json
import re

import pytest

from experiments import documents, measured, notebook
from experiments.errors import ExperimentError
from tests.support import ROOT, fabricated

NOTEBOOK = json.loads((ROOT / "experiments" / "lora_sst2.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def printed(cells):
    """What they printed, as it is stored."""
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(output["output_type"] in ("stream", "display_data") for output in outputs), "a cell failed"
    return "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")


def test_it_is_stored_with_its_outputs():
    pictures = [o for cell in CODE for o in cell["outputs"] if "image/png" in o.get("data", {})]
    assert NOTEBOOK["nbformat"] == 4 and 8 <= len(pictures) <= 14
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert (ROOT / "experiments" / "lora_sst2.ipynb").stat().st_size < 1_000_000
    out = printed(CODE)
    assert "4.127 bits a parameter" in out and "labels that changed: 0" in out
    right = {name: float(share) for name, share in re.findall(r"(\w+) +([\d.]+)% of 853 held-out sentences right", out)}
    assert min(right.values()) > 70 and set(right) == {"LoRA", "QLoRA"}


def test_its_table_is_that_of_the_documents():
    table = documents.tables(measured.read(fabricated.COMMITTED))["part"]
    assert table in printed(CODE)


def test_every_cell_runs(monkeypatch, capsys, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.setenv("QUICK", "1")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = {}
    with matplotlib.rc_context():
        for number, cell in enumerate(CODE):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
            names["plt"].close("all")
    out = capsys.readouterr().out
    assert "4.127 bits a parameter" in out and out.count("trainable parameters: 295,682") == 2 and "merged default" in out
    assert len(names["curves"]["QLoRA"]) == 2  # 64 sentences in batches of 32


def test_running_it_stores_what_it_gave_and_a_cell_that_fails_leaves_it(tmp_path):
    pytest.importorskip("nbclient", reason="nbclient is not installed, so no notebook was run in a kernel")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed, so no notebook was run in a kernel")
    path = tmp_path / "experiments" / "a.ipynb"
    path.parent.mkdir()
    cell = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": ["print(6 * 7)"]}
    whole = {"cells": [cell], "metadata": NOTEBOOK["metadata"], "nbformat": 4, "nbformat_minor": 4}
    path.write_text(json.dumps(whole))
    notebook.execute(path)
    (ran,) = json.loads(path.read_text())["cells"]
    assert ran["outputs"][0]["text"] == ["42\n"] and ran["execution_count"] == 1 and "id" not in ran and not ran["metadata"]
    path.write_text(json.dumps(whole | {"cells": [cell | {"source": ["1 / 0"]}]}))
    before = path.read_bytes()
    with pytest.raises(ExperimentError, match="ZeroDivisionError: division by zero"):
        notebook.execute(path)
    assert path.read_bytes() == before
