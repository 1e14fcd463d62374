"""What an adapter directory holds, and how much each of its updates changes; without its base.

    print(inspect_adapter("adapter/"))              # or another tool's file, which is told by what is in it

For each layer the Frobenius norm of D = s B A and its effective rank, exp(H(sigma / sum sigma)) with H the entropy and sigma
the singular values of D (Roy and Vetterli, "The effective rank", EUSIPCO 2007): between 1 and r, and r if all of them are
alike. Both are worked out from the factors: D is never formed. Where a method rescales rows, D is the update before that.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import one_line
from ..files.adapter import weights_path
from ..files.formats.registry import is_peft
from ..methods.registry import method_of
from .foreign import read_as_it_is
from .layer_update import LayerUpdate
from .layer_views import LayerView, by_kind, each, kind
from .updates import AdapterUpdates, read_updates

#: How many targets are shown.
MANY = 12


@dataclass(frozen=True)
class Inspection:
    """What `inspect_adapter` found.

    Attributes:
        directory: where.
        tool: whose format the files have.
        base: what the configuration calls its base; None if it does not.
        task: its task type, or None.
        variants: what is not plain LoRA about it, such as "DoRA".
        targets: names or pattern of the targets.
        dtypes: of the tensors.
        parameters: number of values, and `layer_parameters` of those on adapted layers.
        nbytes: size of the weights file.
        whole: names of the tensors that it has whole.
        tokens: {path of a layer: how many of its rows are trained by themselves}.
        fingerprint: a hash of what it says of its base, and `trained_on` the format of that base's weights; None if nothing.
        layers: one view each.
        warnings: what is wrong with it.
    """

    directory: str
    tool: str
    base: str | None
    task: str | None
    variants: tuple[str, ...]
    targets: tuple[str, ...]
    dtypes: tuple[str, ...]
    parameters: int
    layer_parameters: int
    nbytes: int
    whole: tuple[str, ...]
    fingerprint: str | None
    trained_on: str | None
    layers: tuple[LayerView, ...]
    warnings: tuple[str, ...]
    tokens: Mapping[str, int]

    def __str__(self) -> str:
        ranks = ", ".join(f"{r} ({n} layers)" for r, n in Counter(layer.rank for layer in self.layers).items())
        alphas = Counter(float(f"{layer.scaling * layer.rank:.6g}") for layer in self.layers)
        facts = {
            "adapter": self.directory,
            "format": self.tool,
            "base": self.base or "not named",
            "task": self.task or "none",
            "variant": ", ".join(self.variants) or "plain LoRA",
            "targets": ", ".join(_shortened(self.targets)),
            "rank": ranks,
            "alpha": ", ".join(f"{alpha:g} ({n} layers)" for alpha, n in alphas.items()),
            "dtype": ", ".join(self.dtypes),
            "parameters": f"{self.parameters:,}, {self.layer_parameters:,} of them on adapted layers",
            "size": f"{self.nbytes:,} bytes",
            "whole": f"{', '.join(self.whole)}: stored as trained, without A and B" if self.whole else "nothing",
            "tokens": ", ".join(f"{n} rows of {path}" for path, n in self.tokens.items()) or "none",
            "fingerprint": f"{self.fingerprint}, of a base in {self.trained_on}" if self.fingerprint else "none",
        }
        warnings = [f"warning: {one_line(text)}" for text in self.warnings]
        lines = [f"{name:<12} {one_line(value)}" for name, value in facts.items()]  # what is not its own is of the file
        return "\n".join([*warnings, *lines, "", by_kind(self.layers)])

    def table(self) -> str:
        """A line for each layer."""
        return each(self.layers)


def inspect_adapter(directory: str | Path) -> Inspection:
    """Reads an adapter: a directory with PEFT's files, or another tool's file, whose layers keep the tool's names here.

    Raises:
        FileFormatError: it is not there, or is broken. Values that are not finite are no error
            here, but a warning.
    """
    path = Path(directory)
    if is_peft(path) or (foreign := read_as_it_is(path)) is None:
        tool, updates, notes = "PEFT", read_updates(path, finite=False), ()
        weights = weights_path(path)
    else:
        tool, weights, updates, notes = foreign
    config, layers = updates.config, tuple(map(_view, updates.layers.values()))
    own = [tensor for update in updates.layers.values() for tensor in update.tensors.values()]
    tensors = [*own, *updates.copies.values(), *(rows for _, rows in updates.tokens.values())]
    kinds = {method_of(config).label: True, "rank-stabilised scaling": config.use_rslora}
    kinds |= {f"biases ({config.bias})": config.bias != "none"}
    targets = config.target_modules
    mark = updates.fingerprint
    return Inspection(
        directory=str(directory),
        tool=tool,
        base=config.base_model_name_or_path,
        task=config.task_type,
        variants=tuple(name for name, used in kinds.items() if name and used),
        targets=((targets,) if isinstance(targets, str) else tuple(targets or ())) + (config.target_parameters or ()),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})),
        parameters=sum(tensor.numel() for tensor in tensors),
        layer_parameters=sum(tensor.numel() for tensor in own),
        nbytes=weights.stat().st_size,
        whole=tuple(sorted(updates.copies)),
        fingerprint=hashlib.blake2b(json.dumps(mark, sort_keys=True).encode(), digest_size=8).hexdigest() if mark else None,
        trained_on=updates.trained_on,
        layers=layers,
        warnings=(*notes, *_warnings(updates, layers)),
        tokens={path: len(ids) for path, (ids, _) in updates.tokens.items()},
    )


def _shortened(targets: tuple[str, ...]) -> list[str]:
    """Targets for a line: of many paths one for all the numbers in it, and no more than a dozen."""
    if len(targets) > MANY:
        targets = tuple(dict.fromkeys(map(kind, targets)))
    return [*targets[:MANY], *([f"and {len(targets) - MANY} more"] if len(targets) > MANY else [])]


def _view(update: LayerUpdate) -> LayerView:
    if (factors := update.factors()) is None:
        return LayerView(update.path, update.rank, update.scaling, float("nan"), float("nan"))
    A, B = (t.double() for t in factors)
    if A.isfinite().all() and B.isfinite().all():
        left, right = torch.linalg.qr(B).R, torch.linalg.qr(A.mT).R  # D = s Q_B (R_B R_A^T) Q_A^T
        sigma = torch.linalg.svdvals(left @ right.mT) * update.scaling  # of E matrices, (E, r)
        norm, total = sigma.norm().item(), sigma.sum(-1, keepdim=True)
        share = sigma / total.where(total > 0, torch.ones_like(total))
        effective = torch.special.entr(share).sum(-1).exp().mul(total[..., 0] > 0).mean().item()
    else:
        norm = effective = float("nan")
    return LayerView(update.path, update.rank, update.scaling, norm, effective)


def _warnings(updates: AdapterUpdates, layers: tuple[LayerView, ...]) -> list[str]:
    found = []
    tensors = [(path, t) for path, u in updates.layers.items() for t in u.tensors.values()] + [*updates.copies.items()]
    tensors += [(path, rows) for path, (_, rows) in updates.tokens.items()]
    if broken := sorted({path for path, tensor in tensors if not tensor.isfinite().all()}):
        found.append(f"NaN or infinite values in {len(broken)} places, such as {broken[0]}")
    still = [layer.path for layer in layers if layer.norm == 0]
    if len(still) == len(layers):
        parts = (method_of(updates.config).besides, "what it has whole" if updates.copies else "")
        parts += ("rows of tokens" if updates.tokens else "",)
        rest = " and ".join(filter(None, parts)) or "nothing"
        found.append(f"B A is zero in every layer: this adapter changes {rest}; was it saved before training?")
    elif still:
        found.append(f"B A is zero in {len(still)} of {len(layers)} layers, such as {still[0]}")
    return found
