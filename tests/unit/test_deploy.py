"""Dockerfile, compose.yaml and deploy/kubernetes: read, merged and run as far as that goes without Docker or a cluster.

hadolint and kubectl are asked where they are installed. Elsewhere the checks that matter here are made by hand: the schema
below is the part of Kubernetes' own that these files use, and knows no other field.
"""

from __future__ import annotations

import copy
import json
import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys
from typing import Any

import jsonschema
import pytest
import yaml

from devtools import bundle
from tests.conftest import REPOSITORY

KUBERNETES = REPOSITORY / "deploy" / "kubernetes"
FOLDER = "/opt/overlay"
#: By what Kubernetes merges a list; any other list is replaced.
MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "volumeMounts": "mountPath",
}
VERSION = re.compile(r"v\d+\.\d+\.\d+")
#: The Dockerfile's example of a version that somebody else may want.
OTHER_VERSION = "v0.32.0"


def load(path: pathlib.Path) -> dict[str, Any]:
    found = yaml.safe_load(path.read_text())
    assert isinstance(found, dict)
    return found


# ---------------------------------------------------------------- Dockerfile


def stages() -> list[list[tuple[str, str]]]:
    """Instruction and argument, by stage; what comes before the first stage belongs to none."""
    text = "\n".join(
        line for line in (REPOSITORY / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")
    )
    found: list[list[tuple[str, str]]] = []
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            instruction, _, argument = line.strip().partition(" ")
            if instruction == "FROM":
                found.append([])
            if found:
                found[-1].append((instruction, " ".join(argument.split())))
    return found


def before_the_stages() -> dict[str, str]:
    """The arguments of the whole build with their defaults."""
    text = (REPOSITORY / "Dockerfile").read_text().partition("\nFROM ")[0]
    return dict(line.removeprefix("ARG ").split("=", 1) for line in text.splitlines() if line.startswith("ARG "))


def test_the_image_is_vllms_own_and_one_layer() -> None:
    *_, last = stages()
    assert last[0] == ("FROM", "${BASE}")
    assert before_the_stages()["BASE"] == "vllm/vllm-openai:${VLLM_VERSION}"
    # No USER, ENTRYPOINT, CMD, HEALTHCHECK, WORKDIR, EXPOSE: they stay vLLM's. LABEL and ENV make no layer.
    assert sorted(instruction for instruction, _ in last[1:]) == ["COPY", "ENV", "LABEL"]
    arguments = dict(last)
    assert arguments["COPY"] == f"--from=folder {FOLDER} {FOLDER}"
    assert arguments["ENV"].startswith(f"PYTHONPATH={FOLDER}$")
    assert "licenses" in arguments["LABEL"] and "title" in arguments["LABEL"]


def test_versions_are_pinned_and_agree() -> None:
    folder, carrier, _ = stages()
    assert dict(folder)["ARG"] == f"BUNDLE=dist/{bundle.NAME}"
    assert carrier[0][1] == "${CARRIER_BASE} AS carrier"
    assert re.fullmatch(r"busybox:\d[\d.]*", before_the_stages()["CARRIER_BASE"])
    files = [REPOSITORY / "Dockerfile", REPOSITORY / "compose.yaml", *KUBERNETES.rglob("*.yaml")]
    found = {version for path in files for version in VERSION.findall(path.read_text()) if version != OTHER_VERSION}
    assert len(files) >= 7 and len(found) == 1, found


def test_the_build_needs_no_network_and_no_frontend_from_a_registry() -> None:
    text = (REPOSITORY / "Dockerfile").read_text()
    assert not re.search(r"\b(pip|curl|wget|apt(-get)?|git)\b", re.sub(r"(?m)^#.*", "", text))
    assert "syntax=" not in text and "ADD" not in {instruction for stage in stages() for instruction, _ in stage}


def test_what_the_build_does_to_the_folder(tmp_path: pathlib.Path) -> None:
    """Its command, run here, on a bundle that has lost its modes."""
    folder, _, _ = bundle.make(tmp_path / "dist")
    (folder / "overlay" / "files.py").chmod(0o666)
    (run,) = (argument for instruction, argument in stages()[0] if instruction == "RUN")
    script = run.replace(FOLDER, str(folder)).replace("python3", sys.executable)
    subprocess.run(["sh", "-c", script], check=True)
    compiled = list(folder.rglob("*.pyc"))
    assert len(compiled) == len(list(folder.rglob("*.py"))) and {path.suffix for path in compiled} == {".pyc"}
    for path in compiled:
        assert path.read_bytes()[4:8] == b"\x01\x00\x00\x00", f"{path}: the byte code would be checked against a time"
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()} == {0o644}
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_dir()} == {0o755}


def test_the_build_copies_the_bundle_and_gets_nothing_else() -> None:
    copied = [
        argument.split()
        for stage in stages()
        for instruction, argument in stage
        if instruction == "COPY" and not argument.startswith("--from")
    ]
    assert copied == [["${BUNDLE}", FOLDER]]
    ignored = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored == ["*", "!dist/vllm-overlay-*", "**/__pycache__"]
    assert pathlib.PurePosixPath(f"dist/{bundle.NAME}").match(ignored[1][1:])


def test_hadolint() -> None:
    places = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    hadolint = shutil.which("hadolint", path=places) or pytest.skip("hadolint, of the dev extra, is not installed here")
    result = subprocess.run([hadolint, REPOSITORY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


# ---------------------------------------------------------------- compose.yaml


def test_the_two_services_differ_in_the_overlay_and_in_where_they_are() -> None:
    services = load(REPOSITORY / "compose.yaml")["services"]
    stock, overlay = copy.deepcopy(services["stock"]), copy.deepcopy(services["overlay"])
    assert overlay.pop("environment") == {"PYTHONPATH": FOLDER}
    assert overlay["volumes"].pop() == f"${{OVERLAY_FOLDER:-./dist/{bundle.NAME}}}:{FOLDER}:ro"
    for service, port, gpu in ((stock, "8000:8000", "${STOCK_GPU:-0}"), (overlay, "8001:8000", "${OVERLAY_GPU:-1}")):
        assert service.pop("ports") == [port]
        (device,) = service.pop("deploy")["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "device_ids": [gpu], "capabilities": ["gpu"]}
    assert stock.pop("profiles") == ["stock", "both"] and overlay.pop("profiles") == ["overlay", "both"]
    assert stock == overlay and stock["command"] == ["${MODEL:-Qwen/Qwen3.5-35B-A3B}"] and stock["ipc"] == "host"


# ---------------------------------------------------------------- Kubernetes


def merge(base: Any, patch: Any, field: str = "") -> Any:
    """A strategic merge, as far as a Deployment's pod needs it."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return {
            name: merge(base[name], patch[name], name)
            if name in base and name in patch
            else patch.get(name, base.get(name))
            for name in {**base, **patch}
        }
    if isinstance(base, list) and field in MERGE_KEYS:
        key = MERGE_KEYS[field]
        patched = {item[key]: item for item in patch}
        known = {item[key] for item in base}
        merged = [merge(item, patched[item[key]]) if item[key] in patched else item for item in base]
        return [item for item in patch if item[key] not in known] + merged
    return patch


def closed(properties: dict[str, Any], required: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def many(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


TEXT, NUMBER, SWITCH = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
TEXTS = {"type": "object", "additionalProperties": TEXT}
QUANTITY = {"type": "string", "pattern": r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti|k|M|G|T)?$"}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}
MOUNT = closed(
    {"name": NAME, "mountPath": {"type": "string", "pattern": "^/[^:]*$"}, "subPath": TEXT, "readOnly": SWITCH},
    ("name", "mountPath"),
)
SECCOMP = closed({"type": {"enum": ["RuntimeDefault", "Localhost", "Unconfined"]}}, ("type",))
CONTAINER = closed(
    {
        "name": NAME,
        "image": TEXT,
        "command": many(TEXT),
        "env": many(closed({"name": TEXT, "value": TEXT}, ("name",))),
        "ports": many(closed({"name": {**NAME, "maxLength": 15}, "containerPort": NUMBER}, ("containerPort",))),
        "readinessProbe": closed({"httpGet": closed({"path": TEXT, "port": NUMBER}, ("port",))}),
        "resources": closed({"requests": QUANTITIES, "limits": QUANTITIES}),
        "securityContext": closed(
            {
                "runAsNonRoot": SWITCH,
                "seccompProfile": SECCOMP,
                "allowPrivilegeEscalation": SWITCH,
                "readOnlyRootFilesystem": SWITCH,
                "capabilities": closed({"drop": many(TEXT)}),
            }
        ),
        "volumeMounts": many(MOUNT),
    },
    ("name",),
)
VOLUME = {
    "oneOf": [
        closed({"name": NAME, "emptyDir": closed({"medium": TEXT, "sizeLimit": QUANTITY})}, ("name", "emptyDir")),
        closed(
            {"name": NAME, "persistentVolumeClaim": closed({"claimName": NAME}, ("claimName",))},
            ("name", "persistentVolumeClaim"),
        ),
    ]
}
DEPLOYMENT = closed(
    {
        "apiVersion": {"const": "apps/v1"},
        "kind": {"const": "Deployment"},
        "metadata": closed({"name": NAME, "labels": TEXTS}, ("name",)),
        "spec": closed(
            {
                "replicas": NUMBER,
                "selector": closed({"matchLabels": TEXTS}),
                "progressDeadlineSeconds": NUMBER,
                "template": closed(
                    {
                        "metadata": closed({"labels": TEXTS}),
                        "spec": closed(
                            {
                                "securityContext": closed(
                                    {
                                        "runAsNonRoot": SWITCH,
                                        "runAsUser": NUMBER,
                                        "fsGroup": NUMBER,
                                        "seccompProfile": SECCOMP,
                                    }
                                ),
                                "containers": many(CONTAINER),
                                "initContainers": many(CONTAINER),
                                "volumes": many(VOLUME),
                            },
                            ("containers",),
                        ),
                    }
                ),
            },
            ("selector", "template"),
        ),
    },
    ("apiVersion", "kind", "metadata", "spec"),
)


@pytest.fixture
def merged() -> dict[str, Any]:
    """The example's Deployment as the component leaves it; kustomize also puts a registry before the image's name."""
    base, patch = load(KUBERNETES / "example" / "deployment.yaml"), load(KUBERNETES / "component" / "overlay.yaml")
    patch["metadata"]["name"] = base["metadata"]["name"]
    result = merge(base, patch)
    (image,) = load(KUBERNETES / "example" / "kustomization.yaml")["images"]
    (init,) = result["spec"]["template"]["spec"]["initContainers"]
    assert init["image"].partition(":")[0] == image["name"]
    init["image"] = f"{image['newName']}:{image['newTag']}"
    return result  # type: ignore[no-any-return]


def test_what_kubernetes_gets_is_valid(merged: dict[str, Any]) -> None:
    jsonschema.validate(load(KUBERNETES / "example" / "deployment.yaml"), DEPLOYMENT)
    jsonschema.validate(merged, DEPLOYMENT)
    pod = merged["spec"]["template"]["spec"]
    volumes = [volume["name"] for volume in pod["volumes"]]
    assert len(volumes) == len(set(volumes))
    for container in (*pod["containers"], *pod["initContainers"]):
        paths = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert len(paths) == len(set(paths))
        assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
    assert merged["spec"]["selector"]["matchLabels"] == merged["spec"]["template"]["metadata"]["labels"]


def test_the_schema_refuses_what_kubernetes_would(merged: dict[str, Any]) -> None:
    for spoil in (
        lambda pod: pod["containers"][0]["env"].append({"name": "PYTHONPATH", "value": 1}),
        lambda pod: pod["containers"][0]["volumeMounts"][0].update(readonly=True),
        lambda pod: pod["volumes"][0].pop("emptyDir"),
        lambda pod: pod["initContainers"][0].update(name="vllm_overlay"),
    ):
        wrong = copy.deepcopy(merged)
        spoil(wrong["spec"]["template"]["spec"])
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, DEPLOYMENT)


def not_restricted(pod: dict[str, Any]) -> list[str]:
    """What Pod Security's level "restricted" has against a pod: its rules, as far as this schema has their fields.
    Source: kubernetes.io, "Pod Security Standards"."""
    found = []
    of_pod = pod.get("securityContext", {})
    for container in (*pod["containers"], *pod.get("initContainers", ())):
        own = container.get("securityContext", {})
        both = {**of_pod, **own}
        found += [
            f"{container['name']}: {rule}"
            for rule, holds in {
                "runAsNonRoot": both.get("runAsNonRoot") is True and both.get("runAsUser") != 0,
                "seccompProfile": both.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
                "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
                "capabilities": "ALL" in own.get("capabilities", {}).get("drop", ()),
            }.items()
            if not holds
        ]
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    return found + [f"volume {one['name']}" for one in pod["volumes"] if not set(one) - {"name"} <= allowed]


def test_pod_security_restricted_lets_the_pod_in(merged: dict[str, Any]) -> None:
    pod = merged["spec"]["template"]["spec"]
    assert not_restricted(pod) == []
    # The init container meets it alone, in a pod that says nothing.
    (init,) = pod["initContainers"]
    assert not_restricted({"containers": [init], "volumes": []}) == []
    del init["securityContext"]["seccompProfile"], init["securityContext"]["capabilities"]
    assert not_restricted({"containers": [init], "volumes": []}) == [
        "vllm-overlay: seccompProfile",
        "vllm-overlay: capabilities",
    ]
    # It names no user: the image has a number, which `runAsNonRoot` can check.
    (user,) = (argument for instruction, argument in stages()[1] if instruction == "USER")
    assert int(user.partition(":")[0]) > 0


def test_the_component_adds_and_changes_nothing_else(merged: dict[str, Any]) -> None:
    pod = merged["spec"]["template"]["spec"]
    (vllm,) = pod["containers"]
    assert vllm["env"].pop(0) == {"name": "PYTHONPATH", "value": FOLDER}
    mount = vllm["volumeMounts"].pop(0)
    assert mount == {"name": "vllm-overlay", "mountPath": FOLDER, "subPath": "overlay", "readOnly": True}
    assert pod["volumes"].pop(0)["name"] == "vllm-overlay"
    del pod["initContainers"]
    assert merged == load(KUBERNETES / "example" / "deployment.yaml")


def test_the_component_meets_the_charts_engines_and_nothing_else() -> None:
    (patch,) = load(KUBERNETES / "component" / "kustomization.yaml")["patches"]
    name = re.compile(patch["target"]["name"])
    assert name.fullmatch("release-qwen-deployment-vllm") and not name.fullmatch("release-deployment-router")
    example = load(KUBERNETES / "example" / "kustomization.yaml")
    for reference in (*example["resources"], *example["components"]):
        assert (KUBERNETES / "example" / reference).exists()
    assert (KUBERNETES / "component" / patch["path"]).is_file()


def test_the_charts_values_say_the_same_as_the_component() -> None:
    (model,) = load(KUBERNETES / "production-stack-values.yaml")["servingEngineSpec"]["modelSpec"]
    pod = load(KUBERNETES / "component" / "overlay.yaml")["spec"]["template"]["spec"]
    (vllm,), (init,) = pod["containers"], pod["initContainers"]
    assert model["env"] == vllm["env"] and model["extraVolumeMounts"] == vllm["volumeMounts"]
    assert model["extraVolumes"] == pod["volumes"]
    assert model["initContainer"]["extraVolumeMounts"] == init["volumeMounts"]
    assert model["initContainer"]["command"] == init["command"]


def test_the_init_container_leaves_a_folder_that_others_cannot_write(tmp_path: pathlib.Path) -> None:
    """Its command, run twice, as when a pod's init containers start again with the same volume."""
    pod = load(KUBERNETES / "component" / "overlay.yaml")["spec"]["template"]["spec"]
    shell, option, script = pod["initContainers"][0]["command"]
    source, volume = tmp_path / "image", tmp_path / "volume"
    (source / "overlay").mkdir(parents=True)
    (source / "overlay" / "files.py").write_text("1")
    volume.mkdir()
    volume.chmod(0o777)  # an emptyDir
    script = script.replace(FOLDER, str(source)).replace("/volume", str(volume))
    (volume / "overlay").mkdir()
    (volume / "overlay" / "of an earlier start.py").touch()
    for _ in range(2):
        subprocess.run([shell, option, script], check=True, umask=0)
        paths = sorted(path.relative_to(volume).as_posix() for path in volume.rglob("*"))
        assert paths == ["overlay", "overlay/overlay", "overlay/overlay/files.py"]
    assert not [path for path in volume.rglob("*") if path.stat().st_mode & 0o022]
    (mount,) = pod["containers"][0]["volumeMounts"]
    assert mount["subPath"] == "overlay"


def test_kustomize_comes_to_the_same(merged: dict[str, Any]) -> None:
    kubectl = shutil.which("kubectl") or pytest.skip("kubectl is not installed here")
    result = subprocess.run([kubectl, "kustomize", KUBERNETES / "example"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.dumps(yaml.safe_load(result.stdout), sort_keys=True) == json.dumps(merged, sort_keys=True)
