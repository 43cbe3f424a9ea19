"""The embedding process with an embedder that needs no model: tokens are their own words.

`words_process.py HOW PARENT`; HOW is `well`, `idle` (in the kernel's idle class), `fail` (each
prompt ends it), `nan` or `long` (vectors that are none) or a folder, in which it notes each prompt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from kvshare_store.lookup.embedders import Vector
from kvshare_store.lookup.embedding_process import (
    end_with,
    private_streams,
    run_when_idle,
    serve,
)
from kvshare_store.testing.embedders import WordEmbedder
from kvshare_store.tree.edits import Tokens

how, parent = sys.argv[1:]


def words(folder: str, tokens: Tokens) -> str:
    if how == "fail":
        sys.exit("this embedder always fails")
    if how not in ("well", "idle", "nan", "long"):
        with (Path(how) / "prompts").open("a") as notes:
            notes.write(f"{tokens[0]}\n")
    return " ".join(map(str, tokens.tolist()))


class Bad(WordEmbedder):
    """What a broken model makes of every text."""

    def embed(self, text: str) -> Vector:
        return super().embed(text) * np.float32("nan" if how == "nan" else 3.0)


if __name__ == "__main__":
    end_with(int(parent))
    if how == "idle":
        run_when_idle()
    requests, answers = private_streams()
    print("what a library prints must not end up between the answers")
    serve(Bad() if how in ("nan", "long") else WordEmbedder(), requests, answers, words)
