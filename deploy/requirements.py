"""Print what an image of the daemon installs: what pyproject.toml asks for, without torch.

    python deploy/requirements.py EXTRA...

Engines need torch and have it; the daemon never imports it, and without it the image is a tenth
of the size. The extra `semantic` asks for torch by itself.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

_PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def requirements(extras: Iterable[str]) -> list[str]:
    """One requirement each; `KeyError` for an extra that does not exist."""
    project = tomllib.loads(_PROJECT.read_text())["project"]
    asked = [line for line in project["dependencies"] if not line.startswith("torch>")]
    return asked + [line for extra in extras for line in project["optional-dependencies"][extra]]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))
