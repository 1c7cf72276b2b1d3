"""A closed loop on servers that pool: embeddings instead of tokens."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from overlay.cli.bench import closed_loop, report, servers
from overlay.cli.bench.command import Options, settle
from overlay.cli.failure import CommandError
from tests import bench_runs

LOAD = closed_loop.load(4, 2, 64, 128, pools=True)


@contextlib.contextmanager
def embedding_server(asked: list[dict[str, Any]]) -> Iterator[int]:
    """The port of an HTTP server that embeds a prompt as its number of tokens; `asked` gets the bodies of requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            assert self.path == servers.EMBEDDINGS
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"data": [{"embedding": str(len(asked[-1]["input"]))}]}).encode())

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as stand_in:
        threading.Thread(target=stand_in.serve_forever, daemon=True).start()
        yield int(stand_in.server_address[1])
        stand_in.shutdown()


def pooled(duration: float, *answers: str) -> dict[str, Any]:
    """What `vllm bench serve --backend openai-embeddings` writes, as far as it is read."""
    return {"duration": duration, "completed": 8, "request_throughput": 8 / duration, "failed": 0, "answers": answers}


def test_the_client_asks_for_embeddings_and_nothing_of_tokens(tmp_path: Path) -> None:
    answer = {"duration": 2.0, "completed": 7, "request_throughput": 3.5, "errors": [""] * 7 + ["refused"]}
    client, found = bench_runs.run(tmp_path, LOAD, answer, ["a", "b"])
    assert client.arguments[:4] == ["--backend", "openai-embeddings", "--endpoint", servers.EMBEDDINGS]
    assert not {"--temperature", "--ignore-eos"} & set(client.arguments)
    assert (found["failed"], found["answers"]) == (LOAD.requests - 7, ["a", "b"])
    assert servers.seconds_of_requests(found) == {"ttft": [], "tpot": [], "embedding": [2.0 / 7]}


def test_a_server_that_generates_is_asked_for_tokens(tmp_path: Path) -> None:
    texts = ["a", "b"]
    answer = {"completed": 2, "failed": 0, "generated_texts": texts, "ttfts": [], "itls": [], "output_lens": []}
    client, found = bench_runs.run(tmp_path, closed_loop.load(1, 2, 8, 4), answer, ["never"])
    assert client.arguments[:2] == ["--backend", "vllm"] and "--ignore-eos" in client.arguments
    assert found["answers"] == texts


def test_the_same_prompts_are_embedded_each_time(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    with embedding_server(asked) as port:
        server: Any = servers.Server.__new__(servers.Server)
        server.port = port
        assert server.embeddings() == server.embeddings() == [str(length) for length in servers.PROBES]
    server.arm, server.log = "stock", tmp_path / "none"
    with pytest.raises(servers.ServingError, match=r"stock: no embedding of 1 tokens: .*refused"):
        server.embeddings()  # the server is gone
    half = len(servers.PROBES)
    assert asked[:half] == asked[half:] and all(one["encoding_format"] == "base64" for one in asked)


def test_embeddings_are_timed_in_pairs_and_compared() -> None:
    stock = {0: pooled(1.0, "a", "b"), 1: pooled(2.0, "a", "b")}
    overlay = {0: pooled(0.9, "a", "b"), 1: pooled(1.8, "a", "x")}
    runs = {4: {"stock": stock, "overlay": overlay}}
    (row,) = closed_loop.rows_of(runs)
    assert (row["metric"], row["rounds"]) == ("embedding", 2) and row["ratio"] == pytest.approx(0.9)
    assert row["requests_per_second"] == {"stock": 6.0, "overlay": pytest.approx(6.0 / 0.9)}
    (answers,) = closed_loop.answers_of(runs)
    assert answers["arms"]["stock"] == {"different": 0, "of": 2, "new": 0, "asked": 4}
    assert answers["arms"]["overlay"] == {"different": 1, "of": 4, "new": 1, "asked": 4}
    said = report.headline({"concurrency": {"rows": [row]}})
    assert said == "overlay, time per embedding: faster by 10.0 % (10.0 to 10.0 in 2 rounds) at clients = 4"


@pytest.mark.parametrize("asked", [{"phases": ("tokens", "serving")}, {"phases": ("serving",), "rates": (1.0,)}])
def test_what_pools_has_no_tokens_to_measure(asked: dict[str, Any]) -> None:
    pytest.importorskip("vllm", reason="no engine in this environment")
    with pytest.raises(CommandError, match="allowed is --phases serving with --concurrency"):
        settle(Options(model="tiny", engine=("runner=pooling",), concurrency=(1,), **asked))
