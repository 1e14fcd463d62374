"""Tokenised sentences and batches of like length.

All token ids of a split lie in one flat array of the smallest integer type that holds the vocabulary, sentence i at
`ids[offsets[i]:offsets[i + 1]]`: SST-2's 67,349 sentences take 2 MB this way, and a hundred times that as Python lists.
A batch is cut from it and padded to its own longest sentence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

#: A pool of this many batches is sorted by length: wide enough for like lengths, small enough to stay random.
POOL_BATCHES = 100
#: Sentences tokenised at a time: the tokenizer's own records of a sentence take kilobytes.
CHUNK = 1024


class TokenisedTexts(Dataset):
    """N tokenised sentences. Indexed by a list of B indices, it gives one padded batch of tensors.

    Batch:

        input_ids       (B, T) int64, padded on the right with `pad_id`
        attention_mask  (B, T) int64, 1 for a token and 0 for padding
        labels          (B,)   int64, if there are labels
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], max_length: int, labels: np.ndarray | None = None) -> None:
        dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
        chunks, lengths = [], []
        for start in range(0, len(texts), CHUNK):
            encoded = tokenizer(
                list(texts[start : start + CHUNK]),
                truncation=True,
                max_length=max_length,
                return_attention_mask=False,
                return_token_type_ids=False,
            )["input_ids"]
            lengths.extend(map(len, encoded))
            chunks.append(np.concatenate([np.array(ids, dtype=dtype) for ids in encoded]))
        self.ids = np.concatenate(chunks)
        self.lengths = np.array(lengths, dtype=np.int32)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        self.labels = None if labels is None else labels.astype(np.int64)
        self.pad_id = tokenizer.pad_token_id

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        lengths = self.lengths[indices]  # (B,)
        mask = np.arange(lengths.max()) < lengths[:, None]  # (B, T)
        input_ids = np.full(mask.shape, self.pad_id, dtype=np.int64)
        input_ids[mask] = np.concatenate([self.ids[self.offsets[i] : self.offsets[i + 1]] for i in indices])
        batch = {"input_ids": input_ids, "attention_mask": mask.astype(np.int64)}
        if self.labels is not None:
            batch["labels"] = self.labels[indices]
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    __getitems__ = __getitem__  # so a DataLoader fetches a batch at once


class LikeLengthBatches(Sampler[list[int]]):
    """Batches of indices whose sentences have like lengths; in a new random order each time, or longest first.

    The longest batch comes first in either case: what does not fit in memory fails at once, and the allocator meets
    the largest blocks before smaller ones have split the heap.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int | None = None) -> None:
        self.lengths, self.batch_size = lengths, batch_size
        self.random = None if seed is None else np.random.default_rng(seed)

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def pass_over(self, epochs: int) -> None:
        """Go to where the random order stands after so many times through the sentences."""
        for _ in range(epochs):
            next(iter(self))  # the order is drawn before its first batch is given

    def __iter__(self) -> Iterator[list[int]]:
        if self.random is None:
            yield from self._cut(np.arange(len(self.lengths)))
            return
        order = self.random.permutation(len(self.lengths))
        pool = POOL_BATCHES * self.batch_size
        batches = [b for start in range(0, len(order), pool) for b in self._cut(order[start : start + pool])]
        self.random.shuffle(batches)
        longest = max(range(len(batches)), key=lambda i: self.lengths[batches[i][0]])
        batches[0], batches[longest] = batches[longest], batches[0]
        yield from batches

    def _cut(self, indices: np.ndarray) -> list[list[int]]:
        by_length = indices[np.argsort(-self.lengths[indices], kind="stable")]
        return [by_length[i : i + self.batch_size].tolist() for i in range(0, len(by_length), self.batch_size)]


def batches(texts: TokenisedTexts, batch_size: int, seed: int | None = None) -> DataLoader:
    """A loader of like-length batches, shuffled when there is a `seed`. The texts make a batch themselves: none to collate."""
    return DataLoader(texts, batch_sampler=LikeLengthBatches(texts.lengths, batch_size, seed), collate_fn=_as_it_is)


def _as_it_is(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch
