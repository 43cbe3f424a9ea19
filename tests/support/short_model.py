"""The small model with a few of its layers, for tests of what happens to rows.

Where rows come from and go to does not depend on how many layers there are, but what a step costs
does. The first layers and the last ones together still answer with words.
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from examples.engines.small_model import CONVERSION, locked, prepare_model

FIRST, LAST = 5, 3
"""Layers that are kept, of the small model's thirty."""
_PREFIX = "model.layers."


@functools.cache
def short_model() -> Path:
    """Folder of the shortened model, beside the small model's; made if it is not there."""
    whole = prepare_model()
    folder = whole.with_name(f"{whole.name}-{CONVERSION}-{FIRST}-{LAST}")
    with locked(whole.with_name(f".{folder.name}.lock")):
        if not folder.exists():
            partial = whole.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(whole, partial, ignore=shutil.ignore_patterns("*.safetensors"))
            _shorten(whole, partial)
            partial.rename(folder)
    return folder


def _shorten(whole: Path, folder: Path) -> None:
    config = json.loads((whole / "config.json").read_text())
    layers = config["num_hidden_layers"]
    kept = [*range(FIRST), *range(layers - LAST, layers)]
    names = {f"{_PREFIX}{old}.": f"{_PREFIX}{new}." for new, old in enumerate(kept)}
    weights = {}
    with safe_open(whole / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - a file, not a dictionary
            if not name.startswith(_PREFIX):
                weights[name] = file.get_tensor(name)
                continue
            old = name[: name.index(".", len(_PREFIX)) + 1]
            if old in names:
                weights[name.replace(old, names[old], 1)] = file.get_tensor(name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config["num_hidden_layers"] = len(kept)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
