"""The systemd unit and the Kubernetes objects of the documents: whether they are valid, and whether what they
start serves."""

from __future__ import annotations

import configparser
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from chatwright.commands.serve import ServeConfig
from chatwright.serve.operation.keys import line_for
from support.documented import HOST, KEY, Replica, block, free_port, placed, start
from support.person import Person

pytestmark = pytest.mark.skipif(os.name != "posix", reason="these programs are POSIX's")
NOWHERE = {"HOME": "/proc/none", "XDG_CACHE_HOME": "", "XDG_DATA_HOME": ""}
"""A process that has no home directory."""


@contextmanager
def served(command: str, cwd: Path, env: Mapping[str, str]) -> Iterator[Replica]:
    """The server that a documented command starts."""
    made = start(command, cwd, port=free_port(), env={**NOWHERE, **env})
    try:
        made.wait_until_ready()
        yield made
    finally:
        made.end(kill=True)


# ---- systemd -----------------------------------------------------------------------------------------------


@pytest.fixture
def unit() -> str:
    return block("guide/serving.md", "A systemd unit")


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="NO SYSTEMD-ANALYZE: the documented unit goes unverified"
)
def test_the_unit_is_valid(unit: str, tmp_path: Path) -> None:
    program = tmp_path / "chatwright"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    file = tmp_path / "chatwright.service"
    file.write_text(placed(unit, {"/opt/chatwright/bin/chatwright": str(program)}))
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(file)], capture_output=True, text=True, timeout=60
    )
    ours = [line for line in checked.stderr.splitlines() if "chatwright" in line]
    assert (checked.returncode, ours) == (0, [])


def test_the_unit_gives_the_server_time_to_end(unit: str) -> None:
    assert int(settings(unit)["TimeoutStopSec"]) > ServeConfig().drain_seconds + 5


def settings(unit: str) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(unit)
    return dict(parser["Service"])


@pytest.mark.slow
def test_what_the_unit_starts_serves(unit: str, tmp_path: Path, chat_dir: Path) -> None:
    folders = {one: tmp_path / one for one in ("cache", "lib", "log")}
    for folder in folders.values():
        folder.mkdir()
    keys = tmp_path / "keys.txt"
    keys.write_text(line_for("anna", KEY))
    unit = placed(
        unit,
        {
            "/srv/models/mine": str(chat_dir),
            "/etc/chatwright/keys.txt": str(keys),
            "/var/cache/chatwright": str(folders["cache"]),
            "/var/lib/chatwright": str(folders["lib"]),
            "/var/log/chatwright": str(folders["log"]),
        },
    )
    given = settings(unit)
    env = dict(one.split("=", 1) for one in shlex.split(given["Environment"]))
    with served(given["ExecStart"], tmp_path, env) as server:
        auth = {"host": HOST, "authorization": f"Bearer {KEY}"}
        with Person(server.url, headers=auth) as person:
            person.model = person.get("/chat/models")["models"][0]["name"]
            made = person.begin("hello")
            assert person.answer(made["id"], made["leaf"], settings={"max_tokens": 3})["type"] == "done"
        assert server.end() == 0
    assert (folders["lib"] / "conversations.db").is_file() and (
        folders["log"] / "access.jsonl"
    ).stat().st_size > 0


# ---- Kubernetes --------------------------------------------------------------------------------------------


@pytest.fixture
def objects() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(block("guide/serving-many.md", "## Kubernetes")))


def test_the_objects_are_valid(objects: list[dict[str, Any]]) -> None:
    reason = "NO KUBERNETES-VALIDATE: the documented objects go unvalidated; pip install kubernetes-validate"
    validator = pytest.importorskip("kubernetes_validate", reason=reason)
    assert [one["kind"] for one in objects] == ["Secret", "Deployment", "Service"]
    for one in objects:
        validator.validate(one, validator.latest_version(), strict=True)


def container_of(objects: list[dict[str, Any]]) -> dict[str, Any]:
    (container,) = objects[1]["spec"]["template"]["spec"]["containers"]
    return dict(container)


def test_the_objects_belong_together(objects: list[dict[str, Any]]) -> None:
    secret, deployment, service = objects
    pod, container = deployment["spec"]["template"], container_of(objects)
    assert (
        deployment["spec"]["selector"]["matchLabels"]
        == pod["metadata"]["labels"]
        == service["spec"]["selector"]
    )
    reference = container["env"][0]["valueFrom"]["secretKeyRef"]
    assert reference["name"] == secret["metadata"]["name"] and reference["key"] in secret["stringData"]
    (port,) = container["ports"]
    assert port["containerPort"] == ServeConfig().port
    probes = [container[kind]["httpGet"]["port"] for kind in ("readinessProbe", "livenessProbe")]
    assert {*probes, service["spec"]["ports"][0]["targetPort"]} == {port["name"]}
    assert pod["spec"]["terminationGracePeriodSeconds"] > ServeConfig().drain_seconds + 5
    assert {one["name"] for one in container["volumeMounts"]} == {
        one["name"] for one in pod["spec"]["volumes"]
    }


@pytest.mark.slow
def test_what_the_container_starts_serves(
    objects: list[dict[str, Any]], tmp_path: Path, chat_dir: Path
) -> None:
    container = container_of(objects)
    key = objects[0]["stringData"]["keys"]
    command = placed(shlex.join(container["command"]), {"/models/mine": str(chat_dir)})
    (cache,) = [one["value"] for one in container["env"] if one["name"] == "CHATWRIGHT_CACHE"]
    assert cache in {one["mountPath"] for one in container["volumeMounts"]}
    env = {"CHATWRIGHT_API_KEYS": key, "CHATWRIGHT_CACHE": str(tmp_path / "cache")}
    with served(command, tmp_path, env) as server:
        for probe in ("readinessProbe", "livenessProbe"):
            assert httpx.get(f"{server.url}{container[probe]['httpGet']['path']}").status_code == 200
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        models = httpx.get(f"{server.url}/v1/models", headers={"authorization": f"Bearer {key}"}).json()
        assert [one["id"] for one in models["data"]] == ["mine"]
        assert server.end() == 0
