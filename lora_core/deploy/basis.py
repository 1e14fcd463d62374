"""What an adapter is folded into: a base's weights as its files hold them, or in the packed form that QLoRA trained against.

Also where a base is recognised: an adapter's fingerprint says what each adapted weight was when it was trained, and a weight
that is not that, in any dtype that the base may have been loaded in, is another base's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..bases import DEFAULT, base_for
from ..bases.base import Format
from ..errors import FileFormatError, WrongBaseError
from ..files.checkpoint import Checkpoint
from ..files.fingerprint import describe_dense, describe_layer, difference, same_values, settings_hash
from ..integrations.pretrained import load_model
from ..model.quantize import quantize, stacks
from .placement import Placement, label_rows
from .updates import AdapterUpdates

#: What a base may have been loaded in before it was packed, besides the dtype of its file.
LOADED = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Basis:
    """The base's weights as the adapters know them.

    Attributes:
        form: of packed weights.
        trained_on_packed: whether an adapter's fingerprint says that its base was packed so.
        loaded: the dtype that weights had before they were packed; None: that of their file.
    """

    form: Format = DEFAULT
    trained_on_packed: bool = False
    loaded: torch.dtype | None = None

    def pack(self, W: Tensor) -> nn.Module:
        """A linear layer with the weight W, (d_out, d_in), packed."""
        return base_for(self.form).pack(_linear(W.to(self.loaded or W.dtype)), self.form)


def find_basis(adapters: Sequence[AdapterUpdates], path: str, W: Tensor) -> Basis:
    """What the adapters' fingerprints say of the base, checked on the weight of one adapted layer.

    Raises:
        WrongBaseError: it is of another base; FileFormatError: a fingerprint is not as written here.
    """
    form = next((a.packed_form for a in adapters if a.packed_form), None)
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
        update = adapter.layers.get(path)
        if adapter.fingerprint is None or update is None or path in adapter.split:  # parts: `parameters.py` has checked them
            continue
        if path in adapter.packed_experts:  # `experts.py` has
            continue
        if adapter.packed_form and not update.is_parameter:
            line = describe_layer(basis.pack(W))
        else:
            line = describe_dense(W.to(adapter.dtype_of(path) or W.dtype))
        check_line(adapter, path, line)


def check_line(adapter: AdapterUpdates, path: str, line: str) -> None:
    """Raises a WrongBaseError if the weight at `path`, which `line` describes, is not what the adapter was trained on."""
    found = {"base": {adapter.called.get(path, path): line}, "settings": settings_hash(adapter.config, adapter.settings)}
    try:
        differs = difference(adapter.fingerprint, found)
    except ValueError as error:
        raise FileFormatError(f"{adapter.directory}: {error}; save the adapter again") from None
    if differs:
        raise WrongBaseError(f"{adapter.directory} was saved on another base: {differs}; merge it into its own")


def check_stored(adapters: Sequence[AdapterUpdates], placement: Placement, base: Checkpoint) -> None:
    """Raises a WrongBaseError if an adapter has stored, as the base's, what this base does not have, or has otherwise."""
    known = placement.aliases | placement.names
    for adapter in adapters:
        for path, own in adapter.base_tensors.items():
            if path not in known:
                raise WrongBaseError(f"the base has no {path!r}, which an adapter has stored of the one that it was trained on")
            if not same_values(base.tensors[known[path]].read(), own):
                owner, _, name = path.rpartition(".")
                what = f"the {name} of {owner} that it was trained on"
                raise WrongBaseError(f"{adapter.directory} holds {what}; the base has another; merge it into its own")


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
        basis: the form of packed weights.
        quantized: paths of the packed layers and experts; none: the base stays dense.
        dtype: of its weights.
    """
    task, rows = adapters[0].config.task_type, label_rows(adapters)
    settings = {"num_labels": rows} if rows and task in ("SEQ_CLS", "TOKEN_CLS") else {}
    model = load_model(base, task, dtype, strict=False, ignore_mismatched_sizes=True, **settings)
    if quantized:
        linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        experts = stacks(dict(model.named_modules()))
        quantize(model, basis.form, skip=[path for path in (*linear, *experts) if path not in set(quantized)])
    return model
