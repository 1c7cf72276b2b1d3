"""deploy/monitoring: every metric, label and state that the alerts and the dashboard name is one that a scrape has."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from overlay import vocabulary
from overlay.report import journal_reader, metrics
from tests.conftest import REPOSITORY

prometheus_client = pytest.importorskip("prometheus_client")
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402 - after the line above

MONITORING = REPOSITORY / "deploy" / "monitoring"
#: What every scrape adds, and vLLM's own.
OF_THE_SCRAPE = {"job", "instance"}
OF_VLLM = {"vllm:num_requests_running"}
STATES = {value for name, value in vars(vocabulary).items() if name.isupper() and isinstance(value, str)}


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((MONITORING / "prometheus-rule.yaml").read_text())["spec"]["groups"]
    return list(group["rules"])


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    return found


def expressions() -> list[str]:
    panels = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    variables = [one["definition"] for one in dashboard()["templating"]["list"] if one["type"] == "query"]
    return [rule["expr"] for rule in rules()] + panels + variables


@pytest.fixture(scope="module")
def scraped() -> dict[str, set[str]]:
    """Each metric with the labels that its samples have, in the exposition of a journal with everything in it."""
    calls = {"dual_stream": 5, "fused": 1, "serial": {"above the token threshold": 3}}
    patch = {
        "verdict": "apply",
        "layers": {"patched": {"a": {}}, "refused": {"b": "quantized"}},
        "calls": calls,
        "plans": [{"shape": {}, "layers": 1, "source": "read", "seconds": 1.0, "rows": []}],
    }
    journal = journal_reader.parse({"schema": 1, "pid": 1, "role": "VllmWorker-0", "patches": {"gdn": patch}})

    class Once:
        def collect(self) -> list[Any]:
            return metrics._families([journal])

    registry = prometheus_client.CollectorRegistry()
    registry.register(Once())
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(prometheus_client.generate_latest(registry).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def selectors(expression: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Each metric that is asked for, with the values of the labels that it is asked for by."""
    for name, labels in re.findall(r"\b(vllm[_:][a-z_]+)(?:\{([^}]*)\})?", expression):
        yield name, dict(re.findall(r'(\w+)(?:=~|!=|!~|=)"([^"]*)"', labels or ""))


@pytest.mark.parametrize("expression", expressions())
def test_an_expression_names_what_a_scrape_has(expression: str, scraped: dict[str, set[str]]) -> None:
    asked = list(selectors(expression))
    assert asked
    labels: set[str] = set(OF_THE_SCRAPE)
    for name, given in asked:
        assert name in scraped or name in OF_VLLM, name
        labels |= scraped.get(name, set())
        assert set(given) <= scraped.get(name, set()) | OF_THE_SCRAPE, name
        if name == "vllm_overlay_patch_state" and "state" in given:
            assert set(given["state"].split("|")) <= STATES
        assert given.get("kind") in (None, "serial", "dual_stream", "fused")
    for by in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
        assert set(by.split(", ")) <= labels, by


def test_the_label_that_is_added_up_by_is_an_identifier(scraped: dict[str, set[str]]) -> None:
    assert {"kind", "strategy"} <= scraped["vllm_overlay_calls_total"]
    for family in metrics._families([]):
        assert all(re.fullmatch("[a-z_]+", label) for label in getattr(family, "_labelnames", ()))


def test_the_alert_on_absence_and_what_an_alert_says() -> None:
    assert any(rule["expr"].startswith("absent(") for rule in rules())
    for rule in rules():
        assert re.fullmatch("VllmOverlay[A-Za-z]+", rule["alert"]) and rule["for"]
        assert rule["labels"]["severity"] in ("info", "warning")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_the_panels_have_a_source_and_do_not_lie_on_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells
        assert panel["datasource"]["uid"] == "${datasource}" and panel["description"]
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])


#: Series of two servers, and the alerts that they give after half an hour.
SCENES: dict[str, tuple[dict[str, str], list[str]]] = {
    "all is well": (
        {
            'vllm:num_requests_running{job="vllm",instance="a"}': "3",
            'vllm_overlay_info{job="vllm",instance="a",version="0.1.0"}': "1",
            'vllm_overlay_patch_state{job="vllm",instance="a",process="W",patch="gdn",state="apply"}': "1",
            'vllm_overlay_layers{job="vllm",instance="a",process="W",patch="gdn",state="patched"}': "30",
            'vllm_overlay_layers{job="vllm",instance="a",process="W",patch="gdn",state="refused"}': "1",
        },
        [],
    ),
    "nowhere": (
        {'vllm:num_requests_running{job="vllm",instance="a"}': "3"},
        ["VllmOverlayNowhere", "VllmOverlayNotInServer"],
    ),
    "in one of two, another version, and every layer stock": (
        {
            'vllm:num_requests_running{job="vllm",instance="a"}': "3",
            'vllm:num_requests_running{job="vllm",instance="b"}': "3",
            'vllm_overlay_info{job="vllm",instance="a",version="0.1.0"}': "1",
            'vllm_overlay_info{job="vllm",instance="c",version="0.2.0"}': "1",
            'vllm_overlay_patch_state{job="vllm",instance="a",process="W",patch="gdn",state="ineffective"}': "1",
            'vllm_overlay_layers{job="vllm",instance="a",process="W",patch="gdn",state="patched"}': "0",
            'vllm_overlay_layers{job="vllm",instance="a",process="W",patch="gdn",state="refused"}': "2",
        },
        [
            "VllmOverlayNotInServer",
            "VllmOverlayPatchWithoutEffect",
            "VllmOverlayEveryLayerStock",
            "VllmOverlayVersionsDiffer",
        ],
    ),
}


def test_promtool_gives_the_alerts(tmp_path: pathlib.Path) -> None:
    """Prometheus's own tool evaluates the rules, where it is installed."""
    promtool = shutil.which("promtool") or pytest.skip("promtool (Debian: prometheus) is not installed here")
    (group,) = yaml.safe_load((MONITORING / "prometheus-rule.yaml").read_text())["spec"]["groups"]
    plain = [re.sub(r"\$\w+", ".*", target["expr"]) for panel in dashboard()["panels"] for target in panel["targets"]]
    panels = {"name": "panels", "rules": [{"record": f"panel:{n}", "expr": expr} for n, expr in enumerate(plain)]}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [group, panels]}))
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": series, "values": f"{value}+0x120"} for series, value in given.items()],
            "promql_expr_test": [
                {
                    "expr": f'count by (alertname) (ALERTS{{alertstate="firing",alertname="{rule["alert"]}"}})',
                    "eval_time": "100m",
                    "exp_samples": [{"labels": f'{{alertname="{rule["alert"]}"}}', "value": 1}]
                    * (rule["alert"] in fired),
                }
                for rule in rules()
            ],
        }
        for given, fired in SCENES.values()
    ]
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "tests": tests}))
    result = subprocess.run(
        [promtool, "test", "rules", tmp_path / "tests.yaml"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
