"""The same layer, and the same adapted model, as ours, as peft's and as loralib's: same weights, same A and B.

Each peer is set up as its own documentation says, and where there is a choice, in the way that is fastest for it: peft
runs unmerged LoRA without its mixed-batch or variant paths, its layer is called directly and not through a wrapper, its
4-bit layer is bitsandbytes' own with the same compute dtype and double quantisation as ours. B is random everywhere:
nothing is measured on zeros. Beside a 16-bit base peft's adapters are float32 by default, as ours; in 16 bits, as an option,
they are faster, and an optimiser has no room for small updates: there peft is asked both ways.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

import loralib
import peft
import torch
from torch import Tensor, nn

from lora_core import LoraConfig, inject, quantize_nf4
from lora_core.bases.bnb import bitsandbytes
from lora_core.files.storage import adapter_tensors

from .measure import Disagreement

#: peft with adapters of 16 bits on a base of 16 bits.
PEFT_16 = "peft, 16-bit"

# --- one layer --------------------------------------------------------------------------------------------------------


def layers(
    d_in: int, d_out: int, r: int, dropout: float, device: str, dtype: torch.dtype, nf4: bool = False
) -> dict[str, nn.Module]:
    """{candidate: one linear layer, in training mode}: frozen, full, ours, peft, and loralib on dense weights; of 16 bits,
    "peft, 16-bit" too.

    `nf4` puts ours and peft on the 4-bit weight; frozen and full stay dense. All share one dense weight, but `full`,
    which trains it, has its own.
    """
    dense = nn.Linear(d_in, d_out, device=device, dtype=dtype).requires_grad_(False)
    ours = nn.ModuleDict({"linear": _like(dense)})
    if nf4:
        quantize_nf4(ours)
    inject(ours, LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=["linear"]))
    randomize(ours)
    candidates = {"frozen": dense, "full": _like(dense, copy=True), "ours": ours["linear"]}
    peft_dtypes = {"peft": torch.promote_types(dtype, torch.float32)} | ({PEFT_16: dtype} if dtype.itemsize == 2 else {})
    for name in peft_dtypes:
        theirs = nn.ModuleDict({"linear": bnb_linear(dense) if nf4 else _like(dense)})
        if nf4:
            theirs.is_loaded_in_4bit = True  # how transformers marks a model for peft
        config = peft.LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=["linear"])
        candidates[name] = peft.inject_adapter_in_model(config, theirs)["linear"]
    if not nf4:
        lib = loralib.Linear(d_in, d_out, r=r, lora_alpha=2 * r, lora_dropout=dropout, merge_weights=False)
        candidates["loralib"] = lib.to(device, dtype)
        lib.weight, lib.bias = dense.weight, dense.bias
    with torch.no_grad():
        A, B = ab(candidates["ours"])
        for name in candidates.keys() & {*peft_dtypes, "loralib"}:
            for part, value in zip(ab(candidates[name]), (A, B), strict=True):
                part.data = value.to(peft_dtypes.get(name, dtype), copy=True)
    for layer in candidates.values():
        layer.train()  # loralib's returns nothing
    return candidates


def ab(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """A and B of an adapted layer, ours or a peer's."""
    parts = layer.lora_A, layer.lora_B
    if isinstance(parts[0], nn.ModuleDict):
        parts = tuple(part["default"].weight for part in parts)
    elif isinstance(parts[0], nn.ParameterDict):
        parts = tuple(part["default"] for part in parts)
    return parts


def trained(layer: nn.Module) -> list[Tensor]:
    """What a training step on this layer needs a gradient for, its input aside."""
    return [p for p in layer.parameters() if p.requires_grad]


def check_layers(candidates: dict[str, nn.Module], x: Tensor, dy: Tensor, tolerance: float) -> float:
    """Compares y, dx, dA and dB of the adapted candidates without dropout; returns the largest relative difference.

    Raises:
        Disagreement: it is above `tolerance`.
    """
    results = {}
    for name in [n for n in candidates if n not in ("frozen", "full")]:
        layer = candidates[name]
        layer.eval()  # x needs a gradient: otherwise bitsandbytes would repack the weight here
        y = layer(x)
        results[name] = (y, *torch.autograd.grad(y, [x, *ab(layer)], dy))
        layer.train()
    worst = max(
        relative_difference(mine, other) for name in results for mine, other in zip(results["ours"], results[name], strict=True)
    )
    return agreed(worst, tolerance, f"y and gradients of {', '.join(results)}")


def relative_difference(a: Tensor, b: Tensor) -> float:
    """The largest |a - b| over the largest |a|."""
    a, b = a.detach().float(), b.detach().float()
    return ((a - b).abs().max() / a.abs().max()).item()


def agreed(difference: float, tolerance: float, what: str) -> float:
    if not difference <= tolerance:
        raise Disagreement(f"{what} differ by {difference:.2g}, and at most {tolerance:.2g} is rounding")
    return difference


def _like(linear: nn.Linear, copy: bool = False) -> nn.Linear:
    """Another layer with the same parameters, or with trainable copies of them."""
    other = nn.Linear(linear.in_features, linear.out_features, device="meta")
    other.weight, other.bias = linear.weight, linear.bias
    if copy:
        other.weight, other.bias = (nn.Parameter(p.detach().clone()) for p in (linear.weight, linear.bias))
    return other


# --- a whole model ----------------------------------------------------------------------------------------------------


def bnb_linear(linear: nn.Linear, compute_dtype: torch.dtype | None = None) -> nn.Module:
    """What transformers makes of a linear layer when it loads a model in 4 bits."""
    bnb = bitsandbytes()
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=compute_dtype or linear.weight.dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    weight = linear.weight.detach().clone()
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer).to(weight.device)
    layer.bias = linear.bias
    return layer


def quantize_for_peft(model: nn.Module, skip: Sequence[str], compute_dtype: torch.dtype | None = None) -> nn.Module:
    """Makes the linear layers bitsandbytes' own 4-bit ones, in place, but those whose path has a part in `skip`."""
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and not set(path.split(".")) & set(skip):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, bnb_linear(module, compute_dtype))
    model.is_loaded_in_4bit = True  # how transformers marks it for peft
    return model


def same_base(model: nn.Module) -> nn.Module:
    """A model of its own that shares the parameters of `model`: cheap, and enough for verbs that leave weights alone."""
    return copy.deepcopy(model, memo={id(t): t for t in (*model.parameters(), *model.buffers())})


def randomize(model: nn.Module) -> None:
    """Gives every B, ours or peft's, random values of about the size that training gives them."""
    for name, parameter in model.named_parameters():
        if ".lora_B." in f".{name}" and not parameter.is_meta:
            nn.init.normal_(parameter, std=0.02)


def adapt_with_peft(model: nn.Module, config: LoraConfig, like: nn.Module | None = None, float32: bool = False) -> nn.Module:
    """`model` through peft with the settings of `config`, and with the A, B and head of `like`, a model of ours.

    Adapters on a 16-bit base are 16-bit too, peft's faster choice, unless they are to be `float32`, its default. Without `like`
    the values are random.
    """
    same = {name: getattr(config, name) for name in ("r", "lora_alpha", "lora_dropout", "task_type")}
    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    settings = peft.LoraConfig(target_modules=targets, **same)
    adapted = peft.get_peft_model(model, settings, autocast_adapter_dtype=float32)
    if like is None:
        randomize(adapted)
        return adapted
    # Our file format is peft's, so peft itself puts the tensors where they belong, and says if one has no place.
    outcome = peft.set_peft_model_state_dict(adapted, adapter_tensors(like))
    if outcome.unexpected_keys or any("lora_" in key for key in outcome.missing_keys):
        raise Disagreement(f"peft adapts other layers than ours: {outcome}")
    return adapted


def freeze(model: nn.Module, targets: Iterable[nn.Module], head: str | None = None) -> nn.Module:
    """The frozen base: only `head` is trained, and gradients flow to where the adapters would stand.

    The outputs of `targets` are made to require gradients, so that the backward reaches exactly as far down as that of
    the adapted model, and computes what adapters that cost nothing would leave: no more, no less.
    """
    model.requires_grad_(False)
    if head:
        model.get_submodule(head).requires_grad_(True)
    for module in targets:
        module.register_forward_hook(_require_grad)
    return model


def _require_grad(module: nn.Module, inputs: tuple, output: Tensor) -> None:
    if not output.requires_grad:
        output.requires_grad_()


def check_models(models: Mapping[str, nn.Module], loss: Callable[[nn.Module], Tensor], tolerance: float) -> float:
    """Compares the loss and every trained gradient of adapted models without dropout, the first against the others.

    Returns:
        The largest relative difference.

    Raises:
        Disagreement: it is above `tolerance`, or the models train different shapes.
    """
    results = {}
    for name, model in models.items():
        model.eval()
        hook = model.get_input_embeddings().register_forward_hook(_require_grad)  # see `check_layers`
        value = loss(model)
        results[name] = [value, *torch.autograd.grad(value, trained(model))]
        hook.remove()
        model.train()
    first, *others = results.values()
    if any([t.shape for t in first] != [t.shape for t in other] for other in others):
        raise Disagreement(f"{', '.join(results)} train parameters of different shapes")
    worst = max(relative_difference(a, b) for other in others for a, b in zip(first, other, strict=True))
    return agreed(worst, tolerance, f"loss and gradients of {', '.join(results)}")
