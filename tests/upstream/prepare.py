"""Everything that vLLM's own tests need and a checkout does not hold, in `.upstream/`.

    python -m tests.upstream.prepare

The tests come from vLLM's source distribution on the package index. Nothing of it is built.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from examples.engines.small_model import prepare_model
from tests.upstream.models import make_models

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / ".upstream"
SITE = FOLDER / "site"
"""Packages that only these tests import."""

_VERSION = "0.32.0"
_SHA256 = "d2c957d5eee3d0985012151315ddc62cbe0cd368fc96a5fc3510438d9dddf2ad"
_ASKED_FOR_METADATA = (
    "packaging",
    "semantic_version",
    "setuptools_rust",
    "setuptools_scm",
    "vcs-versioning",
)
"""Packages that vLLM's setup.py imports before it can report its name."""
_WANTED = (
    "__init__.py",
    "utils.py",
    "v1/__init__.py",
    "v1/utils.py",
    "v1/attention/utils.py",
    "v1/core",
    "v1/kv_connector",
    "v1/simple_kv_offload/__init__.py",
    "v1/simple_kv_offload/test_scheduler.py",
)
_TORCHVISION = "torchvision==0.28.0"
"""Imported by the code of a multimodal model whose configuration the tests read."""


def prepare() -> None:
    """Fill `.upstream/` from the start."""
    for folder in ("tests", "site", "models"):
        shutil.rmtree(FOLDER / folder, ignore_errors=True)
    unpack_tests(source_distribution(), FOLDER / "tests")
    shutil.copy(HERE / "vllm_conftest.py", FOLDER / "tests" / "conftest.py")
    _pip("install", "--no-deps", "--target", str(SITE), _TORCHVISION)
    declare_operators(SITE / "torchvision" / "_meta_registrations.py")
    make_models(FOLDER / "models", prepare_model())


def source_distribution() -> Path:
    """vLLM's archive, downloaded once. `SystemExit` if its hash is not the reviewed one."""
    archive = FOLDER / "download" / f"vllm-{_VERSION}.tar.gz"
    if not archive.exists():
        _download(archive.parent)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != _SHA256:
        sys.exit(f"{archive} has SHA-256 {found}, expected {_SHA256}: delete it and try again")
    return archive


def _download(folder: Path) -> None:
    """By pip, which runs the setup.py for the metadata alone."""
    build = FOLDER / "build"
    _pip("install", "--no-deps", "--upgrade", "--target", str(build), *_ASKED_FOR_METADATA)
    environment = {
        "PYTHONPATH": str(build),
        "VLLM_TARGET_DEVICE": "empty",
        "VLLM_VERSION_OVERRIDE": _VERSION,
    }
    alone = ("--no-deps", "--no-binary", "vllm", "--no-build-isolation")
    _pip("download", *alone, "--dest", str(folder), f"vllm=={_VERSION}", environment=environment)


def unpack_tests(archive: Path, target: Path) -> None:
    """Take the wanted part of the archive's folder `tests`."""
    root = f"vllm-{_VERSION}/tests/"
    wanted = tuple(root + path for path in _WANTED)
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.startswith(wanted):
                member.name = member.name.removeprefix(root)
                tar.extract(member, target, filter="data")
    (target / "v1" / "attention" / "__init__.py").touch()


def declare_operators(file: Path) -> None:
    """Make torchvision's wheel, which is built for CUDA, importable beside a torch without CUDA.

    Its import needs two operators to exist; no test runs them.
    """
    text = file.read_text()
    before = '@torch.library.register_fake("torchvision::nms")'
    declared = (
        '_declared = torch.library.Library("torchvision", "FRAGMENT")\n'
        "if not torchvision.extension._has_ops():\n"
        '    for _name in ("nms", "qnms"):\n'
        '        _declared.define(f"{_name}(Tensor a, Tensor b, float c) -> Tensor")\n\n\n'
    )
    file.write_text(text.replace(before, declared + before))


def _pip(*arguments: str, environment: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    subprocess.run(command, check=True, env=os.environ | (environment or {}))


if __name__ == "__main__":
    prepare()
