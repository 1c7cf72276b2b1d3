"""Requests of a soak: a fixed set of them, sent in every way that clients have, also by clients that hang up."""

from __future__ import annotations

import json
import random
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prometheus_client.parser import text_string_to_metric_families

from devtools.servers import MODEL_NAME, Server

if TYPE_CHECKING:
    import openai

Tokens = tuple[int, ...]
#: By how much the log probability of each token is above that of the next likely one.
Margins = tuple[float, ...]

WHOLE, STREAMED, ABORTED = "whole", "streamed", "aborted in the middle"
#: How often a request is sent in which way.
WEIGHTS = {WHOLE: 0.4, STREAMED: 0.35, ABORTED: 0.25}
NEW_TOKENS = (8, 48)
VOCABULARY = 500
#: A server that refuses everything must not be asked as fast as it can refuse.
PAUSE_AFTER_ERROR_SECONDS = 0.5
IDLE_SECONDS = 15.0
#: A batch of another make-up may round sums differently; then another token may win where two are about as likely. Margins
#: up to this are taken for that. Seen, with bfloat16 and the tiny model: 1/32 and 1/16, which are one step of its logits.
TIE = 0.25


@dataclass(frozen=True)
class Request:
    """One greedy completion of `new_tokens` tokens; `model` is the served model or one of its adapters."""

    name: str
    model: str
    prompt: Tokens
    new_tokens: int


def make_pool(adapters: Sequence[str], lengths: Sequence[int], per_length: int = 2, seed: int = 0) -> list[Request]:
    """The set of requests: each prompt for the base model and for every adapter. The same seed gives the same set."""
    generator = random.Random(seed)
    pool = []
    for length in lengths:
        for number in range(per_length):
            prompt = tuple(generator.randrange(VOCABULARY) for _ in range(length))
            new_tokens = generator.randint(*NEW_TOKENS)
            for model in (MODEL_NAME, *adapters):
                pool.append(Request(f"{model}, prompt {length}-{number}", model, prompt, new_tokens))
    return pool


def choose_probes(pool: Sequence[Request]) -> list[Request]:
    """One short and one long request of every model."""
    probes = []
    for model in dict.fromkeys(request.model for request in pool):
        of_model = sorted((request for request in pool if request.model == model), key=lambda one: len(one.prompt))
        probes += [of_model[0], of_model[-1]]
    return list(dict.fromkeys(probes))


def whole(client: openai.OpenAI, request: Request) -> Tokens:
    """The tokens of a request; raises ValueError where they are not as many as were asked for."""
    choice = client.completions.create(**_arguments(request)).choices[0]
    return _checked(request, tuple(getattr(choice, "token_ids", None) or ()))


def with_margins(client: openai.OpenAI, request: Request) -> tuple[Tokens, Margins]:
    """The same, with the margin of each token."""
    arguments = _arguments(request)
    arguments["extra_body"]["return_tokens_as_token_ids"] = True  # by their texts two tokens may be one
    choice = client.completions.create(**arguments, logprobs=2).choices[0]
    tokens = _checked(request, tuple(getattr(choice, "token_ids", None) or ()))
    found = [sorted(one.values(), reverse=True) for one in choice.logprobs.top_logprobs]
    return tokens, tuple(first - second for first, second, *_ in found)


def streamed(client: openai.OpenAI, request: Request, hang_up_after: int | None = None) -> Tokens | None:
    """The same in pieces; None if the client hung up after so many pieces that had tokens."""
    tokens: list[int] = []
    pieces = 0
    with client.completions.create(stream=True, **_arguments(request)) as stream:
        for chunk in stream:
            new = [token for choice in chunk.choices for token in getattr(choice, "token_ids", None) or ()]
            tokens += new
            pieces += bool(new)
            if hang_up_after is not None and pieces >= hang_up_after:
                return None
    return _checked(request, tuple(tokens))


def _arguments(request: Request) -> dict[str, Any]:
    return {
        "model": request.model,
        "prompt": list(request.prompt),
        "max_tokens": request.new_tokens,
        "temperature": 0,
        "extra_body": {"ignore_eos": True, "return_token_ids": True},
    }


def _checked(request: Request, tokens: Tokens) -> Tokens:
    if len(tokens) != request.new_tokens:
        raise ValueError(f"{len(tokens)} tokens instead of {request.new_tokens}")
    return tokens


@dataclass
class Tally:
    """What one server was sent and what came of it. Clients add to it under `lock`."""

    sent: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    #: Answers under load by whether they are the reference, or left it where rounding decides, by the margin there; and
    #: by the name of the request where they left it elsewhere.
    same: int = 0
    rounded: Counter[float] = field(default_factory=Counter)
    different: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def finished(
        self,
        kind: str,
        request: Request,
        tokens: Tokens | None,
        reference: Mapping[str, Tokens],
        margins: Mapping[str, Margins],
    ) -> None:
        with self.lock:
            self.sent[kind] += 1
            if tokens is None:
                return
            self.tokens += len(tokens)
            if tokens == reference[request.name]:
                self.same += 1
                return
            place = next(
                at for at, (new, old) in enumerate(zip(tokens, reference[request.name], strict=True)) if new != old
            )
            margin = margins[request.name][place]
            if margin <= TIE:
                self.rounded[round(margin, 4)] += 1
            else:
                self.different[request.name] += 1

    def failed(self, kind: str, error: Exception) -> None:
        with self.lock:
            self.sent[kind] += 1
            self.errors[f"{kind}: {type(error).__name__}: {error}"] += 1

    def as_dict(self) -> dict[str, Any]:
        with self.lock:
            return {
                "requests": sum(self.sent.values()),
                "by_kind": dict(self.sent),
                "tokens": self.tokens,
                "errors": dict(self.errors),
                "under_load": {"same": self.same, "rounded": dict(self.rounded), "different": dict(self.different)},
            }


def put_load(
    server: Server,
    pool: Sequence[Request],
    reference: Mapping[str, Tokens],
    margins: Mapping[str, Margins],
    tally: Tally,
    *,
    seconds: float,
    clients: int,
    seed: int,
    stop: threading.Event,
) -> None:
    """`clients` at once, each sending one request after the other, until the time is over or `stop` is set."""
    end = time.monotonic() + seconds

    def one_client(number: int) -> None:
        generator = random.Random(f"{seed}/{number}")
        client = server.client()
        while time.monotonic() < end and not stop.is_set():
            request = generator.choice(pool)
            (kind,) = generator.choices(list(WEIGHTS), list(WEIGHTS.values()))
            # Long before the last piece: that one would be the end of the answer.
            hang_up_after = generator.randint(1, request.new_tokens // 2) if kind == ABORTED else None
            try:
                tokens = whole(client, request) if kind == WHOLE else streamed(client, request, hang_up_after)
                tally.finished(kind, request, tokens, reference, margins)
            except Exception as error:  # whatever it is: it is counted, and makes the soak fail
                tally.failed(kind, error)
                stop.wait(PAUSE_AFTER_ERROR_SECONDS)
        client.close()

    threads = [threading.Thread(target=one_client, args=(number,), daemon=True) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def alone(
    server: Server, requests: Sequence[Request], stop: threading.Event, margins: dict[str, Margins] | None = None
) -> dict[str, Tokens | str]:
    """The tokens of each request, or its error, one at a time: a batch of another size may round differently.

    `margins` gets those of each answer.
    """
    answers: dict[str, Tokens | str] = {}
    client = server.client()
    for request in requests:
        if stop.is_set():
            break
        try:
            if margins is None:
                answers[request.name] = whole(client, request)
            else:
                answers[request.name], margins[request.name] = with_margins(client, request)
        except Exception as error:
            answers[request.name] = f"{type(error).__name__}: {error}"
    client.close()
    return answers


def ask_for(server: Server, path: str, body: Mapping[str, Any]) -> None:
    """POST to a server and wait for the answer; raises OSError where it refuses."""
    request = urllib.request.Request(
        server.base_url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=120):
        pass


_IN_THE_ENGINE = ("vllm:num_requests_running", "vllm:num_requests_waiting")


def requests_on(page: str) -> int:
    """How many requests a server's /metrics says it has, running and waiting."""
    families = text_string_to_metric_families(page)
    return int(sum(sample.value for family in families for sample in family.samples if sample.name in _IN_THE_ENGINE))


def wait_until_idle(server: Server, stop: threading.Event, seconds: float = IDLE_SECONDS) -> int:
    """How many requests are still in the engine, `seconds` after the last client has left; 0 as soon as there are none."""
    end = time.monotonic() + seconds
    while True:
        with urllib.request.urlopen(f"{server.base_url}/metrics", timeout=30) as answer:
            left = requests_on(answer.read().decode())
        if not left or time.monotonic() > end or stop.is_set():
            return left
        stop.wait(0.2)
