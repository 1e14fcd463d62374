"""What a language model says to some prompts, token by token, and how likely it held each: the measure of whether two models
are one.

    said = complete(model, prompts, 32)        greedy: at each place the likeliest token, up to the one that ends an answer
    outputs(model, prompts, said.tokens)       what a model gives at those places: one forward for each prompt, no padding

A model whose likeliest token is `said`'s at every place says the same when it is left to itself. So one is judged by a forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.conventions import end_tokens, most_tokens
from ..progress import watched

#: How many tokens of an answer are looked at, and how many of the likeliest at each of its places.
NEW_TOKENS, LIKELIEST = 48, 5
ABSENT = -1  # after the end of an answer


@dataclass(frozen=True)
class Completions:
    """Greedy completions of N prompts, K tokens at most, and the L likeliest tokens at each of their places.

    Attributes:
        tokens: (N, K) int64; ABSENT after the end.
        likeliest: (N, K, L) int64, the likeliest first.
        logprobs: (N, K, L) float32, of those.
    """

    tokens: Tensor
    likeliest: Tensor
    logprobs: Tensor

    def __getitem__(self, row: int) -> tuple[list[int], list[dict[int, float]]]:
        """The tokens of one completion, and the log-probabilities of the likeliest at each of its places."""
        tokens = [token for token in self.tokens[row].tolist() if token != ABSENT]
        pairs = zip(self.likeliest[row].tolist(), self.logprobs[row].tolist(), strict=True)
        return tokens, [dict(zip(*pair, strict=True)) for pair in list(pairs)[: len(tokens)]]


@dataclass(frozen=True)
class Differing:
    """Where a completion leaves the expected one: at which place of which prompt, the two tokens, and by how much the found one
    is the likelier (the difference of their log-probabilities; None if that is not known)."""

    prompt: int
    place: int
    expected: int | str
    found: int | str
    margin: float | None

    def __str__(self) -> str:
        by = "" if self.margin is None else f", likelier by {self.margin:.2g}"
        return f"prompt {self.prompt}: token {self.place} is {self.found!r} and was {self.expected!r}{by}"


def prompts_of(inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The token ids of each row of a batch, (T_i,) int64, without its padding."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    return [row[kept] for row, kept in zip(ids, mask, strict=True)]


def complete(model: nn.Module, prompts: Sequence[Tensor], new_tokens: int = NEW_TOKENS) -> Completions:
    """The greedy completions of some prompts; `new_tokens` at most, with the token that ends an answer."""
    tokens, likeliest, logprobs = [], [], []
    for token, logits in _steps(model, prompts, new_tokens):
        best = logits.float().log_softmax(-1).topk(min(LIKELIEST, logits.shape[-1]))  # N L
        tokens.append(token.cpu())
        likeliest.append(best.indices.cpu())
        logprobs.append(best.values.cpu())
    return Completions(torch.stack(tokens, 1), torch.stack(likeliest, 1), torch.stack(logprobs, 1))


def greedy(model: nn.Module, prompts: Sequence[Tensor], new_tokens: int) -> Tensor:
    """The tokens of `complete`, (N, K) int64, alone."""
    return torch.stack([token.cpu() for token, _ in _steps(model, prompts, new_tokens)], 1)


@torch.no_grad()
def outputs(model: nn.Module, prompts: Sequence[Tensor], tokens: Tensor) -> Iterator[Tensor]:
    """The logits at each place of each completion, (K_i, V) float32: what a model would say there.

    Args:
        model: of logits for every token, (B, T, V).
        prompts: their token ids.
        tokens: (N, K), the completions; ABSENT after the end.
    """
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        for prompt, row in zip(prompts, tokens, strict=True):
            answer = row[row != ABSENT]
            ids = torch.cat([prompt.cpu(), answer[:-1]]).to(device)
            yield model(input_ids=ids[None]).logits[0, len(prompt) - 1 :].float().cpu()
    finally:
        model.train(training)


@torch.no_grad()
def _steps(model: nn.Module, prompts: Sequence[Tensor], new_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The likeliest token at each place, (N,) int64, and the logits there, (N, V): all prompts together, padded on the left; at
    most `new_tokens` times, or as long as the model can read."""
    device, training = next(model.parameters()).device, model.training
    taken, ends = inspect.signature(model.forward).parameters, torch.tensor(sorted(end_tokens(model)), device=device)
    longest, room = max(map(len, prompts)), most_tokens(model)
    if room is not None:
        new_tokens = min(new_tokens, max(1, room - longest + 1))  # the last token is said, and not read
    places = torch.arange(longest, device=device)
    mask = torch.stack([places >= longest - len(prompt) for prompt in prompts]).long()  # N T
    ids = torch.zeros_like(mask)
    ids[mask.bool()] = torch.cat(list(prompts)).to(device)
    past, done = None, torch.zeros(len(prompts), dtype=torch.bool, device=device)
    model.eval()
    try:
        for _ in watched(range(new_tokens), "answering prompts"):
            given = {"input_ids": ids if past is None else ids[:, -1:], "attention_mask": mask}
            if "position_ids" in taken:
                given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -given["input_ids"].shape[1] :]
            if "past_key_values" in taken:
                given |= {"past_key_values": past, "use_cache": True}
            if "logits_to_keep" in taken:
                given["logits_to_keep"] = 1
            output = model(**given)
            past = getattr(output, "past_key_values", None)
            logits = output.logits[:, -1]  # N V
            token = logits.argmax(-1).masked_fill(done, ABSENT)
            yield token, logits
            done |= torch.isin(token, ends)
            if done.all():
                return
            ids = torch.cat([ids, token.clamp(min=0)[:, None]], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    finally:
        model.train(training)


def difference(row: int, tokens: Tensor, logits: Tensor) -> Differing | None:
    """Where a model of these `logits`, (K, V), would leave the completion `tokens`, (K,); None if nowhere."""
    chosen = logits.argmax(-1)
    places = (chosen != tokens).nonzero()[:, 0].tolist()
    if not places:
        return None
    place = places[0]
    expected, found = int(tokens[place]), int(chosen[place])
    return Differing(row, place, expected, found, (logits[place, found] - logits[place, expected]).item())
