"""A server that speaks OpenAI's protocol (vLLM, llama.cpp's, TGI), asked for greedy completions.

    server = Server("http://localhost:8000")
    server.models()                                        names that it serves
    server.complete("my-adapter", Prompt(ids, text), 48)   the tokens that it says, with the likeliest at each place

The server may be anybody's: it is waited for no longer than it may take, no more is read than an answer can have, and what is
not as the protocol has it is a ServerError of one line. Nothing is followed elsewhere.

Sources: vLLM's entrypoints/openai, llama.cpp's tools/server/README.md, llama-cpp-python's server, OpenAI's reference.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ..errors import ConfigError, ServerError
from ..files.reading import parse_json
from .completions import LIKELIEST

#: Seconds for one answer; a large model on a CPU says a token a second.
TIME_LIMIT = 120.0
#: Bytes of an answer: some fifty tokens, with five others at each place, take some twenty thousand.
MAX_ANSWER = 4_000_000
#: A server that asks for a key gets what this variable holds.
KEY = "LORA_CORE_SERVER_KEY"
#: How vLLM writes a token where it is asked for ids.
TOKEN_ID = "token_id:"
#: How servers refuse what is not as they read it; llama-cpp-python with the last.
REFUSED = (400, 422, 500)
#: Whatever the server's defaults are: nothing drawn, nothing held against a token for having been said (vLLM, llama.cpp).
GREEDY = {"temperature": 0, "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1.0, "repeat_penalty": 1.0}


@dataclass(frozen=True)
class Prompt:
    """A prompt: its token ids, and its text for servers that take no ids; None if it is not known."""

    ids: tuple[int, ...]
    text: str | None


@dataclass(frozen=True)
class Place:
    """A token that a server said: its id, or its text where it gives no ids; {the same of the likeliest: log-probability}."""

    token: int | str
    likeliest: Mapping[int | str, float]


@dataclass(frozen=True)
class Answer:
    """What a server says to a prompt: its text; its tokens, None if it tells none; how many tokens it read, if it says so."""

    text: str
    places: tuple[Place, ...] | None
    read: int | None


class Server:
    """An OpenAI-compatible server.

    Args:
        url: where it is: http or https, host, port; a path before /v1 if it has one.
        seconds: how long one answer may take.

    Raises:
        ConfigError: the address is none.
    """

    def __init__(self, url: str, seconds: float = TIME_LIMIT) -> None:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host = None
        if not host or parts.scheme not in ("http", "https") or parts.query or parts.username or not url.isprintable():
            raise ConfigError(f"{url!r} is no address of a server; give one like http://localhost:8000")
        if not 0 < seconds < math.inf:
            raise ConfigError(f"the time limit is {seconds:g} seconds; give a positive number")
        self.url, self.seconds = url, seconds
        self.host, self.port, self.secure = host, port, parts.scheme == "https"
        self.path = parts.path.rstrip("/").removesuffix("/v1") + "/v1"

    def models(self) -> list[str]:
        """The names of what it serves.

        Raises:
            ServerError: it can't be asked, or its answer is none.
        """
        data = self._ask("GET", "/models").get("data")
        names = [entry.get("id") for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise ServerError(f"{self.url} lists no models under {self.path}/models; is it an OpenAI-compatible server?")
        return names

    def complete(self, model: str, prompt: Prompt, tokens: int) -> Answer:
        """The greedy completion of a prompt, of `tokens` tokens at most.

        Servers that refuse token ids get the text.

        Raises:
            ServerError: it can't be asked, refuses, or answers something else.
        """
        request = {"model": model, "max_tokens": tokens, "logprobs": LIKELIEST, "return_tokens_as_token_ids": True, **GREEDY}
        try:
            content = self._ask("POST", "/completions", {**request, "prompt": list(prompt.ids)})
        except ServerError as error:
            if prompt.text is None or error.status not in REFUSED:
                raise
            content = self._ask("POST", "/completions", {**request, "prompt": prompt.text})
        try:
            return _answer(content)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            raise ServerError(f"{self.url} answers with other fields than a completion has: {str(content)[:200]}") from None

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that it answers with."""
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        with self._connection() as connection:
            connection.request(method, self.path + path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            data, status = response.read(MAX_ANSWER + 1), response.status
        where = f"{self.url} ({method} {self.path}{path})"
        if status != 200:
            raise _refusal(f"{where} answers {status}{_reason(data)}", status)
        if len(data) > MAX_ANSWER:
            raise ServerError(f"{where} answers with more than {MAX_ANSWER:,} bytes")
        try:
            content = parse_json(data, once=False)
        except ValueError as error:
            raise ServerError(f"{where} answers with what is not JSON: {error}") from None
        if not isinstance(content, dict):
            raise ServerError(f"{where} answers with a JSON {type(content).__name__}; an object is expected")
        return content

    @contextmanager
    def _connection(self) -> Iterator[http.client.HTTPConnection]:
        """A connection that is cut when the time is over, however slowly bytes still come."""
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        connection, late = kind(self.host, self.port, timeout=self.seconds), threading.Event()
        timer = None
        try:
            connection.connect()
            timer = threading.Timer(self.seconds, _cut, (connection.sock, late))  # the connection itself lets go of its socket
            timer.daemon = True
            timer.start()
            yield connection
            if late.is_set():
                raise TimeoutError
        except (OSError, ssl.SSLError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, ServerError):
                raise
            if late.is_set() or isinstance(error, TimeoutError):
                raise ServerError(f"{self.url} has not answered within {self.seconds:g} seconds") from None
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ServerError(f"{self.url} can't be asked: {reason}") from None
        finally:
            if timer is not None:
                timer.cancel()
            connection.close()


def _cut(taken: socket.socket, late: threading.Event) -> None:
    late.set()
    with suppress(OSError):
        taken.shutdown(socket.SHUT_RDWR)


def _refusal(message: str, status: int) -> ServerError:
    error = ServerError(message)
    error.status = status
    return error


def _reason(data: bytes) -> str:
    """What the body of a refusal says, if it is JSON as servers write it."""
    try:
        content = parse_json(data[:MAX_ANSWER], once=False)
    except ValueError:
        return ""
    for _ in range(3):  # {"error": {"message": ...}}, {"detail": ...}
        if isinstance(content, dict):
            content = next((content[name] for name in ("error", "message", "detail") if content.get(name)), None)
    return "" if content is None else f": {str(content)[:300]}"


# --- what an answer says ----------------------------------------------------------------------------------------------


def _answer(content: dict[str, Any]) -> Answer:
    choice, usage = content["choices"][0], content.get("usage")
    read = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    logprobs = choice.get("logprobs")
    if not isinstance(choice["text"], str) or not isinstance(read, (int, type(None))):
        raise ValueError
    if not logprobs:
        places = None
    elif "content" in logprobs:
        places = tuple(map(_place, logprobs["content"]))
    else:
        pairs = zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True)
        places = tuple(Place(_token(token), {_token(t): _number(v) for t, v in top.items()}) for token, top in pairs)
    return Answer(choice["text"], places, read)


def _place(entry: dict[str, Any]) -> Place:
    """As chats have them, and llama.cpp's server, which adds ids."""

    def token(one: dict[str, Any]) -> int | str:
        return one["id"] if isinstance(one.get("id"), int) else _token(one["token"])

    return Place(token(entry), {token(one): _number(one["logprob"]) for one in entry["top_logprobs"]})


def _token(text: Any) -> int | str:
    if not isinstance(text, str):
        raise ValueError
    return int(text.removeprefix(TOKEN_ID)) if text.startswith(TOKEN_ID) else text


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise ValueError
    return float(value)
