"""A small OpenAI-compatible server over models of transformers, and one that answers whatever it is told."""

import http.server
import json
import threading
from contextlib import contextmanager

import torch


@contextmanager
def serving(answer):
    """The address of a server on the loopback; `answer(handler)` does each request."""

    class Handler(http.server.BaseHTTPRequestHandler):
        do_GET = do_POST = lambda self: answer(self)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.handle_error = True, lambda *args: None  # whoever asks may hang up
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def say(handler, content, status=200):
    """Answers with JSON, or with bytes as they are."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


class FakeServer:
    """Greedy completions of models, {name: model}, in one of the dialects.

    "vllm": takes ids, gives ids where it is asked for them, and the end of an answer too. "llama.cpp": takes ids and gives
    them as chats have log-probabilities, without the end. "text": takes text alone and gives log-probabilities by the texts of
    tokens. "plain": text alone.
    """

    def __init__(self, models, tokenizer, dialect="vllm", key=None):
        self.models, self.tokenizer, self.dialect, self.key, self.asked = models, tokenizer, dialect, key, []

    def __call__(self, handler):
        if self.key and handler.headers["Authorization"] != f"Bearer {self.key}":
            return say(handler, {"error": "Unauthorized"}, 401)
        if handler.path == "/v1/models":
            return say(handler, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        self.asked.append(body)
        prompt = body["prompt"]
        if self.dialect in ("text", "plain"):
            if not isinstance(prompt, str):
                return say(handler, {"detail": [{"msg": "Input should be a valid string"}]}, 422)
            prompt = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        places = list(self.greedy(self.models[body["model"]], prompt, body["max_tokens"]))
        end = self.tokenizer.eos_token_id
        text = self.tokenizer.decode([token for token, _ in places if token != end])
        if self.dialect != "vllm" and places[-1][0] == end:
            places.pop()
        logprobs = self.logprobs(places, body["logprobs"])
        choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": "stop"}
        say(handler, {"object": "text_completion", "choices": [choice], "usage": {"prompt_tokens": len(prompt)}})

    @torch.no_grad()
    def greedy(self, model, prompt, most):
        ids = list(prompt)
        while len(ids) < len(prompt) + most and (len(ids) == len(prompt) or ids[-1] != self.tokenizer.eos_token_id):
            logprobs = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(logprobs.argmax()))
            yield ids[-1], logprobs

    def logprobs(self, places, size):
        if self.dialect == "plain":
            return None
        word = self.tokenizer.decode
        if self.dialect == "vllm":
            word = "token_id:{}".format
        tops = [dict(zip(*(t.tolist() for t in reversed(p.topk(size))), strict=True)) for _, p in places]
        if self.dialect == "llama.cpp":
            pairs = zip(places, tops, strict=True)
            return {"content": [{**self.entry(t, p), "top_logprobs": [self.entry(o, p) for o in top]} for (t, p), top in pairs]}
        return {
            "tokens": [word(token) for token, _ in places],
            "token_logprobs": [p[token].item() for token, p in places],
            "top_logprobs": [{word(token): value for token, value in top.items()} for top in tops],
        }

    def entry(self, token, logprobs):
        return {"id": token, "token": self.tokenizer.decode(token), "bytes": [], "logprob": logprobs[token].item()}
