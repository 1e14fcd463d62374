"""A merged language model as one program says what the model says, in torch.export's form and in ONNX."""

import pytest
import torch
import transformers

from experiments import export
from lora_core import LoraConfig, inject, save_adapter
from lora_core.__main__ import main
from tests.support import tiny
from tests.support.language_models import small_llama


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    base = small_llama(root / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    inject(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    save_adapter(tiny.randomize(model), root / "adapter")
    argv = ["merge", "--base", base, "--adapter", root / "adapter", "--output", root / "merged"]
    assert main(list(map(str, argv))) == 0
    return root / "merged"


def greedy(logits_of, ids, size=12):
    """The tokens that are said by whatever gives logits."""
    for _ in range(size):
        ids = torch.cat([ids, logits_of(ids, torch.ones_like(ids))[:, -1:].argmax(-1)], 1)
    return ids


def expected(merged, ids):
    model = transformers.AutoModelForCausalLM.from_pretrained(merged).eval()
    with torch.no_grad():
        return greedy(lambda ids, mask: model(ids, attention_mask=mask).logits, ids)


def test_a_language_model_is_exported_and_says_the_same(merged, capsys):
    assert export.main(["--merged", str(merged)]) == 0
    assert "model.pt2: logits off by at most" in capsys.readouterr().out
    program, ids = torch.export.load(merged / export.PROGRAM).module(), tiny.TOKENS
    assert torch.equal(greedy(program, ids), expected(merged, ids))


def test_in_onnx_it_says_the_same(merged):
    for library in ("onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason=f"{library} is not installed, so ONNX was not tried")
    assert export.main(["--merged", str(merged), "--onnx"]) == 0
    program, ids = export._in_onnx_runtime((merged / export.ONNX).read_bytes()), tiny.TOKENS
    assert torch.equal(greedy(program, ids), expected(merged, ids))


def test_without_onnx_s_libraries_it_is_one_line(merged, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert export.main(["--merged", str(merged), "--onnx"]) != 0
    error = capsys.readouterr().err
    assert "--onnx: pip install onnxscript onnxruntime" in error and error.count("\n") == 1
