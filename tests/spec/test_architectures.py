"""The layers that each architecture's adapters usually go on: PEFT's, and names that models of transformers have."""

import contextlib

import pytest
import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from lora_core.layers import lora_class
from lora_core.spec.architectures import _TRANSFORMERS, DEFAULT_TARGETS

#: Architectures of PEFT's table that transformers has no longer, or never had.
GONE = {"RefinedWeb", "RefinedWebModel", "btlm", "chatglm", "rwkv7"}


def test_the_table_holds_what_pefts_holds():
    constants = pytest.importorskip("peft.utils.constants")
    theirs = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    ours = {kind: names if isinstance(names, str) else list(names) for kind, names in DEFAULT_TARGETS.items()}
    assert {kind: ours.get(kind) for kind in theirs} == theirs


def test_no_architecture_has_two_defaults():
    listed = [kind for kinds in _TRANSFORMERS.values() for kind in kinds.split()]
    assert len(listed) == len(set(listed))


def hollow(kind):
    """A model of this architecture with few layers, without weights."""
    config = transformers.AutoConfig.for_model(kind)
    for name in ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"):
        if isinstance(getattr(config, name, None), int):
            with contextlib.suppress(NotImplementedError):  # one that is worked out from others
                setattr(config, name, min(2, getattr(config, name)))
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = config.layer_types[:2]
    causal, plain = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_MAPPING_NAMES
    with torch.device("meta"):
        return getattr(transformers, causal.get(kind) or plain[kind])(config)


@pytest.mark.parametrize("kind", [kind for kinds in _TRANSFORMERS.values() for kind in kinds.split()])
def test_a_model_of_transformers_has_each_of_these_layers(kind):
    modules = dict(hollow(kind).named_modules())
    for name in DEFAULT_TARGETS[kind]:
        found = [module for path, module in modules.items() if path == name or path.endswith(f".{name}")]
        assert found, name
        assert all(isinstance(module, nn.Linear) or lora_class(module) is not None for module in found), name
