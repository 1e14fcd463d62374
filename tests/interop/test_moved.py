"""Adapters from before transformers renamed modules: PEFT trains one, its files get the names of then, and it loads here.

The names of then are those of transformers before 4.52 (models of images and text) and before 5 (ViT).
"""

import copy
import re
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_core import LoraConfig, inject, load_adapter, merge_checkpoint, quantize_nf4, save_adapter
from lora_core.deploy.recipe import Recipe
from lora_core.errors import FileFormatError, StateError, WrongBaseError
from tests.support import tiny
from tests.support.bad_adapters import edit_config

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
TEXT["vocab_size"] = 300
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VISION |= {"image_size": 28, "patch_size": 14}
TOKENS = torch.randint(5, 290, (2, 6), generator=torch.Generator().manual_seed(0))


def paligemma():
    text = TEXT | {"model_type": "gemma", "head_dim": 8}
    vision = VISION | {"model_type": "siglip_vision_model"}
    config = transformers.PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=299, projection_dim=32)
    return transformers.PaliGemmaForConditionalGeneration(config)


def llava():
    text, vision = transformers.LlamaConfig(**TEXT), transformers.CLIPVisionConfig(**VISION, projection_dim=16)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=299)
    return transformers.LlavaForConditionalGeneration(config)


def gemma3():
    text = TEXT | {"head_dim": 8, "sliding_window": 8}
    config = transformers.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=299)
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen2_vl():
    scaling = {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(text_config=TEXT | {"rope_scaling": scaling}, vision_config=vision)
    return transformers.Qwen2VLForConditionalGeneration(config)


def vit():
    sizes = VISION | {"image_size": 32, "patch_size": 16}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))


TWO_TOWERS = {r"model\.language_model": "language_model.model", r"model\.vision_tower": "vision_tower.vision_model"}
#: {family: (model, {name of now: name of then})}
FAMILIES = {
    "paligemma": (paligemma, TWO_TOWERS),
    "llava": (llava, TWO_TOWERS),
    "gemma3": (gemma3, TWO_TOWERS),
    "qwen2-vl": (qwen2_vl, {r"model\.language_model": "model", r"model\.visual": "visual"}),
    "vit": (
        vit,
        {
            r"vit\.layers": "vit.encoder.layer",
            r"attention\.(q)_proj": "attention.attention.query",
            r"attention\.(v)_proj": "attention.attention.value",
            r"attention\.o_proj": "attention.output.dense",
            r"mlp\.fc2": "output.dense",
        },
    ),
}


def base(family):
    torch.manual_seed(0)
    return FAMILIES[family][0]().eval()


def output(family, model):
    if family == "vit":
        return model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))).logits
    return model(input_ids=TOKENS).logits


@torch.no_grad()
def of_then(family, directory, targets, **settings):
    """Files of PEFT's with the names of then, and what the adapter makes of an input."""
    model = peft.get_peft_model(base(family), peft.LoraConfig(r=4, target_modules=targets, **settings)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    path = directory / "adapter_model.safetensors"
    save_file({as_then(family, key): tensor for key, tensor in load_file(path).items()}, path, {"format": "pt"})
    return output(family, model)


def as_then(family, name):
    for now, then in FAMILIES[family][1].items():
        name = re.sub(rf"(^|base_model\.model\.|\.){now}(?=\.|$)", rf"\g<1>{then}", name)
    return name


CASES = {
    "paligemma": {"targets": ["q_proj", "v_proj"], "settings": {"rank_pattern": {r"layers\.0\..*q_proj": 2}}},
    "llava": {"targets": ["q_proj", "k_proj"], "then": r".*(language_model|vision_tower).*(q_proj|k_proj)$"},
    "gemma3": {
        "targets": r"model\.language_model\.layers\.\d\..*(q|v)_proj",
        "then": r"language_model\.model\.layers\.\d\..*(q|v)_proj",
        "settings": {"modules_to_save": ["lm_head"]},
    },
    "qwen2-vl": {"targets": r"model\.language_model\..*\.[qv]_proj", "then": r"^model\.layers\..*(q_proj|v_proj)$"},
    "vit": {
        "targets": ["q_proj", "v_proj", "attention.o_proj", "fc2"],
        "then": ["query", "value", "attention.output.dense", "output.dense"],
        "settings": {"modules_to_save": ["classifier"]},
    },
}


@pytest.mark.filterwarnings("ignore:the base ties")
@pytest.mark.parametrize("family", CASES)
def test_it_computes_what_it_computed(family, tmp_path):
    case = CASES[family]
    expected = of_then(family, tmp_path, case["targets"], **case.get("settings", {}))
    if "then" in case:
        edit_config(tmp_path, target_modules=case["then"])
    ours = base(family)
    with pytest.warns(UserWarning, match="otherwise than this model"):
        report = load_adapter(ours, tmp_path)
    with torch.no_grad():
        assert (output(family, ours) - expected).abs().max() <= 1e-5
        assert (output(family, base(family)) - expected).abs().max() > 1e-2
    assert {as_then(family, new) for new in report.moved} == set(report.moved.values())
    assert not report.left_out


def test_an_image_encoder_that_had_no_adapter_gets_none(tmp_path):
    """A list of names means its layers too, by the names of now; the file has none for them."""
    expected = of_then("llava", tmp_path, r"model\.language_model\..*\.[qv]_proj")
    edit_config(tmp_path, target_modules=["q_proj", "v_proj"])
    ours = base("llava")
    with pytest.warns(UserWarning, match="4 layers, 'model.vision_tower.encoder.layers.0.self_attn"):
        report = load_adapter(ours, tmp_path)
    with torch.no_grad():
        assert (output("llava", ours) - expected).abs().max() <= 1e-5
    assert len(report.left_out) == 4


def test_a_layer_too_few_is_still_missed(tmp_path):
    of_then("vit", tmp_path, ["q_proj"])
    edit_config(tmp_path, target_modules=["query"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({key: t for key, t in tensors.items() if ".1." not in key}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FileFormatError, match=r"2 missing tensors \(base_model.model.vit.layers.1.attention.q_proj.lora_A"):
        load_adapter(base("vit"), tmp_path)


def test_an_adapter_of_the_language_model_alone_may_be_of_either_part(tmp_path):
    """Trained on Gemma3ForCausalLM, say: its layers' names are those of the image encoder too."""
    of_then("gemma3", tmp_path, r"model\.language_model\..*\.[qv]_proj")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    short = {key.replace("language_model.", "", 1): t for key, t in tensors.items()}
    save_file(short, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    edit_config(tmp_path, target_modules=["q_proj", "v_proj"])
    with pytest.raises(FileFormatError, match=r"could be 'model\.language_model\.layers.*' or 'model\.vision_tower\.encoder"):
        load_adapter(base("gemma3"), tmp_path)


def test_files_with_the_names_of_now_are_read_as_ever(tmp_path):
    model = peft.get_peft_model(base("llava"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error", category=UserWarning):
        assert load_adapter(copy.deepcopy(base("llava")), tmp_path).moved == {}


# --- merged over files, which keep the names of then ------------------------------------------------------------------


def saved_base(family, directory, names):
    """A base's files, with the names of then, as transformers writes them, or with those of now."""
    model = base(family)
    model.save_pretrained(directory)
    if names == "now":
        tensors = {key: t.clone() for key, t in model.state_dict().items() if key not in model.all_tied_weights_keys}
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.filterwarnings("ignore:the base ties")
@pytest.mark.parametrize("adapter", ["then", "now"])
@pytest.mark.parametrize("files", ["then", "now"])
@pytest.mark.parametrize("family", CASES)
def test_it_is_merged_over_files_of_either_time(family, files, adapter, tmp_path):
    case = CASES[family]
    expected = of_then(family, tmp_path / "then", case["targets"], **case.get("settings", {}))
    if "then" in case:
        edit_config(tmp_path / "then", target_modules=case["then"])
    if adapter == "now":
        model = base(family)
        with pytest.warns(UserWarning, match="otherwise than this model"):
            load_adapter(model, tmp_path / "then")
        save_adapter(model, tmp_path / "now")
    saved_base(family, tmp_path / "base", files)
    held = load_file(tmp_path / "base" / "model.safetensors").keys()
    report = merge_checkpoint(tmp_path / "base", [tmp_path / adapter], tmp_path / "merged")
    merged, info = type(base(family)).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert (output(family, merged.eval()) - expected).abs().max() <= 1e-5
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) - {"lm_head.weight"} == held - {"lm_head.weight"}
    assert report.moved or adapter == files  # what is saved of the image encoders' names of then is not all of them
    if report.moved:
        assert f"{len(report.moved)} modules have other names in the base" in str(report)


def test_the_fingerprint_still_tells_another_base(tmp_path):
    model = base("llava")
    inject(model, LoraConfig(r=2, target_modules=r"model\.language_model\..*\.[qv]_proj"))
    save_adapter(model, tmp_path / "adapter")
    saved_base("llava", tmp_path / "base", "then")
    assert len(merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged").moved) == 4
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["language_model.model.layers.1.self_attn.v_proj.weight"][0] += 1
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(WrongBaseError, match=r"model\.language_model\.layers\.1\.self_attn\.v_proj .*has other values"):
        merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "again")


def test_an_adapter_of_a_base_in_four_bits_is_merged_into_what_that_was(tmp_path):
    model = base("llava")
    quantize_nf4(model)
    inject(model, LoraConfig(r=4, target_modules=r"model\.language_model\..*\.[qv]_proj"))
    save_adapter(tiny.randomize(model), tmp_path / "adapter")
    saved_base("llava", tmp_path / "base", "then")
    merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert (output("llava", merged) - output("llava", model)).abs().max() <= 1e-4
    with pytest.raises(StateError, match="otherwise in memory, and packed layers of such models are not written"):
        merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "again", Recipe(base_as="nf4"))
