"""`bench --phases timeline`: segments and what is hidden, from made-up kernels."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from overlay.cli.bench import report, timeline, timeline_picture
from overlay.cli.bench.outside.bench_engine import worker
from overlay.cli.bench.progress import Progress
from overlay.cli.bench.results import Results
from overlay.cli.bench.setup import Setup
from overlay.cli.bench.timeline import Kernel

#: Name, duration, and 0 for the main stream; each begins 1 us after the end of the one before it on its stream.
Step = tuple[str, float, int]
GDN: list[Step] = [("_causal_conv1d_update", 2, 0), ("recurrent", 6, 0), ("moe", 40, 0), ("triton_norm", 3, 0)]
STOCK: list[Step] = [*GDN, ("fp8_gemm", 10, 0), ("ba_gemm", 5, 0), ("copy", 1, 0)]
OVERLAY: list[Step] = [*GDN, ("ba_gemm", 5.5, 1), ("fp8_gemm", 10.2, 0), ("copy", 1, 0)]
ATTENTION: list[Step] = [("flash", 9, 0), ("moe", 40, 0)]


def trace(layer: list[Step], side: str = "20", jitter: float = 0.0) -> list[Kernel]:
    """Three steps of 3 GDN layers, an attention layer, 3 GDN layers, and the head. A side kernel begins with the next one."""
    found, now = [], 0.0
    for _ in range(3):
        for part in [layer, layer, [*layer, *ATTENTION], layer, layer, [*layer, ("head", 80, 0)]]:
            for name, duration, stream in part:
                if stream:
                    found.append(Kernel(name, side, now + 1 + jitter, duration))
                else:
                    found.append(Kernel(name, "7", now + 1, duration))
                    now += 1 + duration
    return found


def test_a_segment_is_one_gdn_layer_and_its_mlp() -> None:
    layer = timeline.typical([trace(STOCK), trace(STOCK)])
    assert layer is not None
    assert [kernel.name for kernel in layer.kernels] == [name for name, _, _ in STOCK]
    assert layer.median == sum(duration + 1 for _, duration, _ in STOCK) == 74
    assert (len(layer.lengths), layer.all) == (2 * 3 * 4, 2 * 17)
    assert {kernel.stream for kernel in layer.kernels} == {"main"} and layer.kernels[0].start == 0.0
    assert layer.as_dict()["segment"] == {"median": 74, "low": 74, "high": 74, "alike": 24, "all": 34}


@given(st.lists(st.sampled_from([-0.5, 0.0, 0.5]), min_size=2, max_size=6))
def test_which_of_two_streams_is_sooner_makes_no_other_kind(jitters: list[float]) -> None:
    layer = timeline.typical([trace(OVERLAY, str(20 + index), jitter) for index, jitter in enumerate(jitters)])
    assert layer is not None and len(layer.lengths) == 12 * len(jitters)
    assert {kernel.name for kernel in layer.kernels if kernel.stream == "side 1"} == {"ba_gemm"}


def _row(arm: list[Step], stock: list[Step] = STOCK) -> dict[str, Any]:
    return timeline.row(8, {"stock": [trace(stock)], "overlay": [trace(arm)]})


def test_what_is_hidden_is_stocks_segment_less_the_arms_to_the_side_kernel_and_its_gap() -> None:
    found = _row(OVERLAY)["arms"]["overlay"]["against_stock"]
    (side,) = found["side"]
    assert side == {"name": "ba_gemm", "duration": 5.5, "overlap": 5.5, "stock": {"duration": 5, "gap": 1}}
    assert found["hideable"] == 6
    assert found["saved"] == pytest.approx(5.8) and found["hidden_share"] == pytest.approx(5.8 / 6, abs=1e-3)
    assert found["ratio"] == found["like"] == found["like_tuned"] == pytest.approx(68.2 / 74, abs=1e-4)
    assert found["only_stock"] == found["only_arm"] == found["renamed"] == found["retuned"] == []


def test_other_kernels_are_named_and_taken_out_of_like() -> None:
    changed = [
        ("triton_other" if name == "triton_norm" else name, duration + 2 * (name == "triton_norm"), stream)
        for name, duration, stream in OVERLAY
    ]
    found = _row(changed)["arms"]["overlay"]["against_stock"]
    assert (found["only_stock"], found["only_arm"]) == (["triton_norm"], ["triton_other"])
    assert found["renamed"] == [{"stock": "triton_norm", "arm": "triton_other", "difference": -2}]
    assert found["ratio"] == pytest.approx(70.2 / 74, abs=1e-4)
    assert found["like"] == found["like_tuned"] == pytest.approx(68.2 / 74, abs=1e-4)
    assert found["hidden_share"] == pytest.approx(5.8 / 6, abs=1e-3)


@pytest.mark.parametrize(("beside", "counted"), [(False, True), (True, False)])
def test_a_triton_kernel_that_takes_another_time_counts_unless_something_runs_beside_it(
    beside: bool, counted: bool
) -> None:
    name = "triton_quant" if beside else "triton_norm"
    stock = [("triton_quant" if part == "fp8_gemm" and beside else part, took, on) for part, took, on in STOCK]
    arm = [("triton_quant" if part == "fp8_gemm" and beside else part, took, on) for part, took, on in OVERLAY]
    arm = [(part, took + 2 * (part == name), on) for part, took, on in arm]
    found = _row(arm, stock)["arms"]["overlay"]["against_stock"]
    assert ([one["name"] for one in found["retuned"]] == [name]) == counted
    assert found["like"] == found["ratio"]
    assert (found["like_tuned"] < found["like"]) == counted


@pytest.mark.parametrize("took", [8, 40], ids=["short", "as long as what it is beside"])
def test_what_stock_has_beside_its_main_stream_is_not_the_arms_doing(took: float) -> None:
    def shared(steps: list[Step]) -> list[Step]:
        return [*steps[:2], ("experts", took, 1), *steps[2:]]

    found = _row(shared(OVERLAY), shared(STOCK))["arms"]["overlay"]["against_stock"]
    assert [one["name"] for one in found["side"]] == ["ba_gemm"] and found["hideable"] == 5 + 1
    assert not _row(shared(STOCK), shared(STOCK))["arms"]["overlay"]["against_stock"]["side"]


def test_what_stock_has_beside_the_whole_segment_shows_no_fork_and_no_share() -> None:
    def shared(steps: list[Step]) -> list[Step]:
        return [*steps[:2], ("experts", 90, 1), *steps[2:]]

    found = _row(shared(OVERLAY), shared(STOCK))["arms"]["overlay"]["against_stock"]
    assert found["side"] == [] and found["hideable"] is found["hidden_share"] is None


def test_of_a_fork_what_stock_runs_first_is_main_whichever_stream_a_replay_gave_it() -> None:
    swapped = [*GDN, ("fp8_gemm", 10.2, 1), ("ba_gemm", 5.5, 0)]
    stock = [step for step in STOCK if step[0] != "copy"]
    arm = _row(swapped, stock)["arms"]["overlay"]
    assert [one["name"] for one in arm["against_stock"]["side"]] == ["ba_gemm"]
    assert {one["name"]: one["stream"] for one in arm["kernels"]} == {
        name: "side 1" if name == "ba_gemm" else "main" for name, _, _ in stock
    }


def test_a_side_kernel_without_a_counterpart_is_there_instead_of_what_only_stock_has() -> None:
    odd = [("other_gemm" if name == "ba_gemm" else name, took, on) for name, took, on in OVERLAY]
    found = _row(odd)["arms"]["overlay"]["against_stock"]
    assert found["side"][0]["stock"] is None and found["hideable"] == 5 + 1
    assert (found["only_stock"], found["only_arm"]) == (["ba_gemm"], ["other_gemm"])


def test_a_side_kernel_more_than_stock_has_leaves_the_share_open() -> None:
    found = _row([*OVERLAY[:4], ("zeros", 0.5, 1), *OVERLAY[4:]])["arms"]["overlay"]["against_stock"]
    assert {one["name"] for one in found["side"]} == {"zeros", "ba_gemm"}
    assert found["hideable"] is found["hidden_share"] is None


def test_a_triton_kernels_number_is_not_its_name_and_a_reduction_takes_a_reductions_place() -> None:
    """As on torch 2.11: stock's zeros stand beside its norm, and without them the norm has another name."""
    stock: list[Step] = [
        *GDN[:3],
        ("triton_poi_fused_0", 1, 0),
        ("triton_per_fused_1", 3, 0),
        ("triton_red_norm_2", 4, 0),
    ]
    stock += [("fp8_gemm", 10, 0), ("ba_gemm", 5, 0)]
    arm: list[Step] = [*GDN[:3], ("triton_per_fused_mean_0", 3, 0), ("triton_red_norm_1", 4, 0)]
    arm += [("ba_gemm", 5.5, 1), ("fp8_gemm", 10.2, 0), ("fill", 0.5, 1), ("last", 0.1, 0)]
    found = _row(arm, stock)["arms"]["overlay"]["against_stock"]
    assert found["renamed"] == [{"stock": "triton_per_fused_1", "arm": "triton_per_fused_mean_0", "difference": 0}]
    assert found["only_stock"] == ["triton_per_fused", "triton_poi_fused"]
    assert [one["name"] for one in found["side"]] == ["ba_gemm", "fill"]
    assert found["hideable"] == (5 + 1) + (1 + 1)


def test_of_several_kernels_of_a_name_the_last_is_the_side_projection() -> None:
    stock = [Kernel("gemm", "main", start, duration) for start, duration in ((0, 3), (10, 4), (20, 5))]
    side = [Kernel("gemm", "side 1", 9, 5)]
    assert timeline.counterparts(side, stock) == [stock[2]]
    assert timeline.counterparts([*side, side[0]], stock) == stock[1:]
    assert timeline.counterparts(side * 4, stock) == [None] * 4


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0.1, 20)), max_size=8))
def test_an_overlap_is_no_longer_than_the_kernel_and_counts_nothing_twice(others: list[tuple[float, float]]) -> None:
    kernel = Kernel("side", "side 1", 10, 20)
    found = timeline.overlap(kernel, [Kernel("x", "main", start, duration) for start, duration in others])
    points = [10 + 20 * (index + 0.5) / 4000 for index in range(4000)]
    covered = sum(any(start <= point < start + duration for start, duration in others) for point in points)
    assert found == pytest.approx(20 * covered / 4000, abs=0.1)


def test_nothing_is_made_of_a_trace_without_layers() -> None:
    assert timeline.typical([[]]) is timeline.typical([[Kernel("gemm", "7", 0, 1)]]) is None
    assert timeline.row(1, {"stock": [[]], "overlay": [trace(OVERLAY)]})["arms"].keys() == {"overlay"}


def test_a_worker_answers_with_kernels_alone_and_with_a_bounded_number() -> None:
    def event(index: int, category: str = "kernel") -> dict[str, Any]:
        return {
            "ph": "X",
            "cat": category,
            "name": f"k{index % 2}",
            "ts": 1e15 + index,
            "dur": 0.5,
            "args": {"stream": 7},
        }

    events = [event(2), event(1), event(3, "cuda_runtime"), {"ph": "M", "name": "x"}, event(4, "gpu_memset")]
    found = worker.kernels_of({"traceEvents": events})
    assert found == {"names": ["k1", "k0"], "kernels": [[0, 7, 0.0, 0.5], [1, 7, 1.0, 0.5], [1, 7, 3.0, 0.5]]}
    assert timeline.read(found)[1] == Kernel("k0", "7", 1.0, 0.5)
    many = worker.kernels_of({"traceEvents": [event(index) for index in range(worker.MOST_KERNELS + 50)]})
    assert len(many["kernels"]) == worker.MOST_KERNELS and len(json.dumps(many)) < 2e6
    assert worker.kernels_of({"traceEvents": []}) == {"names": [], "kernels": []}


def test_the_report_says_what_is_hidden() -> None:
    text = io.StringIO()
    data = {"timeline": [_row(OVERLAY)], "tokens": [], "problems": [], "unfinished": []}
    report.show(data, Console(file=text, width=200))
    assert "a layer and its MLP, N=8" in text.getvalue()
    assert (
        "0.967" in text.getvalue()
        and "overlay, side: 5.50 us, 5.50 hidden, stock 5.00 after 1.00: ba_gemm" in text.getvalue()
    )


def test_the_report_has_a_line_for_every_kernel_by_stream() -> None:
    text = io.StringIO()
    report.show({"timeline": [_row(OVERLAY)]}, Console(file=text, width=200))
    lines = [line.split() for line in text.getvalue().splitlines()]
    assert ["main", "6", "66.00", "5.00", "0.00", "ba_gemm"] in lines  # stock's
    (side,) = (line for line in lines if line[:2] == ["side", "1"])
    assert side[4:] == ["5.50", "5.50", "ba_gemm"]
    assert "overlay hides 5.8 µs of the 6.0 µs that can be hidden (97 %)" in text.getvalue()


@pytest.mark.parametrize(
    ("share", "said"), [(1.4, "takes 8.4 µs less than"), (-0.5, "takes 3.0 µs more than"), (None, "")]
)
def test_more_than_can_be_hidden_is_not_said_to_be_hidden(share: float | None, said: str) -> None:
    assert timeline_picture.hidden({"hideable": 6.0, "hidden_share": share}).startswith(said)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "void cutlass::device_kernel<vllm::cutlass_3x_gemm_fp8_blockwise<cutlass::x> >(A)",
            "vllm::cutlass_3x_gemm_fp8_blockwise",
        ),
        ("void vllm::moe::topkGating<8, 256>(float*)", "vllm::moe::topkGating"),
        ("triton_red_fused_1", "triton_red_fused_1"),
        ("void (anonymous namespace)::k(int)", "k"),
        ("x" * 99, "x" * 45 + "…"),
    ],
)
def test_a_kernel_has_a_short_name(name: str, said: str) -> None:
    assert timeline_picture.short(name) == said


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 3)), max_size=40), st.floats(0.01, 1.0))
def test_numbers_on_one_level_do_not_touch(places: list[tuple[float, int]], scale: float) -> None:
    places = sorted(places)
    on: dict[int, float] = {}
    for (middle, digits), level in zip(places, timeline_picture.levels(places, scale), strict=True):
        half = digits * timeline_picture.DIGIT / 2
        assert on.get(level, -1e9) <= middle * scale - half
        on[level] = middle * scale + half
    assert sorted(on) == list(range(len(on)))


def test_the_picture_has_both_arms_and_no_labels_that_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    figures: list[Any] = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    crowded = [*GDN, *[(f"tiny{index}", 0.2, 0) for index in range(12)], *STOCK[4:]]
    row = timeline.row(8, {"stock": [trace(crowded)], "overlay": [trace([*crowded[:16], *OVERLAY[4:]])]})
    found = timeline_picture.draw(row, tmp_path / "timeline-8.svg")
    assert found.read_text().lstrip().startswith("<?xml")
    (figure,) = figures
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for axis in figure.axes for text in axis.texts]
    assert len(boxes) == 2 * sum(len(one["kernels"]) for one in row["arms"].values())
    assert not [(one, other) for index, one in enumerate(boxes) for other in boxes[:index] if one.overlaps(other)]
    colours = {"stock": [], "overlay": []}  # type: dict[str, list[Any]]
    for axis, arm in zip(figure.axes[::2], colours, strict=True):
        assert axis.get_title("left").startswith(f"{arm}: ")
        colours[arm] = [tuple(bar.get_facecolor()[0]) for bar in axis.collections]
    assert all(len(set(found)) == 2 and min(map(found.count, found)) == 1 for found in colours.values())
    monkeypatch.undo()
    pyplot.close(figure)


class Engines:
    """Stands for the engines: what each arm's worker would answer."""

    def __init__(self, folder: Path, answers: dict[str, list[Kernel]]) -> None:
        self.workers: Any = answers
        self.setup, self.results = (
            Setup(folder, folder, None, 100.0),
            Results(folder / "results.json", lambda text: None),
        )
        self.progress = Progress(Console(file=io.StringIO()))
        self.asked: list[tuple[str, int, dict[str, Any]]] = []

    def all(self, command: str, turn: int, **arguments: Any) -> dict[str, Any]:
        self.asked.append((command, turn, arguments))
        answer = {}
        for arm, kernels in self.workers.items():
            rows = [[index, kernel.stream, kernel.start, kernel.duration] for index, kernel in enumerate(kernels)]
            answer[arm] = {"names": [kernel.name for kernel in kernels], "kernels": rows}
        return answer


def test_the_phase_asks_every_arm_and_keeps_a_row_for_each_number_of_requests(tmp_path: Path) -> None:
    alive: Any = Engines(tmp_path, {"stock": trace(STOCK), "overlay": trace(OVERLAY)})
    timeline.measure(alive, (1, 64))
    assert [row["requests"] for row in alive.results.data["timeline"]] == [1, 64]
    assert [(turn, asked["requests"]) for _, turn, asked in alive.asked] == [(0, 1), (1, 1), (0, 64), (1, 64)]
    assert json.loads((tmp_path / "results.json").read_text())["timeline"][0]["arms"]["overlay"]["against_stock"][
        "side"
    ]


def test_without_a_gpu_the_phase_says_so_once(tmp_path: Path) -> None:
    alive: Any = Engines(tmp_path, {"stock": [], "overlay": []})
    timeline.measure(alive, (1, 64))
    assert "timeline" not in alive.results.data and len(alive.results.data["unfinished"]) == 1
