"""The model card beside what was trained: base, data, numbers, and how to load it, with this library and with PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CARD = "README.md"
CLASSES = {"accuracy": "AutoModelForSequenceClassification", "exact_match": "AutoModelForCausalLM"}

_CARD = """\
---
library_name: {library}
base_model: {base}
tags: [lora-core, {method}]
---

# {name} on {data}: `{method}`

{what} of {name}, trained on {train:,} rows of {data}, {epochs}, seed {seed}.

| | |
|---|---|
{numbers}

Settings: {settings}.

{load}"""

_ADAPTER = """\
## Loading it

```python
from transformers import {model_class}

from lora_core import load_adapter

model = {model_class}.from_pretrained({base}{labels})
load_adapter(model, "this directory")
```

With PEFT:

```python
from peft import PeftModel
from transformers import {model_class}

model = {model_class}.from_pretrained({base}{labels})
model = PeftModel.from_pretrained(model, "this directory")
```
{quantised}"""

_MODEL = """\
## Loading it

```python
from transformers import {model_class}

model = {model_class}.from_pretrained("this directory")
```
"""

_QUANTISED = """
It was trained on a base in {held}: `lora_core.{verb}(model{skip})` before it is loaded holds the base as it was then.
"""


def card(metrics: Mapping[str, Any], base: str, adapts: bool) -> str:
    """The card of a run, from its metrics; `base` is what its adapter's file says its base is."""
    data, settings, score = metrics["data"], metrics["hyperparameters"], next(name for name in CLASSES if name in metrics)
    shown = [(score.replace("_", " "), f"{metrics[score]:.1%} of {data['validation']:,} held-out rows")]
    shown += [(name.upper(), f"{metrics[name]:.3f}") for name in ("f1",) if name in metrics]
    shown += [
        ("validation loss", f"{metrics['loss']:.3f}"),
        ("trained", f"{metrics['trainable_parameters']:,} parameters, {metrics['trainable_percent']:.3g} % of all"),
        ("peak memory", f"{metrics['peak_rss_mb']:,.0f} MiB ({metrics['device']})"),
    ]
    classifies = score == "accuracy"
    words = {"model_class": CLASSES[score], "base": json.dumps(base), "labels": ", num_labels=2" if classifies else ""}
    held = {True: ("4-bit NF4", "quantize_nf4"), "int8": ("8 bits", "quantize_int8")}.get(settings.get("quantize"))
    skip = ', skip=["classifier"]' if classifies else ""
    quantised = _QUANTISED.format(held=held[0], verb=held[1], skip=skip) if held else ""
    kept = {name: value for name, value in settings.items() if value is not None and name not in ("quantize", "trains")}
    return _CARD.format(
        library="peft" if adapts else "transformers",
        base=json.dumps(base),
        method=metrics["method"],
        name=Path(metrics["base_model"]["name"]).name,
        data=data["name"],
        what="A LoRA adapter" if adapts else "A copy",
        train=data["train"],
        epochs=f"{settings['epochs']} epochs",
        seed=metrics["seed"],
        numbers="\n".join(f"| {name} | {value} |" for name, value in shown),
        settings=", ".join(f"{name} {_text(value)}" for name, value in kept.items()),
        load=_ADAPTER.format(**words, quantised=quantised) if adapts else _MODEL.format(**words),
    )


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
