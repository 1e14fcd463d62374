"""Several adapters on one model: switch, add up, disable, delete, unload, count."""

import copy

import pytest
import torch
import transformers
from torch import nn

from lora_core import (
    LoraConfig,
    base_weight_bytes,
    count_parameters,
    delete_adapter,
    disable_adapters,
    inject,
    lora_plus_groups,
    merge_adapter,
    merge_and_unload,
    mixed_batch,
    print_trainable_parameters,
    quantize_nf4,
    rename_adapter,
    save_adapter,
    set_adapter,
    trainable_parameters,
    unload,
    unmerge_adapter,
)
from lora_core.errors import AdapterNameError, ConfigError, StateError
from lora_core.model.registry import registry_of
from tests.support import tiny

X = tiny.batch()


def two_adapters(**settings):
    """A model with the random adapters "a" (active) and "b", of other layers and rank."""
    model = tiny.classifier()
    inject(model, LoraConfig(r=4, target_modules=["q", "v"], **settings), "a")
    inject(model, LoraConfig(r=2, lora_alpha=4, target_modules=["v", "out"], **settings), "b")
    return tiny.randomize(tiny.randomize(model, "a", seed=1), "b", seed=2)


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


# --- switching --------------------------------------------------------------------------------------------------------


def test_the_first_adapter_is_active_and_later_ones_wait():
    model = two_adapters()
    assert trained(model) == {f"layers.{i}.{n}.lora_{p}.a" for i in (0, 1) for n in "qv" for p in "AB"}


def test_switching_computes_what_a_model_with_that_adapter_alone_computes():
    model = two_adapters()
    outputs = {}
    for name in ("a", "b"):
        set_adapter(model, name)
        outputs[name] = model(X)
        alone = two_adapters()
        delete_adapter(alone, "a" if name == "b" else "b")
        set_adapter(alone, name)
        assert torch.equal(outputs[name], alone(X))
        assert {path.rpartition(".")[2] for path in trained(model)} == {name}
    assert not torch.allclose(outputs["a"], outputs["b"])


def test_several_active_adapters_add_their_updates():
    model, reference = two_adapters(), tiny.classifier()
    set_adapter(model, ["a", "b"])
    with torch.no_grad():
        for path, layer in model.named_modules():
            for name in getattr(layer, "lora_scaling", {}):
                weight = reference.get_submodule(path).weight
                weight += layer.lora_scaling[name] * layer.lora_B[name] @ layer.lora_A[name]
    # Float32 sums of 64 terms in another order, through two blocks.
    torch.testing.assert_close(model(X), reference(X), rtol=1e-4, atol=1e-5)


def test_order_and_repeats_of_names_do_not_matter():
    model = two_adapters()
    set_adapter(model, ["a", "b"])
    expected = model(X)
    set_adapter(model, ["b", "a", "b"])
    torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-6)


def test_an_unknown_name_changes_nothing_and_names_those_there_are():
    model = two_adapters()
    before = tiny.snapshot(model)
    for call in (lambda: set_adapter(model, ["b", "c"]), lambda: delete_adapter(model, "c"), lambda: merge_adapter(model, "c")):
        with pytest.raises(AdapterNameError, match="'c' on this model; it holds 'a', 'b'"):
            call()
    assert tiny.snapshot(model) == before


@pytest.mark.parametrize(
    "call",
    [lambda m: set_adapter(m, "a"), lambda m: delete_adapter(m, "a"), unload, merge_adapter, unmerge_adapter]
    + [lambda m: disable_adapters(m).__enter__(), lambda m: save_adapter(m, "never-made")],
)
def test_verbs_on_a_plain_model_say_so(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterNameError, match=r"holds no adapters; call inject\(\)"):
        call(tiny.classifier())
    assert not list(tmp_path.iterdir())


# --- disabling --------------------------------------------------------------------------------------------------------


def test_disabled_is_the_base_bit_for_bit_and_comes_back_after_an_error():
    model, base = two_adapters(modules_to_save=["classifier"]), tiny.classifier()
    adapted, before = model(X), tiny.snapshot(model)
    with disable_adapters(model):
        assert torch.equal(model(X), base(X))
    assert tiny.snapshot(model) == before and torch.equal(model(X), adapted)
    with pytest.raises(ZeroDivisionError), disable_adapters(model):
        raise ZeroDivisionError
    assert tiny.snapshot(model) == before


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_disabling_brings_back_the_bases_biases(bias):
    model, base = tiny.classifier(), tiny.classifier()
    inject(model, LoraConfig(r=2, target_modules=["q"], bias=bias))
    tiny.randomize(model)
    assert not torch.equal(model.layers[0].q.bias, base.layers[0].q.bias)
    with disable_adapters(model):
        assert torch.equal(model(X), base(X))


def test_nothing_changes_adapters_while_they_are_disabled():
    """It would be undone at the end without a word, or apply adapters where none is to apply."""
    model = two_adapters()
    changes = [
        lambda: set_adapter(model, "b"),
        lambda: delete_adapter(model, "a"),
        lambda: rename_adapter(model, "a", "c"),
        lambda: merge_adapter(model),
        lambda: merge_and_unload(model, "a"),
        lambda: unload(model),
        lambda: inject(model, LoraConfig(r=2, target_modules=["k"]), "c"),
    ]
    with disable_adapters(model), disable_adapters(model):
        before = tiny.snapshot(model)
        for change in changes:
            with pytest.raises(StateError, match="disable_adapters is open"):
                change()
        with pytest.raises(StateError, match="this thread is in disable_adapters"), mixed_batch(model.eval(), ["a"]):
            pytest.fail("was opened")
        model.train()
        assert tiny.snapshot(model) == before and torch.equal(model(X), tiny.classifier()(X))
    assert registry_of(model).active == ("a",) and {path.rpartition(".")[2] for path in trained(model)} == {"a"}


def test_a_copy_made_while_adapters_are_disabled_can_be_switched_on():
    model = two_adapters()
    adapted = model(X)
    with disable_adapters(model):
        reference = copy.deepcopy(model)
    set_adapter(reference, "a")
    assert torch.equal(reference(X), adapted)


def test_deleting_the_active_adapter_says_that_none_is_active():
    model = two_adapters()
    assert delete_adapter(model, "a") == () and torch.equal(model(X), tiny.classifier()(X))
    model = two_adapters()
    assert delete_adapter(model, "b") == ("a",)


# --- deleting and unloading -------------------------------------------------------------------------------------------


def test_deleting_one_leaves_the_others():
    model = two_adapters()
    expected = model(X)
    delete_adapter(model, "b")
    assert torch.equal(model(X), expected)
    assert not [key for key in model.state_dict() if key.endswith(".b")]
    assert type(model.layers[0].out) is nn.Linear  # only "b" was on it


def test_deleting_the_active_one_leaves_the_base():
    model = two_adapters()
    delete_adapter(model, "a")
    assert torch.equal(model(X), tiny.classifier()(X))
    set_adapter(model, "b")
    assert not torch.equal(model(X), tiny.classifier()(X))


def test_a_name_is_free_again_after_deletion():
    model = two_adapters()
    delete_adapter(model, "a")
    inject(model, LoraConfig(r=3, target_modules=["q"]), "a")
    set_adapter(model, "a")
    assert model.layers[0].q.lora_A["a"].shape[0] == 3


BASES = {
    "trainable": lambda: tiny.classifier(),
    "partly frozen": lambda: _freeze(tiny.classifier(), "layers.0"),
    "nf4": lambda: _quantize(tiny.classifier()),
    "bfloat16": lambda: tiny.classifier(torch.bfloat16),
    "gpt2": lambda: tiny.build("gpt2"),
    "hooked": lambda: _hook(tiny.classifier()),
    "tied": lambda: _tie(tiny.classifier()),
    "eval": lambda: tiny.classifier().eval(),
}


def _freeze(model, path):
    model.get_submodule(path).requires_grad_(False)
    return model


def _quantize(model):
    quantize_nf4(model)
    return model


def _hook(model):
    model.layers[0].q.register_forward_hook(lambda module, args, output: output * 2)
    model.layers[0].q.register_forward_pre_hook(lambda module, args: None)
    return model


def _tie(model):
    model.layers[1].q.weight = model.layers[0].q.weight
    return model


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("how", ["unload", "delete", "unload while folded", "unload while disabled"])
def test_unloading_restores_everything(base, how):
    model = BASES[base]()
    before = tiny.snapshot(model)
    gpt2 = base == "gpt2"
    targets = ["c_attn", "c_fc"] if gpt2 else ["q", "v"]
    saved = ["ln_f"] if gpt2 else ["classifier", "norm"]
    inject(model, LoraConfig(r=4, target_modules=targets, modules_to_save=saved, bias="lora_only"), "a")
    inject(model, LoraConfig(r=2, target_modules="all-linear", modules_to_save=saved), "b")
    tiny.randomize(tiny.randomize(model, "a"), "b")
    assert tiny.snapshot(model) != before
    if how == "unload while folded":
        merge_adapter(model, ["b"])
    if how == "delete":
        delete_adapter(model, "a")
        delete_adapter(model, "b")
    elif how == "unload while disabled":
        set_adapter(model, [])
        unload(model)
    else:
        assert unload(model) is model
    assert tiny.snapshot(model) == before


def test_unloading_after_quantising_what_was_left():
    """QLoRA the other way round: the adapted layers stay dense, the others are packed afterwards."""
    model = tiny.classifier()
    inject(model, LoraConfig(r=4, target_modules=["q"]))
    report = quantize_nf4(model)
    assert "layers.0.q" not in report.layers
    unload(model)
    assert type(model.layers[0].q) is nn.Linear and model.layers[0].q.weight.requires_grad


# --- modules to save --------------------------------------------------------------------------------------------------


def test_each_adapter_has_its_own_copy_of_a_head():
    model = two_adapters(modules_to_save=["classifier"])
    original = tiny.classifier().classifier.weight
    a = model.classifier.weight
    set_adapter(model, "b")
    b = model.classifier.weight
    assert a is not b and not torch.equal(a, b) and b.requires_grad and not a.requires_grad
    set_adapter(model, [])
    assert torch.equal(model.classifier.weight, original)
    set_adapter(model, "a")
    assert model.classifier.weight is a and a.requires_grad


def test_a_second_adapters_copy_starts_from_the_base_not_from_the_first():
    model = tiny.classifier()
    inject(model, LoraConfig(r=2, target_modules=["q"], modules_to_save=["classifier"]), "a")
    tiny.randomize(model, "a")
    inject(model, LoraConfig(r=2, target_modules=["q"], modules_to_save=["classifier"]), "b")
    set_adapter(model, "b")
    assert torch.equal(model.classifier.weight, tiny.classifier().classifier.weight)


def test_two_adapters_that_own_one_head_can_not_be_active_together():
    model = two_adapters(modules_to_save=["classifier"])
    before = tiny.snapshot(model)
    with pytest.raises(StateError, match=r"'a' and 'b'.*'classifier.weight'"):
        set_adapter(model, ["a", "b"])
    assert tiny.snapshot(model) == before


def test_buffers_of_a_saved_module_belong_to_its_adapter():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    inject(model, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    model.train()(torch.randn(8, 4))
    moved = model[1].running_mean.clone()
    assert moved.any() and model[1].num_batches_tracked == 1
    with disable_adapters(model):
        assert not model[1].running_mean.any() and model[1].num_batches_tracked == 0
    assert torch.equal(model[1].running_mean, moved)


def test_saved_modules_that_are_to_stay_tied_do():
    model = tiny.build("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    tied = {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}
    report = inject(model, LoraConfig(r=2, target_modules=["c_attn"], **tied))
    assert report.modules_to_save == ("lm_head", "transformer.wte") and not report.untied
    assert model.lm_head.weight is model.transformer.wte.weight and model.lm_head.weight.requires_grad
    unload(model)
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("whole", [["lm_head"], ["wte"], ["lm_head", "wte"]])
def test_tied_modules_are_trained_apart_and_tied_again_afterwards(whole):
    model = tiny.build("gpt2")
    before = tiny.snapshot(model)
    with pytest.warns(UserWarning, match="trains it apart.*ensure_weight_tying=True"):
        report = inject(model, LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=whole))
    assert set(report.untied) == {f"{path}.weight" for path in report.modules_to_save} and "trained apart" in str(report)
    tiny.randomize(model)
    head, embeddings, base = model.lm_head.weight, model.transformer.wte.weight, tiny.build("gpt2").lm_head.weight
    assert head is not embeddings
    assert torch.equal(head, base) == ("lm_head" not in whole) and torch.equal(embeddings, base) == ("wte" not in whole)
    with disable_adapters(model):
        assert model.lm_head.weight is model.transformer.wte.weight
        assert torch.equal(tiny.logits(model), tiny.logits(tiny.build("gpt2")))
    unload(model)
    assert tiny.snapshot(model) == before


def test_all_biases_of_a_model_with_tied_biases():
    """BertForMaskedLM holds one bias under two names."""
    model = transformers.BertForMaskedLM(transformers.BertConfig(**tiny.SMALL))
    assert model.cls.predictions.bias is model.cls.predictions.decoder.bias
    inject(model, LoraConfig(r=2, target_modules=["query"], bias="all"))
    assert model.cls.predictions.bias is model.cls.predictions.decoder.bias and model.cls.predictions.bias.requires_grad


# --- the model is moved, cast, copied, wrapped ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_that_was_cast_can_still_switch(dtype):
    model = two_adapters(modules_to_save=["classifier"]).to(dtype)
    for names in ("b", [], "a"):
        set_adapter(model, names)
        assert model(tiny.batch(dtype)).dtype == dtype


def test_a_deep_copy_is_independent():
    model = two_adapters(modules_to_save=["classifier"])
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X))
    set_adapter(twin, "b")
    delete_adapter(twin, "a")
    before = model(X)
    tiny.randomize(twin, "b", seed=9)
    unload(twin)
    assert torch.equal(model(X), before) and torch.equal(twin(X), tiny.classifier()(X))


def test_a_compiled_wrapper_is_looked_through():
    model = two_adapters()
    compiled = torch.compile(model, backend="eager")
    set_adapter(compiled, "b")
    assert {path.rpartition(".")[2] for path in trained(model)} == {"b"}
    assert count_parameters(compiled) == count_parameters(model)
    unload(compiled)
    assert torch.equal(model(X), tiny.classifier()(X))


def test_injecting_through_a_compiled_wrapper_names_the_models_own_paths():
    model = tiny.classifier()
    report = inject(torch.compile(model, backend="eager"), LoraConfig(target_modules=["layers.0.q"]))
    assert report.targets == ("layers.0.q",)


def test_a_data_parallel_wrapper_is_looked_through(tmp_path):
    model = two_adapters()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(X).sum().backward()
        save_adapter(wrapped, tmp_path / "a", "a")
        set_adapter(wrapped, "b")
        assert {path.rpartition(".")[2] for path in trained(model)} == {"b"}
        unload(wrapped)
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(model(X), tiny.classifier()(X))


# --- counting ---------------------------------------------------------------------------------------------------------


def test_counts_of_a_plain_model():
    model = tiny.classifier()
    everything = sum(p.numel() for p in model.parameters())
    count = count_parameters(model)
    assert (count.trainable, count.adapter, count.total) == (everything, 0, everything)
    assert count.trainable_percent == 100


def test_counts_include_what_waits():
    base = sum(p.numel() for p in tiny.classifier().parameters())
    a, b, head = 4 * 4 * 128, 4 * 2 * 128, 64 * 3 + 3
    model = two_adapters(modules_to_save=["classifier"])
    for names, adapter, copies in [("a", a, head), ("b", b, head), ([], 0, 0)]:
        set_adapter(model, names)
        count = count_parameters(model)
        assert (count.trainable, count.adapter, count.total) == (adapter + copies, adapter, base + a + b + 2 * head)
    assert sum(p.numel() for p in trainable_parameters(model)) == 0


def test_counts_of_a_4_bit_model_are_those_of_the_dense_one():
    dense, packed = tiny.classifier(), tiny.classifier()
    quantize_nf4(packed)
    assert count_parameters(packed).total == count_parameters(dense).total


def test_base_weight_bytes_leaves_out_what_adapters_added():
    plain = base_weight_bytes(tiny.classifier())
    assert plain == sum(p.nbytes for p in tiny.classifier().parameters())
    assert base_weight_bytes(two_adapters(modules_to_save=["classifier"])) == plain


def test_the_printed_line(capsys):
    model = two_adapters()
    print_trainable_parameters(model)
    count = count_parameters(model)
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert all(f"{n:,}" in line for n in (count.trainable, count.adapter, count.total))


# --- rename, LoRA+ ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["active", "idle", "folded"])
def test_rename_changes_the_name_and_nothing_else(state):
    model = tiny.classifier()
    for name in ("a", "b", "c"):
        inject(model, LoraConfig(target_modules=["q"], modules_to_save=["classifier"], use_dora=True), name)
        tiny.randomize(model, name)
    set_adapter(model, "c" if state == "idle" else "b")
    x = tiny.batch()
    if state == "folded":
        merge_adapter(model)
    y, trainable = model(x), [id(p) for p in trainable_parameters(model)]
    rename_adapter(model, "b", "new")
    assert torch.equal(model(x), y) and [id(p) for p in trainable_parameters(model)] == trainable
    assert list(registry_of(model).adapters) == ["a", "new", "c"]
    if state == "folded":
        unmerge_adapter(model)
    set_adapter(model, "new")
    if state != "idle":
        torch.testing.assert_close(model(x), y, rtol=0, atol=1e-5)
    delete_adapter(model, "new")
    assert not any("new" in key or key[-2:] == ".b" for key in model.state_dict())


def test_rename_refusals():
    model = tiny.classifier()
    for name in ("a", "b"):
        inject(model, LoraConfig(target_modules=["q"]), name)
    before = tiny.snapshot(model)
    for old, new, error in (("c", "d", AdapterNameError), ("a", "b", AdapterNameError), ("a", "x.y", ConfigError)):
        with pytest.raises(error):
            rename_adapter(model, old, new)
    assert tiny.snapshot(model) == before


def test_lora_plus_gives_B_a_larger_rate_and_everything_a_group():
    model = tiny.classifier()
    inject(model, LoraConfig(target_modules=["q", "v"], use_dora=True, modules_to_save=["classifier"]))
    slow, fast = lora_plus_groups(model, lr=1e-3, ratio=8)
    names = {id(p): name for name, p in model.named_parameters()}
    assert slow["lr"] == 1e-3 and fast["lr"] == 8e-3
    assert {names[id(p)].split(".")[-2] for p in fast["params"]} == {"lora_B"} and len(fast["params"]) == 4
    assert {id(p) for p in (*slow["params"], *fast["params"])} == {id(p) for p in trainable_parameters(model)}
    torch.optim.AdamW([slow, fast])
    for bad in ({"lr": 0}, {"lr": 1e-3, "ratio": -1}, {"lr": float("nan")}):
        with pytest.raises(ConfigError, match="positive"):
            lora_plus_groups(model, **bad)


def test_lora_plus_leaves_embeddings_at_the_common_rate():
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8))
    inject(model, LoraConfig(r=2, target_modules=["0", "1"]))
    slow, fast = lora_plus_groups(model, lr=1.0)
    assert [p.shape for p in fast["params"]] == [(8, 2)] and len(slow["params"]) == 3
