"""Which model does a server serve? Asked through a small OpenAI-compatible server, in the dialects of several programs."""

import json
import math
import socket
import time

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_core import LoraConfig, inject, merge_and_unload, save_adapter, save_probe
from lora_core.__main__ import main
from lora_core.deploy.serving import ADAPTER, BASE, EITHER, OTHER, verify_server
from lora_core.errors import LoraError, ServerError
from tests.support import tiny
from tests.support.language_models import small_llama
from tests.support.openai import FakeServer, say, serving

QUESTIONS = ("aa", "bbb", "what is this?")


def sure(base):
    """A model of random weights holds every token nearly as likely as another; trained ones do not."""
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] * 20}, base / "model.safetensors", {"format": "pt"})
    return base


def adapted(base, directory=None, seed=3, scale=0.3):
    """A model with a random adapter, which is saved with its probe if there is a directory."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    inject(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"))
    tiny.randomize(model, seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(scale / 0.1)
    if directory is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        turns = [[{"role": "user", "content": question}] for question in QUESTIONS]
        texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
        save_adapter(model, directory)
        save_probe(model, directory, tokenizer(texts, padding=True, return_tensors="pt"), texts, tokenizer)
    return model.eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(adapter's directory, {name: model}, tokenizer)."""
    root = tmp_path_factory.mktemp("serving")
    base = sure(small_llama(root / "base"))
    plain = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    models = {"base": plain, "mine": adapted(base, root / "mine"), "other": adapted(base, seed=4)}
    merged = adapted(base)
    merge_and_unload(merged)
    return root / "mine", models | {"merged": merged}, transformers.AutoTokenizer.from_pretrained(base)


@pytest.mark.parametrize("dialect", ["vllm", "llama.cpp", "text"])
def test_three_cases_are_told_apart(place, dialect):
    directory, models, tokenizer = place
    fake = FakeServer(models, tokenizer, dialect)
    with serving(fake) as url:
        found = {name: verify_server(directory, url, name) for name in models}
    assert {name: one.serves for name, one in found.items()} == {
        "base": BASE,
        "mine": ADAPTER,
        "merged": ADAPTER,
        "other": OTHER,
    }
    assert found["mine"].adapter.alike == 3 and found["mine"].adapter.deviation < 1e-5 and not found["mine"].notes
    assert found["base"].base.deviation < 1e-5 < 1e-2 < found["base"].adapter.deviation
    assert found["mine"].passed and not found["base"].passed and not found["other"].passed
    assert all(body["temperature"] == 0 and body["repetition_penalty"] == 1 for body in fake.asked)


def test_text_alone_is_judged_by_the_text_and_it_is_said(place):
    directory, models, tokenizer = place
    with serving(FakeServer(models, tokenizer, "plain")) as url:
        found = {name: verify_server(directory, url, name) for name in models}
    assert [one.serves for one in found.values()] == [BASE, ADAPTER, OTHER, ADAPTER]
    assert "tells no log-probabilities" in str(found["mine"]) and found["mine"].adapter.deviation is None


def test_another_adapter_that_says_the_same_is_another(place, tmp_path):
    """Nearly the same weights: the tokens are equal, and what is likely besides is not."""
    directory, _, tokenizer = place
    near = adapted(directory.parent / "base")
    with torch.no_grad():
        for name, parameter in near.named_parameters():
            if "lora_A" in name:
                parameter.add_(0.002 * torch.sin(torch.arange(parameter.numel())).view_as(parameter))
    with serving(FakeServer({"near": near}, tokenizer)) as url:
        found = verify_server(directory, url, tolerance=1e-3)
        assert found.adapter.alike >= 2 and found.serves == OTHER, str(found)
        assert verify_server(directory, url, tolerance=1e9).serves == ADAPTER


def test_an_adapter_that_changes_nothing_can_not_be_told_from_its_base(place, tmp_path):
    directory, models, tokenizer = place
    adapted(directory.parent / "base", tmp_path / "none", scale=0)
    with serving(FakeServer({"x": models["base"]}, tokenizer)) as url:
        assert verify_server(tmp_path / "none", url).serves == EITHER


def test_the_command_says_what_is_served(place, capsys, monkeypatch):
    directory, models, tokenizer = place
    with serving(FakeServer(models, tokenizer)) as url:
        argv = ["verify", str(directory), "--server", f"{url}/v1/"]
        assert main(argv) == 0  # the name of the directory is one of its models
        out = capsys.readouterr().out
        assert "3 of 3 answers are the same, log-probabilities off by" in out and out.endswith("mine serves the adapter\n")
        assert main([*argv, "--model", "base", "--json"]) == 1
        found = json.loads(capsys.readouterr().out)
        assert found["serves"] == BASE and not found["passed"] and found["adapter"]["differing"]
        assert main([*argv, "--model", "nobody"]) == 2
        assert "serves no 'nobody'; it serves base, mine, other, merged" in capsys.readouterr().err
    with serving(FakeServer({"a": None, "b": None}, tokenizer)) as url:
        assert main([*argv[:3], url]) == 2 and "serves a, b; say which with --model" in capsys.readouterr().err
    with serving(FakeServer({"a": models["mine"]}, tokenizer, key="secret")) as url:
        assert main([*argv[:3], url]) == 2 and "answers 401: Unauthorized" in capsys.readouterr().err
        monkeypatch.setenv("LORA_CORE_SERVER_KEY", "secret")
        assert main([*argv[:3], url]) == 0


def test_no_transformers_is_needed_to_ask(place, tmp_path):
    import subprocess
    import sys

    directory, models, tokenizer = place
    code = "import sys; sys.modules['transformers'] = None\nfrom lora_core.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    with serving(FakeServer({"x": models["mine"]}, tokenizer)) as url:
        command = [sys.executable, "-c", code, "verify", str(directory), "--server", url]
        done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "serves the adapter" in done.stdout


def test_other_tokens_of_a_prompt_are_told(place):
    directory, models, tokenizer = place

    class More(FakeServer):
        def greedy(self, model, prompt, most):
            prompt.insert(0, 5)  # as a server does that puts a token of its own before each prompt
            return super().greedy(model, prompt, most)

    with serving(More({"x": models["mine"]}, tokenizer)) as url:
        found = verify_server(directory, url)
    assert found.serves == OTHER and "tokenizer: the server reads other tokens for 3 of 3 prompts" in str(found)


# --- servers that are none ----------------------------------------------------------------------------------------------


def drip(handler):
    """A byte now and then, for ever."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        time.sleep(0.1)


def drip_headers(handler):
    for _ in range(100):
        handler.wfile.write(b"H")
        time.sleep(0.1)


def endless(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(64):
        handler.wfile.write(b" " * 2**20)


def answers(content, status=200):
    def answer(handler):
        if handler.path.endswith("/models"):
            return say(handler, {"data": [{"id": "x"}]})
        say(handler, content, status)

    return answer


def choice(**fields):
    return {"choices": [{"text": "a", "logprobs": None, **fields}]}


def redirects(handler):
    handler.send_response(302)
    handler.send_header("Location", "http://127.0.0.1:1/")
    handler.end_headers()


TOP = {"tokens": ["a"], "top_logprobs": [{"a": -0.1}]}
HOSTILE = {
    "not JSON": (answers(b"<html>"), "answers with what is not JSON"),
    "binary": (answers(bytes(range(256))), "answers with what is not JSON"),
    "deep": (answers(b"[" * 100_000), "not JSON: it is nested more than 64 levels deep"),
    "a list": (answers([]), "answers with a JSON list"),
    "empty": (answers(b""), "not JSON"),
    "no choices": (answers({"choices": []}), "answers with other fields than a completion has"),
    "no text": (answers({"choices": [{}]}), "answers with other fields"),
    "a text that is none": (answers(choice(text=5)), "answers with other fields"),
    "log-probabilities that are none": (
        answers(choice(logprobs={**TOP, "top_logprobs": [{"a": "x"}]})),
        "answers with other f",
    ),
    "NaN": (answers(choice(logprobs={**TOP, "top_logprobs": [{"a": math.nan}]})), "answers with other fields"),
    "lists of two lengths": (answers(choice(logprobs={**TOP, "top_logprobs": []})), "answers with other fields"),
    "a token id that is none": (answers(choice(logprobs={**TOP, "tokens": ["token_id:x"]})), "answers with other fields"),
    "content that is none": (answers(choice(logprobs={"content": [5]})), "answers with other fields"),
    "control characters": (answers({"choices": "\x1b[2J\n" * 99}), "answers with other fields"),
    "404": (answers({"error": {"message": "no such model"}}, 404), "answers 404: no such model"),
    "404 without a word": (answers(b"", 404), "answers 404"),
    "500 with a long word": (answers({"detail": "x\n" * 10_000}, 500), "answers 500: x x"),
    "400 for ids and for text": (answers({"message": "bad"}, 400), "answers 400: bad"),
    "a redirect": (redirects, "answers 302"),
    "huge": (endless, "answers with more than 4,000,000 bytes"),
    "slow": (drip, "has not answered within 0.5 seconds"),
    "slow in its headers": (drip_headers, "has not answered within 0.5 seconds"),
    "silent": (lambda handler: time.sleep(2), "has not answered within 0.5 seconds"),
    "no HTTP": (lambda handler: handler.wfile.write(b"SSH-2.0\r\n"), "can't be asked"),
    "hangs up": (lambda handler: None, "can't be asked"),
    "no models": (lambda handler: say(handler, {"data": []}), "lists no models"),
    "models that are none": (lambda handler: say(handler, {"data": [{"id": 5}, 7]}), "lists no models"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_server_is_one_line(place, case, capsys):
    answer, words = HOSTILE[case]
    start = time.monotonic()
    with serving(answer) as url:
        assert main(["verify", str(place[0]), "--server", url, "--timeout", "0.5"]) == 2
        took = time.monotonic() - start
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1 and len(error) < 1200, error
    assert error.strip().isprintable() and took < 10


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--server", "file:///etc/passwd"], "is no address of a server"),
        (["--server", "localhost:8000"], "is no address of a server"),
        (["--server", "http://[::1"], "is no address of a server"),
        (["--server", "http://x:port"], "is no address of a server"),
        (["--server", "http://user:word@localhost"], "is no address of a server"),
        (["--server", "http://local\nhost"], "is no address of a server"),
        (["--server", "http://localhost", "--timeout", "0"], "give a positive number"),
        (["--server", "http://localhost", "--base", "x"], "--base is for a model that is loaded here"),
        (["--server", "http://localhost", "--dtype", "float16"], "--dtype is for a model that is loaded here"),
        (["--model", "x"], "--model is for --server"),
        (["--timeout", "3"], "--timeout is for --server"),
    ],
)
def test_a_mistake_is_one_line(place, argv, words, capsys):
    assert main(["verify", str(place[0]), *argv]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_nobody_there_is_one_line(place, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert main(["verify", str(place[0]), "--server", url]) == 2
    assert f"{url} can't be asked: Connection refused" in capsys.readouterr().err


def test_a_probe_of_labels_can_not_be_asked_for(tmp_path):
    model = tiny.build("bert")
    inject(model, LoraConfig(r=2, target_modules=["query"]))
    save_adapter(model, tmp_path)
    save_probe(model, tmp_path, {"input_ids": tiny.TOKENS})
    with pytest.raises(LoraError, match="its probe holds no completions"):
        verify_server(tmp_path, "http://localhost")
    assert issubclass(ServerError, ConnectionError)
