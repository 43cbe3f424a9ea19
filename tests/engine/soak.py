"""Random traffic: whatever coincides, every answer must be the one without KVShare."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from kvshare_store.errors import LeaseError
from tests.engine.harness import Answer, Engine, Keep, random_runs

POLICIES = (None, None, None, "exact", "off")
NEW_TOKENS = 8


def related_prompts(text: list[int]) -> list[list[int]]:
    """Prompts with a common beginning, some also with a common end."""
    cut = [text[:60], text[:93], text[:124], [*text[:80], *text[20:35]]]
    return [*cut, *([token + 1 for token in prompt] for prompt in cut)]


class Traffic:
    """Batches of requests for a few stored prompts, under random limits and with random faults."""

    def __init__(self, engine: Engine, prompts: list[list[int]], seed: int) -> None:
        self.engine = engine
        self.prompts = prompts
        self.random = random.Random(seed)
        self.full = [engine.ask(prompt, policy="off", max_tokens=NEW_TOKENS) for prompt in prompts]
        for prompt in prompts:
            engine.store(prompt, policy="exact", max_tokens=1)

    def batch(self) -> None:
        """Send requests that arrive while others run; some are aborted before they are answered."""
        choose, engine = self.random.choice, self.engine
        if choose((True, False)):
            engine.scheduler.reset_prefix_cache()
        seed = self.random.random()
        tokens, rows = choose((None, None, 8, 24, 64)), choose((None, None, 2, 3, 5))
        with ExitStack() as limits:
            limits.enter_context(engine.keeping(lambda length: self._keep(length, seed)))
            limits.enter_context(engine.budget(tokens, rows))
            limits.enter_context(engine.room(min(engine.free_blocks, choose((90, 16, 11, 6)))))
            limits.enter_context(self._failing(choose((0.0, 0.0, 0.3))))
            asked, answers = self._serve(self.random.randint(3, 9))
        for name, (prompt, length) in asked.items():
            full = self.full[prompt]
            plain = Answer(full.tokens[:length], full.logprobs[:length])
            assert answers[name][0].agrees(plain), (name, prompt, length, tokens, rows, seed)

    def _keep(self, length: int, seed: float) -> Keep:
        return [(0, length - 1)] if seed < 0.3 else random_runs(length, int(seed * 1e6) + length)

    @contextmanager
    def _failing(self, chance: float) -> Iterator[None]:
        worker, load = self.engine.worker, self.engine.worker.load_one

        def flaky(spec: Any) -> int:
            if self.random.random() < chance:
                raise LeaseError("forced")
            return load(spec)

        worker.load_one = flaky
        try:
            yield
        finally:
            worker.load_one = load

    def _serve(self, count: int) -> tuple[dict[str, tuple[int, int]], dict[str, list[Answer]]]:
        """The requests that were not aborted (prompt and length of the answer), and all answers."""
        asked: dict[str, tuple[int, int]] = {}
        while count or self.engine.core.has_unfinished_requests():
            while count and self.random.random() < 0.5:
                prompt, length = (
                    self.random.randrange(len(self.prompts)),
                    self.random.choice((1, 8)),
                )
                policy = self.random.choice(POLICIES)
                name = self.engine.add(self.prompts[prompt], max_tokens=length, policy=policy)
                asked[name] = (prompt, length)
                count -= 1
            self.engine.step()
            if asked and self.random.random() < 0.04:
                gone = self.random.choice(list(asked))
                self.engine.abort(gone)
                del asked[gone]
        return asked, self.engine.drain()
