"""A model behind an OpenAI-compatible endpoint: ``POST …/completions``, as vLLM and others speak it.

One connection is kept. Redirects are not followed, so that a key goes nowhere else; answers are bounded in bytes and in
time, and checked. An endpoint says only its likeliest tokens (vLLM: at most 20, unless ``--max-logprobs`` says more).
"""

from __future__ import annotations

import http.client
import json
import math
import os
import time
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from potluck.compose.decoding.models import Counts, Gold, check_question
from potluck.corpus.tokenizer import Vocabulary
from potluck.errors import EngineError, RecipeError
from potluck.untrusted import loads

_MAX_BYTES = 1 << 26
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_ID = "token_id:"
_SUM = 1.05  # probability of a row in all


class AtEndpoint:
    """A model that answers over HTTP.

    Args:
        url: Up to and with ``/v1``; behind ``#``, the model's name there. Without a name it must be the only one.
        vocabulary: The vocabulary that all share: tokens are sent as ids, and come back as ids or as their text.
        key_from: Environment variable that holds the API key; empty for none. It is sent and never said.
        top: Likeliest tokens that are asked for.
        seconds: How long an answer may take.

    Raises:
        RecipeError: The URL or the variable cannot be used.
    """

    whole = False

    def __init__(
        self, url: str, vocabulary: Vocabulary, key_from: str = "", top: int = 20, seconds: float = 60.0
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise RecipeError(
                f"{parts.hostname or url}: not the URL of an endpoint", "such as http://HOST:8000/v1#NAME"
            )
        if key_from and parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            raise RecipeError(f"{parts.hostname}: a key is not sent over plain http", "use https")
        self.name, self.vocabulary = url, vocabulary.size
        self.counts = Counts()
        self._path, self._top, self._seconds = parts.path.rstrip("/"), top, seconds
        self._shared = vocabulary
        self._headers = {"Content-Type": "application/json", **_authorisation(key_from)}
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.hostname, parts.port, timeout=seconds)
        weakref.finalize(self, self._connection.close)
        self._model = parts.fragment or self._only_model()

    def log_probs(self, tokens: Sequence[int], positions: int = 1) -> Tensor:
        """The next token after each of the last prefixes, nats, ``(positions, V)``; -inf for all but the likeliest."""
        check_question(tokens, positions, self.vocabulary)
        with self.counts.asking(positions):
            found = self._complete(tokens, positions)
        rows = torch.full((positions, self.vocabulary), -torch.inf)
        for row, entry in zip(rows, _last(found, "top_logprobs", positions), strict=True):
            for place, value in self._entries(entry):
                row[place] = value
        if bool((rows.exp().sum(dim=1) > _SUM).any()):
            raise EngineError(f"{self.name} answered with probabilities of more than 1 in all")
        return rows

    def gold(self, tokens: Sequence[int]) -> Gold:
        """How it foretells ``tokens[1:]``, from what it says of its prompt (``echo``)."""
        count = len(tokens) - 1
        check_question(tokens, 1, self.vocabulary)
        with self.counts.asking(count):
            found = self._complete(tokens, count + 1)
        values = [_log_probability(self.name, value) for value in _last(found, "token_logprobs", count + 1)[:-1]]
        tops = _last(found, "top_logprobs", count + 1)[:-1]
        best = [max(self._entries(entry), key=lambda pair: pair[1])[0] for entry in tops]
        right = [token == came for token, came in zip(best, tokens[1:], strict=True)]
        return Gold(torch.tensor(values, dtype=torch.float32), torch.tensor(right))

    def _complete(self, tokens: Sequence[int], positions: int) -> Mapping[str, Any]:
        """One more token after ``tokens``, and what the endpoint foretold on the way there."""
        asked = {
            "model": self._model,
            "prompt": list(tokens),
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": self._top,
            "echo": positions > 1,
            "return_tokens_as_token_ids": True,  # vLLM's; others leave it out and name tokens by their text
        }
        answer = self._exchange("POST", "/completions", json.dumps(asked).encode())
        try:
            found: Mapping[str, Any] = answer["choices"][0]["logprobs"]
            assert isinstance(found, Mapping)
        except (KeyError, IndexError, TypeError, AssertionError):
            raise EngineError(
                f"{self.name} answered without logprobs", "does it serve /completions with logprobs?"
            ) from None
        return found

    def _entries(self, entry: Any) -> list[tuple[int, float]]:
        """Token ids and log-probabilities of one position's likeliest tokens."""
        if not isinstance(entry, Mapping) or not entry:
            raise EngineError(f"{self.name} answered without the likeliest tokens", "does it return echoed logprobs?")
        return [(self._id(text), _log_probability(self.name, value)) for text, value in entry.items()]

    def _id(self, text: str) -> int:
        named = text.removeprefix(_ID)
        if text.startswith(_ID) and named.isdigit() and int(named) < self.vocabulary:
            return int(named)
        if text not in self._ids:
            hint = "is its tokenizer the same? vLLM names tokens by their ids: --return-tokens-as-token-ids"
            raise EngineError(f"{self.name} named {text[:40]!r}, which is no one token of the base's vocabulary", hint)
        return self._ids[text]

    @cached_property
    def _ids(self) -> dict[str, int]:
        """The text of every token that is the only one with that text."""
        found: dict[str, int] = {}
        twice: set[str] = set()
        for token in range(self.vocabulary):
            text = self._shared.tokenizer.decode([token], skip_special_tokens=False)
            if text in found:
                twice.add(text)
            found[text] = token
        return {text: token for text, token in found.items() if text not in twice}

    def _only_model(self) -> str:
        found = self._exchange("GET", "/models")
        try:
            names = [str(model["id"]) for model in found["data"]]
        except (KeyError, TypeError):
            names = []
        if len(names) != 1:
            known = ", ".join(names[:20]) or "none"
            raise EngineError(f"{self.name} serves these models: {known}", "name one behind the URL: …/v1#NAME")
        return names[0]

    def _exchange(self, verb: str, path: str, body: bytes = b"") -> Any:
        """One request and its answer as JSON; a connection that was closed meanwhile is opened once more."""
        for again in (True, False):
            try:
                self._connection.request(verb, self._path + path, body, self._headers)
                response = self._connection.getresponse()
                data = _bounded(response, time.monotonic() + self._seconds)
                break
            except (OSError, http.client.HTTPException) as error:
                self._connection.close()
                if not (again and isinstance(error, ConnectionError)):
                    raise EngineError(f"{self.name} cannot be reached ({error or type(error).__name__})") from None
        self.counts.sent_bytes += len(body)
        self.counts.received_bytes += len(data)
        if response.status != 200:
            said = data[:200].decode(errors="replace")
            raise EngineError(f"{self.name} answered {response.status} {response.reason}: {said}")
        try:
            return loads(data)
        except ValueError:
            raise EngineError(f"{self.name} did not answer in JSON") from None


def _bounded(response: http.client.HTTPResponse, until: float) -> bytes:
    """A response's body.

    Raises:
        OSError: It is larger, or takes longer, than any answer may.
    """
    data, length = bytearray(), response.length
    while length is None or len(data) < length:
        piece = response.read1(min(1 << 20, _MAX_BYTES + 1 - len(data)))
        data += piece
        if not piece:
            break
        if len(data) > _MAX_BYTES:
            raise OSError(f"an answer of more than {_MAX_BYTES} bytes")
        if time.monotonic() > until:
            raise TimeoutError("its answer takes too long")
    response.close()
    if length is not None and len(data) < length:
        raise OSError(f"an answer of {length} bytes that ended after {len(data)}")
    return bytes(data)


def _authorisation(variable: str) -> dict[str, str]:
    if not variable:
        return {}
    key = os.environ.get(variable, "")
    if not key or not key.isascii() or not key.isprintable():
        raise RecipeError(f"the environment variable {variable} holds no API key")
    return {"Authorization": f"Bearer {key}"}


def _last(found: Mapping[str, Any], what: str, positions: int) -> Sequence[Any]:
    listed = found.get(what)
    if not isinstance(listed, list) or len(listed) < positions:
        raise EngineError(f"an answer with too few {what}", "does the endpoint support echo with logprobs?")
    return listed[-positions:]


def _log_probability(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value > 1e-3:
        raise EngineError(f"{name} answered {value!r} for a log-probability")
    return float(value)
