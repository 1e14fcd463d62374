"""Modules and models with fused experts: those of transformers, tiny, as the tests of several rooms need them."""

from types import SimpleNamespace

import torch
import transformers
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from lora_core import LoraConfig

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50, "head_dim": 8}
SMALL |= {"intermediate_size": 24, "num_key_value_heads": 2, "num_experts_per_tok": 2}
#: {name: (what transformers calls the architecture, settings, the module with the experts)}.
MODELS = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}, "mlp.experts"),
    "qwen2": ("Qwen2Moe", {"num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 8}, "mlp.experts"),
    "qwen3": ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 12}, "mlp.experts"),
    "gpt-oss": ("GptOss", {"num_local_experts": 4}, "mlp.experts"),
    "llama4": ("Llama4", {"num_local_experts": 4, "num_experts_per_tok": 1, "pad_token_id": 0}, "feed_forward.experts"),
}
TOKENS = torch.arange(14).reshape(2, 7)


def build(name="mixtral", implementation=None, **settings):
    """A language model of this architecture, with the same values each time."""
    kind, own, _ = MODELS[name]
    config = getattr(transformers, f"{kind}{'Text' if kind == 'Llama4' else ''}Config")(**SMALL | own | settings)
    if implementation is not None:
        config._experts_implementation = implementation
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def config(name="mixtral", **settings):
    """An adapter of both parameters of its experts, and of nothing else."""
    experts = MODELS[name][2]
    both = [f"{experts}.gate_up_proj", f"{experts}.down_proj"]
    return LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": both} | settings)


def logits(model):
    return model(TOKENS).logits


def layer(kind=MixtralExperts, implementation="eager"):
    """The experts of one layer alone: four, of which two are for each of five vectors of 8 values."""
    settings = {"hidden_size": 8, "intermediate_size": 12, "num_local_experts": 4, "hidden_act": "silu"}
    settings |= {"swiglu_alpha": 1.7, "swiglu_limit": 7.0, "_experts_implementation": implementation}
    experts = kind(SimpleNamespace(**settings))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return nn.ModuleDict({"experts": experts})


def run(model, x):
    chosen = torch.tensor([[0, 3], [1, 3], [3, 0], [0, 1], [1, 0]], device=x.device)  # nobody asks for number 2
    weights = torch.tensor([[0.6, 0.4]]).to(x).expand(5, 2)
    return model["experts"](x, chosen, weights)


TRANSPOSED = GptOssExperts
