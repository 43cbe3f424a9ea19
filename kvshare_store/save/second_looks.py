"""Edited nodes that an idle engine may compute in full: which are worth it, and who computes which.

docs/design/second_look.md says what becomes of them.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Collection
from typing import Annotated, Literal

import msgspec

from kvshare_store.bounded import Latest
from kvshare_store.commit.node_store import NodeStore
from kvshare_store.config import StoreConfig
from kvshare_store.nodes.node import Node
from kvshare_store.observability.metrics import Metrics
from kvshare_store.quality.parts import Served, served_of
from kvshare_store.quality.quality import Quality
from kvshare_store.quality.traffic import edit_of
from kvshare_store.save.answers import Answers
from kvshare_store.save.scoring import Answered, Given, Scoring
from kvshare_store.save.staging import Reuse, Save
from kvshare_store.save.verdicts import counted_as

LOOK_SECONDS = 120.0
"""How long a prompt belongs to the engine that it was given to."""
_MOST = 256
_LATE_S = 600.0
"""Nodes that waited so long are given no more."""
_HALF_LIFE_S = 60.0
"""After so long the next turn of a conversation is half as likely."""
_ANSWERED_S = 60.0
"""A prompt that has no answer by then gets none."""
_TRIES = 3
_REMEMBERED = 4096
"""Edited nodes of which it is known how their rows came about."""
_CONTROLS = 16
"""Answers served in full that wait to be scored."""
_BEFORE_CONTROL = 9
"""Edited prompts that are given before a control, where both wait."""

End = Literal["computed", "dropped", "declined"]


class Look(msgspec.Struct, frozen=True):
    """A stored prompt to compute in full. An engine of the release before scores nothing."""

    node: str
    stamp: Annotated[int, msgspec.Meta(ge=0)]
    """Of the form that was given."""
    namespace: str
    """Its digest."""
    tokens: bytes
    """int32, native byte order: the prompt, and its answer where there is one."""
    answer: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Where the answer begins."""
    score: Annotated[int, msgspec.Meta(ge=0)] = 0
    """How many tokens of the answer are to be scored."""
    control: bool = False
    """The prompt was served in full and is computed only for its score: from the first token on,
    and nothing is stored."""
    policy: str = ""
    """What the score counts as: the policy that the prompt was served under, or `control`. A daemon
    of the release before does not say."""
    greedy: bool = False
    """The answer's tokens were chosen so."""
    edit: str = ""
    """The kind of edit that its score counts under; empty of controls, and from a daemon of the
    release before."""
    bound: float | None = None
    """The daemon's `quality_bound`. A daemon of the release before does not say."""


class _Entry(msgspec.Struct):
    """A node of the queue."""

    since: float
    answer: Answered
    """Where it has none, one may be on the way."""
    computed: bool = False
    """An engine has computed it: the answer is scored once only."""
    tries: int = 0
    owner: str = ""
    until: float = 0.0
    """When the lease of `owner` ends."""


class SecondLooks:
    """The queue of one store. Thread-safe under the lock of the nodes; nothing of it is durable."""

    def __init__(
        self,
        config: StoreConfig,
        nodes: NodeStore,
        answers: Answers,
        metrics: Metrics,
        quality: Quality,
    ) -> None:
        self._control_share = config.second_look_control
        self._nodes = nodes
        self._answers = answers
        self._metrics = metrics
        self.clock: Callable[[], float] = time.monotonic
        self._scoring = Scoring(nodes.tree, quality)
        self._entries: Latest[str, _Entry] = Latest(_MOST)
        """By node, the oldest first."""
        self._controls: Latest[str, _Entry] = Latest(_CONTROLS)
        """Exact nodes whose answers are scored only, the oldest first."""
        self._served: Latest[str, Served] = Latest(_REMEMBERED)
        """By edited node, in the queue or not."""
        self._since_control = 0
        self._hearing = threading.Lock()
        """Held while an engine's words on an answer are taken in, so that a purge forgets these
        too. Taken before the lock of the nodes."""
        self.verdicts = self._scoring.verdicts

    def reload(self, config: StoreConfig) -> None:
        """Go on by other settings."""
        self._control_share = config.second_look_control

    def __len__(self) -> int:
        return len(self._entries)

    # --- what is stored ----------------------------------------------------------------------

    def stored(self, node: Node, save: Save) -> None:
        """A node is in the tree. Hold the lock.

        Nodes of adapters are not queued; of exact ones only some with answers are, as controls.
        """
        base, adapter = save.base, bool(save.namespace.lora)
        if node.exact:
            if save.extends and not adapter and random.random() < self._control_share:
                self._controls[node.id] = _Entry(self.clock(), Answered.of(save, Served()))
            return
        if base is None or base.id in self._nodes.tree:
            self._metrics.add("edited_stored")
        if adapter:
            self._metrics.add("looks_declined")
            return
        served = self._served[node.id] = self._how(node, save)
        self._entries[node.id] = _Entry(self.clock(), Answered.of(save, served))

    def _how(self, node: Node, save: Save) -> Served:
        """How the rows of an edited prompt came about; the save of its answer does not say."""
        known = self._served.get(save.base.id) if save.base is not None else None
        if known is not None:
            return known
        parent = self._served.get(node.parent) if node.parent is not None else None
        spans = None if save.extends else save.reuse.spans
        return served_of(node, save.extends or node.length, spans, parent)

    def settled(self, edited: Node, exact: Node) -> None:
        """The exact twin of an edited node is in the tree. Hold the lock."""
        self._entries.pop(edited.id, None)
        self._metrics.add("settled")
        self.verdicts.settled(exact.id, exact.namespace)

    # --- who computes what -------------------------------------------------------------------

    def next(
        self, owner: str, namespaces: Collection[str], *, working: bool, scores: bool = False
    ) -> Look | None:
        """The node that is worth most, leased to `owner`; None if there is none.

        Of these namespaces only. `working`: engines have requests, whose answers may be on the way.
        `scores`: the engine scores answers, so that it may get a control.
        """
        with self._nodes.lock:
            now = self.clock()
            found = self._worth_most(now, namespaces, working=working)
            if scores and (found is None or self._since_control >= _BEFORE_CONTROL):
                control = self._control(now, namespaces)
                if control is not None:
                    self._since_control = 0
                    self._metrics.add("looks_control")
                    return self._give(owner, now, control, self._controls[control.id])
            if found is None:
                return None
            self._since_control += 1
            self._metrics.add("looks")
            return self._give(owner, now, found, self._entries[found.id])

    def _worth_most(self, now: float, namespaces: Collection[str], *, working: bool) -> Node | None:
        ranked = sorted(self._ranked(now), key=lambda found: -found[0])
        for _, node in ranked:
            entry = self._entries[node.id]
            early = working and not entry.answer.begins and now - entry.since < _ANSWERED_S
            if early or now < entry.until or node.namespace not in namespaces:
                continue
            if self._answers.base(node.namespace, node.tokens, Reuse()) is not None:
                del self._entries[node.id]  # a longer exact node begins with it
                continue
            return node
        return None

    def _control(self, now: float, namespaces: Collection[str]) -> Node | None:
        """The oldest control that nobody has; those that are gone or too old are forgotten."""
        for name, entry in list(self._controls.items()):
            node = self._nodes.tree.get(name)
            if node is None or now - entry.since > _LATE_S:
                del self._controls[name]
            elif now >= entry.until and node.namespace in namespaces:
                return node
        return None

    def _give(self, owner: str, now: float, node: Node, entry: _Entry) -> Look:
        entry.owner, entry.until, entry.tries = owner, now + LOOK_SECONDS, entry.tries + 1
        scored = Answered() if entry.computed else entry.answer
        given = self._scoring.give(owner, now, entry.until, node, scored)
        return Look(
            node.id,
            node.stamp,
            node.namespace,
            node.token_bytes,
            entry.answer.begins,
            scored.scored(node),
            node.exact,
            counted_as(node.policy or "exact", control=node.exact),
            entry.answer.greedy,
            "" if node.exact else edit_of(given.traffic),
            self._scoring.bound,
        )

    def _ranked(self, now: float) -> list[tuple[float, Node]]:
        """Nodes that are worth it, with their expected uses; the others are forgotten."""
        found = []
        for name, entry in list(self._entries.items()):
            node = self._nodes.tree.get(name)
            uses = self._expected(node, now - entry.since) if node is not None else 0.0
            over = now - entry.since > _LATE_S or (entry.tries >= _TRIES and now >= entry.until)
            if node is None or uses <= 0 or over:
                del self._entries[name]
            else:
                found.append((uses, node))
        return found

    def _expected(self, node: Node, age: float) -> float:
        """How often the node will be built on: what is saved for each token that is computed."""
        tree = self._nodes.tree
        below = {*tree.users(_last_block(node)), *tree.children(node.id)} - {node.id}
        if not below:
            return float(0.5 ** (age / _HALF_LIFE_S))
        found = (tree.get(name) for name in below)
        leaves = sum(tree.user_count(_last_block(one)) == 1 for one in found if one is not None)
        return leaves - 1.0  # one of them is this conversation, which has gone on

    def ended(
        self, owner: str, node: str, stamp: int, end: End, regrets: tuple[float, ...] = ()
    ) -> None:
        """An engine has ended a look. One that is not its own any more is ignored.

        `computed`: the exact node is on its way. `dropped`: somebody else may take it. `regrets`:
        how good the answer was.
        """
        with self._hearing:
            given = self._ended(owner, node, stamp, end)
            if given is not None and end == "computed" and regrets:
                self._scoring.scored(given, regrets)

    def _ended(self, owner: str, node: str, stamp: int, end: End) -> Given | None:
        """The look that has ended; None if the engine had none, which counts nowhere."""
        with self._nodes.lock:
            given = self._scoring.take(owner, node, stamp)
            if given is not None and end != "computed":
                self._metrics.add(f"looks_{end}")
            self._requeue(owner, node, stamp, end)
            return given

    def _requeue(self, owner: str, node: str, stamp: int, end: End) -> None:
        """What becomes of a node whose look has ended. Hold the lock."""
        queue = self._controls if node in self._controls else self._entries
        entry = queue.get(node)
        if entry is None or entry.owner != owner or not self._same(node, stamp):
            return
        if end == "declined" or (end == "computed" and queue is self._controls):
            del queue[node]
        elif end == "computed":
            entry.computed = True
        else:
            entry.owner, entry.until, entry.tries = "", 0.0, entry.tries - 1

    def _same(self, node: str, stamp: int) -> bool:
        here = self._nodes.tree.get(node)
        return here is not None and here.stamp == stamp

    def forget(self, namespace: str) -> None:
        """A namespace was purged: nothing is remembered of its looks, nor heard of those that
        engines have."""
        with self._hearing, self._nodes.lock:
            self._scoring.forget(namespace)
            self._served.clear()  # names of nodes and numbers: what others lose is a share

    def reap(self, dead_owners: Collection[str]) -> None:
        """What engines had that are gone may be given to others."""
        with self._nodes.lock:
            self._scoring.reap(dead_owners)
            for entry in (*self._entries.values(), *self._controls.values()):
                if entry.owner in dead_owners:
                    entry.owner, entry.until = "", 0.0


def _last_block(node: Node) -> str:
    """It holds the row of the node's last token, which whoever goes on from there uses too."""
    return node.blocks[node.segments[-1].block]
