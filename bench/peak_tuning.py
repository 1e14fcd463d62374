"""The peak of a QLoRA job on SmolLM2, in a process that does nothing else; `memory.py` starts it.

    python -m bench.peak_tuning ours fp32 8 20 2        candidate, precision, rows of a batch, steps, threads

All thirty layers in NF4, r=16 on all seven projections, on the task of `experiments.sft`. "ours" is prepared and trained as
that does; "peft" stands on bitsandbytes' own layers, prepared as its documentation says, in a plain loop that takes the loss
from the model; "peft, our loop" is that model in the trainer of the experiments. All take the same batches, the longest first.

Prints {"libraries", "loading", "peak", "parts"} in bytes: the resident size of the process with all libraries and no model, at
most until the first step, and at most during the steps; and what the job's own arithmetic says that it must hold.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_core.cli.command_line import Parser

from .peak import forget_peak, high_water, status
from .quiet import quieten

CANDIDATES = ("ours", "peft", "peft, our loop")


def parser() -> Parser:
    """The command line; `memory.py` writes it."""
    p = Parser(prog="python -m bench.peak_tuning", description=__doc__)
    p.add_argument("candidate", choices=CANDIDATES)
    p.add_argument("precision", choices=("fp32", "bf16"))
    p.add_argument("batch", type=int, help="rows in a step")
    p.add_argument("steps", type=int)
    p.add_argument("threads", type=int, help="of torch")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    given = parser().parse_args(argv)
    quieten()  # before the libraries are there
    import torch

    from experiments import conversations, models
    from experiments.completions import Template, TokenisedCompletions
    from experiments.language_models import load_language_model
    from experiments.methods import Schedule
    from experiments.recipes import LANGUAGE_METHODS
    from experiments.tuning import TuningJob

    from . import harnesses

    torch.set_num_threads(given.threads)
    base, rows = models.resolve("packaged-lm"), conversations.load("orders")
    schedule = Schedule(epochs=1, batch_size=given.batch, learning_rate=1e-3, max_length=512, max_steps=given.steps)
    job = TuningJob(LANGUAGE_METHODS["qlora"], schedule, base, rows, "cpu", given.precision)
    torch.manual_seed(schedule.seed)
    libraries = status("VmRSS") or high_water()
    loaded = load_language_model(base)
    texts = TokenisedCompletions(Template(loaded.tokenizer), rows.train, schedule.max_length)
    engine = harnesses.our_tuned if given.candidate == "ours" else harnesses.their_tuned
    loop = harnesses.plain_tuning if given.candidate == "peft" else harnesses.own_tuning
    model = engine(loaded, job)
    gc.collect()
    loading = status("VmHWM") or high_water()
    forget_peak()
    with tempfile.TemporaryDirectory() as output:
        loop(model, job, texts, loaded.tokenizer, Path(output))
    found = {"libraries": libraries, "loading": loading, "peak": status("VmHWM") or high_water()}
    print(json.dumps(found | {"parts": parts(model, texts, given) if given.candidate == "ours" else {}}))
    return 0


def parts(model: Any, texts: Any, given: Any) -> dict[str, int]:
    """The job's own arithmetic: bytes that each part of it must take when the longest batch goes backward."""
    import torch

    from experiments.batches import batches
    from experiments.completions import IGNORED
    from experiments.next_token import BLOCK, FrozenHead, summed_cross_entropy
    from lora_core import base_weight_bytes, trainable_parameters

    from .memory import saved_bytes

    batch = dict(next(iter(batches(texts, given.batch, seed=0))))
    labels = batch.pop("labels")
    places = (labels[:, 1:] != IGNORED).any(0).nonzero()[:, 0]
    targets = labels[:, places + 1]
    matter, head = targets != IGNORED, FrozenHead.of(model)

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=given.precision == "bf16"):
            hidden = head.inputs(model, **batch, use_cache=False, logits_to_keep=places)
            return summed_cross_entropy(hidden[matter], head.weight, head.bias, targets[matter])

    dense = {p for p in model.parameters() if p.is_floating_point() and not p.requires_grad}
    dense_bytes = sum(p.nbytes for p in dense)
    adapter = sum(p.nbytes for p in trainable_parameters(model))
    logits = min(int(matter.sum()) * model.config.vocab_size, BLOCK) * torch.float32.itemsize
    return {
        "packed weights and their scales": base_weight_bytes(model) - dense_bytes,
        "embeddings and norms": dense_bytes,
        "adapter": adapter,
        "its gradients": adapter,
        "the optimiser's state": 2 * adapter,
        "kept for the backward": saved_bytes(model.train(), loss),
        "a block of logits and of their gradient": 2 * logits,
    }


if __name__ == "__main__":
    sys.exit(main())
