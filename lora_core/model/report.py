"""What an adapter came to be on a model: the reports of what makes one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from .plan import Plan
from .registry import adapter_parameters, find_adapter


@dataclass(frozen=True)
class InjectionReport:
    """What `inject` did.

    Attributes:
        adapter_name: the adapter.
        targets: paths of the layers, and of the parameters, that carry it.
        hits: {pattern of target_modules or target_parameters: how many it matched, before exclusions}.
        modules_to_save: paths of the modules that are trained whole.
        trainable_parameters: number of values that the adapter trains.
        trained: whether it does; else they wait (`load_adapter` without `trainable=True`, `inference_mode`).
        tokens: {path of a layer of which it trains some rows: the tokens}.
        kept: paths of embeddings that came with its file and are not trained.
        untied: {path of a tensor that it trains: paths that the base ties it to, which keep their own}.
        left_out: {path of what `target_modules` might mean and passed over, or of what a file has no tensors for: why}.
        architecture: the `model_type` whose usual layers were taken; None: the configuration names its layers.
        moved: {path of a module: what the file that was loaded calls it}, where that is another name.
        tool, other_parts: whose format a file that was loaded has, if not PEFT's, and what it holds for other models.
    """

    adapter_name: str
    targets: tuple[str, ...]
    hits: Mapping[str, int]
    modules_to_save: tuple[str, ...]
    trainable_parameters: int
    untied: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    architecture: str | None = None
    moved: Mapping[str, str] = field(default_factory=dict)
    trained: bool = True
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    tool: str | None = None
    other_parts: tuple[str, ...] = ()

    def __str__(self) -> str:
        whole = f" and {', '.join(self.modules_to_save)} whole" if self.modules_to_save else ""
        tokens = "".join(f"; {len(ids)} rows of {path}" for path, ids in self.tokens.items())
        kept = f"; embeddings of its own: {', '.join(self.kept)}" if self.kept else ""
        untied = f"; trained apart from what it is tied to: {', '.join(self.untied)}" if self.untied else ""
        usual = f"; target_modules: {', '.join(self.hits)}, as usual for {self.architecture}" if self.architecture else ""
        moved = f"; {len(self.moved)} modules have other names in the file" if self.moved else ""
        what = "trainable parameters" if self.trained else "parameters, which are not trained (trainable=True trains them)"
        left = f"; left out: {len(self.left_out)} ({', '.join(self.left_out)})" if self.left_out else ""
        others = f" (it also holds {', '.join(self.other_parts)})" if self.other_parts else ""
        tool = f"; read from a file of {self.tool}{others}" if self.tool else ""
        return (
            f"adapter {self.adapter_name!r} on {len(self.targets)} layers{whole}: "
            f"{self.trainable_parameters:,} {what}{tokens}{kept}{usual}{moved}{untied}{left}{tool}"
        )


@dataclass(frozen=True)
class FitReport:
    """How much an adapter holds of what it was made from: other adapters, a difference, or what its start goes by.

    Attributes:
        adapter_name: the adapter.
        source: what it was made from, in words.
        ranks: {path: rank of the adapter on that layer}.
        energy: {path: share of the source's squared Frobenius norm that this rank holds}; 1.0 where nothing was cut off.
        modules_to_save: paths of the modules of which it has a copy from the same source, whole.
        not_captured: names of the source's tensors that it has no part of.
    """

    adapter_name: str
    source: str
    ranks: Mapping[str, int]
    energy: Mapping[str, float]
    modules_to_save: tuple[str, ...] = ()
    not_captured: tuple[str, ...] = ()

    def __str__(self) -> str:
        least, most = min(self.ranks.values()), max(self.ranks.values())
        whole = f" and {', '.join(self.modules_to_save)} whole" if self.modules_to_save else ""
        few = ", ".join((*self.not_captured[:3], *(["..."] if len(self.not_captured) > 3 else [])))
        missed = f"; not captured: {len(self.not_captured)} other tensors ({few})" if self.not_captured else ""
        return (
            f"adapter {self.adapter_name!r} = {self.source} on {len(self.ranks)} layers{whole}: rank "
            f"{most if least == most else f'{least} to {most}'}, keeping at least {100 * min(self.energy.values()):.4g} % of "
            f"a layer's squared norm{missed}"
        )


def describe(model: nn.Module, name: str, found: Plan) -> InjectionReport:
    """The report on an adapter that is on the model, by the plan that it has."""
    size = sum(p.numel() for p in adapter_parameters(model, name))
    targets, tokens = found.targets, {path: rows.ids for path, rows in found.tokens.items()}
    report = InjectionReport(name, targets.paths, targets.hits, found.saved_modules, size, found.untied, found.left_out)
    return dataclasses.replace(report, tokens=tokens, kept=found.kept, trained=find_adapter(model, name).trainable)
