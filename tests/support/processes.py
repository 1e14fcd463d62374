"""What tests of runs share: a base small enough to train in a second, the command in this process or in others, digests."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import torch
import transformers
from safetensors.torch import load_file

from experiments.models import resolve


def small_base(directory, dropout=0.1):
    """A BERT of two layers and width 32 with random weights and the packaged model's tokenizer."""
    packaged = resolve("packaged").directory
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**shape, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    transformers.BertModel(config).save_pretrained(directory)
    for path in packaged.iterdir():
        if path.name.startswith(("tokenizer", "vocab", "special")):
            shutil.copy(path, directory)
    return directory


def metrics_of(output):
    return json.loads((output / "metrics.json").read_text())


def trained(output):
    """{name: tensor} of what a run has trained."""
    adapter = output / "adapter" / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else output / "model" / "model.safetensors")


def digest(output):
    """sha256 of the tensors of what a run has trained."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(trained(output).items()):
        sha256.update(name.encode() + tensor.numpy().tobytes())
    return sha256.hexdigest()


def whole_run(output):
    """What two runs that did the same have in common: their tensors, what they called each sentence, and their metrics but for
    time, memory and machine."""
    measured = ("train_seconds", "examples_per_second", "tokens_per_second", "peak_rss_mb", "peak_cuda_mb")
    measured += ("device", "provenance")
    called = output / "predictions.txt"
    metrics = {key: value for key, value in metrics_of(output).items() if key not in measured}
    return digest(output), called.read_bytes() if called.exists() else None, metrics


def start(*argv, count=1, module="experiments.sst2"):
    """Starts the command in a process of its own, or in `count` of them by torchrun; its output comes in one stream."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    command = [sys.executable, *launcher, "-m", module, *map(str, argv)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(process, timeout=120):
    """(exit code, output) of a process that was started here; it is killed if it does not end in time."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, output
