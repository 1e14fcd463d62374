"""LoRA the slow and obvious way: the equation on plain float64 tensors, written without the engine.

    y = x W^T + b + s (m * x / q) A^T B^T        m: a 0/1 dropout mask, q: the probability of a 1

Gradients are autograd's. `rounding_bound` says how far a computation in another precision may be from this one.
"""

import torch


def lora_linear(x, W, b, A, B, s, mask=None, kept=1.0):
    """y of the equation; `mask` has the shape of x, `kept` is the probability with which it keeps."""
    dropped = x if mask is None else x * mask / kept
    y = torch.matmul(x, W.transpose(0, 1)) + s * torch.matmul(torch.matmul(dropped, A.transpose(0, 1)), B.transpose(0, 1))
    return y if b is None else y + b


def lora_linear_and_gradients(tensors, s, dy, mask=None, kept=1.0):
    """(y, {name: gradient}) for `tensors`, a dict of x, W, b, A, B, against the output gradient dy; all in float64."""
    leaves = {name: None if t is None else t.detach().double().requires_grad_() for name, t in tensors.items()}
    mask = None if mask is None else mask.double()
    y = lora_linear(leaves["x"], leaves["W"], leaves["b"], leaves["A"], leaves["B"], s, mask, kept)
    y.backward(dy.double())
    return y.detach(), {name: t.grad for name, t in leaves.items() if t is not None}


def merged_weight(W, updates):
    """W + sum of s B A in float64, for `updates`, a list of (A, B, s)."""
    total = W.double().clone()
    for A, B, s in updates:
        total += s * torch.matmul(B.double(), A.double())
    return total


def rounding_bound(tensors, s, dy, mask=None, kept=1.0):
    """The same as `lora_linear_and_gradients` with every number made positive.

    Each sum of products then adds up the magnitudes of its terms. One rounding of a term, a partial sum or a factor
    changes a result by at most eps times that, so k roundings change it by at most about k eps times that (Higham,
    "Accuracy and Stability of Numerical Algorithms", section 3.1).
    """
    positive = {name: None if t is None else t.detach().abs() for name, t in tensors.items()}
    return lora_linear_and_gradients(positive, abs(s), dy.abs(), mask, kept)


def assert_within_rounding(actual, expected, bound, roundings):
    """Elementwise |actual - expected| <= roundings * eps * bound, with the eps of the dtype of `actual`."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    info = torch.finfo(actual.dtype)
    error = (actual.detach().double() - expected).abs()
    allowed = roundings * (info.eps * bound + info.tiny)
    assert (error <= allowed).all(), f"off by {(error / allowed).max():.3g} times what {roundings} roundings explain"
