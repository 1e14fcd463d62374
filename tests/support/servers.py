"""Servers of language models, started on the loopback and stopped; and a checkpoint as llama.cpp reads it, in float32.

The environments are made by `make test-servers`, in $LORA_CORE_SERVERS or build/servers: vllm/ and llama/.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

from safetensors.torch import load_file

from lora_core.deploy.server import Server
from lora_core.errors import ServerError
from tests.support import ROOT
from tests.support.llamacpp import INNER, OUTER

HOME = Path(os.environ.get("LORA_CORE_SERVERS") or ROOT / "build" / "servers").absolute()
#: {projection whose rows llama.cpp orders otherwise: where a GGUF file says how many heads it has}
HEADS = {"attn_q": "head_count", "attn_k": "head_count_kv"}
#: Seconds to start in: half a minute on two idle cores, ten times that on busy ones.
PATIENCE = 600


@contextlib.contextmanager
def running(name, argv, log, **environment):
    """The address of a server that is started with `--port`, and the seconds until it answered; stopped at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["nice", "-n", "5", HOME / name / "bin" / argv[0], *argv[1:], "--host", "127.0.0.1", "--port", port]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", **environment}
    begin, url = time.monotonic(), f"http://127.0.0.1:{port}"
    with open(log, "wb") as out:
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=out, env=settings, start_new_session=True)
    try:
        while not answers(url):
            assert process.poll() is None, f"{name} did not start; see {log}"
            assert time.monotonic() - begin < PATIENCE, f"{name} does not answer; see {log}"
            time.sleep(1)
        yield url, time.monotonic() - begin
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(url):
    try:
        return bool(Server(url, 5).models())
    except ServerError:
        return False


def vllm(base, log, adapters=(), dtype="float32"):
    """vLLM with a base, and adapters {name: directory}, in the eager mode, which is up sooner."""
    argv = ["vllm", "serve", base, "--served-model-name", "base", "--dtype", dtype, "--enforce-eager"]
    argv += ["--max-model-len", 512, "--max-num-seqs", 16]
    if adapters:
        named = [f"{name}={directory}" for name, directory in adapters.items()]
        argv += ["--enable-lora", "--max-loras", len(adapters), "--lora-modules", *named]
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    return running("vllm", argv, log, VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", **quiet)


def llama_cpp(model, log, adapter=None):
    """llama-cpp-python's server with a GGUF file, and an adapter's; it keeps all logits, or it could tell no likely tokens."""
    argv = ["python", "-m", "llama_cpp.server", "--model", model, "--model_alias", "served", "--logits_all", "true"]
    argv += ["--n_ctx", 512, "--n_threads", 1, "--n_threads_batch", 1, *([] if adapter is None else ["--lora_path", adapter])]
    return running("llama", argv, log)


def version(name, package):
    """The version of a package in the environment of a server."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([HOME / name / "bin" / "python", "-c", code], capture_output=True, text=True).stdout.strip()


def write_gguf(checkpoint, like, path):
    """A Llama's checkpoint as a GGUF file in float32, with the tokenizer and the settings of the file `like`, which is of the
    same model. llama.cpp orders the rows of q and k otherwise, as its conversion/llama.py has it."""
    import gguf

    reader, writer = gguf.GGUFReader(like), gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type", "general.quantization_version"):
            continue
        kind = field.types[0]
        writer.add_key_value(name, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    tensors = load_file(Path(checkpoint) / "model.safetensors")
    heads = {part: int(reader.fields[f"llama.attention.{name}"].contents()) for part, name in HEADS.items()}
    theirs = {theirs: ours for ours, theirs in (OUTER | INNER).items()}
    for tensor in reader.tensors:
        owner, _, kind = tensor.name.rpartition(".")
        _, block, inner = owner.split(".") if owner.startswith("blk.") else (None, None, owner)
        ours = theirs[inner] if block is None else f"model.layers.{block}.{theirs[inner]}"
        W = tensors[f"{ours}.{kind}"].float()
        if inner in heads:
            W = W.reshape(heads[inner], 2, -1, W.shape[1]).swapaxes(1, 2).reshape(W.shape)
        writer.add_tensor(tensor.name, W.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
