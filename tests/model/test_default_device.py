"""An open default device that is not the model's (`with torch.device(...)`) changes nothing."""

import ast
from pathlib import Path

import pytest
import torch
from torch.utils._device import _device_constructors

import lora_core
from lora_core import (
    LoraConfig,
    combine_adapters,
    extract_adapter,
    initialize_eva,
    initialize_loftq,
    inject,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    mixed_batch,
    quantize_nf4,
    save_adapter,
    set_adapter,
    share_dropout_masks,
    trainable_parameters,
    unload,
    unmerge_adapter,
    use_fast_dropout,
    use_fast_linear,
)
from tests.support import tiny

PACKAGE = Path(lora_core.__file__).parent
X = tiny.batch()
STARTS = [True, "gaussian", "orthogonal", "pissa", "pissa_niter_2", "olora"]


def train(model):
    model.train()(X).square().sum().backward()
    torch.optim.SGD(trainable_parameters(model), 0.01).step()
    return model.eval()


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["classifier"]}, {"bias": "all"}])
def test_everything_works_under_another_default_device(settings, packed, tmp_path):
    outcomes = []
    for device in ("cpu", "meta"):
        model, plain, tuned = tiny.classifier(), tiny.classifier(), tiny.classifier(seed=1)
        torch.manual_seed(3)
        with torch.device(device):
            use_fast_linear(model)
            use_fast_dropout(model)
            if packed:
                quantize_nf4(model)
            inject(model, LoraConfig(r=4, lora_dropout=0.3, target_modules=["q", "k", "v"], **settings), "a")
            share_dropout_masks(model)
            train(model)
            save_adapter(model, tmp_path / device, "a")
            found = [model(X)]
            if settings.get("bias") != "all":
                load_adapter(model, tmp_path / device, "b")
                with torch.no_grad(), mixed_batch(model, ["a", "b", None, "a", "b"]):
                    found.append(model(X))
                if not settings.get("use_dora"):
                    combine_adapters(model, ["a", "b"], [1, 1], "c", "dare_ties", density=0.5)
                    set_adapter(model, "c")
                    found.append(model(X))
                    set_adapter(model, "a")
            initialize_eva(model, [X], "a")
            if packed:
                initialize_loftq(model, plain, "a")
            found.append(model(X))
            merge_adapter(model)
            unmerge_adapter(model)
            merge_and_unload(model)
            found.append(model(X))
            if not packed:
                extract_adapter(plain, tuned, LoraConfig(r=4, target_modules=["q"]))
                found.append(plain(X))
                unload(plain)
        outcomes.append([y.detach() for y in found])
    for one, other in zip(*outcomes, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("start", STARTS)
def test_every_start_under_another_default_device(start):
    outcomes = []
    for device in ("cpu", "meta"):
        model = tiny.classifier()
        torch.manual_seed(3)
        with torch.device(device):
            inject(model, LoraConfig(r=4, target_modules=["q"], init_lora_weights=start))
        outcomes.append([p.detach() for p in trainable_parameters(model)])
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_beside_16_bits_under_another_default_device(dtype, packed):
    """What the rounding costs is summed in a tensor of its own."""
    outcomes = []
    for device in ("cpu", "meta"):
        model = tiny.classifier().to(dtype)
        torch.manual_seed(3)
        with torch.device(device):
            if packed:
                quantize_nf4(model)
            inject(model, LoraConfig(r=4, target_modules=["q", "k", "v"], init_lora_weights=False))
            merge_adapter(model)
            unmerge_adapter(model)
            merge_and_unload(model)
        outcomes.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))


def test_every_helper_tensor_names_its_device():
    """Of the functions of torch that a default device applies to, by torch's own list, each call says `device`."""
    makers = {f"torch.{f.__name__}" for f in _device_constructors() if getattr(torch, f.__name__, None) is f}
    calls, silent = 0, []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) in makers):
                continue
            calls += 1
            if not any(keyword.arg == "device" for keyword in node.keywords):
                silent.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert calls and not silent
