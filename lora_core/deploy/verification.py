"""Is a loaded adapter still the model that was saved? Its probe inputs are run again, and what drifted is named.

verify("adapter/", "base/")      # weights, tokenizer, dtype, library: each in a line if it is not what it was
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError, FileFormatError, WrongBaseError, one_line
from ..files.storage import load_adapter
from ..integrations.pretrained import tokenize
from ..spec.checks import check_tolerance
from .basis import Basis, load_base
from .probe import Probe, read_probe, run_probe, versions, weights_hash
from .updates import AdapterUpdates, read_updates

#: By the dtype of the model: sums in another order; on another machine or version also products rounded otherwise.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
FAILING = ("adapter", "base", "tokenizer")


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        inputs: how many were run.
        largest: the largest difference of a logit from what it was.
        relative: the same, over the largest logit then.
        changed: share of the inputs whose label (largest logit) is another.
        tolerance: what `relative` may be.
        drifted: {what is not as it was ("adapter", "base", "tokenizer", "dtype" or "library"): how}.
    """

    inputs: int
    largest: float
    relative: float
    changed: float
    tolerance: float
    drifted: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether the logits are what they were, from the same weights and tokens; a library may be another."""
        return self.relative <= self.tolerance and not any(name in self.drifted for name in FAILING)

    def __str__(self) -> str:
        lines = [
            f"{self.inputs} inputs: largest logit deviation {self.largest:.2g} ({self.relative:.2g} of the largest logit, "
            f"tolerance {self.tolerance:g}), {self.changed:.1%} of labels changed",
            *(f"{name}: {one_line(how)}" for name, how in self.drifted.items()),
            "verified" if self.passed else "NOT the model that was saved",
        ]
        return "\n".join(lines)


def verify(
    adapter: str | Path, base: str | Path, dtype: torch.dtype | None = None, tolerance: float | None = None
) -> Verification:
    """Loads an adapter onto a base and runs the inputs that it carries.

    Args:
        adapter: its directory, with the probe that was saved there.
        base: directory of the base.
        dtype: of the base's weights; None: what it was.
        tolerance: the largest deviation of a logit that passes, as a share of the largest one; None: by the dtype.

    Raises:
        ConfigError: the tolerance is no finite number, or negative.
        LoraError: there is no probe, or the files are broken or don't belong together.
    """
    if tolerance is not None:
        check_tolerance("tolerance", tolerance)
    directory, base = Path(adapter), Path(base)
    probe, updates = read_probe(directory), read_updates(directory)
    was = getattr(torch, probe.dtype, None)
    if was not in TOLERANCES:
        raise ConfigError(f"{directory}: its probe was saved from a model of {probe.dtype!r}, which is no dtype to verify in")
    dtype = dtype or was
    drifted = {}
    if weights_hash(directory) != probe.weights:
        drifted["adapter"] = "its weights are not those that the probe was saved with"
    basis = Basis(updates.packed_form) if updates.packed_form else Basis()
    model = load_base(base, [updates], basis, probe.quantized, dtype)
    try:
        load_adapter(model, directory)
    except WrongBaseError as error:
        drifted["base" if dtype == was else "dtype"] = str(error).partition(";")[0]
        load_adapter(model, directory, strict=False)
    drifted |= _tokens(probe, updates, base)
    if dtype != was:  # the fingerprint knows the dtype too, and can't say more then
        drifted["dtype"] = f"was {probe.dtype}, is {str(dtype).removeprefix('torch.')}"
    now = versions()
    if others := [f"{name} {old} -> {now.get(name, 'none')}" for name, old in probe.versions.items() if now.get(name) != old]:
        drifted["library"] = ", ".join(others)
    logits = run_probe(model, probe.inputs)
    if logits.shape != probe.logits.shape:
        raise ConfigError(f"the model gives logits of {tuple(logits.shape)}, and the probe has {tuple(probe.logits.shape)}")
    largest = (logits - probe.logits).abs().max().item()
    return Verification(
        inputs=len(logits),
        largest=largest,
        relative=largest / max(probe.logits.abs().max().item(), torch.finfo(torch.float32).tiny),
        changed=(logits.argmax(-1) != probe.logits.argmax(-1)).double().mean().item(),
        tolerance=max(TOLERANCES[dtype], TOLERANCES[was]) if tolerance is None else tolerance,
        drifted=drifted,
    )


def _tokens(probe: Probe, updates: AdapterUpdates, base: Path) -> dict[str, str]:
    """Whether the tokenizer gives the texts the token ids that they had."""
    if probe.texts is None:
        return {}
    try:
        found = tokenize([updates.directory, base], probe.texts, probe.inputs["input_ids"].shape[1])
    except FileFormatError as error:
        return {"tokenizer": str(error)}
    was = _without_padding(probe.inputs)
    different = sum(before != now for before, now in zip(was, _without_padding(found), strict=True))
    return {"tokenizer": f"gives other tokens for {different} of {len(was)} texts"} if different else {}


def _without_padding(inputs: Mapping[str, Tensor]) -> list[list[int]]:
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    return [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
