"""Other tools' files without the tools: written, told by what is in them, read, and refused where they are broken."""

import importlib.util
import json
import pickle
import re
import struct
import sys
import time
import types
import zipfile

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from lora_core import (
    AdapterFormat,
    LoraConfig,
    convert_adapter,
    inject,
    inspect_adapter,
    load_adapter,
    merge_checkpoint,
    register_format,
    save_adapter,
)
from lora_core.deploy.programs import findings
from lora_core.errors import ConfigError, FileFormatError, OutputError
from lora_core.files.adapter import read_adapter
from lora_core.files.formats.base import FORMATS
from lora_core.files.formats.ggml import GgufFile
from tests.support import ROOT, tiny

NEEDS_GGUF = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
LANGUAGE = ["mlx", "torchtune", "litgpt", "loralib", "vllm", pytest.param("gguf", marks=NEEDS_GGUF)]


class Attention(nn.Module):
    """A part of a diffusion model with its names: a convolution and two projections."""

    def __init__(self):
        super().__init__()
        block = nn.Module()
        block.to_q, block.to_out = nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8)])
        self.down_blocks, self.conv_in = nn.ModuleList([nn.Module()]), nn.Conv2d(1, 8, (1, 8))
        self.down_blocks[0].attentions = nn.ModuleList([block])

    def forward(self, x):  # N T 8 -> N T 8
        block = self.down_blocks[0].attentions[0]
        return block.to_out[0](torch.tanh(block.to_q(x))) + self.conv_in(x[:, None]).squeeze(3).transpose(1, 2)


class TextEncoder(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.text_model = nn.Module()
        self.text_model.encoder = nn.Module()
        self.text_model.encoder.layers = nn.ModuleList([nn.Module()])
        self.text_model.encoder.layers[0].self_attn = nn.Module()
        self.text_model.encoder.layers[0].self_attn.q_proj = nn.Linear(width, width)

    def forward(self, x):
        return self.text_model.encoder.layers[0].self_attn.q_proj(x)


def built(kind):
    torch.manual_seed(3)
    return kind().eval()


X = torch.sin(torch.arange(2.0 * 5 * 8)).view(2, 5, 8)


def out(model):
    with torch.no_grad():
        return model(X)


def adapted(directory, kind, targets, **settings):
    """What an adapted model gives; its adapter is saved in `directory`."""
    model = built(kind)
    inject(model, LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": targets} | settings))
    save_adapter(tiny.randomize(model), directory)
    return out(model)


def llama(tmp_path, **settings):
    model = tiny.build("llama")
    model.save_pretrained(tmp_path / "base")
    names = [*tiny.projections("llama"), "up_proj"]
    inject(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": names} | settings))
    save_adapter(tiny.randomize(model), tmp_path / "adapter")
    return tiny.logits(model)


def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


# --- both ways --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"alpha_pattern": {"v_proj": 3.0}}, {"use_rslora": True}])
@pytest.mark.parametrize("form", LANGUAGE)
def test_a_language_model_s_adapter_comes_back(tmp_path, form, settings):
    expected = llama(tmp_path, **settings)
    report = convert_adapter(tmp_path / "adapter", tmp_path / form, to=form, base=tmp_path / "base")
    assert report.layers == 10 and FORMATS[form].tool in str(report)
    model = tiny.build("llama")
    read = load_adapter(model, tmp_path / form)
    assert read.tool == (None if form == "vllm" else FORMATS[form].tool)
    near(tiny.logits(model), expected)
    if form == "vllm":
        return
    convert_adapter(tmp_path / form, tmp_path / "back", base=tmp_path / "base")
    model = tiny.build("llama")
    load_adapter(model, tmp_path / "back")
    near(tiny.logits(model), expected)


@pytest.mark.parametrize("form", ["mlx", pytest.param("gguf", marks=NEEDS_GGUF)])
def test_gpt2_has_other_names_and_transposed_weights(tmp_path, form):
    model = tiny.build("gpt2")
    model.save_pretrained(tmp_path / "base")
    inject(model, LoraConfig(r=4, target_modules=["c_attn", "attn.c_proj", "mlp.c_fc"]))
    save_adapter(tiny.randomize(model), tmp_path / "adapter")
    convert_adapter(tmp_path / "adapter", tmp_path / form, to=form, base=tmp_path / "base")
    other = tiny.build("gpt2")
    load_adapter(other, tmp_path / form)
    near(tiny.logits(other), tiny.logits(model))

    # A square weight does not tell how it is stored.
    convert_adapter(tmp_path / form, tmp_path / "back", base=tmp_path / "base")
    convert_adapter(tmp_path / "back", tmp_path / "vllm", to="vllm")
    for adapter in ("back", "vllm"):
        merge_checkpoint(tmp_path / "base", [tmp_path / adapter], tmp_path / f"merged-{adapter}")
        merged = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / f"merged-{adapter}").eval()
        near(tiny.logits(merged), tiny.logits(model))


@pytest.mark.parametrize("form", ["mlx", "loralib", pytest.param("gguf", marks=NEEDS_GGUF)])
def test_embeddings_are_told_from_linear_layers(tmp_path, form):
    expected = llama(tmp_path, target_modules=["embed_tokens", "q_proj"])
    convert_adapter(tmp_path / "adapter", tmp_path / form, to=form, base=tmp_path / "base")
    convert_adapter(tmp_path / form, tmp_path / "back", base=tmp_path / "base")
    for path in (tmp_path / form, tmp_path / "back"):
        model = tiny.build("llama")
        load_adapter(model, path)
        near(tiny.logits(model), expected)


@pytest.mark.parametrize("settings", [{}, {"rank_pattern": {"to_q": 3}, "alpha_pattern": {"conv_in": 1.5}}, {"use_dora": True}])
@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_a_diffusion_model_s_adapter_comes_back(tmp_path, form, settings):
    expected = adapted(tmp_path / "adapter", Attention, ["to_q", "to_out.0", "conv_in"], **settings)
    convert_adapter(tmp_path / "adapter", tmp_path / form, to=form)
    model = built(Attention)
    load_adapter(model, tmp_path / form)
    near(out(model), expected)


def test_mlx_scales_the_product_of_transposed_factors(tmp_path):
    expected = llama(tmp_path, alpha_pattern={"v_proj": 3.0})
    convert_adapter(tmp_path / "adapter", tmp_path / "mlx", to="mlx", base=tmp_path / "base")
    scale = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    model, held = tiny.build("llama"), load_file(tmp_path / "mlx" / "adapters.safetensors")
    with torch.no_grad():
        for name in (name.removesuffix(".lora_a") for name in held if name.endswith(".lora_a")):
            linear = model.get_submodule(name)
            linear.weight += (scale * held[f"{name}.lora_a"] @ held[f"{name}.lora_b"]).t()  # y + scale (x a) b
    near(tiny.logits(model), expected)


def test_a_header_may_say_that_there_is_no_metadata(tmp_path):
    save_file(good(), tmp_path / "f", metadata={"format": "pt"})
    data = (tmp_path / "f").read_bytes()
    told = b'{"__metadata__":{"format":"pt"}'
    (tmp_path / "f").write_bytes(data.replace(told, b'{"__metadata__":null' + b" " * (len(told) - 20)))  # as MLX writes it
    assert len(inspect_adapter(tmp_path / "f").layers) == 1


def test_loralib_s_merged_parts_become_one_product(tmp_path):
    A, B = torch.randn(4, 8), torch.randn(6, 2)  # two adapted parts of three, rank 2, three rows each
    save_file({"0.lora_A": A, "0.lora_B": B}, tmp_path / "lora.safetensors")
    model = nn.Sequential(nn.Linear(8, 9))
    base = out(model)
    hints = {"lora_alpha": 8, "enable_lora": [True, False, True]}
    load_adapter(model, tmp_path / "lora.safetensors", hints=hints)
    D = torch.cat([B[:3] @ A[:2], torch.zeros(3, 8), B[3:] @ A[2:]]) * 8 / 2
    near(out(model), base + X @ D.t())


# --- told by what is in it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["mlx", "torchtune", "litgpt", "loralib", pytest.param("gguf", marks=NEEDS_GGUF)])
def test_the_tool_is_told_whatever_the_file_is_called(tmp_path, form):
    llama(tmp_path)
    convert_adapter(tmp_path / "adapter", tmp_path / "out", to=form, base=tmp_path / "base")
    file = max((p for p in (tmp_path / "out").iterdir()), key=lambda p: p.stat().st_size)
    named = file.rename(file.with_name("a.file"))
    shown = inspect_adapter(named)
    text = str(shown)
    assert shown.tool == FORMATS[form].tool and shown.nbytes == named.stat().st_size
    for line in (r"^rank +4 \(10 layers\)$", r"^alpha +8 \(10 layers\)$"):
        assert re.search(line, text, re.MULTILINE)
    norms = sorted(layer.norm for layer in inspect_adapter(tmp_path / "adapter").layers)
    torch.testing.assert_close(sorted(layer.norm for layer in shown.layers), norms, rtol=1e-5, atol=0)


def test_what_is_no_adapter_is_told(tmp_path):
    save_file({"a.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    for read in (lambda: load_adapter(nn.Sequential(nn.Linear(2, 2)), tmp_path / "model.safetensors"),
                 lambda: inspect_adapter(tmp_path / "model.safetensors")):  # fmt: skip
        with pytest.raises(FileFormatError, match="nor a file of kohya.*it holds a.weight"):
            read()
    with pytest.raises(FileFormatError, match="adapter_config.json"):
        load_adapter(nn.Sequential(nn.Linear(2, 2)), tmp_path)
    (tmp_path / "noise").write_bytes(b"\x01" * 100)
    with pytest.raises(FileFormatError, match="nor a file of kohya.*no tensors that can be read"):
        inspect_adapter(tmp_path / "noise")


def test_a_merge_says_how_to_make_peft_s_files(tmp_path):
    llama(tmp_path)
    convert_adapter(tmp_path / "adapter", tmp_path / "mlx", to="mlx", base=tmp_path / "base")
    with pytest.raises(FileFormatError, match="has the format of MLX.*convert .* --to peft --base BASE"):
        merge_checkpoint(tmp_path / "base", [tmp_path / "mlx"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_several_in_one_directory_are_named(tmp_path):
    llama(tmp_path)
    for form in ("mlx", "loralib"):
        convert_adapter(tmp_path / "adapter", tmp_path / form, to=form, base=tmp_path / "base")
    (tmp_path / "loralib" / "lora.safetensors").rename(tmp_path / "mlx" / "lora.pt")
    with pytest.raises(FileFormatError, match=r"several adapters: .*adapters.safetensors \(MLX.*name one of the files"):
        load_adapter(tiny.build("llama"), tmp_path / "mlx")


# --- the models of a pipeline ----------------------------------------------------------------------------------------


@pytest.fixture
def pipeline(tmp_path):
    """(file of a pipeline's adapter, output of its UNet, of its text encoder)."""
    unet = adapted(tmp_path / "u", Attention, ["to_q", "conv_in"])
    text = adapted(tmp_path / "t", TextEncoder, ["q_proj"])
    for name in "ut":
        convert_adapter(tmp_path / name, tmp_path / f"k{name}", to="kohya")
    both = load_file(tmp_path / "ku" / "lora.safetensors") | load_file(tmp_path / "kt" / "lora.safetensors")
    save_file(both, tmp_path / "both.safetensors")
    return tmp_path / "both.safetensors", unet, text


def test_each_model_of_a_pipeline_takes_its_part(pipeline):
    file, unet, text = pipeline
    for kind, expected, others in ((Attention, unet, "text_encoder (1 layers)"), (TextEncoder, text, "unet (2 layers)")):
        model = built(kind)
        report = load_adapter(model, file)
        near(out(model), expected)
        assert report.other_parts == (others,) and others in str(report)


def test_without_a_model_the_part_is_asked_for(tmp_path, pipeline):
    file, _, text = pipeline
    with pytest.raises(FileFormatError, match=r"holds text_encoder \(1 layers\), unet \(2 layers\).*--component"):
        convert_adapter(file, tmp_path / "out")
    report = convert_adapter(file, tmp_path / "out", hints={"component": "text_encoder"})
    assert report.others == ("unet (2 layers)",)
    model = built(TextEncoder)
    load_adapter(model, tmp_path / "out")
    near(out(model), text)


def test_of_two_encoders_the_shapes_tell(tmp_path):
    wide = lambda: TextEncoder(16)  # noqa: E731
    model = wide()
    inject(model, LoraConfig(r=2, target_modules=["q_proj"]))
    save_adapter(model, tmp_path / "w")
    adapted(tmp_path / "t", TextEncoder, ["q_proj"])
    for name, component in (("w", "text_encoder_2"), ("t", "text_encoder")):
        convert_adapter(tmp_path / name, tmp_path / f"k{name}", to="kohya", hints={"component": component})
    both = load_file(tmp_path / "kw" / "lora.safetensors") | load_file(tmp_path / "kt" / "lora.safetensors")
    save_file(both, tmp_path / "both.safetensors")
    for kind, other in ((wide, "text_encoder (1 layers)"), (TextEncoder, "text_encoder_2 (1 layers)")):
        assert load_adapter(kind(), tmp_path / "both.safetensors").other_parts == (other,)


# --- refused, in one line --------------------------------------------------------------------------------------------


def good():
    return {"0.lora_A": torch.randn(2, 8), "0.lora_B": torch.randn(8, 2)}


class Boom:
    def __reduce__(self):
        return print, ("ran",)


def torch_file(path, content):
    torch.save(content, path)


def packed_zip(path, content):
    torch.save(content, path)
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in entries.items():
            new.writestr(name, data)


def old_pickle(path, content):
    path.write_bytes(pickle.dumps(content))


BAD = {
    "a rank that differs": (save_file, good() | {"0.lora_B": torch.randn(8, 3)}, "of no one rank"),
    "B is missing": (save_file, {"0.lora_A": torch.randn(2, 8)}, "0 has lora_A alone"),
    "integers": (save_file, good() | {"0.lora_A": torch.ones(2, 8, dtype=torch.int32)}, "int32; an adapter's"),
    "not finite": (save_file, good() | {"0.lora_A": torch.full((2, 8), torch.nan)}, "NaN or infinite"),
    "nothing in it": (save_file, {"0.lora_A": torch.ones(0, 8), "0.lora_B": torch.ones(8, 0)}, "of no one rank"),
    "other tensors": (save_file, good() | {"1.weight": torch.ones(2)}, r"1 layers can't be mapped \(1.weight\)"),
    "a pickle that runs code": (torch_file, good() | {"x": Boom()}, "read as tensors alone"),
    "no state dict": (torch_file, [1, 2], "holds a list"),
    "numbers among tensors": (torch_file, good() | {"step": 3}, "'step' is of the kind int"),
    "a zip of a larger content": (packed_zip, good(), "it is compressed"),
    "a pickle of old": (old_pickle, {"a": 1}, "no tensors that can be read"),
    "a view larger than its storage": (torch_file, good() | {"0.lora_A": torch.ones(1).expand(2, 8)}, "more values than"),
    "a number in the place of A": (save_file, good() | {"0.lora_A": torch.tensor(1.0)}, "a matrix or a kernel"),
    "a sparse tensor": (torch_file, good() | {"0.lora_A": torch.ones(2, 8).to_sparse()}, "sparse"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line_and_the_model_is_as_it_was(tmp_path, capsys, name):
    write, content, words = BAD[name]
    write(**{"tensors": content, "filename": tmp_path / "f"}) if write is save_file else write(tmp_path / "f", content)
    model = nn.Sequential(nn.Linear(8, 8))
    before = tiny.snapshot(model)
    for read in (lambda: load_adapter(model, tmp_path / "f", hints={"lora_alpha": 4}), lambda: inspect_adapter(tmp_path / "f")):
        with pytest.raises(FileFormatError, match=words) as caught:
            read()
        assert "\n" not in str(caught.value)
    assert tiny.snapshot(model) == before and "ran" not in capsys.readouterr().out


def test_layers_that_the_model_lacks_are_all_listed(tmp_path):
    adapted(tmp_path / "adapter", Attention, ["to_q", "to_out.0", "conv_in"])
    convert_adapter(tmp_path / "adapter", tmp_path / "kohya", to="kohya")
    with pytest.raises(FileFormatError, match="3 layers can't be mapped.*conv_in.*to_out_0.*to_q.*the base has no such layers"):
        load_adapter(built(TextEncoder), tmp_path / "kohya")
    with pytest.raises(FileFormatError, match="torchtune's names are known for llama.*model_type is 'bert'"):
        llama(tmp_path)
        convert_adapter(tmp_path / "adapter", tmp_path / "tune", to="torchtune", base=tmp_path / "base")
        load_adapter(tiny.build("bert"), tmp_path / "tune")


def test_what_a_file_does_not_say_is_asked_for(tmp_path):
    save_file(good(), tmp_path / "f")
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(FileFormatError, match="don't say lora_alpha.*--lora-alpha 16"):
        load_adapter(model, tmp_path / "f")
    assert any("does not say lora_alpha" in text for text in inspect_adapter(tmp_path / "f").warnings)
    with pytest.raises(ConfigError, match="hints has no entry 'alpha'"):
        load_adapter(model, tmp_path / "f", hints={"alpha": 4})
    save_file({"0.lora_A": torch.ones(4, 8), "0.lora_B": torch.ones(6, 2)}, tmp_path / "merged")
    with pytest.raises(FileFormatError, match="2 adapted parts.*--enable-lora 1,0,1"):
        load_adapter(nn.Sequential(nn.Linear(8, 9)), tmp_path / "merged", hints={"lora_alpha": 4})
    adapted(tmp_path / "adapter", Attention, ["to_q"])
    convert_adapter(tmp_path / "adapter", tmp_path / "kohya", to="kohya")
    with pytest.raises(ConfigError, match="says alpha 6 itself"):
        load_adapter(built(Attention), tmp_path / "kohya", hints={"lora_alpha": 4})
    with pytest.raises(ConfigError, match="hints are for other tools' files"):
        load_adapter(built(Attention), tmp_path / "adapter", hints={"lora_alpha": 4})


CANT = {
    "modules trained whole": ("mlx", {"modules_to_save": ["norm"]}, "holds .*norm.weight whole.*merge"),
    "rows of tokens": ("mlx", {"trainable_token_indices": [5]}, "trains rows of model.embed_tokens .*merge"),
    "DoRA": ("litgpt", {"use_dora": True}, "has no place for lora_magnitude.*--plain"),
    "two ranks": ("mlx", {"rank_pattern": {"v_proj": 2}}, "one rank for all layers"),
    "no such format": ("tflite", {}, "no format 'tflite'; there are peft, .*kohya"),
    "names of no pipeline": ("kohya", {}, "of no known model of a pipeline"),
}


@pytest.mark.parametrize("name", CANT)
def test_what_can_t_be_written_leaves_nothing(tmp_path, name):
    form, settings, words = CANT[name]
    llama(tmp_path, **settings)
    with pytest.raises(ConfigError, match=words):
        convert_adapter(tmp_path / "adapter", tmp_path / "out", to=form, base=tmp_path / "base")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_patterns_in_a_header_are_not_run_for_long(tmp_path):
    adapted(tmp_path / "adapter", Attention, ["to_q"])
    convert_adapter(tmp_path / "adapter", tmp_path / "out", to="diffusers")
    file = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    slow = json.dumps({"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {"(x+x+)+y": 3.0, "(_|.)*(_|.)*z": 2.0}})
    save_file(load_file(file), file, metadata={"lora_adapter_metadata": slow})
    start = time.perf_counter()
    load_adapter(built(Attention), file)
    assert time.perf_counter() - start < 5
    for settings in ("[", '{"unet.r": "a"}', '{"unet.rank_pattern": {"(": 1}}', "3"):
        save_file(load_file(file), file, metadata={"lora_adapter_metadata": settings})
        with pytest.raises(FileFormatError, match="lora_adapter_metadata in its header is not an adapter's settings"):
            load_adapter(built(Attention), file)


def test_a_start_that_was_taken_off_the_base_is_not_left_out(tmp_path):
    llama(tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": "pissa"}))
    with pytest.raises(ConfigError, match="pissa.*convert"):
        convert_adapter(tmp_path / "adapter", tmp_path / "out", to="mlx", base=tmp_path / "base")
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_there_is_left_alone(tmp_path):
    llama(tmp_path)
    with pytest.raises(OutputError, match="exists already"):
        convert_adapter(tmp_path / "adapter", tmp_path / "base", to="mlx", base=tmp_path / "base")


# --- GGUF, byte by byte ----------------------------------------------------------------------------------------------


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def gguf_bytes(values, tensors, version=3, counts=None):
    """The bytes of a GGUF file by hand: values {key: text or float}, tensors {name: (type, shape, data)}."""
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(values))))
    for key, value in values.items():
        head += text(key) + (struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<I", 8) + text(value))
    offset, data = 0, b""
    for name, (kind, shape, content) in tensors.items():
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, offset)
        data += content + b"\0" * (-len(content) % 32)
        offset = len(data)
    return head + b"\0" * (-len(head) % 32) + data


ABOUT = {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora", "adapter.lora.alpha": 8.0}


def small():
    A, B = torch.randn(2, 32), torch.randn(4, 2)
    pair = {"a": (0, (2, 32), A.numpy().tobytes()), "b": (0, (4, 2), B.numpy().tobytes())}
    return A, B, {f"blk.0.ffn_up.weight.lora_{end}": entry for end, entry in pair.items()}


def test_a_gguf_file_is_read_without_the_library(tmp_path):
    A, B, held = small()
    (tmp_path / "f").write_bytes(gguf_bytes(ABOUT, held))
    found = GgufFile(tmp_path / "f")
    assert found.metadata["adapter.lora.alpha"] == 8.0
    tensors = found.tensors()
    assert torch.equal(tensors["blk.0.ffn_up.weight.lora_a"], A) and torch.equal(tensors["blk.0.ffn_up.weight.lora_b"], B)
    (layer,) = inspect_adapter(tmp_path / "f").layers
    assert layer.path == "blk.0.ffn_up" and layer.scaling == 4.0


def test_blocks_of_8_bits_are_dequantised(tmp_path):
    scale, q = torch.tensor([0.5, 0.25], dtype=torch.float16), torch.randint(-127, 128, (2, 32), dtype=torch.int8)
    data = b"".join(scale[i : i + 1].numpy().tobytes() + q[i].numpy().tobytes() for i in range(2))
    (tmp_path / "f").write_bytes(gguf_bytes(ABOUT, {"x": (8, (2, 32), data)}))
    assert torch.equal(GgufFile(tmp_path / "f").tensors()["x"], scale.float()[:, None] * q)


def test_a_broken_gguf_file_is_one_line_wherever_it_ends(tmp_path):
    whole = gguf_bytes(ABOUT, small()[2])
    for end in range(4, len(whole) - 24, 7):
        (tmp_path / "f").write_bytes(whole[:end])
        with pytest.raises(FileFormatError, match="not a whole GGUF adapter|nor a file of"):
            inspect_adapter(tmp_path / "f")


@pytest.mark.parametrize(
    "data",
    [
        gguf_bytes(ABOUT, {}, counts=(2**60, 4)),
        gguf_bytes(ABOUT, {}, counts=(0, 2**60)),
        gguf_bytes(ABOUT, {}, version=1),
        gguf_bytes(ABOUT, {"x": (0, (2**40, 2**20), b"")}),
        gguf_bytes(ABOUT, {"x": (2, (2, 32), b"")}),
        gguf_bytes(ABOUT | {"general.alignment": 0.0}, small()[2]),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 9, 2),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 8, 2**62),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**63),
    ],
)
def test_sizes_that_are_not_true_are_not_believed(tmp_path, data):
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(FileFormatError, match="not a whole GGUF adapter"):
        inspect_adapter(tmp_path / "f")


def test_a_model_in_gguf_is_no_adapter(tmp_path):
    (tmp_path / "f").write_bytes(gguf_bytes(ABOUT | {"general.type": "model"}, small()[2]))
    with pytest.raises(FileFormatError, match="nor a file of"):
        inspect_adapter(tmp_path / "f")
    (tmp_path / "f").write_bytes(gguf_bytes(ABOUT | {"adapter.type": "control"}, small()[2]))
    with pytest.raises(FileFormatError, match="'control'; 'lora' is read"):
        inspect_adapter(tmp_path / "f")


# --- what a program would refuse -------------------------------------------------------------------------------------

REFUSED = {
    "plain": ({}, [], ["PEFT's files: it reads GGUF; python -m lora_core convert"], []),
    "DoRA": ({"use_dora": True}, ["DoRA; .*--plain --base BASE"], ["DoRA; .*--plain"], []),
    "a bias of B": ({"lora_bias": True}, ["lora_bias.*merge"], ["lora_bias.*merge"], []),
    "trained whole": ({"modules_to_save": ["norm"]}, ["whole .*norm.*merge"], ["whole .*merge"], []),
    "rows of tokens": ({"trainable_token_indices": [5]}, ["rows .*embed_tokens.*merge"], ["rows .*merge"], []),
    "a high rank": ({"r": 20, "lora_alpha": 20}, ["rank 20, above --max-lora-rank 16; .*--max-lora-rank 32"], ["GGUF"], []),
    "scalings": ({"alpha_pattern": {"v_proj": 3}}, ["8 layers|2 have another scaling .*--to vllm"], ["GGUF"], []),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_program_refuses_is_said_with_what_mends_it(tmp_path, name):
    settings, *expected = REFUSED[name]
    llama(tmp_path, **settings)
    for program, words in zip(("vllm", "llama.cpp", "peft"), expected, strict=True):
        found = findings(tmp_path / "adapter", program)
        assert len(found) == len(words), found
        for one, pattern in zip(found, words, strict=True):
            assert re.search(pattern, str(one)), one


def test_the_command_that_is_named_mends_it(tmp_path):
    expected = llama(tmp_path, alpha_pattern={"v_proj": 3.0}, rank_pattern={"q_proj": 2})
    convert_adapter(tmp_path / "adapter", tmp_path / "vllm", to="vllm")
    assert findings(tmp_path / "adapter", "vllm") and not findings(tmp_path / "vllm", "vllm")
    config = read_adapter(tmp_path / "vllm").config
    assert {config.scaling_for(f"model.layers.{i}.self_attn.{x}_proj") for i in (0, 1) for x in "qkvo"} == {2.0}
    model = tiny.build("llama")
    load_adapter(model, tmp_path / "vllm")
    near(tiny.logits(model), expected)


def test_another_tool_s_file_is_no_program_s_but_its_own(tmp_path):
    llama(tmp_path)
    convert_adapter(tmp_path / "adapter", tmp_path / "mlx", to="mlx", base=tmp_path / "base")
    for program in ("vllm", "peft"):
        (finding,) = findings(tmp_path / "mlx", program)
        assert "the format of MLX" in finding.what and "--to peft --base BASE" in finding.mend
    (tmp_path / "f").write_bytes(gguf_bytes(ABOUT, small()[2]))
    assert not findings(tmp_path / "f", "llama.cpp")
    with pytest.raises(ConfigError, match="known are vllm, llama.cpp, peft"):
        findings(tmp_path / "mlx", "ollama")


# --- a format of one's own -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    """The format that docs/extend.md shows, run outside of the package."""
    page = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    module = types.ModuleType("a_format")
    sys.modules["a_format"] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("format"))  # it writes files
        snippet = re.search(r"## Add a file format.*?```python\n(.*?)```", page, re.DOTALL)[1]
        exec(compile(snippet, "extend.md", "exec"), vars(module))
    yield module
    del FORMATS["npz"]


def test_a_format_from_outside_passes_the_same_tests(tmp_path, extension):
    expected = llama(tmp_path, alpha_pattern={"v_proj": 3.0}, rank_pattern={"q_proj": 2})
    assert convert_adapter(tmp_path / "adapter", tmp_path / "npz", to="npz").written == "NumPy"
    assert [path.name for path in (tmp_path / "npz").iterdir()] == ["adapter.npz"]
    model = tiny.build("llama")
    assert load_adapter(model, tmp_path / "npz" / "adapter.npz").tool == "NumPy"
    near(tiny.logits(model), expected)
    assert inspect_adapter(tmp_path / "npz").tool == "NumPy"
    convert_adapter(tmp_path / "npz", tmp_path / "back", to="peft")
    model = tiny.build("llama")
    load_adapter(model, tmp_path / "back")
    near(tiny.logits(model), expected)


def test_registering_refuses_what_is_no_format(extension):
    class Twin(AdapterFormat):
        name = "mlx"

    class Nameless(AdapterFormat):
        pass

    for wrong, words in ((Twin(), "a format 'mlx' already"), (Nameless(), "with a name"), ("npz", "not 'npz'")):
        with pytest.raises(ConfigError, match=words):
            register_format(wrong)


# --- LyCORIS' other methods -------------------------------------------------------------------------------------------

LYCORIS = {
    "LoHa": {"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8), "alpha": ()},
    "LoKr": {"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4), "alpha": ()},
    "OFT": {"oft_blocks": (2, 4, 4), "alpha": ()},
}
PAIR = {"lora_down.weight": (2, 8), "lora_up.weight": (8, 2)}


@pytest.mark.parametrize("method", LYCORIS)
def test_what_lycoris_has_besides_lora_is_told_for_what_it_is(method, tmp_path):
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    state = {f"{name}.{end}": torch.ones(shape) for end, shape in LYCORIS[method].items()}
    file = tmp_path / "style.safetensors"
    save_file(state, file)
    model = built(Attention)
    before = tiny.snapshot(model)
    told = f"is an adapter of LyCORIS, and no LoRA: it is {method}.*has no A and B"
    for source in (file, tmp_path):
        for call in (
            load_adapter,
            lambda _, s: inspect_adapter(s),
            lambda _, s: convert_adapter(s, tmp_path / "out", to="peft"),
        ):
            with pytest.raises(FileFormatError, match=told) as caught:
                call(model, source)
            assert "\n" not in str(caught.value)
    other = {f"lora_unet_mid_block_attentions_0_proj_in.{end}": torch.ones(s) for end, s in PAIR.items()}
    save_file(state | other, file)  # some layers are LoRA
    with pytest.raises(FileFormatError, match=rf"can't be mapped .*some are {method}"):
        load_adapter(model, file)
    assert tiny.snapshot(model) == before
