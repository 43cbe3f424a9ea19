"""What deploy/ says of users, files, settings and metrics holds together."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.requirements import requirements
from kvshare_store.config import load_settings, unknown_variables
from tests.support.documents import ROOT
from tests.support.needs import need

DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
USER = "10001"
HOME, TOKEN = "/var/lib/kvshare", "/run/kvshare/token"


def documents(folder: str) -> Iterator[dict[str, Any]]:
    for path in sorted((DEPLOY / folder).glob("*.y*ml")):
        yield from yaml.safe_load_all(path.read_text())


def settings_of(variables: dict[str, str]) -> Any:
    """What a daemon makes of its environment; it refuses values, and ignores names, that it does
    not know."""
    assert unknown_variables(variables) == []
    return load_settings(environ=variables).config


# --- images ---------------------------------------------------------------------------------------


def test_an_image_gets_what_it_copies() -> None:
    """Each file is there, and .dockerignore lets it through."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        name
        for names in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
        for name in names.split()
    }
    assert "kvshare_store" in copied
    assert copied == let_in
    assert [name for name in copied if not (ROOT / name).exists()] == []


def test_an_image_of_the_daemon_needs_no_torch() -> None:
    (extras,) = re.findall(r'^ARG EXTRAS="(.*)"', DOCKERFILE, re.MULTILINE)
    asked = requirements(extras.split())
    assert len(asked) > 12
    assert [line for line in asked if line.startswith("torch")] == []


def test_commands_run_without_torch(tmp_path: Path) -> None:
    """As in the daemon's image. One process for all of them: it is the imports that may fail."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from kvshare_store import Store, StoreConfig\n"
        "import kvshare_store.daemon.server, kvshare_store.http.serving\n"
        f"Store(StoreConfig(home={str(tmp_path / 'home')!r}, host_bytes=1 << 20)).close()\n"
        "from kvshare_store.cli.main import main\n"
        "for line in sys.argv[1:]:\n"
        "    try: main(line.split())\n"
        "    except SystemExit as end: assert end.code == 0, line\n"
    )
    home = f"--home {tmp_path / 'home'}"
    lines = [f"{name} {home}" for name in ("stats", "ls", "check", "gc", "config")]
    done = subprocess.run(
        [sys.executable, "-c", code, *lines], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# --- compose --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return loaded


def test_services_have_what_they_name(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for service in services.values():
        assert set(service.get("depends_on", ())) <= set(services)
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            there = (DEPLOY / source).exists() if source.startswith(".") else source in compose[
                "volumes"
            ]  # fmt: skip
            assert there, volume
        if "build" in service:
            assert f" AS {service['build']['target']}\n" in DOCKERFILE


def test_nothing_listens_beyond_the_machine(compose: dict[str, Any]) -> None:
    ports = [port for it in compose["services"].values() for port in it.get("ports", ())]
    assert len(ports) >= 4
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_daemon_and_engine_are_one_user_without_rights(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert f"ARG USER_ID={USER}\n" in DOCKERFILE
    for name in ("daemon", "engine", "prometheus"):
        assert services[name]["user"] == f"${{USER_ID:-{USER}}}:${{USER_ID:-{USER}}}"
        assert services[name]["cap_drop"] == ["ALL"]
    assert not {"ipc", "shm_size", "pid", "privileged"} & set(services["engine"])


def test_the_daemon_of_compose_takes_its_settings(compose: dict[str, Any]) -> None:
    daemon = compose["services"]["daemon"]
    given = dict(daemon["environment"])
    given["KVSHARE_POLICY"] = re.sub(r"\$\{POLICY:-(\w+)\}", r"\1", given["KVSHARE_POLICY"])
    config = settings_of(given)
    assert config.http_token == TOKEN
    assert int(daemon["mem_limit"].removesuffix("g")) << 30 > config.host_bytes + (1 << 30)


def test_prometheus_asks_what_the_daemon_answers(compose: dict[str, Any]) -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    assert jobs["kvshare"]["authorization"]["credentials_file"] == TOKEN
    port = compose["services"]["daemon"]["environment"]["KVSHARE_HTTP"].rpartition(":")[2]
    assert jobs["kvshare"]["static_configs"] == [{"targets": [f"daemon:{port}"]}]
    assert all((DEPLOY / "prometheus" / name).exists() for name in config["rule_files"])


PREPARED = f"""
set -e
mount -t tmpfs none /var/lib; mount -t tmpfs none /run
sh {DEPLOY}/prepare.sh /run/more; first=$(cat {TOKEN})
sh {DEPLOY}/prepare.sh; test "$first" = "$(cat {TOKEN})"
stat -c '%n %a %u' {HOME} /run/kvshare {TOKEN} /run/more
echo chosen > /run/chosen; TOKEN=/run/chosen sh {DEPLOY}/prepare.sh; cat {TOKEN}
"""


def test_folders_and_token_are_the_users_alone() -> None:
    """And a token that is there stays, unless another is given."""
    need(os.geteuid() == 0 and shutil.which("unshare") is not None, "root, and unshare")
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", PREPARED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{HOME} 700 {USER}",
        f"/run/kvshare 700 {USER}",
        f"{TOKEN} 600 {USER}",
        f"/run/more 700 {USER}",
        "chosen",
    ]


# --- Kubernetes -----------------------------------------------------------------------------------


def pods() -> dict[str, dict[str, Any]]:
    return {it["kind"]: it for it in documents("kubernetes") if "template" in it.get("spec", {})}


@pytest.mark.parametrize("kind", ["DaemonSet", "Deployment"])
def test_a_pod_has_what_its_containers_name(kind: str) -> None:
    spec = pods()[kind]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    pod = spec["template"]["spec"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in (*pod["containers"], *pod.get("initContainers", ())):
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert "ALL" in container["securityContext"]["capabilities"]["drop"]
        ports = {port["name"] for port in container.get("ports", ())}
        for name in ("startupProbe", "livenessProbe", "readinessProbe"):
            if name in container:
                assert container[name]["httpGet"]["port"] in ports
    (container,) = pod["containers"]
    assert str(container["securityContext"]["runAsUser"]) == USER
    (home,) = (volume for volume in pod["volumes"] if volume["name"] == "home")
    assert home["hostPath"]["path"] == HOME
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted["home"] == HOME


def test_the_daemon_of_kubernetes_takes_its_settings() -> None:
    (data,) = (it["data"] for it in documents("kubernetes") if it["kind"] == "ConfigMap")
    config = settings_of(data)
    assert (config.home, config.http_token) == (HOME, TOKEN)
    (daemon,) = pods()["DaemonSet"]["spec"]["template"]["spec"]["containers"]
    port = daemon["ports"][0]["containerPort"]
    assert config.http == f"0.0.0.0:{port}", "probes come from outside the pod"
    limit = int(daemon["resources"]["limits"]["memory"].removesuffix("Gi")) << 30
    assert limit >= config.host_bytes + (2 << 30)


def test_engines_of_other_containers_start_no_daemon() -> None:
    (engine,) = pods()["Deployment"]["spec"]["template"]["spec"]["containers"]
    config = settings_of({it["name"]: it["value"] for it in engine["env"]})
    assert (config.home, config.start_daemon) == (HOME, False)
    assert "KVSHARE_START_DAEMON=false" in DOCKERFILE


def test_kustomize_names_every_file() -> None:
    folder = DEPLOY / "kubernetes"
    config = yaml.safe_load((folder / "kustomization.yaml").read_text())
    there = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(config["resources"]) == there
    specs = [pod["spec"]["template"]["spec"] for pod in pods().values()]
    images = {container["image"] for spec in specs for container in spec["containers"]}
    assert {image["name"] for image in config["images"]} == images


# --- systemd --------------------------------------------------------------------------------------


def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    need(shutil.which("systemd-analyze") is not None, "systemd-analyze (package systemd)")
    unit = (DEPLOY / "systemd" / "kvshare.service").read_text()
    assert "Type=notify\n" in unit
    assert "WatchdogSec=" in unit
    (command,) = re.findall(r"^ExecStart=(\S+)", unit, re.MULTILINE)
    there = unit.replace(command, str(Path(sys.executable).with_name("kvshare")))
    (tmp_path / "kvshare.service").write_text(there)
    done = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / "kvshare.service"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
