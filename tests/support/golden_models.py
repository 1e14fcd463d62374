"""Facts of whole models with adapters of several sorts, for the golden files."""

import json
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from lora_core import (
    LoraConfig,
    combine_adapters,
    count_parameters,
    disable_adapters,
    inject,
    load_adapter,
    merge_and_unload,
    mixed_batch,
    quantize_nf4,
    rename_adapter,
    save_adapter,
    set_adapter,
    trainable_parameters,
)
from tests.support import tiny
from tests.support.golden_facts import FILES, digest, files, fill, fill_trained, gradients, layout, numbers, outcome


class Model(NamedTuple):
    """A model of `tiny`'s or another, its adapters by name, and whether its base is in 4 bits."""

    build: Callable[[], nn.Module]
    adapters: dict[str, dict[str, Any]]
    packed: bool = False


def tied_llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(tie_word_embeddings=True, **tiny.SMALL)).eval()


def one(architecture: str, packed: bool = False, **settings: Any) -> Model:
    settings = {"target_modules": tiny.projections(architecture)[:2], **settings}
    return Model(partial(tiny.build, architecture), {"default": settings}, packed)


MODELS = {
    "modules to save": one("distilbert", modules_to_save=["classifier"], use_dora=True),
    "task type": one("bert", task_type="SEQ_CLS"),
    "all biases": one("bert", bias="all", modules_to_save=["classifier"]),
    "biases of layers": one("bert", bias="lora_only"),
    "layers and patterns": one("llama", layers_to_transform=[1], alpha_pattern={"q_proj": 6}, exclude_modules=["k_proj"]),
    "all-linear": one("gpt2", target_modules="all-linear"),
    "expression": one("t5", target_modules=r"encoder.*\.(q|v)", lora_bias=False, use_rslora=True),
    "every kind": one("convnet", target_modules=["conv1d", "conv2d", "mix", "embedding", "stem"], modules_to_save=["norm"]),
    "vision": one("vit", target_modules=tiny.projections("vit")),
    "4 bits": one("llama", packed=True, target_modules="all-linear"),
    "tied": Model(tied_llama, {"default": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}}),
    "tied as one": Model(
        tied_llama,
        {"default": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}},
    ),
    "several": Model(
        partial(tiny.build, "roberta"),
        {
            "default": {"target_modules": ["query", "value"]},
            "other": {"target_modules": ["query", "key"], "r": 3, "task_type": "SEQ_CLS"},
            "dora": {"target_modules": ["value"], "use_dora": True},
        },
    ),
}
COMBINED = {
    "linear": {},
    "cat": {},
    "svd": {"r": 2},
    "ties": {"r": 2, "density": 0.5},
    "dare_linear": {"r": 2, "density": 0.5},
    "dare_ties": {"r": 2, "density": 0.5},
    "magnitude_prune": {"r": 2, "density": 0.5},
}


def build(name: str) -> nn.Module:
    model = MODELS[name].build()
    fill(dict(model.named_parameters()))
    if MODELS[name].packed:
        quantize_nf4(model)
    return model


def model_facts(name: str) -> dict[str, Any]:
    """What injecting, training, saving, loading and merging do."""
    model, said = build(name), []
    base = tiny.logits(model)
    for adapter, settings in MODELS[name].adapters.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = inject(model, LoraConfig(**{"r": 2, "lora_alpha": 3, **settings}), adapter)
        said += [str(report), *(str(warning.message) for warning in caught)]
        set_adapter(model, adapter)
        fill_trained(model)
    found = {"said": said, "state": _state(model), "parameters": repr(count_parameters(model))}
    found["adapters"] = {adapter: _adapter_facts(model, name, adapter) for adapter in MODELS[name].adapters}
    with disable_adapters(model):
        found["disabled"] = _same(tiny.logits(model), base)
    if len(MODELS[name].adapters) > 1:
        found["together"] = _together(model)
    report = outcome(partial(merge_and_unload, model))
    merged = {"report": str(report).split(":")[0], "state": _state(model)}
    return found | {"merged": merged | {"logits": numbers(tiny.logits(model))}}


def _state(model: nn.Module) -> dict[str, Any]:
    """The keys that adapters add, and how many others there are, with a hash of those."""
    tensors = model.state_dict()
    added = {key: t for key, t in tensors.items() if "lora_" in key}
    base = layout({key: t for key, t in tensors.items() if key not in added})
    return {"added": layout(added), "base": f"{len(tensors) - len(added)} {digest(base.encode())}"}


def _adapter_facts(model: nn.Module, name: str, adapter: str) -> dict[str, Any]:
    set_adapter(model, adapter)
    output = model(**tiny.inputs(model)).logits
    total = gradients(model, output)
    found = {"logits": numbers(output), "gradients": numbers(torch.tensor(list(total.values())))}
    found |= {"trained": digest(" ".join(sorted(total)).encode()), "trainable": len(trainable_parameters(model))}
    with tempfile.TemporaryDirectory() as directory:
        save_adapter(model, directory, adapter)
        saved = files(Path(directory))
        saved["settings"] = json.loads((Path(directory) / FILES[0]).read_text())
        saved["directory"] = sorted(path.name for path in Path(directory).iterdir())
        other = build(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved["loading"] = str(load_adapter(other, directory))
        saved["loads"] = _same(tiny.logits(other), tiny.logits(model))
        save_adapter(other, Path(directory) / "again")
        saved["again"] = digest((Path(directory) / "again" / FILES[1]).read_bytes()) == saved["weights"]
    return found | {"saved": saved}


def _same(found: Tensor, expected: Tensor) -> bool:
    """Whether these are the same but for rounding, which may differ with the memory that a kernel reads."""
    return bool((found - expected).norm() <= 1e-5 * expected.norm())


def _together(model: nn.Module) -> dict[str, Any]:
    """What several adapters do at once, mixed by row, and combined to one."""
    set_adapter(model, ["default", "other"])
    found: dict[str, Any] = {"logits": numbers(tiny.logits(model))}
    with mixed_batch(model, ["dora", None, "other"]):
        found["mixed"] = numbers(tiny.logits(model))
    for method, settings in COMBINED.items():
        report = combine_adapters(model, ["default", "other"], [0.75, -0.5], method, method, **settings)
        set_adapter(model, method)
        found[method] = {"report": str(report), "ranks": dict(report.ranks), "logits": numbers(tiny.logits(model))}
    rename_adapter(model, "linear", "renamed")
    found["renamed"] = [key for key in sorted(model.state_dict()) if "renamed" in key]
    found["refused"] = outcome(lambda: combine_adapters(model, ["default", "dora"], [1.0, 1.0], "sum"))
    set_adapter(model, ["default", "dora"])
    return found
