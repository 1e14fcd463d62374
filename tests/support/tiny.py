"""Tiny models that several test files share: random weights, a few thousand parameters, built in milliseconds."""

import copy
import functools
from types import SimpleNamespace

import torch
import transformers
from torch import nn

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}


class ConvBlock(nn.Module):
    """A layer of each kind that is not an embedding, in a residual block: N 8 T -> N 8 T."""

    def __init__(self):
        super().__init__()
        self.conv1d, self.conv2d = nn.Conv1d(8, 8, 3, padding=1), nn.Conv2d(1, 8, (8, 3), padding=(0, 1))
        self.mix = nn.Linear(8, 8)

    def forward(self, x):
        x = x + torch.tanh(self.conv1d(x))
        x = x + self.conv2d(x[:, None]).squeeze(2)  # N 1 8 T -> N 8 1 T -> N 8 T
        return x + self.mix(x.transpose(1, 2)).transpose(1, 2)


class ConvNet(nn.Module):
    """Token ids -> embedding -> a strided convolution -> blocks -> 3 logits, without transformers."""

    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__()
        self.body = nn.Module()
        self.body.embedding = nn.Embedding(config.vocab_size, 8, padding_idx=7)
        self.body.stem = nn.Conv1d(8, 8, 2, stride=2, bias=False)
        self.body.layers = nn.ModuleList([ConvBlock(), ConvBlock()])
        self.body.norm = nn.BatchNorm1d(8)
        self.classifier = nn.Linear(8, 3)

    def forward(self, input_ids):
        x = self.body.stem(self.body.embedding(input_ids).transpose(1, 2))
        for layer in self.body.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.classifier(self.body.norm(x).mean(2)))


#: name: (configuration, model class, names of the four attention projections, or of as many other layers)
ARCHITECTURES = {
    "bert": (
        transformers.BertConfig(**SMALL),
        transformers.BertForSequenceClassification,
        ["query", "key", "value", "attention.output.dense"],
    ),
    "distilbert": (
        transformers.DistilBertConfig(dim=32, hidden_dim=64, n_layers=2, n_heads=2, vocab_size=99),
        transformers.DistilBertForSequenceClassification,
        ["q_lin", "k_lin", "v_lin", "out_lin"],
    ),
    "roberta": (
        transformers.RobertaConfig(**SMALL),
        transformers.RobertaForSequenceClassification,
        ["query", "key", "value", "attention.output.dense"],
    ),
    "mpnet": (
        transformers.MPNetConfig(**SMALL),
        transformers.MPNetForSequenceClassification,
        ["attn.q", "attn.k", "attn.v", "attn.o"],
    ),
    "gpt2": (
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99, n_positions=64, bos_token_id=1, eos_token_id=1),
        transformers.GPT2LMHeadModel,
        ["c_attn", "attn.c_proj"],
    ),
    "llama": (
        transformers.LlamaConfig(**SMALL),
        transformers.LlamaForCausalLM,
        ["q_proj", "k_proj", "v_proj", "o_proj"],
    ),
    "t5": (
        transformers.T5Config(
            d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=99, decoder_start_token_id=0, dropout_rate=0.0
        ),
        transformers.T5ForConditionalGeneration,
        ["q", "k", "v", "o"],
    ),
    "vit": (
        transformers.ViTConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        ),
        transformers.ViTForImageClassification,
        ["q_proj", "v_proj", "o_proj", "patch_embeddings.projection"],
    ),
    "convnet": (SimpleNamespace(vocab_size=99), ConvNet, ["conv1d", "conv2d", "mix", "embedding"]),
}
CLASSIFIERS = ("bert", "distilbert", "roberta", "mpnet")

#: {architecture: its embedding layers}. Those of GPT-2 and T5 are tied to the output layer.
EMBEDDINGS = {
    **dict.fromkeys(CLASSIFIERS, "word_embeddings"),
    **dict.fromkeys(("llama", "t5"), "embed_tokens"),
    "gpt2": "wte",
    "convnet": "embedding",
}

#: Token ids for every one of them; none is a padding or end token, but for the convolutional net's.
TOKENS = torch.arange(5, 5 + 3 * 8).view(3, 8)


@functools.cache
def _original(architecture):
    config, model_class, _ = ARCHITECTURES[architecture]
    torch.manual_seed(1)
    return model_class(config).eval()


def build(architecture):
    """A fresh copy of the architecture's tiny model, in eval mode; always with the same weights."""
    return copy.deepcopy(_original(architecture))


def projections(architecture):
    return list(ARCHITECTURES[architecture][2])


def task_type(architecture):
    """What the model does, as a configuration says it; None where that would name no head that it has."""
    others = {"gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
    return "SEQ_CLS" if architecture in CLASSIFIERS else others.get(architecture)


def inputs(model, tokens=TOKENS):
    """What one of these models takes, wrapped or not: three rows."""
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.sin(torch.arange(3.0 * 3 * 8 * 8)).view(3, 3, 8, 8)}
    if hasattr(model, "decoder"):
        return {"input_ids": tokens, "decoder_input_ids": tokens.flip(1)}
    return {"input_ids": tokens}


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(**inputs(model, tokens)).logits


class Block(nn.Module):
    """One residual block with the usual four projections; `k` has no bias."""

    def __init__(self, width):
        super().__init__()
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.v, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.out(torch.tanh(self.q(x)) * self.k(x) + self.v(x))


class Classifier(nn.Module):
    """Two blocks and a head, without transformers: 64 values in, 3 out."""

    def __init__(self, width=64):
        super().__init__()
        self.layers = nn.ModuleList([Block(width), Block(width)])
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, 3)

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return self.classifier(self.norm(x))


def classifier(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Classifier().to(dtype)


def batch(dtype=torch.float32, tokens=5):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(tokens, 64, generator=generator).to(dtype)


def randomize(model, adapter="default", seed=3):
    """Gives the adapter random values everywhere, so that nothing about it is zero."""
    from lora_core.model.registry import adapter_parameters

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, adapter):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def snapshot(model):
    """All that unloading has to bring back: keys, bytes, dtypes, flags, classes, identity and hooks."""
    state = {
        key: (tensor.dtype, tensor.detach().clone().contiguous().view(torch.uint8).tolist() if tensor.ndim else tensor.item())
        for key, tensor in model.state_dict().items()
    }
    return {
        "state": state,
        "trainable": {path: p.requires_grad for path, p in model.named_parameters()},
        "parameters": {path: id(p) for path, p in model.named_parameters(remove_duplicate=False)},
        "modules": {path: (id(m), type(m)) for path, m in model.named_modules()},
        "hooks": {path: len(m._forward_hooks) + len(m._forward_pre_hooks) for path, m in model.named_modules()},
        "attributes": {path: sorted(k for k in vars(m) if not k.startswith("__")) for path, m in model.named_modules()},
        "training": {path: m.training for path, m in model.named_modules()},
    }
