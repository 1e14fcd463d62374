"""Greedy answers of a causal language model, many prompts at a time.

Prompts of like length are answered together, padded on the left. Greedy, so that an answer can be compared with another's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 25


@torch.inference_mode()
def greedy(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int = BATCH
) -> list[str]:
    """The answers of `model` to tokenised prompts, in their order, without special tokens.

    The model is left in the mode, training or not, that it was in. An answer ends at the tokenizer's eos token, or at
    `max_new_tokens`.
    """
    answers, training = [""] * len(prompts), model.training
    model.eval()
    try:
        for indices, ids, mask in _batches(prompts, tokenizer.pad_token_id, batch_size):
            device = next(model.parameters()).device
            found = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                use_cache=True,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            texts = tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)
            for index, text in zip(indices, texts, strict=True):
                answers[index] = text
    finally:
        model.train(training)
    return answers


def _batches(prompts: Sequence[Sequence[int]], pad_id: int, size: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Indices, input ids (B, T) and attention mask (B, T) of each batch, longest prompts first."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        longest = max(len(prompts[i]) for i in indices)
        padded = [[pad_id] * (longest - len(prompts[i])) + list(prompts[i]) for i in indices]
        absent = torch.tensor([longest - len(prompts[i]) for i in indices])[:, None]
        yield indices, torch.tensor(padded), (torch.arange(longest) >= absent).long()


def share_equal(found: Sequence[str], expected: Sequence[str]) -> float:
    """The share of answers that are the expected ones, but for white space around them."""
    equal = sum(a.strip() == b.strip() for a, b in zip(found, expected, strict=True))
    return equal / len(expected) if expected else math.nan
