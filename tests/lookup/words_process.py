"""The embedding process with an embedder that needs no model: tokens are their own words.

`words_process.py HOW PARENT`; HOW is `well`, `idle` (in the kernel's idle class), `fail` (each
prompt ends it), `hang`, `short`, `nan` or `long` (a prompt that begins with token 1 gets no vector
that is one), or a folder, in which it notes each prompt.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from kvshare_store.lookup.embedding_process import (
    end_with,
    private_streams,
    run_when_idle,
    serve,
)
from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.vectors import Vector
from kvshare_store.testing.embedders import WordEmbedder

how, parent = sys.argv[1:]


def words(folder: str, tokens: Tokens) -> str:
    if how == "fail":
        sys.exit("this embedder always fails")
    if how == "hang":
        time.sleep(1000)
    if how not in ("well", "idle", "short", "nan", "long"):
        with (Path(how) / "prompts").open("a") as notes:
            notes.write(f"{tokens[0]}\n")
    return " ".join(map(str, tokens.tolist()))


class OddEmbedder(WordEmbedder):
    """Fails at one prompt in the way that is asked for."""

    def embed(self, text: str) -> Vector:
        vector = super().embed(text)
        if not text.startswith("1 "):
            return vector
        if how == "short":
            return vector[:10]
        return vector * np.float32({"nan": "nan", "long": 3.0}.get(how, 1.0))


if __name__ == "__main__":
    end_with(int(parent))
    if how == "idle":
        run_when_idle()
    requests, answers = private_streams()
    print("what a library prints must not end up between the answers")
    serve(OddEmbedder(), requests, answers, words)
