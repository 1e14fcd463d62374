"""The states of the random generators that a run draws from: torch's (CPU and CUDA), numpy's and Python's, as tensors.

Tensors of one shape in every process of a run, so that they can be gathered and stored without a pickle.
"""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from torch import Tensor


def random_states() -> dict[str, Tensor]:
    """{name: state} of every generator of this process, on the CPU."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, next_gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss]),
        "python": torch.tensor([*words, version]),
        # normal variates come in pairs: the second, if it waits to be given
        "gauss": torch.tensor([gauss, math.nan if next_gauss is None else next_gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    """Puts back what `random_states` gave; generators that it does not name stay as they are."""
    gauss, next_gauss = states["gauss"].tolist()
    *keys, position, has_gauss = states["numpy"].tolist()
    *words, version = states["python"].tolist()
    torch.set_rng_state(states["torch"])
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    random.setstate((version, tuple(words), None if math.isnan(next_gauss) else next_gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
