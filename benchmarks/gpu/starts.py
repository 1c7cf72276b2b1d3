"""Phases that start engines of their own: cold compile time, quantized checkpoints."""

from __future__ import annotations

import re
import shutil
import statistics
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from gpu import models, targets
from gpu.run_setup import SIDES, Setup
from overlay.cli.bench.engines import SEED
from overlay.cli.bench.results import Results, journal_summary
from overlay.cli.bench.workers import Worker, WorkerError, tail

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

#: The lines of vLLM's log that say what was compiled and how long it took.
LOG_LINES = re.compile(
    r"((?:torch\.compile took|Compiling a graph for compile range|Dynamo bytecode transform time|saved AOT compiled|"
    r"Directly load|Graph capturing finished|init engine|Model loading took|Initial profiling).*)"
)
NUMBERED = re.compile(r"[0-9a-f]{8,}|\d+")

#: What vLLM prefers to Marlin on Hopper.
NOT_MARLIN = ("MacheteLinearKernel", "AllSparkLinearKernel", "CutlassW4A8LinearKernel")
#: Name: architecture, layers, quantization section, `quantization` argument, environment.
QUANTIZED: dict[str, tuple[str, int, dict[str, Any] | None, str | None, dict[str, str]]] = {
    "fp8 (online)": ("qwen3_5", 4, None, "fp8", {}),
    "fp8 (online), experts": ("qwen3_5_moe", 4, None, "fp8", {}),
    "gptq, Marlin": ("qwen3_5", 4, models.gptq(narrow=True), None, {"VLLM_DISABLED_KERNELS": ",".join(NOT_MARLIN)}),
    "gptq, narrow in 16 bits": ("qwen3_5", 4, models.gptq(narrow=False), None, {}),
}


def _count_files(root: Path) -> dict[str, Any]:
    """Files under a cache root by kind: the name with numbers and hashes taken out. Inductor's own cache apart."""
    kinds: Counter[str] = Counter()
    compiled = size = 0
    for path in root.rglob("*"):
        if not path.is_file():
            continue
        parts = path.relative_to(root).parts
        inductor = any(part.startswith("inductor") for part in parts[:-1])
        compiled += parts[0] == "torch_compile_cache" and not inductor
        kinds[f"{'inductor' if inductor else parts[0]}/…/{NUMBERED.sub('#', path.name)}"[:80]] += 1
        size += path.stat().st_size
    return {
        "files": sum(kinds.values()),
        "torch_compile_cache": compiled,
        "bytes": size,
        "kinds": dict(kinds.most_common(25)),
    }


def log_lines(log: Path) -> list[str]:
    """What the log says about compilation."""
    return [match.group(1)[:200] for match in LOG_LINES.finditer(log.read_text(errors="replace"))]


def compile_cold(setup: Setup, results: Results, order: Sequence[str], architecture: str) -> None:
    """Start engines one after the other, each with an empty compile cache; Triton's cache is warm for all of them."""
    starts: list[dict[str, Any]] = []
    needed = 30.0
    for index, side in enumerate(order):
        if setup.remaining() < needed + 10:
            results.problem(f"compile: out of time before start {index + 1} of {len(order)}")
            break
        root = setup.work / f"cold-{index}-{side}"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        log = setup.work / "logs" / f"compile-{index}-{side}.log"
        worker = Worker(side, setup.environment(side, f"compile-{index}", root), log)
        before = setup.elapsed()
        try:
            model = setup.model_folder(architecture)
            engine = setup.engine(
                model,
                architecture,
                kv_cache_memory_bytes=4 << 30,
                max_num_seqs=8,
                compilation_config={"cudagraph_capture_sizes": [1]},
            )
            answer = worker.call("start", engine=engine, weight_seed=None, timeout=setup.remaining())
        except WorkerError as error:
            results.problem(f"compile: {error}")
            continue
        finally:
            worker.close()
        needed = setup.elapsed() - before
        starts.append(
            {
                "side": side,
                "compile_seconds": answer["compile_seconds"],
                "build_seconds": answer["build_seconds"],
                "counters": answer["counters"],
                "cache": _count_files(root),
                "log": log_lines(log),
            }
        )
        results.put("compile", value=summarize_compile(starts))
        shutil.rmtree(root, ignore_errors=True)


def summarize_compile(starts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians and the ratio. The first start of the list pays for cold files and is a warm-up if its side has others."""
    counted = list(starts)
    if len(starts) > 2 and sum(start["side"] == starts[0]["side"] for start in starts) > sum(
        start["side"] != starts[0]["side"] for start in starts
    ):
        counted = counted[1:]
    times = {side: [start["compile_seconds"] for start in counted if start["side"] == side] for side in SIDES}
    summary: dict[str, Any] = {"starts": list(starts), "target": targets.COMPILE}
    for side in SIDES:
        if times[side]:
            summary[side] = statistics.median(times[side])
    if all(times.values()) and summary["stock"] > 0:
        summary["ratio"] = summary["overlay"] / summary["stock"]
        artifacts = {
            side: next(
                {
                    "saved": start["counters"].get("num_compiled_artifacts_saved"),
                    "compiles": start["counters"].get("num_inductor_compiles"),
                    "graphs": start["counters"].get("num_piecewise_graphs_seen"),
                    "aot": start["counters"].get("num_aot_artifacts_saved"),
                    "files": start["cache"]["torch_compile_cache"],
                }
                for start in counted
                if start["side"] == side
            )
            for side in SIDES
        }
        summary["artifacts"] = artifacts
        summary["artifacts_equal"] = artifacts["stock"] == artifacts["overlay"]
    return summary


def quantized(setup: Setup, results: Results, names: Sequence[str]) -> None:
    """Quantized engines of the same projection shapes: do they load, and do both sides give the same tokens?

    All variants of one side start at once (nothing is timed here), the stock side first. Stock starts a second time as
    the control: where stock does not repeat its own tokens in another process, a difference says nothing.
    """
    answers: dict[str, dict[str, Any]] = {name: {} for name in names}
    for side in (*SIDES, "control"):
        if setup.remaining() < 45:
            results.problem(f"quantized: out of time before {side}")
            break
        with ThreadPoolExecutor(len(names)) as pool:
            jobs = {name: pool.submit(_one_quantized, setup, name, side) for name in names}
        for name, job in jobs.items():
            answers[name][side] = job.result()
        rows = [_compare_quantized(name, sides) for name, sides in answers.items()]
        results.put("quantized", value=rows)
    results.put("quantized_detail", value=answers)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _one_quantized(setup: Setup, name: str, side: str) -> dict[str, Any]:
    architecture, layers, section, argument, extra = QUANTIZED[name]
    slug = _slug(name)
    run = f"quantized-{slug}"
    log = setup.work / "logs" / f"{run}-{side}.log"
    environment = {
        **setup.environment("overlay" if side == "overlay" else "stock", run, setup.work / f"{run}-{side}"),
        **extra,
        "TORCHINDUCTOR_COMPILE_THREADS": "4",
    }
    model = setup.model_folder(architecture, layers, section, f"{slug}-{side}")
    changes: dict[str, Any] = {
        "kv_cache_memory_bytes": (1 if setup.cpu else 4) << 30,
        "gpu_memory_utilization": 0.1,
        "max_num_seqs": 8 if setup.cpu else 32,
        "max_model_len": 1024,
        "max_num_batched_tokens": 1024,
        "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]},
    }
    if argument is not None:
        changes["quantization"] = argument
    worker = Worker(f"{name}, {side}", environment, log)
    try:
        limit = setup.remaining()
        started = worker.call(
            "start", engine=setup.engine(model, architecture, **changes), weight_seed=SEED, timeout=limit
        )
        outputs = [
            worker.call("generate", lengths=lengths, seed=SEED, tokens=24, logprobs=True, timeout=limit)
            for lengths in ([16], [12, 20, 30, 7], [16] * (8 if setup.cpu else 32), [300], [128])
        ]
        checksum = worker.call("checksum", timeout=limit)
    except WorkerError as error:
        return {"error": str(error)[-1500:], "tail": tail(log, 12)}
    finally:
        worker.close()
    return {
        "quantization": started["quantization"],
        "compile_seconds": started["compile_seconds"],
        "checksum": checksum,
        "tokens": [output["tokens"] for output in outputs],
        "logprobs": [output["logprobs"] for output in outputs],
        "kernels": _kernels_in_log(log),
        "journal": journal_summary(setup.journal_folder(run)) if side == "overlay" else None,
    }


def _kernels_in_log(log: Path) -> list[str]:
    found = re.findall(r"(?:Using|Selected) ([A-Za-z0-9_]*Kernel[A-Za-z0-9_]*) for", log.read_text(errors="replace"))
    return sorted(set(found))


def _compare_quantized(name: str, sides: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"variant": name}
    for side, answer in sides.items():
        if "error" in answer:
            row["error"] = f"{side}: {answer['error'][-300:]}"
            return row
    stock, overlay = sides.get("stock"), sides.get("overlay")
    if stock is not None:
        tokens = [token for output in stock["tokens"] for request in output for token in request]
        row |= {
            "quantization": stock["quantization"],
            "kernels": stock["kernels"],
            "generated": len(tokens),
            "distinct": len(set(tokens)),
        }
    if stock is not None and "control" in sides:
        row["stock_repeats"] = stock["tokens"] == sides["control"]["tokens"]
    if stock is not None and overlay is not None:
        row |= {
            "weights_equal": stock["checksum"] == overlay["checksum"],
            "tokens_equal": stock["tokens"] == overlay["tokens"],
            "logprobs_equal": stock["logprobs"] == overlay["logprobs"],
            "journal": overlay["journal"],
        }
    return row


def tensor_parallel(setup: Setup, results: Results, architecture: str) -> None:
    """The same engine over two GPUs, stock, overlay and stock again: same tokens, and sizes per shard on both ranks."""
    answers: dict[str, dict[str, Any]] = {}
    for side in (*SIDES, "control"):
        if setup.remaining() < 40:
            results.problem(f"tensor parallel: out of time before {side}")
            break
        run = "tensor-parallel"
        root = setup.work / f"{run}-{side}"
        environment = setup.environment("overlay" if side == "overlay" else "stock", run, root)
        # The workers inherit the replaced dummy loader only by a fork.
        environment["VLLM_WORKER_MULTIPROCESSING_METHOD"] = "fork"
        engine = setup.engine(
            setup.model_folder(architecture),
            architecture,
            tensor_parallel_size=2,
            max_num_seqs=64,
            max_model_len=2048,
            max_num_batched_tokens=2048,
            kv_cache_memory_bytes=4 << 30,
            compilation_config={"cudagraph_capture_sizes": [1, 8, 64]},
        )
        worker = Worker(side, environment, setup.work / "logs" / f"{run}-{side}.log")
        try:
            limit = setup.remaining()
            worker.call("start", engine=engine, weight_seed=SEED, timeout=limit)
            outputs = [
                worker.call("generate", lengths=lengths, seed=SEED, tokens=24, logprobs=True, timeout=limit)
                for lengths in ([16], [16] * 8, [16] * 64, [300], [1500], [12, 20, 300, 7])
            ]
        except WorkerError as error:
            results.problem(f"tensor parallel: {str(error)[-1500:]}")
            continue
        finally:
            worker.close()
        answers[side] = {key: [output[key] for output in outputs] for key in ("tokens", "logprobs")}
        results.put("tensor_parallel", value=_compare_tensor_parallel(setup, answers, run))


def _compare_tensor_parallel(setup: Setup, answers: dict[str, dict[str, Any]], run: str) -> dict[str, Any]:
    stock = answers.get("stock", {})
    tokens = [token for output in stock.get("tokens", []) for request in output for token in request]
    found: dict[str, Any] = {"generated": len(tokens), "distinct": len(set(tokens))}
    for side, name in (("overlay", "overlay"), ("control", "stock_again")):
        if side in answers:
            found[f"{name}_tokens_equal"] = answers[side]["tokens"] == stock.get("tokens")
            found[f"{name}_logprobs_equal"] = answers[side]["logprobs"] == stock.get("logprobs")
    found["journal"] = journal_summary(setup.journal_folder(run))
    return found
