"""What deploy/ runs, asks for and mounts is what KVShare has: commands, addresses, the socket."""

from __future__ import annotations

import re
import shlex
from pathlib import PurePosixPath
from typing import Any

import pytest
import typer.main
import yaml
from kvshare_connectors.vllm.launch import split, vllm_arguments
from starlette.routing import Route

from deploy.schemas import manifests, problems
from kvshare_store.cli.main import app
from kvshare_store.config import FIELDS, StoreConfig, load_settings, unknown_variables
from kvshare_store.daemon.address import socket_path
from kvshare_store.http.app import routes
from kvshare_store.http.asking import Asking
from kvshare_store.http.guard import OPEN
from kvshare_store.http.history import History
from tests.project.test_deploy import DEPLOY, DOCKERFILE, HOME, documents, pods
from tests.support.page import Numb

DAEMON, ENGINE = "kvshare", "kvshare-vllm"
"""The images."""


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The command that `kvshare WORDS` would run, and its options; a word that it does not take is
    an error."""
    group = typer.main.get_command(app)
    context = group.make_context("kvshare", list(words))
    left = [*context._protected_args, *context.args]
    name, command, rest = group.resolve_command(context, left)  # type: ignore[attr-defined]
    return name, command.make_context(name, rest).params


def stage_of(stage: str) -> str:
    """The lines of one image in the Dockerfile, each in one piece."""
    whole = DOCKERFILE.replace("\\\n", "")
    (text,) = re.findall(rf"^FROM \S+ AS {stage}\n(.*?)(?=^FROM |\Z)", whole, re.M | re.S)
    return str(text)


def words_of(stage: str, instruction: str) -> list[str]:
    """The words of an instruction of an image."""
    (found,) = re.findall(rf"^{instruction} (\[.*\])$", stage_of(stage), re.MULTILINE)
    return list(yaml.safe_load(found))


def variables(stage: str) -> dict[str, str]:
    """What an image puts into the environment."""
    lines = re.findall(r"^ENV (.*)$", stage_of(stage), re.MULTILINE)
    return dict(word.split("=", 1) for line in lines for word in shlex.split(line))


def container(kind: str) -> dict[str, Any]:
    (found,) = pods()[kind]["spec"]["template"]["spec"]["containers"]
    return dict(found)


def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"])


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


# --- commands -------------------------------------------------------------------------------------


def test_every_daemon_is_started_by_a_command_that_there_is() -> None:
    image = words_of("daemon", "ENTRYPOINT")
    unit = (DEPLOY / "systemd" / "kvshare.service").read_text()
    (line,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    commands = [
        image + words_of("daemon", "CMD"),
        image + container("DaemonSet")["args"],
        [PurePosixPath(shlex.split(line)[0]).name, *shlex.split(line)[1:]],
    ]
    assert "command" not in compose()["daemon"], "the image's own"
    for command in commands:
        assert command[0] == "kvshare"
        name, options = parsed(command[1:])
        assert name == "serve"
        assert options["home"] in (None, HOME)


def test_every_engine_is_started_by_a_command_that_there_is(plain_environment: None) -> None:
    image = words_of("engine", "ENTRYPOINT")
    assert image == ["kvshare", "vllm", "serve"]
    of_compose = [re.sub(r"\$\{\w+:[-?]([^}]*)\}", r"\1", word)
                  for word in compose()["engine"]["command"]]  # fmt: skip
    for words in (container("Deployment")["args"], of_compose):
        request = split(words)
        assert request.settings == {"policy": "balanced"}
        assert len(request.rest) == 1, "the model, and nothing that vLLM would have to know"
        assert "KVShareConnector" in " ".join(vllm_arguments(request))


def test_a_word_that_no_command_takes_is_found() -> None:
    with pytest.raises(Exception, match="No such option"):
        parsed(["serve", "--port", "1"])
    with pytest.raises(Exception, match="No such command"):
        parsed(["server"])


# --- settings -------------------------------------------------------------------------------------


def test_every_variable_is_a_setting(plain_environment: None) -> None:
    """Of images, Compose and manifests; each has a value that is taken."""
    services = compose()
    given = [
        variables("daemon"), variables("engine"),
        *(one.get("environment", {}) for one in services.values()),
        *(one["data"] for one in documents("kubernetes") if one["kind"] == "ConfigMap"),
        {one["name"]: one["value"] for one in container("Deployment")["env"]},
    ]  # fmt: skip
    ours = [
        {name: re.sub(r"\$\{\w+:-(\w+)\}", r"\1", value) for name, value in one.items()
         if name.startswith("KVSHARE_")}
        for one in given
    ]  # fmt: skip
    assert sum(map(bool, ours)) == 5
    for one in ours:
        assert unknown_variables(one) == []
        assert {name.removeprefix("KVSHARE_").lower() for name in one} <= set(FIELDS)
        load_settings(environ=one)


# --- addresses ------------------------------------------------------------------------------------


def test_probes_ask_what_the_daemon_answers_without_a_token() -> None:
    daemon = container("DaemonSet")
    ports = {port["name"]: port["containerPort"] for port in daemon["ports"]}
    (settings,) = (it["data"] for it in documents("kubernetes") if it["kind"] == "ConfigMap")
    asked = {name: daemon[name]["httpGet"] for name in daemon if name.endswith("Probe")}
    assert {name: probe["path"] for name, probe in asked.items()} == {
        "startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz",
    }  # fmt: skip
    assert {ports[probe["port"]] for probe in asked.values()} == {port_of(settings["KVSHARE_HTTP"])}
    there = {route.path for route in routes(Asking(Numb(), History())).routes
             if isinstance(route, Route)}  # fmt: skip
    for path in (probe["path"] for probe in asked.values()):
        assert path in there
        assert path in OPEN


def test_the_images_health_check_asks_where_the_daemon_listens() -> None:
    (check,) = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w+)", DOCKERFILE)
    assert check == (str(port_of(variables("daemon")["KVSHARE_HTTP"])), "/readyz")
    daemon = compose()["daemon"]
    assert port_of(daemon["environment"]["KVSHARE_HTTP"]) == int(check[0]), (
        "it replaces the image's"
    )
    assert daemon["ports"] == [f"127.0.0.1:{check[0]}:{check[0]}"]


# --- what is shared -------------------------------------------------------------------------------


def test_daemon_and_engines_meet_at_one_socket() -> None:
    """Both mount the folder that has it, the daemon may write there, and rows need nothing else."""
    socket = socket_path(StoreConfig(home=HOME).home_path)
    for kind in ("DaemonSet", "Deployment"):
        pod = pods()[kind]["spec"]["template"]["spec"]
        (mount,) = [one for one in container(kind)["volumeMounts"] if one["name"] == "home"]
        assert socket.is_relative_to(mount["mountPath"])
        assert not mount.get("readOnly")
        (volume,) = [one for one in pod["volumes"] if one["name"] == "home"]
        assert socket.is_relative_to(volume["hostPath"]["path"])
        assert not {"hostIPC", "hostPID", "hostNetwork"} & pod.keys()
    for name in ("daemon", "engine"):
        assert f"store:{HOME}" in compose()[name]["volumes"]


def test_images_are_those_that_the_documents_build() -> None:
    built = re.findall(
        r"--target (\w+) -t ([\w-]+):", (DEPLOY.parent / "docs/deploying.md").read_text()
    )
    assert dict(built) == {"daemon": DAEMON, "engine": ENGINE}
    assert container("DaemonSet")["image"] == compose()["daemon"]["image"] == DAEMON
    assert container("Deployment")["image"] == compose()["engine"]["image"] == ENGINE
    assert all(f" AS {stage}\n" in DOCKERFILE for stage, _ in built)


# --- schemas --------------------------------------------------------------------------------------


def test_what_a_schema_does_not_know_is_a_problem() -> None:
    """`make schemas` has those of Kubernetes and of Compose; here a small one."""
    shared = {"$defs": {"spec": {"properties": {"x": {"type": "integer"}},
                                 "additionalProperties": False}}}  # fmt: skip
    schema = {"properties": {"spec": {"$ref": "/api/_definitions.json#/$defs/spec"}}}
    assert problems({"spec": {"x": 1}}, schema, shared) == []
    assert problems({"spec": {"x": "1"}}, schema, shared) == [
        "$.spec.x: '1' is not of type 'integer'"
    ]
    (found,) = problems({"spec": {"y": 1}}, schema, shared)
    assert found.startswith("$.spec: Additional properties are not allowed")


def test_every_manifest_is_checked() -> None:
    checked = {file for file, _ in manifests()}
    assert checked == {path.name for path in (DEPLOY / "kubernetes").glob("*.yaml")} - {
        "kustomization.yaml"
    }
