"""Answers that are scored, over a daemon's socket: prompts are served and saved with an answer, and
a look says how good that was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kvshare_store.config import StoreConfig
from kvshare_store.daemon.client import Client, plan_request
from kvshare_store.daemon.protocol import Looked, NextLook, Quality
from kvshare_store.namespace import Namespace
from kvshare_store.plan import LABEL_CHARS, Outcome, ReusePlan
from kvshare_store.quality.score import SCORED_TOKENS
from kvshare_store.save.second_looks import Look
from kvshare_store.save.staging import Reuse, contexts_of_rows, reuse_of
from kvshare_store.tensors.layout import KVLayout
from tests.support.daemons import ClientDriver, Daemon
from tests.support.page import EVIL, PARENT, TENANT, World, byte_tokenizer, page_url
from tests.support.stores import SMALL

SETTINGS: dict[str, Any] = {"second_look_control": 1.0}
"""Every answer that was served in full is a control."""
GOOD = (0.0,) * SCORED_TOKENS
BAD = (0.0, 0.0, 0.75, 1.5, *GOOD[4:])


class Judged(ClientDriver):
    """An engine that looks at each answer as soon as it is stored."""

    def __init__(self, client: Client, namespace: Namespace) -> None:
        super().__init__(client, namespace)

    def served(self, tokens: Sequence[int], request: str) -> ReusePlan:
        """Plan and finish a request that has a name."""
        array = np.asarray(tokens, np.int32)
        asked = self.client.send(plan_request(array, self.namespace, None, request))
        plan = msgspec.convert(self.client.receive(asked, 20.0), ReusePlan)
        if not plan.declined:
            left = plan.tokens - plan.reused
            self.client.finish(plan.lease, Outcome(plan.exact, plan.reused - plan.exact, left))
        return plan

    def answered(
        self,
        tokens: Sequence[int],
        answer: Sequence[int],
        regrets: Callable[[ReusePlan], tuple[float, ...]] = lambda _: GOOD,
        *,
        request: str = "",
        greedy: bool = True,
    ) -> ReusePlan:
        """Serve a prompt, save it with its answer, and say of that how good it was. `regrets`: of
        each of its first tokens, by the plan that it was served on."""
        plan = self.served(tokens, request)
        self.save(tokens, None if plan.declined else plan)
        used = reuse_of(plan)
        self._extend(tokens, answer, used, request=request, greedy=greedy)
        look = self.client.call(NextLook((self.namespace.digest,), scores=True))
        if look is not None:
            given = msgspec.convert(look, Look)
            self.client.call(
                Looked(given.node, given.stamp, "computed", regrets(plan)[: given.score])
            )
        return plan

    def _extend(
        self, tokens: Sequence[int], answer: Sequence[int], used: Reuse, *, request: str,
        greedy: bool,
    ) -> None:  # fmt: skip
        whole, begins = [*tokens, *answer], len(tokens)
        exact = min((span.start for span in used.spans if not span.exact), default=len(whole))
        reuse = Reuse(generation=used.generation, contexts=contexts_of_rows(used, begins))
        staged = self.client.stage_bytes(
            np.asarray(whole, np.int32).tobytes(), self.namespace, reuse, begins,
            greedy=greedy, request=request,
        )  # fmt: skip
        self.commit_rows(staged, whole, exact)


@contextlib.contextmanager
def judged_world(folder: Path) -> Iterator[World]:
    """A daemon that has scored answers of one class under a bound: the edited ones all diverge.
    `child` is one of those."""
    settings = SMALL | SETTINGS | {"http": "127.0.0.1:0", "quality_bound": 0.5}
    config = StoreConfig(home=str(folder / "home"), **settings)
    tokenizer = byte_tokenizer(folder / "tokenizer")
    space = Namespace("org/<model>", KVLayout(2, 1, 4, "float32"), tenant=TENANT,
                      tokenizer=str(tokenizer))  # fmt: skip
    with Daemon(config) as daemon, Client(config.home_path) as client:
        made = World(daemon, page_url(config.home_path), space, "", "", "")
        engine = Judged(client, space)
        for day in range(24):
            engine.answered(
                made.tokens(PARENT.replace("3 May", f"{10 + day} June")),
                made.tokens(f" On day {day} we do sell them."),
                lambda plan: BAD if plan.generation else GOOD,
                request=f"chat-{day}-{EVIL}"[:LABEL_CHARS],
            )
        client.flush()
        worst = client.call(Quality())["worst"]
        yield made._replace(child=worst[0]["node"])
