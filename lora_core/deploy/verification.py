"""Is a loaded adapter still the model that was saved? Its probe inputs are run again, and what drifted is named.

    verify("adapter/", "base/")      # weights, tokenizer, dtype, library: each in a line if it is not what it was

A language model is also judged by what it says: by each token of its answers to the probe's prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..errors import ConfigError, FileFormatError, WrongBaseError, one_line
from ..files.storage import load_adapter
from ..integrations.pretrained import tokenize
from ..spec.checks import check_tolerance
from .basis import Basis, load_base
from .completions import Differing, difference, outputs, prompts_of
from .probe import PROBE_FILE, Probe, read_probe, run_probe, versions, weights_hash
from .updates import AdapterUpdates, read_updates

#: By the dtype of the model: sums in another order; on another machine or version also products rounded otherwise.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
FAILING = ("adapter", "base", "tokenizer")


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        inputs: how many were run.
        largest: the largest difference of a logit from what it was; of a log-probability too, at each token of an answer.
        relative: the same, over the largest logit then.
        changed: share of the inputs whose label (largest logit), or whose answer, is another.
        tolerance: what `relative` may be.
        drifted: {what is not as it was ("adapter", "base", "tokenizer", "dtype" or "library"): how}.
        differing: where an answer is another, for each such.
        judged: "labels", or "answers" of a language model.
    """

    inputs: int
    largest: float
    relative: float
    changed: float
    tolerance: float
    drifted: dict[str, str]
    differing: tuple[Differing, ...] = ()
    judged: str = "labels"

    @property
    def passed(self) -> bool:
        """Whether the logits are what they were, from the same weights and tokens; a library may be another."""
        return self.relative <= self.tolerance and not any(name in self.drifted for name in FAILING)

    def __str__(self) -> str:
        lines = [
            f"{self.inputs} inputs were run again. Logits are off by at most {self.largest:.2g} from those that were stored, "
            f"{self.relative:.2g} of the largest ({self.tolerance:g} is allowed); {self.changed:.1%} of {self.judged} changed",
            *map(str, self.differing),
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
    largest, changed, differing = (logits - probe.logits).abs().max().item(), logits.argmax(-1) != probe.logits.argmax(-1), ()
    if probe.adapter is not None:
        off, differing = _answers(model, probe)
        largest, changed = max(largest, off), torch.tensor([d is not None for d in differing], device="cpu")
    return Verification(
        inputs=len(logits),
        largest=largest,
        relative=largest / max(probe.logits.abs().max().item(), torch.finfo(torch.float32).tiny),
        changed=changed.double().mean().item(),
        tolerance=max(TOLERANCES[dtype], TOLERANCES[was]) if tolerance is None else tolerance,
        drifted=drifted,
        differing=tuple(d for d in differing if d is not None),
        judged="labels" if probe.adapter is None else "answers",
    )


def _answers(model: nn.Module, probe: Probe) -> tuple[float, list[Differing | None]]:
    """The largest difference of a log-probability at the tokens of the probe's answers, and where each leaves what it was."""
    said, largest, differing = probe.adapter, 0.0, []
    if max(int(said.likeliest.max()), int(said.tokens.max())) >= probe.logits.shape[-1]:
        raise FileFormatError(f"{PROBE_FILE} names tokens that the model does not have; save the adapter and its probe again")
    for row, logits in enumerate(outputs(model, prompts_of(probe.inputs), said.tokens)):
        size = len(logits)
        found = logits.log_softmax(-1).gather(-1, said.likeliest[row, :size])
        largest = max(largest, (found - said.logprobs[row, :size]).abs().max().item())
        differing.append(difference(row, said.tokens[row, :size], logits))
    return largest, differing


def _tokens(probe: Probe, updates: AdapterUpdates, base: Path) -> dict[str, str]:
    """Whether the tokenizer gives the texts the token ids that they had."""
    if probe.texts is None:
        return {}
    was, different = prompts_of(probe.inputs), []
    for special in (True, False):  # a chat template writes the special tokens itself
        try:
            found = tokenize([updates.directory, base], probe.texts, probe.inputs["input_ids"].shape[1], special)
        except FileFormatError as error:
            return {"tokenizer": str(error)}
        different.append(sum(not torch.equal(*pair) for pair in zip(was, prompts_of(found), strict=True)))
    return {"tokenizer": f"gives other tokens for {min(different)} of {len(was)} texts"} if min(different) else {}
