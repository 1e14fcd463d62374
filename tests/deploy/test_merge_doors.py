"""Merging where it meets other tools' files: PEFT's copies of the base, tied heads, 4 bits, losses, factors."""

import math
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from lora_core import (
    LoraConfig,
    LoraError,
    combine_adapters,
    initialize_eva,
    inject,
    load_adapter,
    lora_plus_groups,
    merge_adapter,
    merge_and_unload,
    quantize_nf4,
    save_adapter,
)
from lora_core.__main__ import main
from lora_core.deploy.inspection import inspect_adapter
from lora_core.deploy.recipe import Recipe, choices
from lora_core.deploy.stream import merge_checkpoint
from lora_core.deploy.updates import read_updates
from lora_core.errors import ConfigError, StateError, WrongBaseError
from lora_core.maths.loss import cost, describe_loss
from tests.support import tiny
from tests.support.language_models import MODELS, build, close, names_of, reloaded

pytestmark = pytest.mark.filterwarnings("ignore:.*trains it apart:UserWarning")

TARGETS = [("head",), ("embeddings",), ("head", "embeddings")]


def by_peft(name, directory, **settings):
    """Logits of an adapter that peft made and saved for a base on disk."""
    build(name).save_pretrained(directory / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = type(build(name)).from_pretrained(directory / "base")
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings)).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn(p.shape, generator=generator) * 0.1)
        model.save_pretrained(directory / "adapter")
    return tiny.logits(model.base_model.model)


# --- PEFT's copies of the base ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", TARGETS, ids="+".join)
@pytest.mark.parametrize("name", MODELS)
def test_adapters_on_heads_and_embeddings_are_merged(name, parts, tmp_path):
    expected = by_peft(name, tmp_path, target_modules=[MODELS[name][1], *names_of(name, parts)])
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    stored = [key for key in keys if key.endswith("base_layer.weight")]
    assert stored or parts == ("embeddings",)  # PEFT does so where it knows the name: embed_tokens, lm_head
    inspection = inspect_adapter(tmp_path / "adapter")
    assert inspection.whole == () and inspection.parameters == inspection.layer_parameters
    report = merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    assert len(report.layers) == len(read_updates(tmp_path / "adapter").layers)
    close(tiny.logits(reloaded(name, tmp_path / "merged")), expected)
    ours = build(name)
    load_adapter(ours, tmp_path / "adapter")
    close(tiny.logits(ours), expected)


@pytest.mark.parametrize("name", ["llama", "llama, tied"])
def test_two_of_them_are_merged_together(name, tmp_path):
    by_peft(name, tmp_path, target_modules=["q_proj", "lm_head"])
    report = merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"] * 2, tmp_path / "merged", Recipe(weights=(0.25, 0.75)))
    once = merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "once")
    assert report.layers.keys() == once.layers.keys()
    close(tiny.logits(reloaded(name, tmp_path / "merged")), tiny.logits(reloaded(name, tmp_path / "once")))


def test_a_copy_of_another_base_is_refused(tmp_path):
    by_peft("llama", tmp_path, target_modules=["q_proj", "lm_head"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.base_layer.weight"] += 1
    save_file(tensors, file)
    with pytest.raises(WrongBaseError, match=r"holds the weight of lm_head that it was trained on"):
        merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(LoraError):
        load_adapter(build("llama"), tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore:.*was saved on another base:UserWarning")
def test_a_module_that_is_really_called_base_layer_keeps_its_name(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(4, 4)
            self.head = nn.ModuleDict({"base_layer": nn.Linear(4, 2)})

    model = Own()
    inject(model, LoraConfig(r=2, target_modules=["q"], modules_to_save=["base_layer"]))
    save_adapter(tiny.randomize(model), tmp_path)
    assert set(read_updates(tmp_path).copies) == {"head.base_layer.weight", "head.base_layer.bias"}
    other = Own()
    load_adapter(other, tmp_path, strict=False)
    assert torch.equal(other.head["base_layer"].weight, model.head["base_layer"].weight)


# --- tied, over files ---------------------------------------------------------------------------------------------------

WHOLE = [{"modules_to_save": parts, "ensure_weight_tying": tie} for parts in TARGETS for tie in (False, True)]


@pytest.mark.parametrize("settings", WHOLE, ids=lambda s: "+".join(s["modules_to_save"]) + ("=" * s["ensure_weight_tying"]))
@pytest.mark.parametrize("name", [name for name in MODELS if "tied" in name])
def test_what_is_trained_whole_is_merged_as_it_was_trained(name, settings, tmp_path):
    build(name).save_pretrained(tmp_path / "base")
    model = build(name)
    whole = names_of(name, settings["modules_to_save"])
    inject(model, LoraConfig(r=2, target_modules=[MODELS[name][1]], **settings | {"modules_to_save": whole}))
    save_adapter(tiny.randomize(model), tmp_path / "adapter")
    arguments = ["--base", tmp_path / "base", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged", "--check"]
    assert main(["merge", *map(str, arguments)]) == 0
    close(tiny.logits(reloaded(name, tmp_path / "merged")), tiny.logits(model))


@pytest.mark.parametrize("transformers_knows", [True, False])
@pytest.mark.parametrize("kind", ["Bert", "DistilBert", "Roberta"])
def test_masked_language_models(kind, transformers_knows, tmp_path, monkeypatch):
    from lora_core.deploy import placement

    config = getattr(transformers, f"{kind}Config")
    small = {"dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 2, "vocab_size": 99}
    config = config(**(small if kind == "DistilBert" else tiny.SMALL))
    model = getattr(transformers, f"{kind}ForMaskedLM")(config).eval()
    model.save_pretrained(tmp_path / "base")
    head = "vocab_projector" if kind == "DistilBert" else "decoder"
    inject(model, LoraConfig(r=2, target_modules=["word_embeddings", head]))
    save_adapter(tiny.randomize(model), tmp_path / "adapter")
    if not transformers_knows:
        monkeypatch.setattr(placement, "known_class", lambda *_: None)
        with pytest.raises(StateError, match="install transformers, which knows them, or merge in memory: .*merge_and_unload"):
            merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
        return
    merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    merged, loading = type(model).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(loading.values()), loading
    close(tiny.logits(merged.eval()), tiny.logits(model))


# --- 4 bits and losses --------------------------------------------------------------------------------------------------


def qlora(name, directory, scale=0.1):
    """An adapter trained on the 4-bit base, with updates of about a tenth of the weights' size."""
    build(name).save_pretrained(directory / "base")
    model = build(name)
    quantize_nf4(model)
    inject(model, LoraConfig(r=4, target_modules=[MODELS[name][1]], task_type="CAUSAL_LM"))
    tiny.randomize(model)
    with torch.no_grad():
        for path, p in model.named_parameters():
            if "lora_B" in path:
                p.mul_(scale)
    save_adapter(model, directory / "adapter")
    return model.eval()


@pytest.mark.parametrize("base_as", choices(["nf4"]))
@pytest.mark.parametrize("name", ["llama, tied", "llama", "qwen2, tied"])
def test_a_check_runs_whatever_is_merged_into(name, base_as, tmp_path, capsys):
    qlora(name, tmp_path, scale=1.0)
    arguments = ["--base", tmp_path / "base", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged"]
    assert main(["merge", *map(str, arguments), "--check", "--base-as", base_as, "--tolerance", "2"]) == 0
    printed = capsys.readouterr().out
    assert "not measured" not in printed and all(other in printed for other in choices(["nf4"]))
    merged = reloaded(name, tmp_path / "merged")
    ids = merged.generate(tiny.TOKENS[:1], max_new_tokens=3, do_sample=False)
    assert ids.shape == (1, tiny.TOKENS.shape[1] + 3)


def test_a_side_comparison_that_fails_is_not_measured(tmp_path, capsys, monkeypatch):
    from lora_core.deploy import check

    qlora("llama", tmp_path)
    deviation = check._deviation

    def fails(merge, *args):
        if merge.base_as == "original":
            raise AttributeError("some library\nfails")
        return deviation(merge, *args)

    monkeypatch.setattr(check, "_deviation", fails)
    arguments = ["--base", tmp_path / "base", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged", "--check"]
    assert main(["merge", *map(str, arguments)]) == 0
    assert "original         not measured: some library fails" in capsys.readouterr().out
    assert (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.parametrize("base_as", choices(["nf4"]))
def test_a_check_runs_encoder_decoders(base_as, tmp_path, capsys):
    """T5 takes tokens of the decoder too."""
    model = tiny.build("t5")
    model.save_pretrained(tmp_path / "base")
    if base_as != "original":
        quantize_nf4(model)
    inject(model, LoraConfig(r=2, target_modules=["q"], task_type="SEQ_2_SEQ_LM"))
    save_adapter(tiny.randomize(model), tmp_path / "adapter")
    arguments = ["--base", tmp_path / "base", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged"]
    assert main(["merge", *map(str, arguments), "--check", "--base-as", base_as, "--tolerance", "2"]) == 0
    printed = capsys.readouterr().out
    assert "not measured" not in printed and all(other in printed for other in choices(["nf4"]))


@pytest.mark.parametrize("which", ["adapted", "merged"])
def test_a_model_that_cannot_be_run_fails_the_check_in_one_line(which, tmp_path, capsys, monkeypatch):
    from lora_core.deploy import check

    qlora("llama", tmp_path)

    def fails(*args):
        raise RuntimeError("some library\nfails")

    monkeypatch.setattr(check, {"adapted": "greedy", "merged": "outputs"}[which], fails)
    arguments = ["--base", tmp_path / "base", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged", "--check"]
    assert main(["merge", *map(str, arguments)]) == 1
    error = capsys.readouterr().err
    assert f"error: the {which} model can't be run: some library fails" in error and error.count("\n") == 1
    assert not (tmp_path / "merged").exists()


def test_a_small_update_survives_packing_over_files_and_not_in_memory(tmp_path):
    """The base lies on the 4-bit grid once it is packed; the update is far smaller than the grid's steps."""
    model = qlora("llama", tmp_path, scale=0.001)
    adapted = tiny.logits(model)
    before = tiny.snapshot(model)
    with pytest.raises(StateError, match=r"nothing of the adapter is left in .* of 2 layers.*--base-as.*allow_loss=True"):
        merge_and_unload(model, requantize=True)
    assert tiny.snapshot(model) == before and torch.equal(tiny.logits(model), adapted)
    report = merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged", Recipe(base_as="nf4"))
    assert report.least_kept > 0.5 and "of each update is there" in str(report)
    lost = merge_and_unload(model, requantize=True, allow_loss=True)
    assert lost.least_kept < 0.05 and "nothing of the adapter is left" in str(lost)


def tiny_update(dtype):
    model = tiny.classifier(dtype)
    inject(model, LoraConfig(r=2, target_modules=["q", "v"]))
    tiny.randomize(model)
    with torch.no_grad():
        for path, p in model.named_parameters():
            if "lora_B" in path:
                p.mul_(1e-6)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("merge", [merge_adapter, merge_and_unload])
def test_an_update_below_the_spacing_of_16_bits_is_refused_unless_allowed(merge, dtype):
    model = tiny_update(dtype)
    before = tiny.snapshot(model)
    with pytest.raises(StateError, match=r"nothing of the adapter is left in 4 of 4 layers.*dtype=torch.float32.*allow_loss"):
        merge(model)
    assert tiny.snapshot(model) == before
    merge(model, allow_loss=True)
    model = tiny_update(dtype)
    assert merge_and_unload(model, dtype=torch.float32).least_kept > 0.999


def test_over_files_too_and_nothing_is_left(tmp_path, capsys):
    build("llama").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = build("llama").to(torch.bfloat16)
    inject(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    tiny.randomize(model)
    with torch.no_grad():
        for path, p in model.named_parameters():
            if "lora_B" in path:
                p.mul_(1e-6)
    save_adapter(model, tmp_path / "adapter")
    arguments = ["merge", "--base", tmp_path / "base", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged"]
    arguments = list(map(str, arguments))
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "nothing of the adapter is left in 2 of 2 layers" in error and "--allow-loss" in error and error.count("\n") == 1
    assert not (tmp_path / "merged").exists()
    assert main([*arguments, "--allow-loss"]) == 0 and "nothing of the adapter is left" in capsys.readouterr().out


def test_the_measures_by_their_definition():
    torch.manual_seed(0)
    W, D = torch.randn(300, 70, dtype=torch.float64), torch.randn(300, 70, dtype=torch.float64) * 0.01
    M, M0 = (W + 0.7 * D).bfloat16(), W.bfloat16()
    found = cost(W + D, W, M, M0)
    assert found.lost == pytest.approx(((M.double() - W - D).norm() / D.norm()).item(), rel=1e-9)
    assert found.kept == pytest.approx((((M.double() - M0.double()) * D).sum() / D.square().sum()).item(), rel=1e-9)
    assert cost(W + D, W, W + D, W) == pytest.approx((0.0, 1.0)) and cost(W, W, W, W) == (0.0, 1.0)
    assert describe_loss({"a": 1.0, "b": 0.6}) is None
    assert describe_loss({"a": 0.0, "b": 0.3, "c": 1.1}) == (
        "nothing of the adapter is left in 1 of 3 layers and less than half of it in 1 of 3 layers"
    )


# --- factors ------------------------------------------------------------------------------------------------------------

BAD = [math.nan, math.inf, -math.inf, "1", True, None]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_factor_that_is_no_finite_number_is_refused(bad, tmp_path):
    model = tiny.classifier()
    for name in "ab":
        inject(model, LoraConfig(r=2, target_modules=["q"]), name)
    calls = {
        "weights": lambda: Recipe(weights=(bad,)),
        "combine weights": lambda: combine_adapters(model, ["a", "b"], [1.0, bad], "c"),
        "density": lambda: combine_adapters(model, ["a"], [1.0], "c", "ties", density=bad),
        "lora_alpha": lambda: LoraConfig(target_modules=["q"], lora_alpha=bad),
        "alpha_pattern": lambda: LoraConfig(target_modules=["q"], alpha_pattern={"q": bad}),
        "lora_dropout": lambda: LoraConfig(target_modules=["q"], lora_dropout=bad),
        "r": lambda: LoraConfig(target_modules=["q"], r=bad),
        "lr": lambda: lora_plus_groups(model, bad),
        "ratio": lambda: lora_plus_groups(model, 1e-3, bad),
        "rho": lambda: initialize_eva(model, [tiny.batch()], "a", rho=bad),
    }
    before = tiny.snapshot(model)
    for name, call in calls.items():
        with pytest.raises(ConfigError) as caught:
            call()
            pytest.fail(name)
        assert "\n" not in str(caught.value)
    assert tiny.snapshot(model) == before


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf", "one"])
@pytest.mark.parametrize("flag", ["--weights", "--tolerance"])
def test_on_the_command_line_too(flag, bad, tmp_path, capsys):
    build("llama").save_pretrained(tmp_path / "base")
    model = build("llama")
    inject(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    save_adapter(tiny.randomize(model), tmp_path / "adapter")
    arguments = ["merge", "--base", tmp_path / "base", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged"]
    try:
        code = main([*map(str, arguments), "--check", f"{flag}={bad}"])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "merged").exists()


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "0", "-1"])
@pytest.mark.parametrize("field", ["lora_alpha", "alpha_pattern", "lora_dropout"])
def test_in_a_configuration_file_too(field, value, tmp_path):
    model = tiny.classifier()
    inject(model, LoraConfig(r=2, lora_alpha=7, target_modules=["q"], lora_dropout=0.5, alpha_pattern={"q": 9}))
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    old = {"lora_alpha": '"lora_alpha": 7', "alpha_pattern": '"q": 9', "lora_dropout": '"lora_dropout": 0.5'}[field]
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, old.rpartition(" ")[0] + f" {value}"))
    if (field, value) == ("lora_dropout", "0"):
        load_adapter(tiny.classifier(), tmp_path)
        return
    with pytest.raises(LoraError):
        load_adapter(tiny.classifier(), tmp_path)
    with pytest.raises(LoraError):
        read_updates(tmp_path)


@pytest.mark.parametrize("factors", [{"weights": (1e300,)}, {"weights": (-1e38,)}])
def test_a_factor_that_float32_does_not_hold(factors, tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    model = build("llama")
    inject(model, LoraConfig(r=2, lora_alpha=20, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    save_adapter(tiny.randomize(model), tmp_path / "adapter")
    with pytest.raises(ConfigError, match="is more than float32 holds"):
        merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged", Recipe(**factors))
    with pytest.raises(ConfigError, match=r"lora_alpha must be a positive number up to 3.4e\+38, not 1e\+308"):
        LoraConfig(lora_alpha=1e308, target_modules=["q_proj"])
