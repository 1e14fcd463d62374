"""The same maths on a GPU: every kind, method and base, masks, 16 bits, 4 bits, and what moves between devices."""

import copy

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_core import (
    LoraConfig,
    VeraConfig,
    combine_adapters,
    disable_adapters,
    extract_adapter,
    inject,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    mixed_batch,
    quantize_int8,
    quantize_nf4,
    save_adapter,
    set_adapter,
    share_dropout_masks,
    trainable_parameters,
    unmerge_adapter,
    use_fast_dropout,
    use_fast_linear,
)
from lora_core.bases import dense_weight, is_packed
from lora_core.cpu.dropout import KeepMask, draw_keep_mask, same_keep_mask
from lora_core.gpu import thin as gpu_thin
from tests.support import oracle, tiny
from tests.support.cases import CASES
from tests.support.contract import CHECKS

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")

METHODS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "bias": {"bias": "lora_only"},
}
PACKED = {"nf4": quantize_nf4, "int8": quantize_int8}


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """torch convolves in TF32 by default, with 10 bits, and by whichever way it finds fast: here in float32, by one."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def adapted(architecture="llama", base=None, **settings):
    model = tiny.build(architecture).to(DEVICE)
    if base:
        PACKED[base](model)
    inject(model, LoraConfig(r=4, target_modules=tiny.projections(architecture), **settings))
    return tiny.randomize(model)


def logits(model):
    device = next(model.parameters()).device
    with torch.no_grad():
        return model(**{name: x.to(device) for name, x in tiny.inputs(model).items()}).logits.float().cpu()


def near(found, expected, tolerance=1e-5):
    assert (found - expected).abs().max() <= tolerance * max(1, expected.abs().max())


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", CASES)
def test_the_contract(name, check):
    case = CASES[name]
    CHECKS[check](type(case)(**{**vars(case), "device": DEVICE}))


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_it_computes_what_the_cpu_computes(architecture, method, tmp_path):
    model = adapted(architecture, **METHODS[method])
    expected = logits(copy.deepcopy(model).cpu())
    near(logits(model), expected)
    assert {p.device.type for p in model.parameters()} == {torch.device(DEVICE).type}
    save_adapter(model, tmp_path)
    other = tiny.build(architecture).to(DEVICE)
    load_adapter(other, tmp_path)
    near(logits(other), expected)
    merge_adapter(model)
    near(logits(model), expected)
    unmerge_adapter(model)
    near(logits(model), expected)
    merge_and_unload(model)
    near(logits(model), expected)


def test_vera():
    model = tiny.build("llama").to(DEVICE)
    inject(model, VeraConfig(r=8, target_modules=["q_proj", "o_proj"]))
    tiny.randomize(model)
    near(logits(model), logits(copy.deepcopy(model).cpu()))


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("base", PACKED)
def test_packed_bases(base, method):
    """Against the same model with the packed weights made dense, in float64."""
    model, packed = adapted("llama", base, **METHODS[method]), PACKED[base]
    before, dense = {n: t.clone() for n, t in model.state_dict().items()}, tiny.build("llama").to(DEVICE)
    with torch.no_grad():
        layers = tiny.build("llama").to(DEVICE)
        packed(layers)
        for path, layer in layers.named_modules():
            if is_packed(layer):
                dense.get_submodule(path).weight.copy_(dense_weight(layer))
    inject(dense, LoraConfig(r=4, target_modules=tiny.projections("llama"), **METHODS[method]))
    tiny.randomize(dense)
    # NF4's own kernel for one row of x, and LLM.int8's products, round by themselves.
    near(logits(model), logits(dense.double()).float(), 1e-4 if base == "nf4" else 5e-2)
    x = tiny.TOKENS.to(DEVICE)
    model(input_ids=x, labels=x).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable_parameters(model))
    merge_adapter(model, allow_loss=True)
    unmerge_adapter(model)
    after = model.state_dict()
    assert all(torch.equal(t, after[n]) for n, t in before.items())


@pytest.mark.parametrize("base", PACKED)
def test_packed_on_the_cpu_it_moves_to_the_gpu_and_back(base):
    model = tiny.build("llama")
    PACKED[base](model)
    expected, held = logits(model), {p: dense_weight(m) for p, m in model.named_modules() if is_packed(m)}
    model.to(DEVICE)
    assert held and all((dense_weight(model.get_submodule(p)).cpu() - W).abs().max() <= 1e-6 for p, W in held.items())
    near(logits(model), expected, 1e-4 if base == "nf4" else 5e-2)
    assert torch.equal(logits(model.cpu()), expected)


def test_the_same_bytes_are_packed_on_both():
    here, there = tiny.build("llama"), tiny.build("llama").to(DEVICE)
    quantize_nf4(here), quantize_nf4(there)
    one, other = here.state_dict(), there.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if tensor.dtype == torch.uint8 and "quant_state" not in name and "nested" not in name:
            # A value on the edge of two levels, or a scale: 8 bits of a float32 that was summed in another order.
            wrong = (tensor.int() - other[name].cpu().int()).abs()
            assert wrong.max() <= 1 if "absmax" in name else (wrong != 0).sum() <= tensor.numel() * 1e-3, name


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("inside", ["nothing", "reentrant", "checkpoint"])
def test_gradients_use_the_masks_of_the_forward(inside, shared):
    """By finite differences along one direction, the generator put back before each forward."""
    model = tiny.classifier(torch.float64).to(DEVICE)
    inject(model, LoraConfig(r=4, lora_dropout=0.3, target_modules=["q", "k", "v", "out"]))
    tiny.randomize(model).train()
    if shared:
        assert share_dropout_masks(model) == 8
    x = tiny.batch(torch.float64).to(DEVICE).requires_grad_()

    def run(x):
        if inside == "nothing":
            return model(x)
        for block in model.layers:
            x = checkpoint(block, x, use_reentrant=inside == "reentrant")
        return model.classifier(model.norm(x))

    def total():
        torch.manual_seed(5)
        return run(x).sin().sum()

    total().backward()
    for parameter in [x, *trainable_parameters(model)]:
        way, step, sums = torch.cos(torch.arange(parameter.numel()).to(parameter)).view_as(parameter), 1e-5, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * way)
            sums.append(total().detach())
            with torch.no_grad():
                parameter.sub_(sign * step * way)
        torch.testing.assert_close((parameter.grad * way).sum(), (sums[0] - sums[1]) / (2 * step), rtol=1e-5, atol=1e-6)


def test_masks_drop_as_often_as_they_say():
    for p in (0.01, 0.1, 0.5, 0.9):
        mask, kept, source = draw_keep_mask((1000, 1000), p, torch.device(DEVICE))
        assert abs(kept - (1 - p)) <= 2**-9  # 8 bits of p
        assert abs(mask.float().mean().item() - kept) < 5 * (p * (1 - p) / 1e6) ** 0.5
        torch.rand(10, device=DEVICE)
        assert torch.equal(same_keep_mask(source, (1000, 1000), p, mask.device), mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_bases_keep_the_updates_precision(dtype):
    """One layer: the update and its gradients in float32, what comes out rounded once."""
    torch.manual_seed(0)
    layer, x, dy = nn.Linear(64, 48), torch.randn(20, 64), torch.randn(20, 48)
    layer, x, dy = layer.to(DEVICE, dtype), x.to(DEVICE, dtype).requires_grad_(), dy.to(DEVICE, dtype)
    model = nn.Sequential(layer)
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules=["0"]))
    tiny.randomize(model)
    A, B = (table["default"] for table in (model[0].lora_A, model[0].lora_B))
    A, B = (getattr(factor, "weight", factor) for factor in (A, B))
    tensors = {"x": x, "W": model[0].weight, "b": model[0].bias, "A": A, "B": B}
    tensors = {name: t.detach().cpu() for name, t in tensors.items()}
    y, gradients = oracle.lora_linear_and_gradients(tensors, 2.0, dy.cpu())
    found = model(x)
    found.backward(dy)
    assert found.dtype == dtype and A.grad.dtype == B.grad.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    near(found.detach().cpu().double(), y, 4 * eps)
    near(A.grad.cpu().double(), gradients["A"], 1e-5)
    near(B.grad.cpu().double(), gradients["B"], 1e-5)
    near(x.grad.cpu().double(), gradients["x"], 4 * eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [None, "nf4"])
def test_training_lowers_the_loss_under_autocast(base, dtype):
    model = adapted("llama", base, lora_dropout=0.05).train()
    x = tiny.TOKENS.to(DEVICE)
    optimizer = torch.optim.AdamW(trainable_parameters(model), 1e-2, fused=True)
    scaler, losses = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16), []
    for _ in range(15):
        with torch.autocast(DEVICE, dtype):
            loss = model(input_ids=x, labels=x).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert torch.nn.utils.clip_grad_norm_(trainable_parameters(model), 1.0).isfinite()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True, "lora_bias": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_what_peft_computes(dtype, settings, tmp_path):
    model = tiny.build("llama").to(DEVICE, dtype)
    inject(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **settings))
    tiny.randomize(model)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny.build("llama").to(DEVICE, dtype), tmp_path)
    near(logits(model), logits(theirs), 1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=str)
def test_mixed_batches(settings):
    model = adapted("llama", **settings)
    inject(model, LoraConfig(r=8, target_modules=["q_proj"]), "other")
    tiny.randomize(model, "other", seed=5)
    alone = []
    for name in ("default", "other"):
        set_adapter(model, name)
        alone.append(logits(model))
    with disable_adapters(model):
        alone.append(logits(model))
    with mixed_batch(model, ["default", "other", None]):
        found = logits(model)
    for row in range(3):
        near(found[row], alone[row][row])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("base", [None, "nf4"])
def test_large_inputs_meet_the_factors_in_halves(base, dropout, monkeypatch):
    """bfloat16 beside A and B in float32: what is multiplied in halves is what is multiplied in float32."""
    found = {}
    for large in (2**62, 0):
        monkeypatch.setattr(gpu_thin, "LARGE", large)
        model = tiny.build("llama").to(DEVICE, torch.bfloat16)
        if base:
            PACKED[base](model)
        inject(model, LoraConfig(r=4, lora_dropout=dropout, target_modules=tiny.projections("llama")))
        tiny.randomize(model)
        torch.manual_seed(3)
        x = tiny.TOKENS.to(DEVICE)
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        found[large] = [loss.detach(), *(p.grad for p in trainable_parameters(model))]
    for float32, halves in zip(found[2**62], found[0], strict=True):
        near(halves, float32, 0.02)  # the roundings of y and dx to bfloat16, through the layers


def test_products_in_halves_are_exact_to_16_bits(monkeypatch):
    monkeypatch.setattr(gpu_thin, "LARGE", 0)
    torch.manual_seed(0)
    x = torch.randn(4096, 2048, device=DEVICE).bfloat16()
    A, h = torch.randn(16, 2048, device=DEVICE), torch.randn(4096, 16, device=DEVICE)
    x64, A64, h64 = x.double(), A.double(), h.double()
    near(gpu_thin.narrow(x, A).double(), x64 @ A64.t(), 2**-15)
    near(gpu_thin.tall(x, h).double(), x64.t() @ h64, 2**-15)


def test_compiled():
    model = adapted("llama", lora_dropout=0.0)
    expected, x = logits(model), tiny.TOKENS.to(DEVICE)
    model(input_ids=x, labels=x).loss.backward()
    gradients = [p.grad.clone() for p in trainable_parameters(model)]
    model.zero_grad()
    compiled = torch.compile(model)
    near(compiled(input_ids=x).logits.detach().cpu(), expected, 1e-4)
    compiled(input_ids=x, labels=x).loss.backward()
    for p, expected in zip(trainable_parameters(model), gradients, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-3, atol=1e-5)


def test_starts_fits_and_combinations_that_use_an_svd():
    model = tiny.build("llama").to(DEVICE)
    base = copy.deepcopy(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.add_(torch.randn_like(layer.mlp.up_proj.weight) * 0.1)
    tuned = logits(model)
    extract_adapter(base, model, LoraConfig(r=32, target_modules=["up_proj"]))
    near(logits(base), tuned, 1e-4)
    model = adapted("llama")
    inject(model, LoraConfig(r=4, target_modules=tiny.projections("llama")), "other")
    tiny.randomize(model, "other", seed=4)
    for method in ("linear", "svd", "ties"):
        density = {"density": 0.5} if method == "ties" else {}
        combine_adapters(model, ["default", "other"], [0.5, 0.5], f"by_{method}", method, **density)
    assert all(p.device.type == torch.device(DEVICE).type for p in model.parameters())


def test_offloaded_by_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model = tiny.build("llama")
    plan = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.norm": 0, "model.rotary_emb": 0}
    model = accelerate.dispatch_model(model, {**plan, "lm_head": 0}, main_device=0)
    inject(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    tiny.randomize(model)
    plain = tiny.build("llama").to(DEVICE)
    inject(plain, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    tiny.randomize(plain)
    x = tiny.TOKENS.to(DEVICE)
    near(model(input_ids=x).logits.detach().cpu(), logits(plain))
    for each in (model, plain):
        each(input_ids=x, labels=x).loss.backward()
    for mine, other in zip(trainable_parameters(model), trainable_parameters(plain), strict=True):
        torch.testing.assert_close(mine.grad.to(DEVICE), other.grad, rtol=1e-4, atol=1e-6)


def test_a_base_that_transformers_loads_in_4_bits(tmp_path):
    tiny.build("llama").save_pretrained(tmp_path / "base")
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "base", quantization_config=quantization, device_map={"": 0})
    inject(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    tiny.randomize(model)
    save_adapter(model, tmp_path / "adapter")
    theirs = load(tmp_path / "base", quantization_config=quantization, device_map={"": 0})
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    near(logits(model), logits(theirs), 1e-4)
    tokens = tiny.TOKENS[:, :4].to(DEVICE)
    ours = model.generate(input_ids=tokens, max_new_tokens=8, do_sample=False)
    assert torch.equal(ours, theirs.generate(input_ids=tokens, max_new_tokens=8, do_sample=False))


def test_the_fast_layers_leave_a_gpu_alone():
    model, plain = tiny.build("bert").to(DEVICE).train(), tiny.build("bert").to(DEVICE).train()
    use_fast_linear(model), use_fast_dropout(model)
    x = tiny.TOKENS.to(DEVICE)
    near(logits(model.eval()), logits(plain.eval()))
    model.train()(input_ids=x).logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_generators_state_is_left_and_seeds_repeat():
    model, x = adapted("llama", lora_dropout=0.5).train(), tiny.TOKENS.to(DEVICE)
    torch.manual_seed(1)
    first = model(input_ids=x).logits
    second = model(input_ids=x).logits
    torch.manual_seed(1)
    assert torch.equal(model(input_ids=x).logits, first) and not torch.equal(second, first)


def test_no_more_than_the_thin_products_are_kept():
    """What a layer keeps on the device for its backward, x aside: h, (T, r). No mask, no dropped copy, none of x in 32 bits."""
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Sequential(nn.Linear(1024, 1024, bias=False)).to(DEVICE, dtype)
        inject(model, LoraConfig(r=8, lora_dropout=0.1, target_modules=["0"]))
        x = torch.randn(4096, 1024, device=DEVICE, dtype=dtype)
        model(x)
        before = torch.cuda.memory_allocated()
        y = model(x)
        kept = torch.cuda.memory_allocated() - before - y.nbytes
        assert kept <= 4096 * 8 * 4 + 4096


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_large_bfloat16_tensors_keep_the_updates_precision(dropout):
    """Against float64, the base's own product aside: gradients of A and B to 2^-14, outputs rounded once."""
    torch.manual_seed(0)
    T, d = 2**14, 1024
    model = nn.Sequential(nn.Linear(d, d, bias=False)).to(DEVICE, torch.bfloat16)
    inject(model, LoraConfig(r=8, lora_alpha=8, lora_dropout=dropout, target_modules=["0"]))
    tiny.randomize(model)
    x = torch.randn(T, d, device=DEVICE).bfloat16().requires_grad_()
    dy = torch.randn(T, d, device=DEVICE).bfloat16()
    torch.manual_seed(1)
    y = model(x)
    y.backward(dy)
    torch.manual_seed(1)
    mask = draw_keep_mask((T, d), dropout, x.device) if dropout else KeepMask(torch.ones(T, d, device=DEVICE), 1.0, x)
    A, B = (p.detach().double() for p in trainable_parameters(model))
    W, x64, dy64 = model[0].weight.double(), x.detach().double(), dy.double()
    s, keep = 1 / mask.kept, mask.keep.double()
    xd = x64 * keep
    update = s * xd @ A.t() @ B.t()
    base = torch.nn.functional.linear(x, model[0].weight).detach().double()
    assert ((y.detach().double() - (base + update)).abs() <= 2**-8 * (base + update).abs() + 1e-4).all()
    dA, dB = s * (dy64 @ B).t() @ xd, s * dy64.t() @ (xd @ A.t())
    for parameter, expected in zip(trainable_parameters(model), (dA, dB), strict=True):
        assert (parameter.grad.double() - expected).norm() <= 2**-14 * expected.norm()
    dx = dy64 @ W + s * keep * (dy64 @ B @ A)
    assert (x.grad.double() - dx).norm() <= 2**-7 * dx.norm()
