"""A few inputs that an adapter carries, with the logits that its model gave for them when it was saved.

    save_adapter(model, "out/");  save_probe(model, "out/", tokenizer(texts, ...), texts)      # out/probe.safetensors

Of a language model the inputs are prompts, as its chat template writes them, and what it says to them is kept too, with and
without the adapter. Whoever loads the adapter later, elsewhere, can run them again and see whether it is the same model
(`verification.py`), or ask a server that should have it (`serving.py`). The file also says in what dtype the model was and
which of its layers were in 4 bits, which an adapter's other files do not.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bases import is_packed, libraries
from ..errors import ConfigError, FileFormatError
from ..files.adapter import weights_path
from ..files.disk import read_safetensors, to_safetensors, write_whole
from ..files.reading import open_file, parse_json
from ..layers.packed import packed_experts
from ..model.adapters import disable_adapters
from ..model.conventions import is_causal
from ..model.registry import unwrap
from .completions import ABSENT, Completions, complete, prompts_of

PROBE_FILE = "probe.safetensors"
ABOUT = "lora_core.probe"  # in the file's metadata
TEXT_INPUTS = {"input_ids", "attention_mask", "token_type_ids"}
LIBRARIES = ("torch", "transformers", "tokenizers", *libraries())


@dataclass(frozen=True)
class Probe:
    """What a probe file holds, for N inputs.

    Attributes:
        inputs: {argument of the model: (N, T)}, "input_ids" among them.
        logits: (N, C), float32: what `run_probe` gave.
        dtype: of the model, "float32" or the like.
        quantized: paths of its 4-bit layers.
        texts: what the inputs were tokenised from; None if that is not known.
        versions: {library: version}.
        weights: a hash of the adapter's weights file.
        adapter: of a language model, its greedy completions of the inputs; else None.
        base: those of the model without the adapter.
        pieces: {token: its text, among others}, of every token in the two; empty if no tokenizer was given.
    """

    inputs: dict[str, Tensor]
    logits: Tensor
    dtype: str
    quantized: tuple[str, ...]
    texts: tuple[str, ...] | None
    versions: dict[str, str]
    weights: str
    adapter: Completions | None = None
    base: Completions | None = None
    pieces: Mapping[int, str] = field(default_factory=dict)


def save_probe(
    model: nn.Module,
    directory: str | os.PathLike,
    inputs: Mapping[str, Tensor],
    texts: Sequence[str] | None = None,
    tokenizer: Any = None,
) -> None:
    """Runs `model` on some inputs and writes them, with its logits, beside the adapter that was saved in `directory`.

    A language model of transformers also answers them, greedily, with and without its adapters: so give it prompts as it will
    get them, written by its chat template.

    Args:
        model: the model, with the adapter active.
        directory: where `save_adapter` has put the adapter.
        inputs: its arguments, (N, T) each: input_ids, attention_mask, ...
        texts: the N texts that the inputs were tokenised from, so that a changed tokenizer shows.
        tokenizer: of a language model; whatever has `decode(ids)`. With it servers that speak in text can be verified.

    Raises:
        ConfigError: the model gives no logits, or the number of texts is another than that of inputs.
        StateError: the adapters of a language model are merged, so that it can't answer without them.
    """
    root, directory = unwrap(model), Path(directory)
    if texts is not None and len(texts) != len(inputs["input_ids"]):
        raise ConfigError(f"{len(texts)} texts are given for {len(inputs['input_ids'])} inputs; give one for each, or none")
    logits = run_probe(model, inputs)
    modules = root.named_modules()
    about = {
        "dtype": str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch."),
        "quantized": [*(path for path, m in modules if isinstance(m, nn.Linear) and is_packed(m)), *packed_experts(root)],
        "texts": None if texts is None else list(texts),
        "versions": versions(),
        "weights": weights_hash(directory),
    }
    tensors = {"logits": logits} | {f"input.{name}": tensor.cpu() for name, tensor in inputs.items()}
    if is_causal(root) and inputs.keys() <= TEXT_INPUTS:
        prompts = prompts_of(inputs)
        said = {"adapter": complete(root, prompts)}
        with disable_adapters(root):
            said["base"] = complete(root, prompts)
        tensors |= {f"{who}.{name}": tensor for who, one in said.items() for name, tensor in vars(one).items()}
        about["pieces"] = {} if tokenizer is None else pieces(tokenizer, prompts, said.values())
    data = to_safetensors(tensors, {"format": "pt", ABOUT: json.dumps(about)})
    write_whole(directory / PROBE_FILE, data)


def read_probe(directory: Path) -> Probe:
    """The probe beside an adapter.

    Raises:
        FileFormatError: it has none; the file is broken.
    """
    path = directory / PROBE_FILE
    if not path.exists():
        raise FileFormatError(f"{path} is not there: this adapter was saved without probe inputs")
    tensors, metadata = read_safetensors(path)
    try:
        about = parse_json(metadata[ABOUT], once=False)
        inputs = {name.removeprefix("input."): t for name, t in tensors.items() if name.startswith("input.")}
        if tensors["logits"].shape[:1] != inputs["input_ids"].shape[:1] or not isinstance(about["versions"], dict):
            raise ValueError
        texts = None if about["texts"] is None else tuple(map(str, about["texts"]))
        quantized = tuple(map(str, about["quantized"]))
        said = {who: _completions(tensors, who, len(inputs["input_ids"])) for who in ("adapter", "base")}
        told = {int(token): str(text) for token, text in about.get("pieces", {}).items()}
        about = {"dtype": str(about["dtype"]), "versions": about["versions"], "weights": str(about["weights"])}
        return Probe(inputs, tensors["logits"], quantized=quantized, texts=texts, **about, **said, pieces=told)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise FileFormatError(f"{path} is not as written here; save the adapter and its probe again") from None


def _completions(tensors: Mapping[str, Tensor], who: str, size: int) -> Completions | None:
    """What `who` said, checked; None if that is not in the file."""
    if f"{who}.tokens" not in tensors:
        return None
    said = Completions(*(tensors[f"{who}.{name}"] for name in ("tokens", "likeliest", "logprobs")))
    ids, values = {said.tokens.dtype, said.likeliest.dtype}, said.logprobs
    shapes = said.tokens.shape == said.likeliest.shape[:2] and said.likeliest.shape == values.shape
    if not shapes or len(said.tokens) != size or 0 in values.shape or ids != {torch.int64} or values.dtype != torch.float32:
        raise ValueError
    if said.tokens.min() < ABSENT or said.tokens[:, 0].min() < 0 or said.likeliest.min() < 0 or not values.isfinite().all():
        raise ValueError
    return said


def pieces(tokenizer: Any, prompts: Sequence[Tensor], said: Iterable[Completions]) -> dict[int, str]:
    """The text of each token among others, for some tokenizers drop the space before a token that stands alone."""
    before = int(prompts[0][-1])
    alone = tokenizer.decode([before])
    ids = {token for one in said for token in (*one.tokens.flatten().tolist(), *one.likeliest.flatten().tolist())}
    return {token: tokenizer.decode([before, token])[len(alone) :] for token in sorted(ids - {ABSENT})}


def quantized_layers(directory: Path) -> tuple[str, ...] | None:
    """Paths of the layers and experts that were packed when the adapter in `directory` was saved; None if no probe says so."""
    return (read_probe(directory).quantized or None) if (directory / PROBE_FILE).exists() else None


@torch.no_grad()
def run_probe(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The logits of each input, (N, C), float32; of models that give some for every token, those of the last one.

    Raises:
        ConfigError: the model gives no logits.
    """
    device, training = next(model.parameters()).device, model.training
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    model.eval()
    try:
        found = [_of_last_token(model(**batch), batch) for batch in _batches(model, inputs)]
    finally:
        model.train(training)
    if any(one is None for one in found):
        raise ConfigError(f"{type(model).__name__} gives no logits to compare; only models with a head can be probed")
    return torch.cat(found).float().cpu()


def _of_last_token(output: Any, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """(N, C), of the last token where there are some for every token; None if there are none."""
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:  # N T C
        return logits if isinstance(logits, Tensor) else None
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).to(logits.device)
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    return logits[torch.arange(len(logits), device=mask.device), last]


def _batches(model: nn.Module, inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """`inputs`, all at once; or one by one and without padding, for a classifier that does not know which token pads.

    Such is GPT-2's or Llama's as it is published: it looks for a row's last token by that, and refuses a batch.
    """
    config = getattr(unwrap(model), "config", None)
    if "input_ids" not in inputs or getattr(config, "pad_token_id", 0) is not None or is_causal(unwrap(model)):
        return [inputs]
    shown = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    return [
        {name: t[i : i + 1, shown[i]] if t.shape[:2] == shown.shape else t[i : i + 1] for name, t in inputs.items()}
        for i in range(len(shown))
    ]


def weights_hash(directory: Path) -> str:
    """A hash of the adapter's weights file."""
    with open_file(weights_path(directory)) as file:
        return hashlib.blake2b(file.read(), digest_size=16).hexdigest()


def versions() -> dict[str, str]:
    """The versions of the libraries that a model's outputs depend on."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
