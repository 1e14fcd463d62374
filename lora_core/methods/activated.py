"""Activated LoRA: the adapter acts from its invocation on, and what stands before is the base's (Greenewald et al., arXiv
2504.12397).

    W x_t + [t >= t0] s B A dropout(x_t)        t0: where the last invocation begins, for each row of the batch

The invocation is a sequence of tokens that the adapter is trained with. Before it keys and values are those of the base, so the
cache of a long text serves the base and all such adapters. No weight holds that: it can't be merged.

`Text` is how layers know where the invocation is: hooks on the model read its `input_ids`, and keep on the cache what it has
read. So an invocation counts in generation too, in a cache that is read on with, and in one that the base has filled before.
What is generated, token by token, does not invoke, as in PEFT and vLLM.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..bases.forwards import stored_entry
from ..errors import StateError, TargetError
from ..spec.config import LoraConfig
from .base import Table, refuse_other_than_linear
from .lora import Lora

#: Under which names models are given what they have computed of earlier tokens.
CACHES = ("past_key_values", "cache_params")
#: The attribute of a cache that has its text, and what stands there for a token that is not known or was generated.
READ, UNKNOWN = "lora_core_text", -1


class Activated(Lora):
    """LoRA on the tokens from an invocation on."""

    name, label, asked = "activated", "activated LoRA", "alora_invocation_tokens"
    mark = ("activated",)
    unmergeable = "acts on some tokens alone, which no weight can hold"
    is_product, adds_itself, reads_text = False, True, True
    tables = (*Lora.tables, Table("lora_invocation", "", trained=False, shared=True))

    def asked_by(self, config: LoraConfig) -> bool:
        return config.alora_invocation_tokens is not None

    def check(self, config: LoraConfig, path: str, module: nn.Module, shape: tuple[int, int], r: int) -> None:
        refuse_other_than_linear(self.label, path, module)
        super().check(config, path, module, shape, r)

    def settings(self, config: LoraConfig) -> tuple[Any, ...]:
        return (*self.mark, config.alora_invocation_tokens)

    def shared(self, config: LoraConfig, shapes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        return {"lora_invocation": torch.tensor(config.alora_invocation_tokens, device="cpu")}

    def acts(self, layer: Any, name: str, x: Tensor) -> Tensor:
        """On which tokens of the layer's input x, (N, T, d_in), the adapter acts: (N, T), bool."""
        return layer.lora_reader.from_last(name, stored_entry(layer.lora_invocation, name), x)

    def add(self, layer: Any, name: str, y: Tensor, x: Tensor) -> Tensor:  # N T d_out, N T d_in -> N T d_out
        acts = self.acts(layer, name, x)
        dropout = layer.lora_dropout[name] if layer.training else 0.0
        update = layer.product(x[acts], *self.product(layer, name), layer.lora_scaling[name], dropout)  # of the chosen tokens
        return y.index_put((acts,), (y[acts] + update).to(y.dtype))


@dataclass
class _Call:
    """A call of the model.

    Attributes:
        text: the tokens that it reads, after those that the cache has of it, (N, L); None: it was given none.
        new: how many it reads now.
        acts: {adapter: on which of these it acts, (N, new)}.
    """

    text: Tensor | None
    new: int = 0
    acts: dict[str, Tensor] = field(default_factory=dict)


class Text:
    """What a model reads, by hooks on it: in the call of each thread, `from_last` tells its layers where an invocation is."""

    def __init__(self, model: nn.Module) -> None:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise TargetError(
                f"{Activated.asked}: a {type(model).__name__} reads one text and writes another, and activated LoRA is for "
                "models of one text; leave it out"
            )
        self.first = next(iter(inspect.signature(model.forward).parameters), "input_ids")
        self.calls: dict[int, _Call] = {}
        self.to_come: list[_Call] = []  # the last two whose backward is to come, of which a checkpoint asks again
        self.asked_again = False
        self.handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self.enter, with_kwargs=True),
            model.register_forward_hook(self.leave, with_kwargs=True, always_call=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"calls": {}, "to_come": [], "asked_again": False}  # a copy of the model is in nobody's hands

    def __repr__(self) -> str:
        return "Text()"

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self.handles:
            handle.remove()

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else kwargs.get(self.first))
        if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point():
            call = _Call(_text(ids.detach(), _cache_in(kwargs)), ids.shape[1])
        else:
            call = _Call(None)
        self.calls[get_ident()] = call
        if model.training and torch.is_grad_enabled():
            self.to_come = [call] if self.asked_again else [*self.to_come[-1:], call]
            self.asked_again = False

    def leave(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        call = self.calls.pop(get_ident(), None)
        if output is None or call is None or call.text is None:  # it was interrupted, say
            return
        cache = _cache_in(kwargs)
        if cache := _cache_of(output) if cache is None else cache:
            setattr(cache, READ, call.text)

    def from_last(self, name: str, invocation: Tensor, x: Tensor) -> Tensor:
        """On which tokens of x, (N, T, d), an adapter acts that acts from its last invocation on: (N, T), bool.

        Where x has fewer than the model reads they are the last ones: a head may be given those alone.

        Raises:
            StateError: it is not known what the model reads, or x is no such thing.
        """
        call = self.calls.get(get_ident()) or self._checkpointed()
        if call.text is None:
            raise StateError(
                f"adapter {name!r} looks for its invocation in the model's input_ids, (rows, tokens), and there are none; pass "
                "them, to the model itself and not to a part of it, or use disable_adapters"
            )
        if name not in call.acts:
            call.acts[name] = _from_last(call.text, invocation.to(call.text.device))[:, -call.new :]
        acts = call.acts[name]
        if x.dim() < 3 or len(x) != len(acts) or x.shape[1] > call.new:
            raise StateError(
                f"adapter {name!r} acts on tokens, and is on a layer that reads {tuple(x.shape)} where the model reads "
                f"{len(acts)} rows of {call.new} tokens; leave that layer out of target_modules"
            )
        return acts[:, call.new - x.shape[1] :].to(x.device)

    def _checkpointed(self) -> _Call:
        """The call that a gradient checkpoint computes a part of again, in the backward.

        Raises:
            StateError: it may be one of two.
        """
        if torch._C._current_graph_task_id() == -1 or not self.to_come:  # in no backward
            return _Call(None)
        texts, self.asked_again = [call.text for call in self.to_come], True
        if any(text is None or not torch.equal(text, texts[0]) for text in texts[1:]):
            raise StateError(
                "activated LoRA with gradient checkpointing needs the backward of each forward before the next one; run what "
                "needs no gradients under torch.no_grad()"
            )
        return self.to_come[-1]


def _cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The cache among a model's keyword arguments; None if there is none.

    Raises:
        StateError: it is of a kind that can't be told what was read.
    """
    cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
    if cache is not None and not hasattr(cache, "__dict__"):
        raise StateError(
            f"activated LoRA keeps on the cache what was read, and a {type(cache).__name__} can't; pass a DynamicCache"
        )
    return cache


def _cache_of(output: Any) -> Any:
    """The cache in a model's output; None if there is none."""
    if isinstance(output, tuple):
        return next((entry for entry in output if hasattr(entry, "get_seq_length")), None)
    return next((getattr(output, name) for name in CACHES if getattr(output, name, None) is not None), None)


def _text(ids: Tensor, cache: Any) -> Tensor:
    """The tokens that a cache holds, (N, L), as far as they are known, and then `ids`, (N, T)."""
    known = getattr(cache, READ, None)
    length = (0 if known is None else known.shape[1]) if not hasattr(cache, "get_seq_length") else int(cache.get_seq_length())
    if not length:
        return ids
    past = ids.new_full((len(ids), length), UNKNOWN)
    if known is None:  # what the base, say, has read
        return torch.cat([past, ids], dim=1)
    if len(ids) % len(known):
        raise StateError(f"the cache is of {len(known)} rows, and input_ids of {len(ids)}; give each row of it as many")
    known = known[:, :length].repeat_interleave(len(ids) // len(known), dim=0)  # it may have been cropped
    past[:, : known.shape[1]] = known
    generated = ids.shape[1] == 1
    return torch.cat([past, torch.full_like(ids, UNKNOWN) if generated else ids], dim=1)


def _from_last(text: Tensor, invocation: Tensor) -> Tensor:
    """Which tokens of each row of the text, (N, L), stand from its last invocation, (n,), on: (N, L), bool."""
    (N, L), n = text.shape, len(invocation)
    if n > L:
        return text.new_zeros(N, L, dtype=torch.bool)
    place = torch.arange(L, device=text.device)
    begins = (text.unfold(1, n, 1) == invocation).all(-1)  # N L-n+1
    last = torch.where(begins, place[: L - n + 1], -1).amax(1)
    return (place >= last[:, None]) & (last >= 0)[:, None]
