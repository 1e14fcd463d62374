"""What does a 1B model take to train on a GPU: tokens a second and peak memory, in bf16 and in NF4, against peft?

    python -m bench llama --device cuda

The shape of Llama 3.2 1B with random weights; r=16 on every linear layer, dropout 0 and then 0.1, 8 x 1,024 tokens,
AdamW. Ours and peft's adapters are float32 beside the 16-bit base, as the optimiser needs and as is peft's default;
"peft, 16-bit" has them in bfloat16, its fastest and smallest way. The checked values are the same. The frozen base is the
floor: nothing is trained, and gradients flow to where the lowest adapter would stand. On a CPU a tiny model stands in, to
show that this works.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lora_core import LoraConfig, inject, quantize_nf4

from .measure import Measure, Ratio
from .models import ALL_LINEAR, LLAMA_1B, LLAMA_TINY, R, llama
from .peers import PEFT_16, adapt_with_peft, check_models, freeze, quantize_for_peft, randomize, trained
from .settings import Settings
from .timing import interleave

ROUNDS = 9
HEAD = "lm_head"
#: Two 16-bit products rounded in another order, through many layers.
TOLERANCE = 0.2


class Step:
    """One training step on next-token prediction; on a model that trains nothing, its forward and backward."""

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self.model, self.ids, self.parameters = model, ids, trained(model)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4) if self.parameters else None

    def __call__(self) -> None:
        loss(self.model, self.ids).backward()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def run(settings: Settings) -> Iterator[Measure]:
    for quantize in (False, True):
        for dropout in (0.0, 0.1):
            yield from measure(quantize, dropout, settings)


def measure(quantize: bool, dropout: float, settings: Settings) -> Iterator[Measure]:
    """Seconds of a step, the candidates interleaved; then the peak of a step, each candidate alone on the device."""
    cuda = settings.device == "cuda"
    generator = torch.Generator().manual_seed(0)
    size, vocabulary = ((8, 1024), LLAMA_1B["vocab_size"]) if cuda else ((2, 16), LLAMA_TINY["vocab_size"])
    ids = torch.randint(vocabulary, size, generator=generator).to(settings.device)
    kind = "NF4" if quantize else "bf16"
    title = f"{'1B Llama' if cuda else 'tiny Llama'}, {kind}, r={R} on all linear layers, dropout {dropout}"
    key = f"llama-{kind.lower()}-p{dropout}"
    names = ("ours", "peft", PEFT_16) if quantize else ("frozen", "ours", "peft", PEFT_16)

    ours = build("ours", quantize, dropout, settings.device)
    models = {name: ours if name == "ours" else build(name, quantize, dropout, settings.device, ours) for name in names}
    adapted = {name: model for name, model in models.items() if name != "frozen"}
    difference = check_models(adapted, lambda model: loss(model, ids), TOLERANCE)
    steps = {name: Step(model, ids) for name, model in models.items()}
    samples = interleave(steps, **settings.timing(ROUNDS))
    seconds = samples.medians()
    setting = {"tokens": list(size), "r": R, "dropout": dropout, "dtype": "bfloat16", "quantized": quantize}
    yield Measure(
        key=key,
        title=f"{title}: training step",
        unit="s",
        values=seconds,
        ratios={f"{name} / ours": samples.ratio(name, "ours") for name in names if name != "ours"},
        setting={
            **setting,
            "rounds": samples.rounds,
            "difference": difference,
            "tokens a second": {name: round(ids.numel() / value) for name, value in seconds.items()},
        },
    )
    if cuda:
        del ours, models, adapted, steps
        peaks = {name: peak(name, quantize, dropout, ids) for name in names}
        yield Measure(
            key=f"{key}-peak",
            title=f"{title}: peak memory of a step",
            unit="bytes",
            values=peaks,
            ratios={f"ours / {name}": Ratio(peaks["ours"] / peaks[name]) for name in ("peft", PEFT_16)},
            setting=setting,
        )


def build(name: str, quantize: bool, dropout: float, device: str, like: nn.Module | None = None) -> nn.Module:
    """One candidate, in training mode. `like`: for peft: the model of ours to take A and B from."""
    model = llama(LLAMA_1B if device == "cuda" else LLAMA_TINY, device)
    config = LoraConfig(r=R, lora_alpha=2 * R, lora_dropout=dropout, target_modules=ALL_LINEAR)
    if name == "frozen":
        linears = [m for path, m in model.named_modules() if isinstance(m, nn.Linear) and path != HEAD]
        return freeze(model, linears).train()
    if name == "ours":
        if quantize:
            quantize_nf4(model, skip=[HEAD])
        inject(model, config)
        randomize(model)
        with torch.no_grad():  # values that peft's 16-bit adapters can hold too
            for parameter in trained(model):
                parameter.copy_(parameter.bfloat16())
        return model.train()
    if quantize:
        # prepare_model_for_kbit_training would make the head and the norms float32, which is slower and larger.
        quantize_for_peft(model, [HEAD])
    return adapt_with_peft(model, config, like, float32=name == "peft").train()


def peak(name: str, quantize: bool, dropout: float, ids: Tensor) -> int:
    """The most that torch had allocated on the GPU in three steps of one candidate, the model included."""
    gc.collect()
    torch.cuda.empty_cache()
    step = Step(build(name, quantize, dropout, "cuda"), ids)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
