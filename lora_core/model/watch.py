"""What layers see as a model runs over a few batches: the second moments of their inputs, the gradients of their weights.

    C, vectors = second_moments(model, layers, batches)            # C: (d_in, d_in) of each layer
    G = weight_gradients(model, layers, batches, loss)             # G: (d_out, d_in)

The model runs as it is, with its adapters, in eval mode. A weight need not require gradients, nor be dense: its gradient is
worked out from what goes in and what comes back, G = sum of (dL/dy)^T x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..layers import LoraLayer
from ..progress import watched

#: What `loss` of `weight_gradients` is: (the model's output, the batch) to one number.
Loss = Callable[[Any, Any], Tensor]


@torch.no_grad()
def second_moments(
    model: nn.Module, layers: Mapping[str, LoraLayer], batches: Iterable[Any]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """{path: sum of x^T x over the layer's input vectors, (d_in, d_in)}, {path: how many those were}.

    Vectors at places where a batch's `attention_mask` is zero do not count.
    """
    sizes = {path: layer.matrix_shape(layer)[0] for path, layer in layers.items()}
    moments = {path: torch.zeros(d_in, d_in, device=layers[path].weight.device) for path, d_in in sizes.items()}
    vectors = dict.fromkeys(layers, 0)
    mask: Tensor | None = None

    def watch(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].float()
            fits = mask is not None and x.shape[:-1] == mask.shape
            x = x[mask.bool().to(x.device)] if fits else x.reshape(-1, x.shape[-1])
            moments[path].addmm_(x.t(), x)
            vectors[path] += len(x)

        return hook

    with _evaluating(model), ExitStack() as undo:
        for path, layer in layers.items():
            undo.callback(layer.register_forward_pre_hook(watch(path)).remove)
        for batch in watched(batches, "reading batches"):
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            call(model, batch)
    return moments, vectors


def weight_gradients(
    model: nn.Module, layers: Mapping[str, LoraLayer], batches: Iterable[Any], loss: Loss | None = None
) -> dict[str, Tensor]:
    """{path: gradient of the loss by the layer's weight, (d_out, d_in), the mean over the batches}.

    Nothing of the model requires gradients meanwhile, and none has other ones afterwards.

    Args:
        model: the model.
        layers: {path: linear layer}.
        batches: as `call` takes them.
        loss: what is differentiated; None: the output's `loss`, or the output if it has none.

    Raises:
        ConfigError: there is no batch, or the loss is no number, or not finite.
    """
    shapes = {path: layer.matrix_shape(layer)[::-1] for path, layer in layers.items()}
    gradients = {path: torch.zeros(shape, device=layers[path].weight.device) for path, shape in shapes.items()}
    count = 0

    def watch(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            if not torch.is_grad_enabled():  # in a checkpoint, which runs it again
                return y
            start = torch.zeros((), device=y.device, requires_grad=True)
            return _Watched.apply(y, args[0], gradients[path], start)

        return hook

    trained = [p for p in model.parameters() if p.requires_grad]
    with _evaluating(model), ExitStack() as undo, torch.enable_grad():
        for path, layer in layers.items():
            undo.callback(layer.register_forward_hook(watch(path)).remove)
        undo.callback(lambda: [p.requires_grad_(True) for p in trained])
        for p in trained:
            p.requires_grad_(False)
        for batch in watched(batches, "reading batches"):
            output = call(model, batch)
            value = getattr(output, "loss", output) if loss is None else loss(output, batch)
            _check_loss(value)
            value.backward()
            count += 1
    if not count:
        raise ConfigError("there are no batches; pass some, as a list or a DataLoader")
    return {path: G / count for path, G in gradients.items()}


class _Watched(torch.autograd.Function):
    """y, as it is; on the way back G += (dL/dy)^T x. `start` is what gives y a gradient where nothing before it is trained."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, G: Tensor, start: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.G = G
        return y.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        g = gradient.reshape(-1, gradient.shape[-1]).float()
        ctx.G.addmm_(g.t(), x.reshape(-1, x.shape[-1]).float())
        return gradient, None, None, None


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output: of a mapping of keyword arguments, a tuple or list of arguments, or one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch if isinstance(batch, (tuple, list)) else (batch,))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and each module's own mode again."""
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _check_loss(value: Any) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        found = f"a tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ConfigError(
            f"the loss must be one number that depends on the adapted layers, not {found}; pass batches with labels, or "
            "loss=lambda output, batch: ..."
        )
    if not value.isfinite():
        raise ConfigError(f"the loss is {value.item()}; pass other batches")
