"""The methods under comparison: a few settings of one recipe each. A new one is a line in `METHODS`.

A run records its settings, so this file is no part of the code that its results come from: a new method leaves the runs of the
others as they are, and a run of settings that are no longer a method's is named with them.
"""

from __future__ import annotations

from .methods import EVERYTHING, HEAD, NOTHING, Method

#: In the order in which tables and figures show them.
METHODS = {
    method.name: method
    for method in (
        Method("base", "no training: the pretrained model with an untrained head", trains=NOTHING),
        Method("head-only", "only the classification head is trained", trains=HEAD, learning_rate=1e-2),
        Method("full", "full fine-tuning: every parameter is trained", trains=EVERYTHING, learning_rate=5e-5),
        Method("lora", "LoRA of rank 16 on the four attention projections"),
        Method("qlora", "the same on a base in 4-bit NF4", quantize=True),
        Method("low-rank", "LoRA of rank 4", r=4, lora_alpha=16),
        Method("high-rank", "LoRA of rank 32", r=32, lora_alpha=64),
        Method("query-only", "LoRA of rank 16 on the query projection alone", roles=("query",)),
        Method("bias", "LoRA that trains the adapted layers' biases too; --bias all: every bias", bias="lora_only"),
        Method("rslora", "LoRA scaled by alpha / sqrt(rank)", use_rslora=True),
        Method("dora", "LoRA with a trained magnitude for each output", use_dora=True),
        # The best of 14 random settings on a part of SST-2's training set, judged on another part: results/sweep/sweep.csv.
        Method(
            "best",
            "what a sweep found: rank 32 on every linear layer, and LoRA+",
            learning_rate=3.8e-4,
            r=32,
            lora_alpha=16,
            lora_dropout=0.09,
            lora_plus_ratio=4,
            target_modules=("all-linear",),
        ),
    )
}

_LANGUAGE = {"learning_rate": 1e-3, "lora_dropout": 0.05, "target_modules": ("all-linear",)}
#: For language models.
LANGUAGE_METHODS = {
    method.name: method
    for method in (
        Method("base", "no training: the model as it is", trains=NOTHING),
        Method("full", "full fine-tuning: every parameter is trained", trains=EVERYTHING, learning_rate=5e-5),
        Method("lora", "LoRA of rank 16 on every linear layer but the head", **_LANGUAGE),
        Method("qlora", "the same on a base in 4-bit NF4", quantize=True, **_LANGUAGE),
        Method("rslora", "LoRA scaled by alpha / sqrt(rank)", use_rslora=True, **_LANGUAGE),
        Method("dora", "LoRA with a trained magnitude for each output", use_dora=True, **_LANGUAGE),
    )
}
