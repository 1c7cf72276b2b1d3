"""Settings: parsed once, and every error names the variable, the value and what is allowed."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from overlay import settings
from overlay.patches import registry
from overlay.settings import Settings, SettingsError, load
from overlay.vocabulary import PATCH_NAMES, PLANS


def test_nothing_set_gives_the_defaults() -> None:
    assert load({"PATH": "/bin", "VLLM_LOGGING_LEVEL": "INFO"}) == Settings(
        journal_folder=settings.default_journal_folder()
    )


def test_a_folder_for_temporary_files_is_asked_for_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def gettempdir() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", gettempdir)
    assert load({"VLLMOVERLAY_JOURNAL_DIR": "/journals"}).journal_folder == "/journals"
    assert not load({"VLLMOVERLAY": "0"}).enabled
    with pytest.raises(SettingsError, match=r"VLLMOVERLAY_JOURNAL_DIR='' .* absolute path"):
        load({})


def test_every_setting_can_be_set() -> None:
    loaded = load(
        {
            "VLLMOVERLAY": "on",
            "VLLMOVERLAY_PATCHES": "gdn",
            "VLLMOVERLAY_STRICT": "1",
            "VLLMOVERLAY_PLAN": "serial",
            "VLLMOVERLAY_TOKEN_THRESHOLD": "64",
            "VLLMOVERLAY_SERIAL_PASS_THROUGH": "yes",
            "VLLMOVERLAY_LOG_LEVEL": "debug",
            "VLLMOVERLAY_JOURNAL_DIR": "/var/run/overlay",
        }
    )
    assert loaded == Settings(True, ("gdn",), True, "serial", 64, True, "debug", "/var/run/overlay")
    assert len(settings._VARIABLES) + 1 == len(dataclasses.fields(Settings)), "all but `retired` can be set"


def test_plans_are_measured_unless_something_else_was_asked_for() -> None:
    assert (load({}).plan, load({}).retired) == ("auto", ())


@pytest.mark.parametrize(
    "set_", [{"VLLMOVERLAY_PLAN": " Fused "}, {"VLLMOVERLAY_INEXACT": "1"}, {"VLLMOVERLAY_INEXACT": "x"}]
)
def test_what_asks_for_one_gemm_gets_auto_and_a_line_that_says_so(set_: dict[str, str]) -> None:
    loaded = load(set_)
    ((name, value),) = set_.items()
    assert loaded.plan == "auto" and loaded.retired == (f"{name}={value} does nothing any more, the plan is measured",)
    both = load({"VLLMOVERLAY_PLAN": "fused", "VLLMOVERLAY_INEXACT": "1"})
    assert both.plan == "auto" and len(both.retired) == 2
    assert load({"VLLMOVERLAY_INEXACT": ""}).retired == ()


@pytest.mark.parametrize("plan", PLANS)
def test_a_patch_that_measures_nothing_forks_unless_it_is_to_be_serial(plan: str) -> None:
    assert load({"VLLMOVERLAY_PLAN": plan}).forks == ("serial" if plan == "serial" else "dual")


@pytest.mark.parametrize(("value", "tokens"), [("", 256), ("0", 0), ("64", 64)])
def test_a_token_threshold_that_was_set_counts_for_every_patch(value: str, tokens: int) -> None:
    assert load({"VLLMOVERLAY_TOKEN_THRESHOLD": value}).tokens_or(256) == tokens


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load({}).strict = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("VLLMOVERLAY", "maybe", "1, true, on, yes"),
        ("VLLMOVERLAY_STRICT", "2", "0, false, off, no"),
        ("VLLMOVERLAY_PATCHES", "gnd", "gdn"),
        ("VLLMOVERLAY_PATCHES", ",", "gdn"),
        ("VLLMOVERLAY_PLAN", "fast", "auto, dual, serial"),
        ("VLLMOVERLAY_TOKEN_THRESHOLD", "many", "whole number"),
        ("VLLMOVERLAY_TOKEN_THRESHOLD", "-1", "whole number"),
        ("VLLMOVERLAY_TOKEN_THRESHOLD", "1000001", "whole number"),
        ("VLLMOVERLAY_LOG_LEVEL", "loud", "debug, info, warning, error"),
        ("VLLMOVERLAY_JOURNAL_DIR", "relative/path", "absolute path"),
        ("VLLMOVERLAY_STRIKT", "1", "VLLMOVERLAY_STRICT"),
        ("VLLM_OVERLAY_STRICT", "1", "VLLMOVERLAY_STRICT"),
        ("VLLM_OVERLAY", "1", "did you mean VLLMOVERLAY?"),
    ],
)
def test_what_cannot_be_used_is_named(name: str, value: str, allowed: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load({name: value})
    message = str(caught.value)
    assert name in message and repr(value) in message and allowed in message
    assert "\n" not in message


def test_an_empty_value_counts_as_not_set() -> None:
    assert load({"VLLMOVERLAY_PLAN": "", "VLLMOVERLAY": ""}) == load({})


def test_patches_none_and_all() -> None:
    assert load({}).patches == PATCH_NAMES
    assert load({"VLLMOVERLAY_PATCHES": "none"}).patches == ()
    assert load({"VLLMOVERLAY_PATCHES": " ALL "}).patches == PATCH_NAMES


@given(st.text(string.printable, max_size=20))
def test_a_switch_is_on_or_off_or_an_error(value: str) -> None:
    try:
        enabled = load({"VLLMOVERLAY": value}).enabled
    except SettingsError:
        assert value != "" and value.strip().lower() not in (*settings.ON, *settings.OFF)
    else:
        assert enabled == (value == "" or value.strip().lower() in settings.ON)


#: Names of Services whose variables look like the family's, as Kubernetes allows them.
SERVICES = st.tuples(
    st.sampled_from(["vllmoverlay", "vllm-overlay"]),
    st.sampled_from(["", "-"]) | st.just("-plan") | st.just("-strict"),
    st.text(string.ascii_lowercase + string.digits + "-", max_size=12),
).map(lambda parts: "".join(parts).rstrip("-"))
PORTS = st.integers(1, 65535)
PORT_NAMES = st.none() | st.from_regex(r"[a-z][a-z0-9-]{0,12}[a-z0-9]", fullmatch=True)
ADDRESSES = st.ip_addresses().map(str)
PROTOCOLS = st.sampled_from(["TCP", "UDP", "SCTP"])


def service_links(
    service: str, address: str, ports: Sequence[tuple[int, str | None, str]], first: int = 0
) -> dict[str, str]:
    """The variables that the kubelet makes for a Service, as Kubernetes documents them; `first`: of a pod's own start."""
    prefix = service.upper().replace("-", "_")
    host = f"[{address}]" if ":" in address else address
    port, _, protocol = ports[first]
    links = {
        f"{prefix}_SERVICE_HOST": address,
        f"{prefix}_SERVICE_PORT": str(port),
        f"{prefix}_PORT": f"{protocol.lower()}://{host}:{port}",
    }
    for port, name, protocol in ports:
        if name is not None:
            links[f"{prefix}_SERVICE_PORT_{name.upper().replace('-', '_')}"] = str(port)
        link = f"{prefix}_PORT_{port}_{protocol}"
        links[link] = f"{protocol.lower()}://{host}:{port}"
        links |= {f"{link}_PROTO": protocol.lower(), f"{link}_PORT": str(port), f"{link}_ADDR": address}
    return links


@given(SERVICES, ADDRESSES, st.lists(st.tuples(PORTS, PORT_NAMES, PROTOCOLS), min_size=1, max_size=3))
@example("vllm-overlay", "10.0.0.7", [(8000, "http", "TCP")])
@example("vllmoverlay-plan", "fd00::7", [(53, None, "UDP"), (9000, "log-level", "SCTP")])
def test_the_links_of_a_service_that_is_named_like_the_family_are_not_ours(
    service: str, address: str, ports: list[tuple[int, str | None, str]]
) -> None:
    links = service_links(service, address, ports)
    assert load(links) == load({})
    assert load({**links, "VLLMOVERLAY_PLAN": "serial"}).plan == "serial"
    assert not set(links) & set(settings._VARIABLES), "a Service must not be able to set anything"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("VLLMOVERLAY_PORTS", "tcp://10.0.0.7:8000"),
        ("VLLMOVERLAY_PORT", "8000"),
        ("VLLMOVERLAY_SERVICE_PORT", "http"),
        ("VLLMOVERLAY_SERVICE_PORT", ""),
        ("VLLMOVERLAY_SERVICE_HOST", "serial"),
        ("VLLMOVERLAY_SERVICE", "10.0.0.7"),
        ("VLLMOVERLAY_PLAN_PORT", "dual"),
        ("VLLMOVERLAY_PORT_8000", "tcp://10.0.0.7:8000"),
        ("VLLMOVERLAY_PORT_8000_TCP_PROTO", "http"),
        ("VLLMOVERLAY_PORT_8000_TCP_ADDR", "10.0.0.7:8000"),
        ("VLLM_OVERLAY_PLAN", "10.0.0.7"),
        ("VLLM_OVERLAY_STRICT", "8000"),
    ],
)
def test_what_only_looks_like_a_link_is_still_an_error(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name):
        load({name: value})


def test_no_setting_has_the_name_of_a_link() -> None:
    for name in settings._VARIABLES:
        assert not any(pattern.fullmatch(name) for pattern in settings._LINKS), name


@given(st.text(string.ascii_uppercase + "_", min_size=1, max_size=12), st.text(string.printable, max_size=12))
def test_an_unknown_name_of_the_family_is_never_ignored(suffix: str, value: str) -> None:
    name = f"VLLMOVERLAY_{suffix}"
    if name in settings._VARIABLES:
        return
    with pytest.raises(SettingsError, match=name):
        load({name: value})


def test_every_patch_that_can_be_named_has_a_verdict() -> None:
    assert set(PATCH_NAMES) == set(registry.TARGET_MODULES)


def test_the_family_is_not_one_that_vllm_takes_for_its_own() -> None:
    assert not any(name.startswith("VLLM_") for name in settings._VARIABLES)
