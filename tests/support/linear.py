"""What tests of the fused linear layer share: how far it may be from the equation, and the mask that it drew."""

import torch

from lora_core.maths.lora import lora_linear

D_IN, D_OUT, R, SCALING = 13, 7, 3, 0.75

#: Roundings that a result may collect (see oracle.rounding_bound). In 32 and 64 bits sums are accumulated in that
#: precision, so the longest sum (60 tokens) counts; 16-bit products are accumulated in 32 bits and rounded when stored:
#: A, B, h or g, the thin product and the sum, dropout's factor.
ROUNDINGS = {torch.float64: 80, torch.float32: 80, torch.bfloat16: 8, torch.float16: 8}


def recover_mask(shape, p, seed, width=D_IN):
    """The dropout mask of a call with this seed: W = 0 and A = B = 1 leave dropout of ones, which is mask / kept.

    Returns the mask and the probability with which it keeps.
    """
    torch.manual_seed(seed)
    eye = torch.eye(width, dtype=torch.float64)
    y = lora_linear(torch.ones(*shape, width, dtype=torch.float64), torch.zeros_like(eye), None, eye, eye, 1.0, p)
    factors = y[y != 0].unique().tolist()
    assert len(factors) <= 1, f"kept elements were scaled by different factors: {factors}"
    return (y != 0).double(), 1 / factors[0] if factors else 1.0
