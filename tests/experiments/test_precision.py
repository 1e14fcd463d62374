"""Which precision a run computes in, and that bfloat16 learns what float32 does."""

import copy
import json
import os
import platform
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from experiments import precision, predict
from experiments.data import read_tsv
from experiments.errors import ExperimentError
from experiments.expected import architectures
from experiments.models import resolve
from experiments.parallel import Processes
from experiments.precision import autocast, cast_frozen, choose_precision, choose_together, restore_frozen
from experiments.sst2 import main
from experiments.trainer import EVAL_BATCH, SentimentTrainer
from lora_core import LoraConfig, inject, use_fast_dropout, use_fast_linear
from lora_core.__main__ import main as lora_core
from tests.support import tiny

#: Prints, after a short run that looks what a product takes, by how many bytes products of 240 heights make the process grow.
MANY_SHAPES = """
import random, sys, torch
from experiments.heap import give_back
from experiments.sst2 import main

def resident_bytes():
    give_back()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

assert main(sys.argv[1:]) == 0
x, W = torch.ones(2200, 384, dtype=torch.bfloat16), torch.ones(1536, 384, dtype=torch.bfloat16)
before = resident_bytes()
for rows in random.Random(0).sample(range(256, 2176, 8), 240):
    x[:rows] @ W.t() @ W
print(resident_bytes() - before)
"""


@pytest.mark.parametrize("faster", [0.3, 4.0])
def test_auto_takes_bfloat16_where_it_is_faster(monkeypatch, faster):
    monkeypatch.setattr(precision, "speed_of_bf16", lambda: faster)
    assert choose_precision("auto", "cpu") == ("bf16" if faster > 1 else "fp32")
    assert choose_precision("bf16", "cpu") == "bf16" and choose_precision("fp32", "cpu") == "fp32"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("first", ["fp32", "bf16"])
def test_process_0_chooses_for_all(monkeypatch, rank, first):
    other = "bf16" if first == "fp32" else "fp32"
    found = [precision.PRECISIONS.index(first)]
    monkeypatch.setattr(precision, "choose_precision", lambda *_: first if rank == 0 else other)
    monkeypatch.setattr(
        Processes, "reduce", lambda self, numbers: found if numbers in ([-1], found) else pytest.fail("own choice")
    )
    assert choose_together("auto", "cpu", Processes(2, rank, 2, rank)) == first
    assert choose_together("auto", "cpu", Processes()) == (first if rank == 0 else other)


@pytest.mark.parametrize("has_it", [False, True])
def test_a_gpu_uses_what_it_has(monkeypatch, has_it):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_it)
    assert choose_precision("auto", "cuda") == ("bf16" if has_it else "fp32")
    assert choose_precision("fp32", "cuda") == "fp32"
    if has_it:
        assert choose_precision("bf16", "cuda") == "bf16"
    else:
        with pytest.raises(ExperimentError, match="does not have it; pass fp32 or auto"):
            choose_precision("bf16", "cuda")


def test_looking_at_the_speed_leaves_the_threads_as_they_were():
    before = torch.get_num_threads()
    assert 0.01 < precision.speed_of_bf16() < 100 and torch.get_num_threads() == before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="holes in the heap are glibc's")
@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 on this processor")
def test_a_run_that_looks_at_the_speed_keeps_few_shapes(tmp_path, small_data):
    flags = ["--model", "packaged", "--data", str(small_data), "--device", "cpu", "--precision", "auto", "--max-steps", "1"]
    capacities = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # which earlier tests of this process may have set
    environment, grown = {name: value for name, value in os.environ.items() if name not in capacities}, {}
    for kept, given in (("few", {}), ("all", dict.fromkeys(capacities, "1024"))):
        command = [sys.executable, "-c", MANY_SHAPES, *flags, "--output-dir", str(tmp_path / kept)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment | given)
        grown[kept] = int(done.stdout.splitlines()[-1])
    assert grown["few"] < 0.25 * grown["all"], grown


# --- frozen weights held in bfloat16 ------------------------------------------------------------------------------------


def minilm():
    """A model of MiniLM's widths, with fewer layers and words."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12, "num_hidden_layers": 2}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, vocab_size=99)).eval()


def step(model):
    """The loss of a training step under autocast, and every gradient."""
    torch.manual_seed(5)
    model.train()
    inputs = {"input_ids": tiny.TOKENS} | ({"decoder_input_ids": tiny.TOKENS} if model.config.is_encoder_decoder else {})
    with autocast("bf16", "cpu"):
        loss = model(**inputs).logits.float().logsumexp(-1).square().mean()
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("architecture", ["minilm", "distilbert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize(
    ("settings", "held"),
    [
        ({}, "all"),
        ({"lora_dropout": 0.1}, "all"),
        ({"bias": "lora_only"}, "all"),
        ({"use_dora": True, "lora_dropout": 0.1}, "those without adapter"),
        (None, "all"),
    ],
    ids=["lora", "dropout", "bias", "dora", "norms alone"],
)
def test_a_step_is_the_same_bit_for_bit_as_with_weights_cast_by_autocast(architecture, settings, held):
    model = minilm() if architecture == "minilm" else tiny.build(architecture)
    model.config.use_cache = False
    targets = tiny.projections("bert" if architecture == "minilm" else architecture)
    head = [name for name in ("classifier", "pre_classifier") if hasattr(model, name)]
    use_fast_linear(model)
    if settings is None:
        for name, p in model.named_parameters():
            p.requires_grad = "norm" in name.lower() or "ln_" in name
    else:
        inject(model, LoraConfig(r=4, target_modules=targets, modules_to_save=head or None, **settings))
        tiny.randomize(model)
    use_fast_dropout(model)
    other = copy.deepcopy(model)
    paths = cast_frozen(other, head)

    weights = {name: p for name, p in other.named_parameters() if p.dtype == torch.bfloat16}
    assert set(weights) == {f"{path}.weight" for path in paths} and not any(p.requires_grad for p in weights.values())
    assert any(path.endswith(targets[0]) for path in paths) == (held == "all")
    alike = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    linear = {path for path, module in model.named_modules() if isinstance(module, alike) and path not in head}
    left = linear - set(paths)
    assert all(path.endswith(tuple(targets)) or "modules_to_save" in path for path in left), left
    assert (held == "all") == (not left)

    expected, found = step(model), step(other)
    assert expected.keys() == found.keys() and len(expected) > 1
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name

    restore_frozen(other, paths, model)
    if architecture in ("gpt2", "t5"):
        assert "lm_head" in paths and other.lm_head.weight is other.get_input_embeddings().weight
    assert all(torch.equal(p, q) and p.dtype == q.dtype for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_a_base_that_has_changed_since_is_not_taken_for_the_one_that_was_cast():
    model, other = minilm().requires_grad_(False), minilm()
    paths = cast_frozen(model, ["classifier"])
    with torch.no_grad():
        other.get_submodule(paths[-1]).weight[3, 2] += 1
    with pytest.raises(ExperimentError, match=f"{paths[-1]}' has other weights than when the run began"):
        restore_frozen(model, paths, other)


@pytest.fixture
def call(tmp_path, small_data, monkeypatch):
    """Runs a method in bfloat16; what its last evaluation gave, (N, 2) logits in float32, and its metrics."""
    logits, share_right = [], SentimentTrainer.share_right
    monkeypatch.setattr(predict, "BATCH", EVAL_BATCH)  # the same batches have the same numbers to the last bit

    def keep(self, prediction):
        order = np.concatenate(list(self.get_eval_dataloader().batch_sampler))
        logits.append(torch.from_numpy(prediction.predictions)[order.argsort()])
        return share_right(self, prediction)

    def run(*more):
        monkeypatch.setattr(SentimentTrainer, "share_right", keep)
        flags = ["--model", "packaged", "--data", str(small_data), "--device", "cpu", "--precision", "bf16", "--epochs", "1"]
        assert main([*flags, "--output-dir", str(tmp_path), *more]) == 0
        return logits[-1], json.loads((tmp_path / "metrics.json").read_text())

    return run


@pytest.mark.parametrize(
    ("flags", "held"),
    [
        (["--method", "lora"], 6 * (4 * 384 * 384 + 2 * 384 * 1536) + 384 * 384),
        (["--method", "dora"], 6 * 2 * 384 * 1536 + 384 * 384),
        (["--method", "qlora"], 0),
        (["--method", "head-only"], 6 * (4 * 384 * 384 + 2 * 384 * 1536) + 384 * 384),
        (["--method", "full"], 0),
    ],
)
def test_what_is_saved_is_of_the_base_as_it_is_and_predicts_what_the_run_did(call, tmp_path, small_data, flags, held):
    logits, metrics = call(*flags)
    base = resolve("packaged")
    quantize = metrics["hyperparameters"].get("quantize", False)
    expected = architectures()[base.name].base_bytes(quantize, held)
    assert metrics["base_weight_bytes"] == expected
    saved = tmp_path / ("adapter" if metrics["adapter_parameters"] else "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = {"adapter": saved} if saved.name == "adapter" else {"adapter": None, "model": str(saved)}
        predictor = predict.Predictor(**given)
    texts = read_tsv(small_data / "dev.tsv").texts
    found = torch.tensor([p if label == "positive" else 1 - p for label, p in predictor(texts)])
    assert torch.allclose(found, logits.softmax(-1)[:, 1], rtol=0, atol=1e-7)
    if saved.name == "adapter":
        with safe_open(saved / "adapter_model.safetensors", "pt") as file:
            lines = json.loads(file.metadata()["lora_core.fingerprint"])["base"].values()
        assert {line.split()[0] for line in lines} == {"nf4/64/double" if quantize else "float32"}
        assert lora_core(["verify", str(saved), "--base", str(base.directory)]) == 0
    else:
        assert {t.dtype for t in load_file(saved / "model.safetensors").values()} == {torch.float32}


def test_a_run_in_bfloat16_learns_what_one_in_float32_does(tmp_path, small_data):
    losses = {}
    for kind in ("fp32", "bf16"):
        output = tmp_path / kind
        flags = ["--model", "packaged", "--data", str(small_data), "--device", "cpu", "--precision", kind, "--max-steps", "6"]
        assert main(["--method", "qlora", *flags, "--output-dir", str(output)]) == 0
        metrics = json.loads((output / "metrics.json").read_text())
        assert metrics["hyperparameters"]["precision"] == kind
        assert lora_core(["verify", str(output / "adapter"), "--base", str(resolve("packaged").directory)]) == 0
        losses[kind] = torch.tensor([loss for _, loss in metrics["loss_history"]])
    # 8 bits of precision in each product; a loss is of the order of 1.
    torch.testing.assert_close(losses["bf16"], losses["fp32"], rtol=0, atol=0.02)
    assert not torch.equal(losses["bf16"], losses["fp32"])
