"""Files of other tools against the tools' own code: what is written here they read, and what they write is read here.

Each tool is optional: a test of one that is not installed is skipped.
"""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from lora_core import LoraConfig, convert_adapter, inject, load_adapter, save_adapter
from tests.support import llamacpp, tiny

CONFIG = transformers.LlamaConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=99
)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = tiny.TOKENS[:1]


def llama():
    torch.manual_seed(5)
    return transformers.LlamaForCausalLM(CONFIG).eval()


def adapted(tmp_path, **settings):
    """(directory of the base, that of an adapter on it, the adapted model's logits)."""
    model = llama()
    model.save_pretrained(tmp_path / "base")
    inject(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | settings))
    tiny.randomize(model)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", tiny.logits(model, TOKENS)


def loaded(path, **settings):
    model = llama()
    load_adapter(model, path, **settings)
    return tiny.logits(model, TOKENS)


def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


# --- loralib ----------------------------------------------------------------------------------------------------------


def test_loralib_reads_what_is_written_and_the_other_way(tmp_path):
    lora = pytest.importorskip("loralib", reason="loralib is not installed")
    torch.manual_seed(0)
    merged = lora.MergedLinear(6, 9, r=2, lora_alpha=8, enable_lora=[True, False, True])
    theirs = nn.Sequential(lora.Linear(8, 6, r=2, lora_alpha=8), nn.Tanh(), merged)
    for layer in (theirs[0], theirs[2]):
        nn.init.normal_(layer.lora_B)
    base = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 9))
    base.load_state_dict(theirs.state_dict(), strict=False)
    torch.save(lora.lora_state_dict(theirs), tmp_path / "lora.pt")
    x = torch.randn(3, 8)
    report = load_adapter(base, tmp_path / "lora.pt", hints={"lora_alpha": 8, "enable_lora": [True, False, True]})
    assert report.tool == "loralib"
    near(base(x), theirs(x).detach())

    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 9))
    inject(model, LoraConfig(r=2, lora_alpha=8, target_modules=["0"], bias="lora_only"))
    tiny.randomize(model)
    save_adapter(model, tmp_path / "adapter")
    convert_adapter(tmp_path / "adapter", tmp_path / "out", to="loralib")
    theirs = nn.Sequential(lora.Linear(8, 6, r=2, lora_alpha=8), nn.Tanh(), nn.Linear(6, 9))
    theirs.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" not in k}, strict=False)
    theirs.load_state_dict(load_file(tmp_path / "out" / "lora.safetensors"), strict=False)
    near(theirs(x).detach(), model(x).detach())


# --- MLX --------------------------------------------------------------------------------------------------------------


def mlx_llama():
    """The tiny Llama in mlx-lm, with our weights."""
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    llama_module = pytest.importorskip("mlx_lm.models.llama", reason="mlx-lm is not installed")
    fields = {key: getattr(CONFIG, key) for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")}
    fields |= {key: getattr(CONFIG, key) for key in ("num_attention_heads", "num_key_value_heads", "rms_norm_eps")}
    model = llama_module.Model(llama_module.ModelArgs(model_type="llama", tie_word_embeddings=False, **fields))
    model.load_weights([(name, mx.array(W.numpy())) for name, W in llama().state_dict().items()])
    model.eval()
    return model


def mlx_logits(model):
    import mlx.core as mx
    import numpy as np

    with mx.stream(mx.cpu):
        return torch.tensor(np.array(model(mx.array(TOKENS.numpy()))))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"alpha_pattern": {"v_proj": 3}}])
def test_mlx_reads_what_is_written(tmp_path, settings):
    model = mlx_llama()
    base, adapter, expected = adapted(tmp_path, **settings)
    convert_adapter(adapter, tmp_path / "mlx", to="mlx", base=base)
    from mlx_lm.tuner.utils import load_adapters

    near(mlx_logits(load_adapters(model, str(tmp_path / "mlx"))), expected)
    near(loaded(tmp_path / "mlx"), expected)


@pytest.mark.parametrize("dora", [False, True])
def test_what_mlx_trains_is_read(tmp_path, dora):
    model, parameters = mlx_llama(), {"rank": 3, "scale": 2.5, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.down_proj"]}
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model.freeze()
    linear_to_lora_layers(model, 1, parameters, use_dora=dora)
    trained = dict(tree_flatten(model.trainable_parameters()))
    weights = {name: mx.random.normal(w.shape) * 0.1 + name.endswith(".m") for name, w in trained.items()}
    model.load_weights(list(weights.items()), strict=False)
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    settings = {"fine_tune_type": "dora" if dora else "lora", "num_layers": 1, "lora_parameters": parameters}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"model": "some/llama"}))
    near(loaded(tmp_path), mlx_logits(model))


# --- torchtune --------------------------------------------------------------------------------------------------------


def torchtune_llama(**settings):
    builders = pytest.importorskip("torchtune.models.llama2", reason="torchtune is not installed", exc_type=ImportError)
    from torchtune.models.convert_weights import hf_to_tune

    model = builders.lora_llama2(
        ["q_proj", "k_proj", "v_proj", "output_proj"], apply_lora_to_mlp=True, vocab_size=99, num_layers=2, num_heads=4,
        num_kv_heads=2, embed_dim=64, max_seq_len=64, intermediate_dim=96, norm_eps=CONFIG.rms_norm_eps, lora_rank=4,
        lora_alpha=8, **settings,
    )  # fmt: skip
    model.load_state_dict(hf_to_tune(llama().state_dict(), num_heads=4, num_kv_heads=2, dim=64), strict=False)
    return model.eval()


@pytest.mark.parametrize("dora", [False, True])
def test_torchtune_both_ways(tmp_path, dora):
    model = torchtune_llama(use_dora=dora)
    base, adapter, expected = adapted(tmp_path, use_dora=dora)
    convert_adapter(adapter, tmp_path / "tune", to="torchtune", base=base)
    (file,) = (tmp_path / "tune").glob("*.safetensors")
    held = load_file(file)
    missing, unexpected = model.load_state_dict(held, strict=False)
    assert not unexpected and not [name for name in missing if "lora_" in name or "magnitude" in name]
    with torch.no_grad():
        near(model(TOKENS).float(), expected)

    torch.save(held, tmp_path / "adapter_model.pt")  # as torchtune writes it, with its settings beside it
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    near(loaded(tmp_path / "adapter_model.pt"), expected)


# --- litgpt -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [TARGETS, ["q_proj", "v_proj"], ["k_proj", "o_proj"]])
def test_litgpt_both_ways(tmp_path, targets):
    lit = pytest.importorskip("litgpt.lora", reason="litgpt is not installed", exc_type=ImportError)
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.scripts.merge_lora import load_lora_metadata

    base, adapter, expected = adapted(tmp_path, target_modules=targets)
    convert_adapter(adapter, tmp_path / "lit", to="litgpt", base=base)
    settings, _, _ = load_lora_metadata(tmp_path / "lit")
    config = lit.Config(
        n_layer=2, n_head=4, n_query_groups=2, n_embd=64, vocab_size=99, padded_vocab_size=99, rotary_percentage=1.0,
        bias=False, parallel_residual=False, norm_class_name="RMSNorm", norm_eps=CONFIG.rms_norm_eps, mlp_class_name="LLaMAMLP",
        intermediate_size=96, block_size=64, **settings,
    )  # fmt: skip
    model, weights = lit.GPT(config).eval(), {}
    copy_weights_hf_llama(config, {}, weights, dict(llama().state_dict()))
    held = torch.load(tmp_path / "lit" / "lit_model.pth.lora", weights_only=True)["model"]
    missing, unexpected = model.load_state_dict(weights | held, strict=False)
    assert not unexpected and not missing
    with torch.no_grad():
        near(model(TOKENS), expected)
    near(loaded(tmp_path / "lit"), expected)


# --- llama.cpp --------------------------------------------------------------------------------------------------------


SCALED = {"alpha_pattern": {"v_proj": 3}, "rank_pattern": {"up_proj": 2}}


@pytest.mark.parametrize("settings", [{}, SCALED, {"use_rslora": True}, {"target_modules": ["embed_tokens", "q_proj"]}])
def test_llama_cpp_reads_what_is_written(tmp_path, settings):
    pytest.importorskip("gguf", reason="gguf is not installed")
    llamacpp.need()
    base, adapter, expected = adapted(tmp_path, **settings)
    convert_adapter(adapter, tmp_path / "out", to="gguf", base=base)
    llamacpp.write_model(tmp_path / "base.gguf", llama())
    tokens = TOKENS[0].tolist()
    near(llamacpp.logits(tmp_path / "base.gguf", tokens), tiny.logits(llama(), TOKENS)[0])
    near(llamacpp.logits(tmp_path / "base.gguf", tokens, tmp_path / "out" / "adapter.gguf"), expected[0])
    near(loaded(tmp_path / "out"), expected)


# --- diffusers --------------------------------------------------------------------------------------------------------

LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.2", "time_emb_proj"]
IMAGE, TEXT = torch.sin(torch.arange(4.0 * 64)).view(1, 4, 8, 8), torch.cos(torch.arange(5.0 * 32)).view(1, 5, 32)


def unet():
    models = pytest.importorskip("diffusers", reason="diffusers is not installed", exc_type=ImportError)
    torch.manual_seed(0)
    return models.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(32, 64), cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8, norm_num_groups=8,
    ).eval()  # fmt: skip


def denoised(model):
    with torch.no_grad():
        return model(IMAGE, 3, TEXT).sample


def of_unet(tmp_path, **settings):
    model = unet()
    model.save_pretrained(tmp_path / "unet")
    inject(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": LAYERS} | settings))
    tiny.randomize(model)
    save_adapter(model, tmp_path / "adapter")
    return denoised(model)


DORA = {"use_dora": True, "target_modules": LAYERS[:3]}
MIXED = {"alpha_pattern": {"conv1": 3}, "rank_pattern": {"to_v": 2}}


@pytest.mark.parametrize(
    ("form", "settings"),  # of kohya's files it drops dora_scale, with a warning
    [("kohya", {}), ("kohya", MIXED), ("diffusers", {}), ("diffusers", MIXED), ("diffusers", DORA)],
)
def test_diffusers_reads_what_is_written(tmp_path, form, settings):
    expected = of_unet(tmp_path, **settings)
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    for base in (tmp_path / "unet", None):
        out = tmp_path / f"out-{base is None}"
        convert_adapter(tmp_path / "adapter", out, to=form, base=base)
        (file,) = out.iterdir()
        model = unet()
        state, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
            str(out), weight_name=file.name, unet_config=model.config, return_lora_metadata=True
        )
        model.load_lora_adapter(state, prefix="unet", network_alphas=alphas, metadata=metadata)
        near(denoised(model), expected)
        model = unet()
        assert load_adapter(model, out).tool.startswith(form)
        near(denoised(model), expected)


def test_what_diffusers_wrote_before_is_read(tmp_path):
    expected = of_unet(tmp_path, lora_alpha=4)  # these files have no alpha: the scaling is 1
    held = {
        key.removeprefix("base_model.model."): tensor
        for key, tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items()
    }

    def written(name, change):
        (tmp_path / name).mkdir()
        save_file({f"unet.{change(key)}": t for key, t in held.items()}, tmp_path / name / "pytorch_lora_weights.safetensors")
        return tmp_path / name

    def down_up(key):
        return key.replace("lora_A", "lora.down").replace("lora_B", "lora.up")

    def processors(key):
        if ".attn" not in key:
            return down_up(key)
        head, _, projection = key.replace(".to_out.0.", ".to_out.").rpartition(".to_")
        return f"{head}.processor.to_{projection}".replace(".lora_A", "_lora.down").replace(".lora_B", "_lora.up")

    for directory in (written("first", processors), written("then", down_up), written("now", lambda key: key)):
        model = unet()
        load_adapter(model, directory)
        near(denoised(model), expected)


def test_kohya_names_of_the_original_unet_are_diffusers_ones(tmp_path):
    unet()
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )

    from lora_core.files.formats.kohya import modern

    class Config:
        layers_per_block = 2

    names = ["input_blocks_0_0", "input_blocks_1_0_in_layers_2", "input_blocks_4_1_transformer_blocks_0_attn1_to_q"]
    names += ["input_blocks_3_0_op", "input_blocks_7_1_proj_in", "middle_block_1_transformer_blocks_3_ff_net_2"]
    names += ["middle_block_2_out_layers_3", "output_blocks_5_1_transformer_blocks_1_attn2_to_out_0", "output_blocks_2_2_conv"]
    names += ["output_blocks_0_0_skip_connection", "time_embed_0", "label_emb_0_2", "out_2", "input_blocks_5_0_emb_layers_1"]
    for name in names:
        key = f"lora_unet_{name}"
        state = {f"{key}.lora_down.weight": torch.ones(1), f"{key}.lora_up.weight": torch.ones(1)}
        state = _maybe_map_sgm_blocks_to_diffusers(state, Config)
        found, _ = _convert_non_diffusers_lora_to_diffusers(state)
        theirs = next(iter(found)).removeprefix("unet.").replace(".processor", "")
        theirs = theirs.replace("to_q_lora", "to_q").replace("to_out_lora", "to_out.0")
        theirs = theirs.partition(".lora.")[0].partition(".down.")[0]
        assert modern(name) == theirs.replace(".", "_"), name
