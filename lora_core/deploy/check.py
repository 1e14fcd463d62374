"""Does the merged model compute what the adapted one did? Both are run, whichever of the three bases was merged into.

    original         logits off by at most 1.2e-06, ...; merged weights off by at most 3.1e-07 of what the adapter changes
    and what packed bases would have given: ...

The adapted model is the yardstick: the base as the adapter was trained on it, with the adapter. A language model is compared
at every token of what the adapted one answers, other models at their labels. All compute in float32, so that weights are
compared and not arithmetic. A layer's error is |W' - (W + D)| / |D|, with W' the merged weight, W + D the adapted one and D
the update: 1 means that the merge changed as much as the adapter did.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..bases import base_for, dense_weight, is_packed
from ..errors import CheckFailedError, LoraError, one_line
from ..files.storage import load_adapter
from ..integrations.pretrained import ask, in_float32, load_model, tokenize
from ..model.adapters import set_adapter
from ..model.conventions import is_causal
from ..model.copies import submodule
from ..model.registry import adapter_layers, find_adapter, registry_of
from ..spec.checks import check_tolerance
from .basis import load_base
from .completions import NEW_TOKENS, greedy, outputs, prompts_of
from .probe import PROBE_FILE, read_probe, run_probe
from .recipe import choices
from .stream import StreamMerge

#: The largest deviation of a logit that passes, as a share of the largest logit, by what the weights were cast to: float32
#: sums in another order; a rounding of each weight; a new quantisation, which can only be called a change of model.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
TOLERANCE_PACKED = 0.5
RANDOM_SHAPE = (8, 32)
CAUSAL = "CAUSAL_LM"


@dataclass(frozen=True)
class Deviation:
    """How far a merged model is from the adapted one.

    Attributes:
        base_as: what was merged into.
        largest: the largest difference of a logit.
        relative: the same, over the largest logit of the adapted model.
        changed: share of the inputs whose label (largest logit), or whose greedy answer, is another.
        layers: {path: error of the layer's weight, as above}.
        obstacle: why it could not be measured; None if it was.
        judged: "labels", or "answers" of a language model.
    """

    base_as: str
    largest: float = 0.0
    relative: float = 0.0
    changed: float = 0.0
    layers: Mapping[str, float] | None = None
    obstacle: str | None = None
    judged: str = "labels"

    def __str__(self) -> str:
        if self.obstacle:
            return f"{self.base_as:<16} not measured: {self.obstacle}"
        worst = max((self.layers or {}).values(), default=0)
        return (
            f"{self.base_as:<16} logits off by at most {self.largest:.2g}, {self.relative:.2g} of the largest; "
            f"{self.changed:.1%} of {self.judged} changed; merged weights off by at most {worst:.2g} of what the adapter "
            "changes"
        )


@dataclass(frozen=True)
class Expected:
    """What the adapted model gives for some inputs: the logits of each, (N, C), or of a language model its answers, (N, K)."""

    model: nn.Module
    inputs: Mapping[str, Tensor]
    logits: Tensor | None = None
    answers: Tensor | None = None

    @classmethod
    def of(cls, model: nn.Module, inputs: Mapping[str, Tensor]) -> Expected:
        """Runs the model."""
        if is_causal(model):
            return cls(model, inputs, answers=greedy(model, prompts_of(inputs), NEW_TOKENS))
        return cls(model, inputs, logits=run_probe(model, inputs))

    def beside(self, merged: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """For each input the merged model's logits and the adapted one's: (K, V) at the tokens of an answer, else (1, C)."""
        if self.answers is None:
            return zip(run_probe(merged, self.inputs)[:, None], self.logits[:, None], strict=True)
        prompts = prompts_of(self.inputs)
        return zip(*(outputs(model, prompts, self.answers) for model in (merged, self.model)), strict=True)


def probe_inputs(merge: StreamMerge, texts: Sequence[str] | None) -> dict[str, Tensor]:
    """What to run: the given texts, to a language model as questions; else what an adapter carries; else random token ids."""
    directories = [*(adapter.directory for adapter in merge.adapters), merge.base.directory]
    probe = next((a.directory for a in merge.adapters if (a.directory / PROBE_FILE).is_file()), None)
    if texts is None and probe is not None:
        return read_probe(probe).inputs
    causal = merge.adapters[0].config.task_type == CAUSAL
    inputs = _random_inputs(merge) if texts is None else (ask if causal else tokenize)(directories, texts)
    if merge.base.config.get("is_encoder_decoder"):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs


def _random_inputs(merge: StreamMerge) -> dict[str, Tensor]:
    vocabulary = merge.base.config.get("vocab_size")
    high = vocabulary if isinstance(vocabulary, int) and vocabulary > 1 else 100
    ids = torch.randint(high, RANDOM_SHAPE, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def check_merge(
    merge: StreamMerge, directory: Path, texts: Sequence[str] | None = None, tolerance: float | None = None
) -> list[Deviation]:
    """Compares the merged model in `directory` with the adapted one, and what the other two bases would have given.

    Args:
        merge: what wrote it.
        directory: the merged checkpoint.
        texts: what to run; see `probe_inputs`.
        tolerance: the largest deviation that passes, as a share of the largest logit; None: by the dtype.

    Returns:
        One deviation for each base; the first is of what was merged.

    Raises:
        ConfigError: the tolerance is no finite number, or negative.
        CheckFailedError: the merged model deviates more, or does not load without a missing or unexpected key; or one of the
            two models can't be run.
    """
    if tolerance is not None:
        check_tolerance("tolerance", tolerance)
    else:
        tolerance = TOLERANCE_PACKED if merge.repacks else TOLERANCES[merge.result_dtype]
    inputs = probe_inputs(merge, texts)
    try:
        expected = Expected.of(in_float32(_adapted(merge)), inputs)
    except LoraError:
        raise
    except Exception as error:  # of any library that runs it
        raise CheckFailedError(f"the adapted model can't be run: {_in_words(error)}") from None
    try:
        mine = _deviation(merge, directory, expected)
    except Exception as error:
        raise CheckFailedError(f"the merged model can't be run: {_in_words(error)}") from None
    others = [
        _deviation_of(base_as, merge, directory, expected)
        for base_as in choices([base_for(merge.form or merge.basis.form).name])
        if base_as != merge.base_as
    ]
    if not mine.relative <= tolerance:
        raise CheckFailedError(f"{mine}: above the tolerance of {tolerance:g}, so nothing was kept", [mine, *others])
    return [mine, *others]


def _adapted(merge: StreamMerge) -> nn.Module:
    """The base as the adapters were trained on it, with all of them active."""
    model = load_base(merge.base.directory, merge.adapters, *merge.trained_form())
    names = [f"adapter{i}" for i in range(len(merge.adapters))]
    for i, (name, adapter) in enumerate(zip(names, merge.adapters, strict=True)):
        load_adapter(model, adapter.directory, name)
        for _, layer in adapter_layers(model, find_adapter(model, name)):
            layer.lora_scaling[name] *= merge.recipe.weights[i] if merge.recipe.weights else 1.0
    set_adapter(model, names)
    return model


def _deviation_of(base_as: str, merge: StreamMerge, directory: Path, expected: Expected) -> Deviation:
    """The same for another base: merged beside `directory`, run and removed."""
    try:
        other = StreamMerge(merge.original, merge.adapters, replace(merge.recipe, base_as=base_as))
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f"{directory.name}.") as place:
            other.write(Path(place))
            return _deviation(other, Path(place), expected)
    except Exception as error:  # of any library: that a comparison can't be had says nothing of the merge
        return Deviation(base_as, obstacle=_in_words(error))


def _in_words(error: Exception) -> str:
    return one_line(str(error)) or type(error).__name__


def _deviation(merge: StreamMerge, directory: Path, expected: Expected) -> Deviation:
    task, adapted = merge.adapters[0].config.task_type, expected.model
    merged = in_float32(load_model(directory, task, merge.result_dtype, strict=True))
    largest, top, changed = 0.0, torch.finfo(torch.float32).tiny, []
    for found, was in expected.beside(merged):
        largest, top = max(largest, (found - was).abs().max().item()), max(top, was.abs().max().item())
        changed.append(not torch.equal(found.argmax(-1), was.argmax(-1)))
    errors = {}
    names = registry_of(adapted).active
    for name in names:
        for path, layer in adapter_layers(adapted, find_adapter(adapted, name)):
            if path not in errors:
                module = submodule(merged, path)
                W = dense_weight(module) if is_packed(module) else module.weight.detach().float()
                here = [n for n in names if n in layer.lora_scaling]
                update = layer.update_norm(here)
                errors[path] = (W - layer.folded_weight(here)).norm().item() / update if update else 0.0
    return Deviation(
        base_as=merge.base_as,
        largest=largest,
        relative=largest / top,
        changed=sum(changed) / len(changed),
        layers=errors,
        judged="labels" if expected.answers is None else "answers",
    )
