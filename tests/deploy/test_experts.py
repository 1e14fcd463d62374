"""Fused experts without a model: merged over files that hold them fused or one by one, inspected, converted, refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core import inject, inspect_adapter, load_adapter, merge_checkpoint, save_adapter
from lora_core.deploy.convert import convert_adapter
from lora_core.deploy.recipe import Recipe
from lora_core.errors import FileFormatError, StateError, WrongBaseError
from lora_core.files.checkpoint import open_checkpoint
from tests.support import tiny
from tests.support.experts import MODELS, build, config, logits

#: How the files of each hold the experts of a layer.
STORED = {
    "mixtral": "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    "qwen2": "model.layers.0.mlp.experts.0.gate_proj.weight",
    "qwen3": "model.layers.0.mlp.experts.0.gate_proj.weight",
    "gpt-oss": "model.layers.0.mlp.experts.gate_up_proj",
    "llama4": "model.layers.0.feed_forward.experts.gate_up_proj",
}
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


def saved_base(name, directory, change=None, **settings):
    model = build(name, **settings)
    for parameter in model.parameters() if change else ():
        parameter.data *= change
    model.save_pretrained(directory)
    return model


def adapted(name, directory, build_settings=None, **settings):
    """A model with a trained adapter, which is saved there."""
    model = build(name, **(build_settings or {}))
    inject(model, config(name, **settings))
    save_adapter(tiny.randomize(model), directory)
    return model


def loaded(model, directory):
    return type(model).from_pretrained(directory, dtype=torch.float32).eval()


@EVERY_MODEL
@pytest.mark.parametrize("with_layers", [False, True])
def test_a_merged_checkpoint_computes_what_the_adapted_model_does(name, with_layers, tmp_path):
    router = "router.weight" if name in ("gpt-oss", "llama4") else "mlp.gate.weight"
    parameters = [*config(name).target_parameters, router]
    settings = {"target_modules": ["q_proj"], "target_parameters": parameters} if with_layers else {}
    saved_base(name, tmp_path / "base")
    model = adapted(name, tmp_path / "adapter", rank_pattern={"experts.gate_up_proj": 3}, **settings)
    assert STORED[name] in open_checkpoint(tmp_path / "base").tensors
    report = merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    assert report.least_kept > 0.999
    found, plain = load_file(tmp_path / "merged" / "model.safetensors"), load_file(tmp_path / "base" / "model.safetensors")
    assert found.keys() == plain.keys()  # the files hold experts as they did
    torch.testing.assert_close(logits(loaded(model, tmp_path / "merged")), logits(model), rtol=0, atol=1e-5)
    changed = {key for key in found if not torch.equal(found[key], plain[key])}
    assert STORED[name] in changed and "model.embed_tokens.weight" not in changed


def test_two_adapters_with_weights_and_another_dtype(tmp_path):
    saved_base("mixtral", tmp_path / "base")
    for seed, name in enumerate("ab"):
        model = build()
        inject(model, config(r=2 + seed))
        save_adapter(tiny.randomize(model, seed=seed), tmp_path / name)
    recipe = Recipe(weights=(1.0, 0.5), dtype=torch.bfloat16)
    merge_checkpoint(tmp_path / "base", [tmp_path / "a", tmp_path / "b"], tmp_path / "merged", recipe)
    expected = build()
    with torch.no_grad():
        for name, weight in (("a", 1.0), ("b", 0.5)):
            other = build()
            load_adapter(other, tmp_path / name)
            for path, slot in other.named_modules():
                if path.endswith(("lora_weights.gate_up_proj", "lora_weights.down_proj")):
                    W = expected.get_parameter(path.replace("lora_weights.", ""))
                    W += weight * (slot.folded_weight(["default"]) - slot.dense_weight())
    merged = loaded(expected, tmp_path / "merged")
    for path, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, expected.get_parameter(path).bfloat16().float(), rtol=2**-7, atol=0)


def test_experts_spread_over_shards_and_names_with_a_prefix_less(tmp_path):
    model = saved_base("qwen3", tmp_path / "base")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="6KB")
    assert len(open_checkpoint(tmp_path / "sharded").shards) > 3
    model.model.save_pretrained(tmp_path / "inner")  # names without "model."
    expected = adapted("qwen3", tmp_path / "adapter")
    for base in ("sharded", "inner"):
        merge_checkpoint(tmp_path / base, [tmp_path / "adapter"], tmp_path / f"merged-{base}")
    assert open_checkpoint(tmp_path / "merged-sharded").shards == open_checkpoint(tmp_path / "sharded").shards
    torch.testing.assert_close(logits(loaded(model, tmp_path / "merged-sharded")), logits(expected), rtol=0, atol=1e-5)
    found = open_checkpoint(tmp_path / "merged-inner").tensors
    whole = open_checkpoint(tmp_path / "merged-sharded").tensors
    names = [name for name in whole if ".experts." in name]
    assert names and all(
        torch.equal(whole[name].read(), found.get(name, found.get(name.removeprefix("model."))).read()) for name in names
    )


@EVERY_MODEL
def test_another_base_is_refused(name, tmp_path):
    saved_base(name, tmp_path / "other", change=1.01)
    adapted(name, tmp_path / "adapter")
    with pytest.raises(WrongBaseError, match=r"experts\.gate_up_proj .*has other values"):
        merge_checkpoint(tmp_path / "other", [tmp_path / "adapter"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("experts", [3, 5])
def test_another_number_of_experts_is_refused(experts, tmp_path):
    saved_base("mixtral", tmp_path / "base", num_local_experts=experts)
    adapted("mixtral", tmp_path / "adapter")
    with pytest.raises(WrongBaseError, match=f"{48 * experts} rows of experts in the place of .*gate_up_proj, .* for 192"):
        merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")


def test_which_way_square_matrices_lie_is_told_by_the_others_or_refused(tmp_path):
    square = {"intermediate_size": 16}  # of gpt-oss, as the published ones are
    saved_base("gpt-oss", tmp_path / "base", **square)
    model = adapted("gpt-oss", tmp_path / "both", square)
    merge_checkpoint(tmp_path / "base", [tmp_path / "both"], tmp_path / "merged")
    torch.testing.assert_close(logits(loaded(model, tmp_path / "merged")), logits(model), rtol=0, atol=1e-5)
    adapted("gpt-oss", tmp_path / "one", square, target_parameters=["experts.down_proj"])
    with pytest.raises(StateError, match="are square, and which way they lie"):
        merge_checkpoint(tmp_path / "base", [tmp_path / "one"], tmp_path / "merged-one")


def test_names_that_are_not_known_are_refused(tmp_path):
    saved_base("qwen3", tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    save_file({key.replace(".gate_proj.", ".first."): t for key, t in tensors.items()}, path, {"format": "pt"})
    adapted("qwen3", tmp_path / "adapter")
    with pytest.raises(WrongBaseError, match=r"no weight for the layer 'model.layers.0.mlp.experts.gate_up_proj'.*merge_and"):
        merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")


def test_inspection_and_conversion(tmp_path):
    model = adapted("mixtral", tmp_path / "adapter", rank_pattern={"gate_up_proj": 3}, use_rslora=True)
    report = inspect_adapter(tmp_path / "adapter")
    assert [(view.path, view.rank) for view in report.layers][:2] == [
        ("model.layers.0.mlp.experts.gate_up_proj", 3),
        ("model.layers.0.mlp.experts.down_proj", 2),
    ]
    assert report.targets == config().target_parameters
    for view in report.layers:
        slot = model.get_submodule(view.path.replace("experts.", "experts.lora_weights."))
        D = slot.folded_weight(["default"]) - slot.dense_weight()
        assert view.norm == pytest.approx(D.norm().item(), rel=1e-4)
        sigma = torch.linalg.svdvals(D)[:, : view.rank]
        share = sigma / sigma.sum(-1, keepdim=True)
        assert view.effective_rank == pytest.approx(torch.special.entr(share).sum(-1).exp().mean().item(), rel=1e-3)
    convert_adapter(tmp_path / "adapter", tmp_path / "plain", plain=True)
    other = build()
    load_adapter(other, tmp_path / "plain")
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=1e-5)


def test_a_file_that_does_not_say_which_parameter_is_refused(tmp_path):
    adapted("mixtral", tmp_path / "adapter")
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for number, names in enumerate((["experts.down_proj"], ["experts.first", "experts.second"])):
        directory = tmp_path / str(number)
        shutil.copytree(tmp_path / "adapter", directory)
        (directory / "adapter_config.json").write_text(json.dumps(fields | {"target_parameters": names}))
        with pytest.raises(FileFormatError, match="updates of parameters, and which of .* depends on its model"):
            inspect_adapter(directory)


@pytest.mark.parametrize("name", ["mixtral", "qwen3"])
def test_rows_of_tokens_and_a_grown_vocabulary_go_along(tmp_path, name):
    base = build(name)
    base.save_pretrained(tmp_path / "base")
    base.resize_token_embeddings(53)
    settings = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 52]}
    inject(base, config(name, **settings))
    tiny.randomize(base)
    save_adapter(base, tmp_path / "adapter", save_embedding_layers=True)
    merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    merged = type(base).from_pretrained(tmp_path / "merged").eval()
    tokens = torch.tensor([[3, 5, 52, 51, 1]])
    with torch.no_grad():
        found, expected = merged(tokens).logits, base(tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
