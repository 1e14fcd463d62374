"""A training step of a language model, for the question `training`: SmolLM2's widths, 4 rows of 128 tokens.

Six of its thirty layers with random weights, and the whole vocabulary; r=16 on all seven projections of a layer, dropout 0.05,
AdamW in one kernel, clipping at 1; in float32, and under bfloat16 autocast. "Ours, as experiments" is as `experiments.sft`
trains: siblings share a mask, on AMD's processors oneDNN multiplies by the frozen weights, under autocast these lie in
bfloat16, and the loss is made block by block. The frozen base trains nothing: its step is a forward and a backward that reaches
down to where the lowest adapter would stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from experiments.next_token import FrozenHead, summed_cross_entropy
from experiments.precision import cast_frozen
from lora_core import LoraConfig, inject, share_dropout_masks, use_fast_linear

from .measure import Measure
from .models import ALL_LINEAR, LLAMA_TINY, SMOLLM, R, llama
from .peers import adapt_with_peft, check_models, freeze, randomize, trained
from .settings import Settings
from .timing import interleave

SIZE = (4, 128)
DROPOUT = 0.05
ROUNDS = 15
HEAD = "lm_head"
#: float32 sums in another order; products of 8 bits of precision, rounded in another order, through the layers.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.2}
NAMES = ("frozen", "full", "ours", "peft", "ours, as experiments")
PAIRS = (("peft", "ours"), ("full", "ours"), ("frozen", "ours"), ("peft", NAMES[-1]), ("full", NAMES[-1]), ("frozen", "peft"))


class Step:
    """One candidate's training: each call is a step on the same rows."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
        self.model, self.loss, self.parameters = model, loss, trained(model)
        if self.parameters:
            self.optimizer = torch.optim.AdamW(self.parameters, lr=5e-4, weight_decay=0.01, fused=True)

    def __call__(self) -> None:
        self.loss(self.model).backward()
        if self.parameters:
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def loss(model: nn.Module, ids: Tensor, dtype: torch.dtype, head: FrozenHead | None = None) -> Tensor:
    """Cross entropy of the next token, (B, T) ids; as the experiments make it, by its `head`, if that is given."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        if head is None:
            return model(input_ids=ids, labels=ids, use_cache=False).loss
        hidden, targets = head.inputs(model, input_ids=ids, use_cache=False)[:, :-1], ids[:, 1:]
        return summed_cross_entropy(hidden.flatten(0, 1), head.weight, head.bias, targets.flatten()) / targets.numel()


def steps(settings: Settings) -> Iterator[Measure]:
    """Seconds of a step, the candidates interleaved, in each dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        yield measure(dtype, settings)


def measure(dtype: torch.dtype, settings: Settings) -> Measure:
    shape, size = (LLAMA_TINY, (2, 16)) if settings.quick else (SMOLLM, SIZE)
    ids = torch.randint(shape["vocab_size"], size, generator=torch.Generator().manual_seed(0)).to(settings.device)
    ours = build("ours", shape, settings.device)
    models = {name: ours if name == "ours" else build(name, shape, settings.device, ours) for name in NAMES}
    if dtype == torch.bfloat16:
        cast_frozen(models[NAMES[-1]], (HEAD,))
    head = FrozenHead.of(models[NAMES[-1]])

    def loss_of(model: nn.Module) -> Tensor:
        return loss(model, ids, dtype, head if model is models[NAMES[-1]] else None)

    adapted = {name: model for name, model in models.items() if name not in ("frozen", "full")}
    difference = check_models(adapted, loss_of, TOLERANCES[dtype])
    samples = interleave({name: Step(model, loss_of) for name, model in models.items()}, **settings.timing(ROUNDS))
    kind = str(dtype).removeprefix("torch.")
    name = "tiny Llama" if settings.quick else f"SmolLM2's widths, {shape['num_hidden_layers']} layers"
    return Measure(
        key=f"train-llm-{kind}",
        title=f"{name}, LoRA r={R} on all seven projections: training step, {kind}",
        unit="s",
        values=samples.medians(),
        ratios={f"{above} / {below}": samples.ratio_within_rounds(above, below) for above, below in PAIRS},
        setting={
            "tokens": list(size),
            "r": R,
            "dropout": DROPOUT,
            "dtype": kind if dtype == torch.float32 else f"{kind} autocast",
            "rounds": samples.rounds,
            "difference": difference,
        },
    )


def build(name: str, shape: dict, device: str, like: nn.Module | None = None) -> nn.Module:
    """One candidate, in training mode. `like`: for peft: the model of ours to take A and B from."""
    model = llama(shape, device, torch.float32)
    if name == "full":
        return model.train()
    if name == "frozen":
        return freeze(model, [m for path, m in model.named_modules() if isinstance(m, nn.Linear) and path != HEAD]).train()
    config = LoraConfig(r=R, lora_alpha=2 * R, lora_dropout=DROPOUT, target_modules=ALL_LINEAR)
    if name == "peft":
        return adapt_with_peft(model, config, like).train()
    if name != "ours":
        use_fast_linear(model)
    torch.manual_seed(0)  # two models of ours get the same A and B
    inject(model, config)
    randomize(model)
    if name != "ours":
        share_dropout_masks(model)
    return model.train()
