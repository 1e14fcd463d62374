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
from lora_core.deploy.updates import read_updates
from lora_core.errors import ConfigError, FileFormatError
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


# --- Flux -------------------------------------------------------------------------------------------------------------

#: The original model's fused layers, with what diffusers' converter takes for granted: a width of 3,072.
WIDTH, MLP = 3072, 12288
FLUX = {
    "double_blocks_0_img_attn_qkv": (WIDTH, 3 * WIDTH),
    "double_blocks_0_img_attn_proj": (WIDTH, WIDTH),
    "double_blocks_0_img_mlp_0": (WIDTH, MLP),
    "double_blocks_0_img_mlp_2": (MLP, WIDTH),
    "double_blocks_0_img_mod_lin": (WIDTH, 6 * WIDTH),
    "double_blocks_1_txt_attn_qkv": (WIDTH, 3 * WIDTH),
    "double_blocks_1_txt_attn_proj": (WIDTH, WIDTH),
    "double_blocks_1_txt_mlp_0": (WIDTH, MLP),
    "double_blocks_1_txt_mlp_2": (MLP, WIDTH),
    "double_blocks_1_txt_mod_lin": (WIDTH, 6 * WIDTH),
    "single_blocks_2_linear1": (WIDTH, 3 * WIDTH + MLP),
    "single_blocks_2_linear2": (WIDTH + MLP, WIDTH),
    "single_blocks_2_modulation_lin": (WIDTH, 3 * WIDTH),
    "guidance_in_in_layer": (256, WIDTH),
    "guidance_in_out_layer": (WIDTH, WIDTH),
    "time_in_in_layer": (256, WIDTH),
    "time_in_out_layer": (WIDTH, WIDTH),
    "vector_in_in_layer": (768, WIDTH),
    "vector_in_out_layer": (WIDTH, WIDTH),
    "img_in": (64, WIDTH),
    "txt_in": (4096, WIDTH),
    "final_layer_adaLN_modulation_1": (WIDTH, 2 * WIDTH),
    "final_layer_linear": (WIDTH, 64),
}


def flux_file(path, shapes, r=2, alpha=4.0, prefix="lora_unet_"):
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, (d_in, d_out) in shapes.items():
        state[f"{prefix}{name}.lora_down.weight"] = torch.randn(r, d_in, generator=generator)
        state[f"{prefix}{name}.lora_up.weight"] = torch.randn(d_out, r, generator=generator)
        state[f"{prefix}{name}.alpha"] = torch.tensor(alpha)
    save_file(state, path)
    return state


def of_diffusers(state):
    """{path: (A, B)} as diffusers' converter has it, with the scaling in them."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    found = _convert_kohya_flux_lora_to_diffusers(dict(state))
    down = {key: tensor for key, tensor in found.items() if key.endswith(".lora_A.weight")}
    assert 2 * len(down) == len(found)
    return {
        key.removeprefix("transformer.").removesuffix(".lora_A.weight"): (A, found[key.replace("lora_A", "lora_B")])
        for key, A in down.items()
    }


def products(directory):
    """{path: s B A} of PEFT's files."""
    updates = read_updates(directory)
    return {path: u.scaling * u.tensors["lora_B"] @ u.tensors["lora_A"] for path, u in updates.layers.items()}


def diffusers_or_skip():
    return pytest.importorskip("diffusers", reason="diffusers is not installed", exc_type=ImportError)


#: Of layers outside of blocks diffusers' converter drops the alpha of the last two, which it lists as a thing to do.
LAST = ("proj_out", "norm_out.linear")


def test_kohya_names_of_flux_are_diffusers_ones(tmp_path):
    diffusers_or_skip()
    state = flux_file(tmp_path / "flux.safetensors", FLUX)
    convert_adapter(tmp_path / "flux.safetensors", tmp_path / "out")
    ours, theirs = products(tmp_path / "out"), of_diffusers(state)
    assert ours.keys() == theirs.keys() and len(ours) == 30
    for path, (A, B) in theirs.items():
        near(ours[path], (2.0 if path in LAST else 1.0) * B @ A)


def flux():
    """A small FluxTransformer2DModel of diffusers."""
    torch.manual_seed(0)
    return diffusers_or_skip().FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip


def drawn(model):
    generator = torch.Generator().manual_seed(2)
    shapes = {"hidden_states": (1, 6, 4), "encoder_hidden_states": (1, 5, 32), "pooled_projections": (1, 32)}
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    inputs |= {"timestep": torch.tensor([0.5]), "guidance": torch.tensor([3.5])}
    with torch.no_grad():
        return model(**inputs, img_ids=torch.arange(18.0).view(6, 3), txt_ids=torch.zeros(5, 3)).sample


#: In widths of the model; the fused rows are worked out from what a layer reads.
SMALL_FLUX = {
    "double_blocks_0_img_attn_qkv": (32, 96),
    "double_blocks_0_txt_attn_qkv": (32, 96),
    "double_blocks_0_img_mlp_0": (32, 128),
    "single_blocks_1_linear1": (32, 224),
    "single_blocks_1_linear2": (160, 32),
    "final_layer_adaLN_modulation_1": (32, 64),
    "img_in": (4, 32),
}


def test_a_file_of_kohya_runs_on_diffusers_flux_as_diffusers_reads_it(tmp_path):
    """Of fused layers of this width diffusers' converter reads q, k and v alone, so the single block's is split here."""
    model = flux()
    state = flux_file(tmp_path / "flux.safetensors", SMALL_FLUX, alpha=2.0)
    text = flux_file(tmp_path / "text.safetensors", {"text_model_encoder_layers_0_mlp_fc1": (8, 8)}, prefix="lora_te1_")
    save_file(state | text, tmp_path / "flux.safetensors")
    report = load_adapter(model, tmp_path / "flux.safetensors")
    assert "kohya" in report.tool and report.other_parts == ("text_encoder (1 layers)",)
    assert len(report.targets) == 3 + 3 + 1 + 4 + 1 + 1 + 1
    found = drawn(model)

    expected = flux()
    fused = {key: state.pop(key) for key in list(state) if "linear1" in key}
    theirs = of_diffusers(state)
    down, up = (fused[f"lora_unet_single_blocks_1_linear1.lora_{end}.weight"] for end in ("down", "up"))
    for part, rows in zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), up.split([32, 32, 32, 128]), strict=True):
        theirs[f"single_transformer_blocks.1.{part}"] = down, rows
    with torch.no_grad():
        for path, (A, B) in theirs.items():
            expected.get_submodule(path).weight += B @ A
    near(found, drawn(expected))
    assert (found - drawn(flux())).abs().max() > 1e-2


FLUX_TARGETS = ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0"]
FLUX_TARGETS += ["proj_mlp", "ff.net.2", "norm_out.linear"]


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, 17),
        ({"alpha_pattern": {"to_k": 5}, "rank_pattern": {"to_v": 2}}, 17),
        ({"target_modules": ["to_q", "to_v", "add_k_proj"]}, 7),  # some of the parts of a fused layer
        ({"use_dora": True}, 17),
    ],
    ids=str,
)
def test_what_is_written_for_flux_comes_back_and_has_kohyas_names(settings, parts, tmp_path):
    model = flux()
    model.save_pretrained(tmp_path / "base")
    inject(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": FLUX_TARGETS, **settings}))
    tiny.randomize(model)
    save_adapter(model, tmp_path / "adapter")
    for base in (tmp_path / "base", None):
        out = tmp_path / f"kohya-{base is None}"
        convert_adapter(tmp_path / "adapter", out, to="kohya", base=base)
        names = {key.partition(".")[0] for key in load_file(out / "lora.safetensors")}
        assert "lora_unet_double_blocks_0_img_attn_qkv" in names and "lora_unet_single_blocks_1_linear1" in names
        again = flux()
        assert len(load_adapter(again, out).targets) == parts
        near(drawn(again), drawn(model))


def test_diffusers_reads_what_is_written_for_flux(tmp_path):
    model = flux()
    inject(model, LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"]))
    tiny.randomize(model)
    save_adapter(model, tmp_path / "adapter")
    convert_adapter(tmp_path / "adapter", tmp_path / "kohya", to="kohya")
    held = load_file(tmp_path / "kohya" / "lora.safetensors")
    theirs = of_diffusers({key: tensor for key, tensor in held.items() if "linear1" not in key})
    ours = products(tmp_path / "adapter")
    assert set(ours) - set(theirs) == {f"single_transformer_blocks.{n}.attn.to_{x}" for n in "01" for x in "qkv"}
    for path, (A, B) in theirs.items():
        near(B @ A, ours[path])
        assert len(A) == 4  # taken apart again, and not of three times the rank


def test_fused_layers_of_flux_that_have_no_place_are_told(tmp_path):
    model = flux()
    inject(model, LoraConfig(r=4, target_modules=["to_q"], use_dora=True))
    save_adapter(model, tmp_path / "dora")
    with pytest.raises(ConfigError, match=r"with lora_magnitude all are adapted: .*to_k, .*to_v"):
        convert_adapter(tmp_path / "dora", tmp_path / "out", to="kohya")
    flux_file(tmp_path / "wrong.safetensors", {"double_blocks_0_img_attn_qkv": (32, 95)})
    with pytest.raises(FileFormatError, match=r"img_attn_qkv has A \(2, 32\) and B \(95, 2\); it is read as 3 layers"):
        load_adapter(flux(), tmp_path / "wrong.safetensors")
    flux_file(tmp_path / "more.safetensors", {"double_blocks_0_img_attn_qkv": (32, 96), "double_blocks_7_img_mlp_0": (32, 128)})
    with pytest.raises(FileFormatError, match="1 layers can't be mapped .transformer_blocks.7.ff.net.0.proj"):
        load_adapter(flux(), tmp_path / "more.safetensors")


def test_the_text_encoders_of_flux(tmp_path):
    """CLIP's part, under both of its names, and T5's."""
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
    clip = transformers.CLIPTextConfig(hidden_size=32, intermediate_size=64, **small)
    t5 = transformers.T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=99)
    flux_file(tmp_path / "unet.safetensors", SMALL_FLUX)
    of_clip, of_t5 = {"text_model_encoder_layers_0_mlp_fc1": (32, 64)}, {"encoder_block_0_layer_0_SelfAttention_q": (32, 32)}
    for prefix, names, build, component in (
        ("lora_te1_", of_clip, lambda: transformers.CLIPTextModel(clip), "text_encoder"),
        ("lora_te2_", of_t5, lambda: transformers.T5EncoderModel(t5), "text_encoder_2"),
        ("lora_te3_", of_t5, lambda: transformers.T5EncoderModel(t5), "text_encoder_2"),  # as sd-scripts calls it
    ):
        text = flux_file(tmp_path / "text.safetensors", names, prefix=prefix)
        save_file(load_file(tmp_path / "unet.safetensors") | text, tmp_path / "both.safetensors")
        model = build()
        report = load_adapter(model, tmp_path / "both.safetensors")
        assert report.other_parts == ("transformer (14 layers)",) and len(report.targets) == 1
        layer = model.get_submodule(report.targets[0])
        A, B = layer.factors("default")
        down, up = (text[f"{prefix}{next(iter(names))}.lora_{end}.weight"] for end in ("down", "up"))
        near(B @ A, up @ down)
        save_adapter(model, tmp_path / prefix)
        convert_adapter(tmp_path / prefix, tmp_path / f"{prefix}kohya", to="kohya", hints={"component": component})
        again = build()
        assert load_adapter(again, tmp_path / f"{prefix}kohya").targets == report.targets
