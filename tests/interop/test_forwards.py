"""A forward on the instance: accelerate's hooks and offloading, compiled and patched forwards."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import attach_execution_device_hook, remove_hook_from_module
from torch import nn

from lora_core import (
    LoraConfig,
    disable_adapters,
    extract_adapter,
    inject,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    quantize_nf4,
    save_adapter,
    set_adapter,
    unload,
    unmerge_adapter,
    use_fast_dropout,
    use_fast_linear,
)
from lora_core.cpu.dropout import FastDropout
from lora_core.cpu.products import FastLinear
from lora_core.errors import StateError, TargetError
from lora_core.files.storage import adapter_tensors
from tests.support import tiny

X = tiny.batch()
SETTINGS = {"r": 2, "target_modules": ["q", "v"], "init_lora_weights": False}


def hooked():
    """What `dispatch_model` does to a model on several devices."""
    model = tiny.classifier()
    attach_execution_device_hook(model, "cpu")
    return model


def offloaded(tmp_path, kind):
    model = tiny.classifier().eval()
    if kind == "cpu":
        return cpu_offload(model, torch.device("cpu"))
    disk_offload(model, str(tmp_path / "weights"), torch.device("cpu"))
    return model


def adapted(model, seed=3, **settings):
    inject(model, LoraConfig(**{**SETTINGS, **settings}))
    return tiny.randomize(model, seed=seed)


def gradients(model, x=X):
    model(x).square().sum().backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


# --- accelerate's hooks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["classifier"]}, {"bias": "all"}, {"use_dora": True}])
def test_an_adapter_works_inside_accelerates_hooks(settings):
    model, plain = adapted(hooked(), **settings), adapted(tiny.classifier(), **settings)
    assert hasattr(model.layers[0].q, "_hf_hook") and torch.equal(model(X), plain(X))
    for mine, theirs in zip(gradients(model), gradients(plain), strict=True):
        assert torch.equal(mine, theirs)


def test_the_hooks_run_around_the_adapters_forward():
    model = hooked()
    inject(model, LoraConfig(**SETTINGS))
    seen, hook = [], model.layers[0].q._hf_hook
    before, after = hook.pre_forward, hook.post_forward
    hook.pre_forward = lambda module, *args, **kwargs: seen.append("before") or before(module, *args, **kwargs)
    hook.post_forward = lambda module, output: seen.append("after") or after(module, output)
    model(X)
    assert seen == ["before", "after"]


def test_unloading_gives_the_hooked_layer_back():
    model = hooked()
    expected, before = model(X), tiny.snapshot(model)
    for verb in (unload, merge_and_unload):
        other = copy.deepcopy(model)
        inject(other, LoraConfig(r=2, target_modules=["q"]))
        verb(other)
        assert torch.equal(other(X), expected) and type(other.layers[0].q) is nn.Linear
        assert other.layers[0].q._old_forward.__func__ is nn.Linear.forward
    inject(model, LoraConfig(r=2, target_modules=["q"]))
    unload(model)
    assert tiny.snapshot(model) == before


def test_verbs_on_a_hooked_model(tmp_path):
    model = adapted(hooked())
    output, base = model(X), tiny.classifier()(X)
    with disable_adapters(model):
        assert torch.equal(model(X), base)
    save_adapter(model, tmp_path)
    merge_adapter(model)
    torch.testing.assert_close(model(X), output)
    unmerge_adapter(model)
    assert torch.equal(model(X), output)
    other = hooked()
    load_adapter(other, tmp_path)
    assert torch.equal(other(X), output)


def test_hooks_that_come_and_go_after_injection():
    model = adapted(tiny.classifier())
    output = model(X)
    attach_execution_device_hook(model, "cpu")
    assert torch.equal(model(X), output)
    set_adapter(model, [])
    assert torch.equal(model(X), tiny.classifier()(X))
    set_adapter(model, "default")
    remove_hook_from_module(model, recurse=True)  # leaves the bound forward of the class on the instance
    assert torch.equal(model(X), output)
    unload(model)
    assert torch.equal(model(X), tiny.classifier()(X))
    inject(model, LoraConfig(**SETTINGS))
    assert not torch.equal(model(X), tiny.classifier()(X))


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_offloaded_weights_train_as_those_in_memory(tmp_path, kind):
    model = offloaded(tmp_path, kind)
    assert model.layers[0].q.weight.is_meta
    inject(model, LoraConfig(r=2, target_modules=["q", "v"]))
    tiny.randomize(model)
    layer = model.layers[0].q
    assert layer.weight.is_meta and layer.lora_A["default"].device.type == "cpu"
    plain = adapted(tiny.classifier().eval(), init_lora_weights=True)
    assert torch.equal(model(X), plain(X)) and layer.weight.is_meta
    for mine, expected in zip(gradients(model), gradients(plain), strict=True):
        assert torch.equal(mine, expected)
    save_adapter(model, tmp_path / "adapter")
    other = offloaded(tmp_path, kind)
    load_adapter(other, tmp_path / "adapter")  # the fingerprint is read from where the weights are
    assert torch.equal(other(X), model(X))
    unload(other)
    assert torch.equal(other(X), tiny.classifier().eval()(X))


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_offloaded_weights_can_be_started_from(tmp_path, settings):
    model, plain = offloaded(tmp_path, "cpu"), tiny.classifier().eval()
    for m in (model, plain):
        inject(m, LoraConfig(**{**SETTINGS, "init_lora_weights": True, **settings}))
        tiny.randomize(m)
    torch.testing.assert_close(model(X), plain(X))


def test_what_offloaded_weights_do_not_allow_is_refused_by_name(tmp_path):
    model = offloaded(tmp_path, "cpu")
    with pytest.raises(StateError, match=r"modules_to_save: classifier: accelerate offloads"):
        inject(model, LoraConfig(modules_to_save=["classifier"], **SETTINGS))
    assert torch.equal(model(X), tiny.classifier().eval()(X))
    adapted(model)
    output = model(X)
    for merge in (merge_adapter, merge_and_unload):
        with pytest.raises(StateError, match="accelerate offloads"):
            merge(model)
        assert torch.equal(model(X), output)


VARIANTS = [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"modules_to_save": ["classifier"]}]


@pytest.mark.parametrize("settings", VARIANTS)
def test_a_model_that_was_offloaded_after_injection_runs_and_says_that_it_can_not_be_trained(settings):
    model = adapted(tiny.classifier().eval(), **settings)
    expected = model(X).detach()
    cpu_offload(model, torch.device("cpu"))
    assert model.layers[0].q.lora_A["default"].is_meta
    with torch.no_grad():
        assert torch.equal(model(X), expected)
    if settings in VARIANTS[:1]:
        plain = adapted(tiny.classifier().eval())
        for name, tensor in adapter_tensors(model).items():
            assert torch.equal(tensor, adapter_tensors(plain)[name])
    with pytest.raises(StateError, match="were offloaded with the model, and can't be trained; offload first"):
        model(X)


def test_copies_that_were_offloaded_after_injection_are_not_switched():
    """The hook would bring back the tensor that was in place when it came."""
    model = tiny.classifier().eval()
    for i, name in enumerate("ab"):
        inject(model, LoraConfig(modules_to_save=["classifier"], **SETTINGS), name)
        tiny.randomize(model, name, seed=i)
    cpu_offload(model, torch.device("cpu"))
    with torch.no_grad():
        output = model(X)
        with pytest.raises(StateError, match="switching what adapters train whole would not reach them"):
            set_adapter(model, "b")
        assert torch.equal(model(X), output)


def test_meta_weights_are_refused_where_values_are_needed(tmp_path):
    with torch.device("meta"):
        model = tiny.Classifier()
    inject(model, LoraConfig(r=2, target_modules=["q"]))
    extract = lambda m: extract_adapter(tiny.classifier(), tiny.Classifier().to("meta"), LoraConfig(target_modules=["q"]))  # noqa: E731
    for verb in (merge_adapter, merge_and_unload, lambda m: save_adapter(m, tmp_path / "out"), extract):
        with pytest.raises(StateError, match="on the meta device; load the model"):
            verb(model)
    assert not (tmp_path / "out").exists()
    save_adapter(adapted(tiny.classifier()), tmp_path / "adapter")
    with torch.device("meta"), pytest.raises(StateError, match="on the meta device"):
        load_adapter(tiny.Classifier(), tmp_path / "adapter")
    for settings in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(StateError, match="on the meta device"):
            inject(model, LoraConfig(r=2, target_modules=["v"], **settings), "other")


# --- other forwards -----------------------------------------------------------------------------------------------------


def compiled(layer):
    layer.forward = torch.compile(layer.forward, backend="eager")


def patched(layer):
    forward = layer.forward
    layer.forward = lambda x: forward(x) * 2


def borrowed(layer):
    layer.forward = nn.Linear(64, 64).forward


@pytest.mark.parametrize("put", [compiled, patched, borrowed])
def test_a_forward_that_would_hide_the_adapter_is_refused(put):
    model = tiny.classifier()
    put(model.layers[0].q)
    before, output = tiny.snapshot(model), model(X)
    with pytest.raises(TargetError, match=r"'layers\.0\.q' has a forward of its own on the instance"):
        inject(model, LoraConfig(**SETTINGS))
    assert tiny.snapshot(model) == before and torch.equal(model(X), output)


@pytest.mark.parametrize("compile_", [lambda m: m.compile(backend="eager"), lambda m: m.layers[0].q.compile(backend="eager")])
def test_a_model_or_layer_compiled_before_injection_applies_the_adapter(compile_):
    torch._dynamo.reset()
    model = tiny.classifier()
    compile_(model)
    base = model(X).detach()
    adapted(model)
    torch.testing.assert_close(model(X), adapted(tiny.classifier())(X))
    assert not torch.equal(model(X), base)


def test_a_patch_that_comes_after_injection_is_named_when_the_layer_is_given_back():
    model = adapted(tiny.classifier())
    patched(model.layers[0].q)
    output = model(X)
    with pytest.raises(TargetError, match="has a forward of its own on the instance"):
        unload(model)
    assert torch.equal(model(X), output)


def test_fast_layers_take_effect_inside_hooks_and_are_not_counted_where_they_would_not():
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 64), nn.Dropout(0.5))
    attach_execution_device_hook(model, "cpu")
    patched(model[2])
    patched(model[3])
    assert (use_fast_linear(model), use_fast_dropout(model)) == (1, 1)
    assert model[0]._old_forward.__func__ is FastLinear.forward and type(model[1]) is FastDropout
    assert type(model[2]) is nn.Linear and type(model[3]) is nn.Dropout
    assert model(X).shape == X.shape


@pytest.mark.parametrize("adapted_too", [False, True])
def test_4_bit_layers_inside_hooks(adapted_too):
    """What transformers makes of a 4-bit model over several devices: bitsandbytes' own layers, hooked."""
    import bitsandbytes as bnb

    model, plain = tiny.classifier(), tiny.classifier()
    for m in (model, plain):
        quantize_nf4(m)
        for layer in m.modules():
            if isinstance(layer, bnb.nn.Linear4bit):
                layer.__class__ = bnb.nn.Linear4bit
    attach_execution_device_hook(model, "cpu")
    targets = ["q", "v"] if adapted_too else ["q"]
    for m in (model, plain):
        adapted(m, target_modules=targets)
    assert torch.equal(model(X), plain(X))
    for mine, expected in zip(gradients(model), gradients(plain), strict=True):
        assert torch.equal(mine, expected)
    unload(model)
    assert type(model.layers[0].k) is bnb.nn.Linear4bit
    assert model.layers[0].k._old_forward.__func__ is bnb.nn.Linear4bit.forward
