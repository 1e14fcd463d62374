"""Several updates of one shape into one, value by value, on plain tensors: TIES, DARE and magnitude pruning.

    ties             TIES (arXiv 2306.01708): of each update the largest values; where they disagree in sign, only those
                     of the sign that has more; the mean of what is left
    dare_linear      DARE (arXiv 2311.03099): of each update a random part, divided by its density; the sum
    dare_ties        a random part as in DARE, then signs and mean as in TIES
    magnitude_prune  of each update the largest values; the sum

The updates come with their weights, so a negative one has its vote for the sign that it pulls towards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
MAJORITIES = ("total", "frequency")


@dataclass(frozen=True)
class Rule:
    """How updates become one.

    Attributes:
        method: one of PRUNING; any other is the plain sum.
        density: the share of values to keep, in (0, 1]: the density * n largest, rounded, at least one, and whatever equals
            the smallest of these; with DARE each value with this probability.
        majority: what decides on a sign: "total", that of the sum of the values, or "frequency", the one that occurs more
            often. Where neither has more the result is zero.
        generator: a CPU generator, from which DARE draws `torch.rand` in float64 for each update in turn, on any device; a
            value stays if its number is below `density`.
    """

    method: str
    density: float | None
    majority: str
    generator: torch.Generator

    def __call__(self, updates: Iterable[Tensor]) -> Tensor:
        """Their combination; they are of one shape, dtype and device, and at least one."""
        pruned = map(self._prune, updates)
        return self._agreed_mean(list(pruned)) if self.method.endswith("ties") else sum(pruned)

    def _prune(self, D: Tensor) -> Tensor:
        if self.method in ("ties", "magnitude_prune"):
            keep = max(1, round(self.density * D.numel()))
            size = D.abs()
            return torch.where(size >= size.flatten().kthvalue(D.numel() - keep + 1).values, D, 0)
        if self.method in PRUNING:
            draws = torch.rand(D.shape, dtype=torch.float64, generator=self.generator, device=self.generator.device)
            keep = draws < self.density
            return torch.where(keep.to(D.device), D / self.density, 0)
        return D

    def _agreed_mean(self, updates: Sequence[Tensor]) -> Tensor:
        """The mean, value by value, of those that have the sign which wins there; zeros have no vote and do not count."""
        sign = sum(updates if self.majority == "total" else (D.sign() for D in updates)).sign()
        total = sum(torch.where(D.sign() == sign, D, 0) for D in updates)
        return total / sum((D.sign() == sign).to(D.dtype) for D in updates).clamp(min=1)
