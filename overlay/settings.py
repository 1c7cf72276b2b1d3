"""The settings: one family of environment variables, parsed once into a frozen object.

The family is ``VLLMOVERLAY``, without an underscore after ``VLLM``, on purpose. vLLM warns about every ``VLLM_…`` name that
it does not know, and with ``--fail-on-environ-validation`` it refuses to start. Settings may stay in a manifest after the
overlay's folder is gone; they must not do that.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from overlay.vocabulary import AUTO, DUAL, PATCH_NAMES, PLANS, SERIAL

FAMILY = "VLLMOVERLAY"
#: What people type by habit: an error that names it, because ignoring it would hide the mistake.
HABITUAL = "VLLM_OVERLAY"
#: One GEMM for both projections, up to overlay 0.1. It now means `auto`, and logs a WARNING.
RETIRED_PLAN, RETIRED_NAME = "fused", f"{FAMILY}_INEXACT"
LOG_LEVELS = ("debug", "info", "warning", "error")
ON = ("1", "true", "on", "yes")
OFF = ("0", "false", "off", "no")

Value = TypeVar("Value")


class SettingsError(ValueError):
    """A setting that cannot be used. The message names the variable, its value and what is allowed."""

    def __init__(self, variable: str, value: str, allowed: str) -> None:
        super().__init__(f"{variable}={value!r} is not usable: {allowed}")


def default_journal_folder() -> str:
    """This user's own folder, shared by the journals of all their processes on the host.

    Raises SettingsError if there is no folder for temporary files.
    """
    try:
        temporary = tempfile.gettempdir()
    except FileNotFoundError as error:
        allowed = "there is no folder for temporary files to put its default in; allowed is an absolute path"
        raise SettingsError(f"{FAMILY}_JOURNAL_DIR", "", allowed) from error
    return os.path.join(temporary, f"vllm-overlay-{os.getuid()}")


@dataclass(frozen=True)
class Settings:
    """All settings with their defaults; `load` fills it from the environment."""

    enabled: bool = True
    patches: tuple[str, ...] = PATCH_NAMES
    strict: bool = False
    plan: str = AUTO
    token_threshold: int | None = None  #: None: each patch has its own
    serial_pass_through: bool = False
    log_level: str = "info"
    journal_folder: str = ""
    retired: tuple[str, ...] = ()  #: one line for each setting that was set and no longer does anything

    @property
    def forks(self) -> str:
        """The plan of a patch that can overlap in one way only and has a fixed threshold."""
        return SERIAL if self.plan == SERIAL else DUAL

    def tokens_or(self, default: int) -> int:
        """The largest number of tokens that is overlapped: the setting, or else `default`, which is the patch's own."""
        return default if self.token_threshold is None else self.token_threshold


def _switch(variable: str, value: str) -> bool:
    word = value.strip().lower()
    if word in ON:
        return True
    if word in OFF:
        return False
    raise SettingsError(variable, value, f"allowed are {', '.join(ON)} and {', '.join(OFF)}")


def _one_of(allowed: tuple[str, ...]) -> Callable[[str, str], str]:
    def parse(variable: str, value: str) -> str:
        word = value.strip().lower()
        if word not in allowed:
            raise SettingsError(variable, value, f"allowed are {', '.join(allowed)}")
        return word

    return parse


def _patches(variable: str, value: str) -> tuple[str, ...]:
    words = [word.strip().lower() for word in value.split(",") if word.strip()]
    if words == ["all"]:
        return PATCH_NAMES
    if words == ["none"]:
        return ()
    unknown = [word for word in words if word not in PATCH_NAMES]
    if unknown or not words:
        raise SettingsError(
            variable, value, f"allowed are all, none, or a comma-separated list of {', '.join(PATCH_NAMES)}"
        )
    return tuple(name for name in PATCH_NAMES if name in words)


def _tokens(variable: str, value: str) -> int:
    try:
        number = int(value)
    except ValueError:
        number = -1
    if not 0 <= number <= 1_000_000:
        raise SettingsError(variable, value, "allowed is a whole number of tokens from 0 to 1000000")
    return number


def _folder(variable: str, value: str) -> str:
    if not os.path.isabs(value):
        raise SettingsError(variable, value, "allowed is an absolute path")
    return value


_VARIABLES: dict[str, tuple[str, Callable[[str, str], Any]]] = {
    FAMILY: ("enabled", _switch),
    f"{FAMILY}_PATCHES": ("patches", _patches),
    f"{FAMILY}_STRICT": ("strict", _switch),
    f"{FAMILY}_PLAN": ("plan", _one_of(PLANS)),
    f"{FAMILY}_TOKEN_THRESHOLD": ("token_threshold", _tokens),
    f"{FAMILY}_SERIAL_PASS_THROUGH": ("serial_pass_through", _switch),
    f"{FAMILY}_LOG_LEVEL": ("log_level", _one_of(LOG_LEVELS)),
    f"{FAMILY}_JOURNAL_DIR": ("journal_folder", _folder),
}


_ADDRESS = r"[0-9]+(\.[0-9]+){3}|[0-9a-fA-F]*:[0-9a-fA-F]*:[0-9a-fA-F:.]*"
_URL = rf"(tcp|udp|sctp)://({_ADDRESS}|\[({_ADDRESS})\]):[0-9]+"
#: The variables that the kubelet sets in a pod for each Service of its namespace, with the form of their values. If a
#: Service has the family's name, so have its variables. Source: Kubernetes, "Service", environment variables.
_LINKS = {
    re.compile(rf"({FAMILY}|{HABITUAL})([A-Z0-9_]*){name}"): re.compile(value)
    for name, value in {
        "_SERVICE_HOST": _ADDRESS,
        "_SERVICE_PORT(_[A-Z0-9_]+)?": "[0-9]+",
        "_PORT": _URL,
        "_PORT_[0-9]+_(TCP|UDP|SCTP)": _URL,
        "_PORT_[0-9]+_(TCP|UDP|SCTP)_PROTO": "tcp|udp|sctp",
        "_PORT_[0-9]+_(TCP|UDP|SCTP)_PORT": "[0-9]+",
        "_PORT_[0-9]+_(TCP|UDP|SCTP)_ADDR": _ADDRESS,
    }.items()
}


def is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes made this variable. The value counts too, so that a misspelt setting does not pass as a link."""
    return any(link.fullmatch(name) and form.fullmatch(value) for link, form in _LINKS.items())


def strict_was_asked_for(environ: Mapping[str, str]) -> bool:
    """Whether strict is on. It is for the case that the other settings cannot be parsed."""
    return environ.get(f"{FAMILY}_STRICT", "").strip().lower() in ON


def outcome(strict: bool, otherwise: str = "vLLM runs stock here") -> str:
    """What a failure leads to, in the words of every message about one. `otherwise` is what happens without strict."""
    return "vLLM stops here, as strict asks" if strict else otherwise


def load(environ: Mapping[str, str]) -> Settings:
    """Parse the family out of `environ`.

    An empty value counts as not set, as for vLLM's own variables in a compose file. Variables that Kubernetes sets for a
    Service are ignored. Raises SettingsError for an unknown name of the family and for a value that is not allowed.
    """
    found: dict[str, Any] = {}
    for name, value in environ.items():
        if not name.startswith((FAMILY, HABITUAL)) or is_service_link(name, value):
            continue
        if name.startswith(HABITUAL):
            allowed = f"the family is {FAMILY}…; did you mean {FAMILY}{name.removeprefix(HABITUAL)}?"
            raise SettingsError(name, value, allowed)
        if name != FAMILY and not name.startswith(f"{FAMILY}_"):
            continue
        if (name, value.strip().lower()) == (f"{FAMILY}_PLAN", RETIRED_PLAN) or (name == RETIRED_NAME and value):
            found["retired"] = (
                *found.get("retired", ()),
                f"{name}={value} does nothing any more, the plan is measured",
            )
            continue
        if name not in _VARIABLES and name != RETIRED_NAME:
            raise SettingsError(name, value, f"no such setting; the family has {', '.join(_VARIABLES)}")
        if value == "":
            continue
        field, parse = _VARIABLES[name]
        found[field] = parse(name, value)
    settings = Settings(**found)
    if not settings.enabled or settings.journal_folder:
        return settings
    return replace(settings, journal_folder=default_journal_folder())
