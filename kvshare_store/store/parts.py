"""What a store is made of, from its opening to its end."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from typing import Any, Self

from kvshare_store.commit.repository import Repository
from kvshare_store.commit.rewrite import Rewriter
from kvshare_store.config import StoreConfig
from kvshare_store.errors import KVShareError
from kvshare_store.lookup.cost import Costs
from kvshare_store.lookup.open_plans import OpenPlans
from kvshare_store.lookup.outcomes import Outcomes
from kvshare_store.lookup.plan_maker import PlanMaker
from kvshare_store.lookup.serving import Serving
from kvshare_store.lookup.sources import Sources
from kvshare_store.lookup.steering import open_quality, terms_of
from kvshare_store.lookup.text_vectors import TextVectors, wanted
from kvshare_store.maintenance.janitor import Janitor
from kvshare_store.maintenance.others_purges import OthersPurges
from kvshare_store.maintenance.sharing import Sharing
from kvshare_store.maintenance.stats import stats_of
from kvshare_store.namespace.limits import TenantLimits
from kvshare_store.save.saving import Saving

log = logging.getLogger("kvshare")


class Parts:
    """The parts of one open store. Use as a context manager, or call `close`."""

    def __init__(self, config: StoreConfig, *, visiting: bool = False) -> None:
        """`visiting`: see `Repository`."""
        self.config = config
        self._since = time.time()
        wanted(config)
        self.costs = Costs()
        self.far_costs = Costs(far=True)
        """Of engines on other machines."""
        with ExitStack() as opened:  # whoever tries again must find the home unlocked
            self._put_together(config, Repository(config, visiting=visiting), opened)
            opened.pop_all()

    def _put_together(self, config: StoreConfig, repository: Repository, opened: ExitStack) -> None:
        """Make all parts. `opened` closes those that have threads."""
        opened.callback(repository.close)
        self.repository = repository
        self.metrics = repository.metrics
        self.nodes = nodes = repository.nodes
        self.tree = nodes.tree
        self.blocks = repository.blocks
        self._queue = repository.queue
        self._rewriter = Rewriter(repository)
        plans = OpenPlans()
        self.text = TextVectors(config, nodes, self._rewriter, self.metrics)
        opened.callback(self.text.close)
        self.quality = open_quality(config, self.metrics, repository.keys)
        costs = {False: self.costs, True: self.far_costs}
        sources = Sources(nodes, self._rewriter)
        self.outcomes = Outcomes(
            nodes, plans, costs, self.metrics, self.quality, log_prompts=config.log_prompts
        )
        self._maker = PlanMaker(config, nodes, costs, self.quality)
        self.serving = Serving(
            config, nodes, plans, self._maker, self.outcomes, self.text, sources, self.quality
        )
        self.saving = Saving(config, nodes, plans, sources, self.metrics, self.quality)
        self.janitor = Janitor(config, repository, self._rewriter)
        opened.callback(self.janitor.close)
        self._failures: dict[str, int] = {}
        """Failures of the committer so far, when each owner first saved since its last `flush`."""
        self.sharing: Sharing | None = None
        if config.catalog and repository.catalog is not None:
            purges = OthersPurges(repository, self.saving, self.quality, config.home_path)
            self.sharing = Sharing(repository.catalog, repository, config.sync_seconds, purges)

    def reload(self, config: StoreConfig) -> None:
        """Go on by the settings of `config` that may change while a store is open: its limits, the
        deadlines and budgets of plans, and how many nodes are kept. `ConfigError`, and nothing has
        changed, if the limits of single tenants cannot be read."""
        limits = TenantLimits(config)
        self.config = config
        self.nodes.reload(config, limits)
        for part in (self.serving, self.saving, self.janitor):
            part.reload(config)
        self.quality.reload(terms_of(config))

    def drain(self) -> None:
        """Make no more plans and stage no more saves; those that are under way go on."""
        self.serving.ending = True

    @property
    def draining(self) -> bool:
        """Whether no more plans are made."""
        return self.serving.ending

    @property
    def held(self) -> int:
        """Leases and staged saves that have not ended."""
        return len(self.blocks.leases) + len(self.saving)

    def reap(self, dead_owners: set[str] | None = None) -> None:
        """End expired leases, and release what clients hold that are gone."""
        dead = dead_owners or set()
        with self.nodes.lock:
            self.outcomes.reap(dead)
            self.saving.reap(dead)
            self.saving.looks.reap(dead)
        self.text.gone(dead)
        self.quality.keep()
        for owner in dead:
            self._failures.pop(owner, None)

    def stats(self) -> dict[str, Any]:
        """Counters since `since` (Unix seconds), budgets and times, in plain types.

        Never waits: neither for the lock nor for a first look at the disk.
        """
        staged, looks = len(self.saving), len(self.saving.looks)
        return stats_of(
            self.config,
            self.repository,
            since=self._since,
            staged=staged,
            looks=looks,
            texts=len(self.text.jobs),
            scores=self.saving.looks.verdicts.report(),
            scores_by_edit=self.saving.looks.verdicts.by_edit(),
            quality=self.quality.overview(),
        )

    def close(self) -> None:
        """Finish what is queued and release the home. Everything committed stays."""
        self.text.close()
        self.janitor.close()
        if self.sharing is not None:
            self.sharing.close()
        try:
            if self.repository.uses is not None:
                self.repository.uses.exchange()
        except KVShareError as error:
            log.warning("kvshare: last uses could not be written down: %s", error)
        self.quality.close()
        self.repository.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
