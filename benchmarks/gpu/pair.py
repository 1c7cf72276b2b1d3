"""The two engines of the GDN evidence: those of `bench`, an older architecture where the new one does not start, traces."""

from __future__ import annotations

from pathlib import Path

from gpu import trace
from gpu.run_setup import SIDES, Setup
from overlay.cli.bench.engines import SEED, Engines
from overlay.cli.bench.progress import Progress
from overlay.cli.bench.results import Results
from overlay.cli.bench.workers import WorkerError


class EnginePair(Engines):
    """Stock and overlay."""

    def __init__(self, setup: Setup, results: Results, progress: Progress) -> None:
        super().__init__(setup, results, progress)
        self.evidence_setup = setup

    def start_any(self) -> None:
        """Start both. Together only where Triton's choices are in its cache, for then nothing is timed at start."""
        setup = self.evidence_setup
        for architecture in setup.architectures():
            try:
                engine = setup.engine(setup.model_folder(architecture), architecture)
                self.start(engine, together=setup.triton_is_warm() and not setup.cpu)
                self.results.put("pair", "architecture", value=architecture)
                return
            except WorkerError as error:
                self.results.problem(f"{architecture} did not start: {error}")
                self.close()
        raise WorkerError("no architecture started")

    def trace(self, requests: int, steps: int, folder: Path) -> None:
        """Profiler traces of both sides, and what they show about the two projections."""
        for side in SIDES:
            path = folder / f"trace-{side}.json.gz"
            timing = self.workers[side].call(
                "trace", requests=requests, steps=steps, path=str(path), seed=SEED + 300_000
            )
            kernels = trace.read_kernels(path)
            found = trace.analyse(kernels, self.evidence_setup.gdn_layers())
            found["gpu_seconds_per_step"] = trace.span(kernels) * 1e-6 / steps
            self.results.put("trace", side, value={**timing, **found, "requests": requests, "steps": steps})
