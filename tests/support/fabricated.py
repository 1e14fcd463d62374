"""Metrics that no run has measured, for what only reads: like a real run's, with whatever a test wants to be different."""

import copy
import json
from pathlib import Path

import numpy as np

from experiments import predictions, provenance, record
from experiments.measured import PLAIN
from experiments.models import layer_names
from experiments.recipes import METHODS
from tests.support import ROOT

COMMITTED = ROOT / "experiments" / "results"
_TEMPLATE = json.loads((COMMITTED / "float32/sst-2-all-minilm-l6-v2-12000x2/lora-seed0" / "metrics.json").read_text())
_TEMPLATE["data"]["train"] = 67_349
_TEMPLATE["hyperparameters"] |= {"epochs": 3, "train_samples": None}
for _part in ("data", "base_model"):
    _TEMPLATE[_part].pop("sha256", None)
#: What another run of it would measure otherwise.
_TEMPLATE |= {"f1": 0.891, "loss": 0.32, "peak_rss_mb": 1331.8, "train_seconds": 1998.0, "device": "cpu, 1 threads"}
_TEMPLATE |= {provenance.KEY: {**provenance.sources(), "version": "0", "processor": "one", "threads": 1, "seconds": 2020.0}}
_TEMPLATE |= {"loss_history": [[63 * i, 0.7 - i / 200] for i in range(1, 101)], "accuracy_by_epoch": [0.85, 0.86, 0.87]}


def metrics(method="lora", accuracy=0.87, seed=0, **changes):
    """The committed LoRA run's metrics as if of all of SST-2, under another name, with another last accuracy, seed or other
    top-level keys.
    """
    made = copy.deepcopy(_TEMPLATE)
    made |= {"method": method, "accuracy": accuracy, "seed": seed} | changes
    made["accuracy_by_epoch"] = [*made["accuracy_by_epoch"][:-1], accuracy]
    recipe = METHODS[method]
    made["hyperparameters"] |= {"trains": recipe.trains, "quantize": recipe.quantize}
    if recipe.adapts:
        for key in ("r", "lora_alpha", "lora_dropout"):
            made["hyperparameters"][key] = getattr(recipe, key)
        targets = recipe.target_modules or layer_names(made["base_model"]["model_type"], recipe.roles)
        made["hyperparameters"] |= {"target_modules": list(targets)}
        own = {name: getattr(recipe, name) for name in ("bias", "lora_plus_ratio", "use_rslora", "use_dora")}
        made["hyperparameters"] |= {name: value for name, value in own.items() if value != PLAIN[name]}
    else:
        for key in ("r", "lora_alpha", "lora_dropout"):
            del made["hyperparameters"][key]
        made["hyperparameters"]["target_modules"] = []
    made["hyperparameters"]["learning_rate"] = recipe.learning_rate
    if method == "base":
        made |= {"trainable_parameters": 0, "adapter_parameters": 0, "accuracy_by_epoch": [], "loss_history": []}
    return made


def _wrong(made):
    """The sentences that a run of this accuracy is wrong about: mostly those that any other run is wrong about too."""
    size = made["data"]["validation"]
    of_all = np.random.default_rng(0).permutation(size)
    own = np.random.default_rng([made["seed"], *made["method"].encode()]).permutation(size)[: size // 50]
    order = dict.fromkeys([*own, *of_all])
    return set(list(order)[: round((1 - made["accuracy"]) * size)])


def write(directory, *all_metrics):
    """Writes each into a run's directory of its own; returns `directory`.

    A key "wrong", the sentences that the run is wrong about, or None for a run that kept no predictions, is not written.
    """
    for number, made in enumerate(all_metrics):
        path = Path(directory) / f"run{number}"
        path.mkdir(parents=True)
        wrong = made["wrong"] if "wrong" in made else _wrong(made)
        if wrong is not None:
            labels = np.arange(made["data"]["validation"]) % 2
            predictions.write(path, labels, np.where(np.isin(np.arange(len(labels)), list(wrong)), 1 - labels, labels))
        record.write_json(path / record.METRICS, {key: value for key, value in made.items() if key != "wrong"})
    return Path(directory)
