"""What does an adapter that is not merged cost where a text is written token by token?

    python -m bench decoding

SmolLM2's shape, all thirty layers with random weights, float32; r=16 on all seven projections. One sequence with 32 tokens
in its cache reads one more; each call is then forgotten. The base alone is the floor: a merged adapter costs as much.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lora_core import LoraConfig, inject

from .measure import Measure
from .models import ALL_LINEAR, LLAMA_TINY, SMOLLM, R, llama
from .peers import adapt_with_peft, agreed, randomize, relative_difference
from .settings import Settings
from .timing import interleave

CONTEXT, LAYERS, ROUNDS = 32, 30, 101
PAIRS = (("ours", "base"), ("peft", "base"), ("peft", "ours"))


class Writer:
    """A model that has read a text; each call reads one token more, and forgets it."""

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self.model, self.token = model.eval(), ids[:, -1:]
        with torch.inference_mode():
            self.cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        logits = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True).logits
        self.cache.crop(-1)
        return logits


def run(settings: Settings) -> Iterator[Measure]:
    shape = LLAMA_TINY if settings.quick else SMOLLM | {"num_hidden_layers": LAYERS}
    dtype = torch.bfloat16 if settings.device == "cuda" else torch.float32
    config = LoraConfig(r=R, lora_alpha=2 * R, target_modules=ALL_LINEAR)
    ours = llama(shape, settings.device, dtype)
    inject(ours, config)
    randomize(ours)
    theirs = adapt_with_peft(llama(shape, settings.device, dtype), config, like=ours)
    ids = torch.randint(shape["vocab_size"], (1, CONTEXT + 1), generator=torch.Generator().manual_seed(0)).to(settings.device)
    models = {"base": llama(shape, settings.device, dtype), "ours": ours, "peft": theirs}
    writers = {name: Writer(model, ids) for name, model in models.items()}
    tolerance = 1e-3 if dtype == torch.float32 else 0.2
    difference = agreed(relative_difference(writers["peft"](), writers["ours"]()), tolerance, "the logits of peft and ours")
    samples = interleave(writers, **settings.timing(ROUNDS))
    yield Measure(
        key="decode-llm",
        title=f"{'tiny Llama' if settings.quick else 'SmolLM2'}, LoRA r={R} on all seven projections: reading one token",
        unit="s",
        values=samples.medians(),
        ratios={f"{above} / {below}": samples.ratio_within_rounds(above, below) for above, below in PAIRS},
        setting={
            "context": CONTEXT,
            "layers": shape["num_hidden_layers"],
            "dtype": str(dtype).removeprefix("torch."),
            "rounds": samples.rounds,
            "difference": difference,
        },
    )
