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


# --- updates into one update, value by value --------------------------------------------------------------------------


def combined(updates, method, density=1.0, majority="total", seed=0):
    """Weighted float64 updates of one shape into one: the definitions of TIES and DARE, one value after the other."""
    if method in ("linear", "cat", "svd"):
        return sum(updates)
    generator = torch.Generator().manual_seed(seed)
    columns = []
    for update in updates:
        values = update.flatten().tolist()
        if method.startswith("dare"):
            draws = torch.rand(update.shape, dtype=torch.float64, generator=generator).flatten().tolist()
            values = [v / density if draw < density else 0.0 for v, draw in zip(values, draws, strict=True)]
        else:
            kept = sorted((abs(v) for v in values), reverse=True)[: max(1, round(density * len(values)))]
            values = [v if abs(v) >= kept[-1] else 0.0 for v in values]
        columns.append(values)
    merge = (lambda row: _elect(row, majority)) if method.endswith("ties") else sum
    return torch.tensor([merge(row) for row in zip(*columns, strict=True)], dtype=torch.float64).view(updates[0].shape)


def _elect(row, majority):
    votes = row if majority == "total" else [(v > 0) - (v < 0) for v in row]
    chosen = [v for v in row if v * sum(votes) > 0]
    return sum(chosen) / len(chosen) if chosen else 0.0


def truncation(D, r):
    """(share of |D|^2 that the best approximation of rank r keeps, Frobenius norm of what it misses), in float64."""
    squares = torch.linalg.svdvals(D.double()) ** 2
    total = float(squares.sum())
    return (float(squares[:r].sum()) / total if total else 1.0), float(squares[r:].sum()) ** 0.5


# --- any kind of layer ------------------------------------------------------------------------------------------------
#
# A layer computes apply(x, M) + b, where M is its weight as a matrix of (d_out, d_in): one row for each output feature.


def apply_linear(x, M):
    return torch.einsum("...i,oi->...o", x, M)


def apply_embedding(ids, M):
    return M.transpose(0, 1)[ids]


def convolution(layer):
    """apply(x, M) of a convolution with the geometry of `layer`, whose rows of M are kernels."""
    size = layer.kernel_size

    def apply(x, M):
        padding = layer.padding
        if padding == "same":
            totals = [d * (k - 1) for d, k in zip(layer.dilation, size, strict=True)]
            pads = [(total // 2, total - total // 2) for total in totals]
        else:
            pads = [(p, p) for p in padding]
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = torch.nn.functional.pad(x, [p for pair in reversed(pads) for p in pair], mode=mode)
        convolve = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[len(size) - 1]
        kernel = M.reshape(len(M), layer.in_channels, *size)
        return convolve(x, kernel, stride=layer.stride, dilation=layer.dilation)

    return apply


def update_matrices(W, updates):
    """(M, [N, ...]): with these adapters a layer of weight W computes apply(x, M) + the sum of apply(dropout(x), N).

    Each update is a dictionary: A, B, s; A0 and B0 if what it started from is subtracted; m for DoRA, whose norms are
    constants: f = m / |W + D| for each row, and f (W + D) in place of W + D.
    """
    M, parts = W, []
    for update in updates:
        D = update["s"] * torch.matmul(update["B"], update["A"])
        if "A0" in update:
            D = D - update["s"] * torch.matmul(update["B0"], update["A0"])
        if "m" in update:
            norm = (W + D).detach().square().sum(1).sqrt()
            f = torch.where(norm == 0, 0 * update["m"], update["m"] / norm)
            M, D = M + (f - 1)[:, None] * W, f[:, None] * D
        parts.append(D)
    return M, parts


def adapted_layer(apply, x, W, b, updates):
    """What a layer with these active adapters computes, without dropout. `bias` of an update is multiplied by its s."""
    M, parts = update_matrices(W, updates)
    y = apply(x, M + sum(parts, torch.zeros_like(M)))
    for bias in [b, *(u["s"] * u["bias"] for u in updates if "bias" in u)]:
        if bias is not None:
            y = y + bias.reshape(-1, *(1,) * (y.dim() - 2)) if apply.__name__ == "apply" else y + bias
    return y
