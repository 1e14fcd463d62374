"""The models that the bench adapts, and the work that they do: real weights and sentences where those matter.

`minilm` is the packaged all-MiniLM-L6-v2 (6 layers, width 384) with a fresh head for two labels, as the experiments load
it. `distilbert` and `llama` have the shapes of those models and random weights.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DistilBertConfig, DistilBertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from experiments.batches import POOL_BATCHES, TokenisedTexts, batches
from experiments.data import load
from experiments.models import Loaded, load_classifier, resolve
from lora_core import LoraConfig, inject, quantize_nf4

from .peers import adapt_with_peft, freeze, quantize_for_peft, randomize

ATTENTION = ("query", "key", "value", "attention.output.dense")
ALL_LINEAR = "all-linear"
HEAD = "classifier"
DENSE = (HEAD, "pooler")  # what of MiniLM stays out of 4 bits: the head is new, and the pooler belongs to it
R = 16
DROPOUT = 0.1


@functools.cache
def packaged() -> Loaded:
    """The packaged model and its tokenizer, loaded once."""
    torch.manual_seed(0)
    return load_classifier(resolve("packaged"))


def minilm() -> nn.Module:
    """A fresh copy; the head is always the same one."""
    return copy.deepcopy(packaged().model)


def sentences(batch_size: int, count: int, device: str = "cpu") -> list[dict[str, Tensor]]:
    """`count` batches of real sentences, of like length within a batch and padded to its longest, always the same."""
    train = load("packaged").train.sample(POOL_BATCHES * batch_size, seed=0)
    texts = TokenisedTexts(packaged().tokenizer, train.texts, 128, train.labels)
    chosen = itertools.islice(batches(texts, batch_size, seed=0), count)
    return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in chosen]


def tokens(batch_size: int, length: int, device: str = "cpu") -> dict[str, Tensor]:
    """One batch of full rows, for measures where only the shape matters."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (batch_size, length), generator=generator).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}


def classification_loss(model: nn.Module, batch: dict[str, Tensor], bf16: bool = False) -> Tensor:
    """Cross entropy; under bfloat16 autocast if asked for, and on CUDA always, as the experiments train there."""
    ids = batch["input_ids"]
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16 or ids.is_cuda):
        logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits.float(), batch["labels"])


def classifier(
    candidate: str,
    targets: tuple[str, ...] | str = ATTENTION,
    quantize: bool = False,
    device: str = "cpu",
    like: nn.Module | None = None,
    prepare: Callable[[nn.Module], Any] | None = None,
) -> nn.Module:
    """MiniLM as one candidate trains it, in training mode.

    Args:
        candidate: "frozen" (only the head is trained), "full", "ours" or "peft".
        targets: the layers that carry adapters.
        quantize: whether the base is in NF4.
        like: for peft: the model of ours to take A, B and head from.
        prepare: called with the plain model first.
    """
    model = minilm().to(device)
    if prepare:
        prepare(model)
    torch.manual_seed(0)  # two models of ours get the same A and B
    compute_dtype = torch.bfloat16 if device == "cuda" else None
    config = LoraConfig(r=R, lora_alpha=2 * R, lora_dropout=DROPOUT, target_modules=targets, task_type="SEQ_CLS")
    if candidate == "frozen":
        freeze(model, _linears(model, targets), HEAD)
    elif candidate == "ours":
        if quantize:
            quantize_nf4(model, skip=DENSE, compute_dtype=compute_dtype)
        inject(model, config)
        randomize(model)
    elif candidate == "peft":
        if quantize:
            quantize_for_peft(model, DENSE, compute_dtype)
            model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        model = adapt_with_peft(model, config, like)
    return model.train()


def _linears(model: nn.Module, targets: tuple[str, ...] | str) -> Iterable[nn.Module]:
    """The layers that `targets` means, on a plain model."""
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) and path != HEAD}
    return [m for path, m in linears.items() if targets == ALL_LINEAR or path.endswith(tuple(f".{t}" for t in targets))]


def distilbert(quick: bool = False) -> nn.Module:
    """A classifier of DistilBERT's size, 67 million parameters; small when `quick`."""
    torch.manual_seed(0)
    small = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2, "vocab_size": 99}
    return DistilBertForSequenceClassification(DistilBertConfig(**small if quick else {}))


#: Of Llama 2 7B and of Llama 3.2 1B.
LLAMA_7B: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_1B: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
#: SmolLM2-135M's, with 6 of its 30 layers.
SMOLLM: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
LLAMA_TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}


def llama(shape: dict[str, Any], device: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A decoder of this shape with random weights (none on the meta device), built where it will be."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**shape))
    finally:
        torch.set_default_dtype(before)
