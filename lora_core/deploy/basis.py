"""What an adapter is folded into: a base's weights as its files hold them, or in the NF4 form that QLoRA trained against.

Also where a base is recognised: an adapter's fingerprint says what each adapted weight was when it was trained, and a weight
that is not that, in any dtype that the base may have been loaded in, is another base's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ..bases.nf4 import packed_form, to_4bit
from ..errors import AdapterFormatError, WrongBaseError
from ..files.fingerprint import describe_dense, describe_packed, difference, fingerprint, same_values
from ..integrations.pretrained import load_model
from ..model.quantize import quantize_nf4
from ..spec.config import LoraConfig
from .placement import label_rows
from .updates import AdapterUpdates

DEFAULT_FORM = "nf4/64/double"
#: What a base may have been loaded in before it was packed, besides the dtype of its file.
LOADED = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Basis:
    """The base's weights as the adapters know them.

    Attributes:
        form: of 4-bit weights: "nf4/64/double" has blocks of 64, with scales in 8 bits.
        trained_on_nf4: whether an adapter's fingerprint says that its base was in 4 bits.
        loaded: the dtype that weights had before they were packed; None: that of their file.
    """

    form: str = DEFAULT_FORM
    trained_on_nf4: bool = False
    loaded: torch.dtype | None = None

    def pack(self, W: Tensor) -> nn.Module:
        """A 4-bit linear layer with the weight W, (d_out, d_in)."""
        _, block_size, *double = self.form.split("/")
        return to_4bit(_linear(W.to(self.loaded or W.dtype)), None, bool(double), int(block_size))

    def repack(self, W: Tensor) -> nn.Module:
        """The same of a merged weight, in its own dtype."""
        return Basis(self.form).pack(W)


def find_basis(adapters: Sequence[AdapterUpdates], path: str, W: Tensor) -> Basis:
    """What the adapters' fingerprints say of the base, checked on the weight of one adapted layer.

    Raises:
        WrongBaseError: it is of another base; AdapterFormatError: a fingerprint is not as written here.
    """
    form = next((a.trained_on for a in adapters if (a.trained_on or "").startswith("nf4/")), None)
    if form is None:
        basis = Basis()
        check_base(basis, adapters, path, W)
        return basis
    problem = None
    for dtype in dict.fromkeys((W.dtype, *LOADED)):
        basis = Basis(form, True, dtype)
        try:
            check_base(basis, adapters, path, W)
            return basis
        except WrongBaseError as error:
            problem = problem or error
    raise problem


def check_base(basis: Basis, adapters: Sequence[AdapterUpdates], path: str, W: Tensor) -> None:
    """Raises a WrongBaseError if W, as the file holds it, is not the weight that an adapter at `path` was trained on."""
    for adapter in adapters:
        mark = adapter.fingerprint
        if mark is None or path not in adapter.layers:
            continue
        form = adapter.trained_on
        try:
            if (form or "").startswith("nf4/"):
                line = describe_packed(*packed_form(basis.pack(W)))
            else:
                line = describe_dense(W.to(adapter.dense_dtype or W.dtype))
            differs = difference(mark, {"base": {path: line}, "settings": settings(adapter.layers, adapter.config)})
        except ValueError as error:
            raise AdapterFormatError(f"{adapter.directory}: {error}; save the adapter again") from None
        if differs:
            raise WrongBaseError(f"{adapter.directory} was saved on another base: {differs}; merge it into its own")


def check_stored(adapters: Sequence[AdapterUpdates], path: str, tensor: Tensor) -> None:
    """Raises a WrongBaseError if an adapter has stored, as the base's, another tensor at `path`."""
    owner, _, name = path.rpartition(".")
    for adapter in adapters:
        own = adapter.base_tensors.get(path)
        if own is not None and not same_values(tensor, own):
            what = f"the {name} of {owner} that it was trained on"
            raise WrongBaseError(f"{adapter.directory} holds {what}; the base has another; merge it into its own")


def settings(paths: Iterable[str], config: LoraConfig) -> str:
    """The part of a fingerprint that is about an adapter's settings on layers of these paths."""
    nothing = SimpleNamespace(weight=torch.empty(0, device="cpu"))  # the base does not count for it
    return fingerprint([(path, nothing) for path in paths], config)["settings"]


def _linear(W: Tensor) -> nn.Linear:
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(W, requires_grad=False)
    return linear


def load_base(
    base: Path, adapters: Sequence[AdapterUpdates], basis: Basis, quantized: Sequence[str], dtype: torch.dtype
) -> nn.Module:
    """The base of some adapters, in eval mode, as they were trained on it; without them.

    Args:
        base: its directory.
        adapters: their task and head say which class it is of.
        basis: the form of 4-bit weights.
        quantized: paths of the 4-bit layers; none: the base stays dense.
        dtype: of its weights.
    """
    task, rows = adapters[0].config.task_type, label_rows(adapters)
    settings = {"num_labels": rows} if rows and task in ("SEQ_CLS", "TOKEN_CLS") else {}
    model = load_model(base, task, dtype, strict=False, ignore_mismatched_sizes=True, **settings)
    if quantized:
        linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        _, block_size, *double = basis.form.split("/")
        skip = [path for path in linear if path not in set(quantized)]
        quantize_nf4(model, skip=skip, double_quant=bool(double), block_size=int(block_size))
    return model
