"""Parameters with adapters, fused experts above all: what the host's forward reads, and what is refused.

The equation, gradients, files, folding and unloading are in the contract (`tests/support/cases.py`).
"""

import copy
import io
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from lora_core import (
    LoraConfig,
    combine_adapters,
    count_parameters,
    delete_adapter,
    disable_adapters,
    inject,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    mixed_batch,
    quantize_nf4,
    rename_adapter,
    save_adapter,
    set_adapter,
    trainable_parameters,
    unload,
    unmerge_adapter,
)
from lora_core.errors import LoraError, StateError, TargetError
from lora_core.maths.updated import UpdatedWeight
from tests.support import experts, tiny
from tests.support.experts import build, config, logits

BOTH = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def alone(**settings):
    torch.manual_seed(0)
    model = experts.layer()
    inject(model, LoraConfig(**{"r": 2, "lora_alpha": 3} | BOTH | settings))
    return tiny.randomize(model)


def read():
    torch.manual_seed(1)
    return torch.randn(5, 8)


def test_the_module_stays_what_it_is():
    plain, model = experts.layer(), alone()
    module, kind = model["experts"], type(plain["experts"])
    assert isinstance(module, kind) and isinstance(module.gate_up_proj, nn.Parameter)
    added = {key for key in model.state_dict() if key not in plain.state_dict()}
    names = [f"{name}.{table}" for name in ("gate_up_proj", "down_proj") for table in ("lora_A", "lora_B")]
    assert added == {f"experts.lora_weights.{name}.default" for name in names}
    A, B = module.lora_weights["gate_up_proj"].lora_A["default"], module.lora_weights["gate_up_proj"].lora_B["default"]
    assert A.shape == (4 * 2, 8) and B.shape == (24, 2 * 4)
    counts, size = count_parameters(model), sum(p.numel() for p in trainable_parameters(model))
    assert counts.adapter == counts.trainable == size == 2 * 4 * (8 + 24 + 12 + 8)
    unload(model)
    assert type(module) is kind and model.state_dict().keys() == plain.state_dict().keys()


def test_each_expert_starts_by_itself():
    torch.manual_seed(0)
    model = experts.layer()
    inject(model, LoraConfig(r=4, init_lora_weights="gaussian", **BOTH))
    A = model["experts"].lora_weights["gate_up_proj"].lora_A["default"].view(4, 4, 8)
    assert len({round(a.sum().item(), 5) for a in A}) == 4
    assert 0.15 < A.std() < 0.35  # 1 / r, and not 1 / (4 r)


def test_only_the_forward_reads_more_than_the_base_and_only_in_its_thread():
    model, seen = alone(), {}
    module, base = model["experts"], model["experts"].gate_up_proj
    plain = type(module).__mro__[2].forward

    def forward(self, *args):
        seen["inside"] = self.gate_up_proj
        other = threading.Thread(target=lambda: seen.update(beside=self.gate_up_proj))
        other.start()
        other.join()
        return plain(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(module).__mro__[2], "forward", forward)
        experts.run(model, read())
    assert isinstance(seen["inside"], UpdatedWeight) and seen["beside"] is base
    assert module.gate_up_proj is base and not module.lora_read


def test_nothing_is_left_behind_by_a_forward_that_fails():
    model = alone()
    with pytest.raises(RuntimeError):
        model["experts"](torch.randn(5, 9), torch.zeros(5, 2, dtype=torch.long), torch.ones(5, 2))
    assert not model["experts"].lora_read


def test_several_adapters_add_up_and_are_switched():
    model, x = alone(), read()
    with torch.no_grad():
        W = {name: p.double() for name, p in model["experts"].named_parameters(recurse=False)}
        inject(model, LoraConfig(r=3, lora_alpha=2, **BOTH), "b")
        tiny.randomize(model, "b", seed=7)
        one = experts.run(model, x)
        set_adapter(model, ["default", "b"])
        both = experts.run(model, x)
        plain = experts.layer().double()
        for name, value in W.items():
            slot = model["experts"].lora_weights[name]
            for adapter, s in (("default", 3 / 2), ("b", 2 / 3)):
                A, B = slot.lora_A[adapter].double(), slot.lora_B[adapter].double()
                value = value + s * torch.einsum("ore,eri->eoi", B.view(len(B), -1, 4), A.view(4, -1, A.shape[1]))
            plain["experts"]._parameters[name].data = value
        torch.testing.assert_close(both.double(), experts.run(plain, x.double()), rtol=0, atol=1e-5)
        merge_adapter(model)
        torch.testing.assert_close(experts.run(model, x), both, rtol=0, atol=1e-5)
        unmerge_adapter(model)
        assert torch.equal(experts.run(model, x), both)
        set_adapter(model, "default")
        assert torch.equal(experts.run(model, x), one)
        rename_adapter(model, "b", "c")
        delete_adapter(model, "c")
        assert torch.equal(experts.run(model, x), one)
        torch.manual_seed(0)
        with disable_adapters(model):
            assert torch.equal(experts.run(model, x), experts.run(experts.layer(), x))


def test_an_adapter_may_be_on_one_parameter_and_another_on_the_other():
    model, x = alone(target_parameters=["down_proj"]), read()
    first = experts.run(model, x)
    inject(model, LoraConfig(r=2, target_modules=[], target_parameters=["gate_up_proj"]), "b")
    tiny.randomize(model, "b")
    set_adapter(model, ["default", "b"])
    assert not torch.allclose(experts.run(model, x), first)
    set_adapter(model, "default")
    delete_adapter(model, "b")
    assert torch.equal(experts.run(model, x), first) and list(model["experts"].lora_weights) == ["down_proj"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: torch.load(saved(model), weights_only=False)])
def test_copies_compute_the_same(copied):
    model, x = alone(), read()
    other = copied(model)
    assert torch.equal(experts.run(other, x), experts.run(model, x))
    assert other["experts"].lora_weights["down_proj"].weight is other["experts"].down_proj
    unload(other)
    assert type(other["experts"]) is type(experts.layer()["experts"])


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(implementation, reentrant):
    grads = []
    for checkpointed in (False, True):
        model = build(implementation=implementation)
        inject(model, config())
        tiny.randomize(model).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(experts.TOKENS, labels=experts.TOKENS).loss.backward()
        grads.append([p.grad for p in trainable_parameters(model)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_a_training_step_keeps_no_copy_of_the_experts(implementation):
    """What autograd keeps besides the base's own tensors is of the size of what was read, not of the experts."""
    model = experts.layer(implementation=implementation)
    x = read().requires_grad_()
    inject(model, LoraConfig(r=2, **BOTH))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
        experts.run(model, x)
    sizes = [t.untyped_storage().nbytes() // 4 for place, t in kept.items() if place not in own]
    assert max(sizes) < model["experts"].gate_up_proj.numel() // 2


def test_a_compiled_model_computes_the_same():
    model = build(implementation="grouped_mm")
    inject(model, config())
    tiny.randomize(model)
    expected = logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), expected, rtol=0, atol=1e-5)


def test_under_autocast_and_beside_a_sixteen_bit_base():
    model = build().bfloat16()
    inject(model, config())
    tiny.randomize(model)
    wide = {p.dtype for p in trainable_parameters(model)}
    exact = copy.deepcopy(model).float()
    assert wide == {torch.float32} and logits(model).dtype == torch.bfloat16
    # Two layers of sums of some 50 bfloat16 terms, each within 2^-9 of its value.
    torch.testing.assert_close(logits(model).float(), logits(exact), rtol=0, atol=50 * 2**-9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = exact(experts.TOKENS, labels=experts.TOKENS).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable_parameters(exact))


def test_the_layers_around_them_may_be_in_four_bits(tmp_path):
    model = build()
    quantize_nf4(model)
    report = inject(model, config(target_modules=["q_proj"]))
    tiny.randomize(model)
    assert len(report.targets) == 6
    expected = logits(model)
    save_adapter(model, tmp_path)
    other = build()
    quantize_nf4(other)
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), expected)
    merge_and_unload(other)
    torch.testing.assert_close(logits(other), expected, rtol=0, atol=1e-4)


REFUSED = {
    "dropout": ({"lora_dropout": 0.1}, "no input for lora_dropout=0.1 to act on; set it to 0"),
    "DoRA": ({"use_dora": True}, "leave use_dora=True out"),
    "a bias of B": ({"lora_bias": True}, "leave lora_bias=True out"),
    "biases": ({"bias": "all"}, "no place for bias='all'"),
    "a start from the weight": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' can't start"),
    "an orthogonal start": ({"init_lora_weights": "orthogonal"}, "init_lora_weights='orthogonal' can't start"),
    "layers by number": ({"target_modules": ["q_proj"], "layers_to_transform": [0]}, "layers_to_transform chooses among"),
    "an excluded module": ({"exclude_modules": ["experts"]}, "exclude_modules excludes a module around"),
    "a vector": ({"target_parameters": ["input_layernorm.weight"]}, "it has 1 dimensions; a matrix has 2"),
    "a misspelt name": ({"target_parameters": ["experts.gate_upproj"]}, "closest: 'experts.gate_up_proj' (2 parameters)"),
    "a module": ({"target_parameters": ["mlp.experts"]}, "matched no parameter"),
    "twice": ({"target_modules": ["q_proj"], "target_parameters": ["q_proj.weight"]}, "which target_modules names too"),
    "a string": ({"target_parameters": "gate_up_proj"}, "target_parameters must be a list of names"),
    "fused names as modules": ({"target_modules": ["gate_up_proj"], "target_parameters": None}, "goes in target_parameters"),
    "as an expression": ({"target_modules": ".*down_proj", "target_parameters": None}, "goes in target_parameters"),
    "names of transformers 4": ({"target_modules": ["w1"], "target_parameters": None}, "transformers 5 holds experts in"),
    "the module around": ({"target_modules": ["experts"], "target_parameters": None}, "name gate_up_proj and down_proj in"),
    "nothing": ({"target_parameters": None, "target_modules": []}, "target_modules is an empty list"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_refused_in_a_line_and_changes_nothing(case):
    settings, message = REFUSED[case]
    model = build()
    before = tiny.snapshot(model)
    with pytest.raises(LoraError) as error:
        inject(model, config(**settings))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert tiny.snapshot(model) == before


def test_what_a_layer_or_another_library_holds_is_refused():
    lstm = nn.ModuleDict({"lstm": nn.LSTM(4, 4), "linear": nn.Linear(4, 4)})
    with pytest.raises(TargetError, match="keeps a list of its weights"):
        inject(lstm, LoraConfig(target_modules=[], target_parameters=["lstm.weight_ih_l0"]))
    inject(lstm, LoraConfig(target_modules=["linear"]))
    with pytest.raises(TargetError, match="carries an adapter itself"):
        inject(lstm, LoraConfig(target_modules=[], target_parameters=["linear.weight"]), "b")
    packed = nn.ModuleDict({"linear": nn.Linear(64, 64)})
    quantize_nf4(packed)
    with pytest.raises(TargetError, match="on dense floating-point values"):
        inject(packed, LoraConfig(target_modules=[], target_parameters=["linear.weight"]))
    own = nn.Linear(4, 4)
    with pytest.raises(TargetError, match="the model's own"):
        inject(own, LoraConfig(target_modules=[], target_parameters=["weight"]))
    patched = experts.layer()
    patched["experts"].forward = lambda *args: None
    with pytest.raises(TargetError, match="target_parameters: 'experts.gate_up_proj' has a forward of its own"):
        inject(patched, LoraConfig(**BOTH))
    shared = nn.ModuleDict({"a": nn.Linear(4, 4)})
    shared["b"] = shared["a"]
    with pytest.raises(TargetError, match="are one module"):
        inject(shared, LoraConfig(target_modules=[], target_parameters=["a.weight"]))


def test_verbs_that_need_layers_refuse_parameters_by_name():
    model = alone()
    inject(model, LoraConfig(r=2, **BOTH), "b")
    model.eval()
    with pytest.raises(LoraError, match=r"experts\.gate_up_proj.*rows share a weight"), mixed_batch(model, ["default", "b"]):
        pass
    with pytest.raises(LoraError, match=r"experts\.gate_up_proj"):
        combine_adapters(model, ["default", "b"], [1, 1], "c")
    with pytest.raises(TargetError, match="an adapter is on a parameter of it"):
        inject(model, LoraConfig(target_modules=["experts"]), "c")


def test_in_a_mixed_batch_of_others_the_experts_are_the_base_s():
    model = build()
    inject(model, config())
    tiny.randomize(model)
    inject(model, LoraConfig(r=2, target_modules=["q_proj"]), "q")
    tiny.randomize(model, "q")
    set_adapter(model, "q")
    expected = logits(model)
    set_adapter(model, "default")
    with mixed_batch(model, ["q", "q"]):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


def test_a_parameter_that_is_pruned_afterwards_is_refused_not_missed():
    model = alone()
    prune.l1_unstructured(model["experts"], "down_proj", 0.5)
    for call in (lambda: experts.run(model, read()), lambda: merge_adapter(model)):
        with pytest.raises(StateError, match="the down_proj of a MixtralExperts is computed from other tensors"):
            call()


def test_names_of_layers_that_experts_have_fused_are_not_missed_without_a_word():
    model = build("qwen2")  # its shared expert has layers of these names
    with pytest.warns(UserWarning, match=r"leaves out .*experts\.gate_up_proj .*target_parameters=\['experts.gate_up_proj'\]"):
        report = inject(model, LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"]))
    assert len(report.left_out) == 4 and all("shared_expert" in path for path in report.targets)


def test_all_linear_says_how_to_target_them_and_not_of_those_that_are():
    model = build()
    with pytest.warns(UserWarning, match=r'="all-linear" leaves out .*target_parameters=\[\'experts.gate_up_proj\'\]'):
        report = inject(model, LoraConfig(r=2, target_modules="all-linear", target_parameters=["experts.down_proj"]))
    assert {path.rpartition(".")[2] for path in report.left_out} == {"gate_up_proj", "lm_head"}


class Host(nn.Module):
    """A module that multiplies by a parameter of its own, in a way of its own."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.w, self.way = nn.Parameter(torch.randn(2, 4, 3)), way

    def forward(self, x, depth=1):
        return self.way(self, x, depth)


def hosted(way):
    model = nn.ModuleDict({"host": Host(way)})
    inject(model, LoraConfig(r=2, target_modules=[], target_parameters=["host.w"]))
    return tiny.randomize(model)


def test_a_forward_that_calls_itself_reads_its_adapters_after_that():
    model = hosted(lambda self, x, depth: (self(x, depth - 1) if depth else 0) + x @ self.w[0])
    x = torch.randn(5, 4)
    found = model["host"](x).detach()
    merge_and_unload(model)
    torch.testing.assert_close(found, model["host"](x).detach(), rtol=0, atol=1e-5)


def test_a_checkpoint_inside_of_the_forward_is_refused_not_wrong():
    inside = hosted(lambda self, x, depth: checkpoint(lambda x: x @ self.w[0], x, use_reentrant=True))
    y = inside["host"](torch.randn(5, 4, requires_grad=True))
    with pytest.raises(StateError, match="put the checkpoint around the module"):
        y.sum().backward()


def test_the_weight_that_attention_reads_by_itself_is_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(TargetError, match="name the attention, in target_modules"):
        inject(model, LoraConfig(target_modules=[], target_parameters=["out_proj.weight"]))
