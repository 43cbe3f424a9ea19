"""KVShareModel: a Hugging Face causal LM that reuses rows of similar prompts."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kvshare_connectors.transformers.decode import generate
from kvshare_connectors.transformers.engine import RowEngine
from kvshare_connectors.transformers.identity import namespace_of
from kvshare_connectors.transformers.rows import RowCache
from kvshare_connectors.transformers.types import Model, Tokenizer
from torch import Tensor

from kvshare_store.config import load_config
from kvshare_store.errors import KVShareError, UnsupportedError
from kvshare_store.namespace import Namespace
from kvshare_store.plan import ReusePlan
from kvshare_store.plan.spans import gaps
from kvshare_store.store import Store

log = logging.getLogger("kvshare")


@dataclass(frozen=True)
class Served:
    """A prompt with all of its rows."""

    tokens: tuple[int, ...]
    cache: RowCache
    logits: Tensor
    """float32 `[vocab]`: of the last position."""
    plan: ReusePlan
    """What was reused; `declined` says why nothing was."""
    namespace: Namespace

    @property
    def reused(self) -> int:
        """Rows that came from the store."""
        return 0 if self.plan.declined else self.plan.reused


@dataclass(frozen=True)
class Answer:
    """A greedy answer, and the cost of its prompt."""

    text: str
    tokens: list[int]
    prompt_tokens: int
    reused: int
    seconds: float
    """To the first token: lookup, loading, prefill."""


class KVShareModel:
    """A model with a store. Not thread-safe. Use as a context manager, or call `close`.

    `UnsupportedError` for a model that KVShare declines; `capability.py` lists why.
    """

    def __init__(self, model: Model, store: Store, tokenizer: Tokenizer | None = None) -> None:
        self.engine = RowEngine(model)
        self.store = store
        self.tokenizer = tokenizer
        folder = str(getattr(tokenizer, "name_or_path", ""))
        self.namespace = namespace_of(model, folder if Path(folder).is_dir() else "")

    @classmethod
    def load(
        cls, model: str | Path, *, dtype: torch.dtype | None = None, **settings: Any
    ) -> KVShareModel:
        """A Hugging Face folder or name, its tokenizer, and a store with `StoreConfig`'s settings.

        `BusyError` when another process, such as an engine's daemon, owns the store's home.
        """
        from transformers import AutoTokenizer  # noqa: PLC0415 - seconds

        engine = RowEngine.load(model, dtype)
        store = Store(load_config(settings))
        return cls(engine.model, store, AutoTokenizer.from_pretrained(str(model)))

    # --- serve -------------------------------------------------------------------------------

    def prefill(
        self,
        tokens: Sequence[int],
        *,
        policy: str | None = None,
        tenant: str = "",
        source: bytes = b"",
    ) -> Served:
        """The prompt's rows: reused ones are loaded, the others computed in one forward.

        Any failure of the store is a miss: the prompt is then computed in full. `source`: who sends
        it, hashed (`namespace.Sources`).
        """
        namespace = self.namespace.for_tenant(tenant)
        plan = self.store.plan(tokens, namespace, policy=policy, source=source)
        cache = self.engine.cache(len(tokens))
        if not plan.declined:
            try:
                self._load(plan, cache)
            except KVShareError as error:
                log.warning("kvshare: a plan could not be loaded, computing in full: %s", error)
                plan = ReusePlan(
                    namespace=plan.namespace, tokens=plan.tokens, declined=f"load_{error.kind}"
                )
        start = time.perf_counter()
        fresh = _fresh(plan)
        logits = self.engine.partial(cache, tokens, fresh)
        self.store.observe(namespace.model_digest, len(fresh), time.perf_counter() - start)
        return Served(tuple(tokens), cache, logits, plan, namespace)

    def _load(self, plan: ReusePlan, cache: RowCache) -> None:
        edited = self.store.load(plan, self.engine.rope)
        cache.rows[:, :, 0, edited.positions] = edited.rows.to(cache.rows.device)

    def save(self, served: Served) -> str | None:
        """Store the rows that were computed. Returns the prompt's node, or None if it is already
        stored."""
        rows = served.cache.rows[:, :, 0, _fresh(served.plan)].contiguous().cpu()
        reused = None if served.plan.declined else served.plan
        buffer = rows.view(torch.uint8).numpy()
        return self.store.save(served.tokens, served.namespace, buffer, reused)

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 128,
        *,
        stop: Collection[int] = (),
        policy: str | None = None,
        tenant: str = "",
        save: bool = True,
    ) -> Answer:
        """A greedy answer. Text is put into the model's chat template; token ids are taken as is.

        It ends before a token of `stop`, or before the tokenizer's end token when `stop` is empty.
        """
        tokens = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        start = time.perf_counter()
        served = self.prefill(tokens, policy=policy, tenant=tenant)
        seconds = time.perf_counter() - start
        if save:
            try:
                self.save(served)
            except KVShareError as error:
                log.warning("kvshare: the prompt is not stored: %s", error)
        end = getattr(self.tokenizer, "eos_token_id", None)
        answer = generate(
            self.engine, [served], max_new_tokens, stop or (() if end is None else (end,))
        )[0]
        text = self.tokenizer.decode(answer) if self.tokenizer is not None else ""
        return Answer(text, answer, len(tokens), served.reused, seconds)

    def encode(self, text: str) -> list[int]:
        """A message as token ids, in the chat template when the tokenizer has one.

        `UnsupportedError` if the model was given no tokenizer.
        """
        if self.tokenizer is None:
            raise UnsupportedError("there is no tokenizer for text: pass token ids instead")
        if self.tokenizer.chat_template is None:
            return list(self.tokenizer.encode(text))
        message = [{"role": "user", "content": text}]
        return list(
            self.tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_dict=False
            )
        )

    def close(self) -> None:
        """Make everything saved durable and release the store's home."""
        self.store.close()

    def __enter__(self) -> KVShareModel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _fresh(plan: ReusePlan) -> Tensor:
    """Positions that the plan leaves to compute, int64, ascending."""
    runs = gaps(() if plan.declined else plan.spans, 0, plan.tokens)
    return torch.cat([torch.arange(run.start, run.stop) for run in runs])
