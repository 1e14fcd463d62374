"""The notebook runs from top to bottom, in its quick setting, and is stored without outputs that change at each run."""

import json

from tests.support import ROOT

NOTEBOOK = json.loads((ROOT / "experiments" / "lora_sst2.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_it_is_stored_without_outputs():
    assert (NOTEBOOK["nbformat"], len(CODE)) == (4, 8)
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)


def test_every_cell_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("QUICK", "1")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = {}
    for number, cell in enumerate(CODE):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    out = capsys.readouterr().out
    assert "4.127 bits a parameter" in out and "trainable parameters: 295,682" in out
    assert out.count("295,682 trained") == 2 and "merged default" in out
    assert len(names["losses"]) == 2  # 64 sentences in batches of 32
