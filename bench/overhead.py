"""What does an adapter cost on one linear layer, forward alone and forward + backward, over the same layer frozen?

    python -m bench overhead            the lines through the middle of the grid: 768x768, r=16, 1,024 tokens
    python -m bench overhead --full     every width, rank, number of tokens and dropout

The floor counts multiplications: frozen, a layer takes 2 T d_in d_out forward and as many for the gradient of its input.
An adapter adds six products, 2 T r d_in or 2 T r d_out each: two forward, four backward. Full fine-tuning instead adds
the gradient of W, a third product of 2 T d_in d_out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora_core import LoraConfig, inject, merge_adapter

from .measure import Measure, Ratio
from .peers import check_layers, layers, randomize, trained
from .settings import Settings
from .timing import interleave

WIDTHS = ((384, 384), (768, 768), (768, 3072), (2048, 2048))
RANKS = (4, 16, 64)
TOKENS = (128, 1024, 4096)
DROPOUTS = (0.0, 0.1)
ROUNDS = 31


@dataclass(frozen=True)
class Case:
    """One shape to measure: T tokens through a layer of d_in and d_out with rank r."""

    d_in: int = 768
    d_out: int = 768
    r: int = 16
    tokens: int = 1024
    dropout: float = 0.0
    backward: bool = True
    nf4: bool = False

    @property
    def key(self) -> str:
        direction = "both" if self.backward else "forward"
        return f"{'nf4' if self.nf4 else 'dense'}-{self.d_in}x{self.d_out}-r{self.r}-t{self.tokens}-p{self.dropout}-{direction}"

    @property
    def title(self) -> str:
        dropout = f"dropout {self.dropout}" if self.dropout else "no dropout"
        direction = "forward + backward" if self.backward else "forward"
        base = "NF4 " if self.nf4 else ""
        return f"{base}{self.d_in}x{self.d_out}, r={self.r}, {self.tokens:,} tokens, {dropout}: {direction}"

    def shrunk(self) -> Case:
        """The same case in small, for a quick run; 768 becomes 64: bitsandbytes wants whole blocks."""
        return replace(self, d_in=self.d_in // 12, d_out=self.d_out // 12, tokens=self.tokens // 16)

    @property
    def floor(self) -> float:
        """Multiplications of the adapted layer over those of the frozen one."""
        dense, thin = self.d_in * self.d_out, self.r * (self.d_in + self.d_out)
        return 1 + (6 * thin) / (4 * dense) if self.backward else 1 + thin / dense


def cases(settings: Settings) -> Iterator[Case]:
    """What to measure, each once."""
    middle = Case()
    if settings.full:
        shapes = [Case(*width, r=r, tokens=t) for width in WIDTHS for r in RANKS for t in TOKENS]
        quantized = [replace(middle, d_in=i, d_out=o, nf4=True) for i, o in WIDTHS]
    else:
        shapes = [
            *(replace(middle, d_in=i, d_out=o) for i, o in WIDTHS),
            *(replace(middle, r=r) for r in RANKS),
            *(replace(middle, tokens=t) for t in TOKENS),
        ]
        quantized = [replace(middle, nf4=True)]
    directions = (True,) if settings.quick else (True, False)
    yield from dict.fromkeys(
        replace(shape, dropout=p, backward=b) for shape, p, b in itertools.product([*shapes, *quantized], DROPOUTS, directions)
    )


def run(settings: Settings) -> Iterator[Measure]:
    for case in cases(settings):
        yield measure(case, settings)
    yield merged(Case(), settings)


def measure(nominal: Case, settings: Settings) -> Measure:
    """Times one case: every candidate over the dense frozen layer, after a check that all compute the same."""
    case = nominal.shrunk() if settings.quick else nominal
    dtype = torch.bfloat16 if settings.device == "cuda" else torch.float32
    torch.manual_seed(0)
    candidates = layers(case.d_in, case.d_out, case.r, case.dropout, settings.device, dtype, case.nf4)
    x = torch.randn(case.tokens, case.d_in, device=settings.device, dtype=dtype, requires_grad=True)
    dy = torch.randn(case.tokens, case.d_out, device=settings.device, dtype=dtype)
    difference = check_layers(candidates, x, dy, tolerance=1e-4 if dtype == torch.float32 else 5e-2)
    work = {name: _work(layer, x, dy, case.backward) for name, layer in candidates.items()}
    samples = interleave(work, **settings.timing(ROUNDS))
    adapted = [name for name in candidates if name != "frozen"]
    return Measure(
        key=nominal.key,
        title=case.title,
        unit="s",
        values=samples.medians(),
        ratios={
            **{f"{name} / frozen": samples.ratio(name, "frozen") for name in adapted},
            **{f"ours / {name}": samples.ratio("ours", name) for name in adapted if name.startswith("peft")},
            "floor / frozen": Ratio(case.floor),
        },
        setting={
            **{k: getattr(case, k) for k in ("d_in", "d_out", "r", "tokens", "dropout", "backward", "nf4")},
            "dtype": str(dtype).removeprefix("torch."),
            "rounds": samples.rounds,
            "difference": difference,
        },
    )


def _work(layer: nn.Module, x: Tensor, dy: Tensor, backward: bool) -> Callable[[], object]:
    """One call: the forward as in training, and with `backward` the gradients of x and of what the layer trains."""
    wanted = [x, *trained(layer)]
    return (lambda: torch.autograd.grad(layer(x), wanted, dy)) if backward else (lambda: layer(x))


def merged(case: Case, settings: Settings) -> Measure:
    """Our layer with its adapter folded in, over a plain one: a merged adapter must cost nothing."""
    case = case.shrunk() if settings.quick else case
    torch.manual_seed(0)
    ours = nn.ModuleDict({"linear": nn.Linear(case.d_in, case.d_out, device=settings.device)})
    inject(ours, LoraConfig(r=case.r, lora_alpha=2 * case.r, target_modules=["linear"]))
    randomize(ours)
    merge_adapter(ours)
    plain = nn.Linear(case.d_in, case.d_out, device=settings.device).requires_grad_(False)
    x = torch.randn(case.tokens, case.d_in, device=settings.device)
    with torch.inference_mode():
        work = {"ours merged": lambda: ours["linear"](x), "frozen": lambda: plain(x)}
        samples = interleave(work, **settings.timing(4 * ROUNDS))
    return Measure(
        key="merged",
        title=f"{case.d_in}x{case.d_out}, {case.tokens:,} tokens, adapter merged: forward",
        unit="s",
        values=samples.medians(),
        ratios={"ours merged / frozen": samples.ratio("ours merged", "frozen")},
        setting={"d_in": case.d_in, "d_out": case.d_out, "tokens": case.tokens, "dtype": "float32", "rounds": samples.rounds},
    )
