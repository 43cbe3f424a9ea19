"""Repository: everything that is stored, opened. Its parts (blocks, nodes, catalogue, committer)
are lower in the import order and do not know it."""

from __future__ import annotations

import logging
import uuid
from contextlib import ExitStack

from kvshare_store.blocks.block_store import BlockStore
from kvshare_store.catalog.uses import Uses
from kvshare_store.commit.committer import Committer
from kvshare_store.commit.condemned import Condemned
from kvshare_store.commit.durable import Durable
from kvshare_store.commit.home import Home, mark_encrypted
from kvshare_store.commit.node_store import NodeStore
from kvshare_store.commit.queue import CommitQueue
from kvshare_store.commit.recovery import recover
from kvshare_store.config import StoreConfig
from kvshare_store.errors import ConfigError, HomeError, StorageError
from kvshare_store.namespace.limits import TenantLimits
from kvshare_store.nodes.state import NodeState
from kvshare_store.observability.metrics import Metrics

log = logging.getLogger("kvshare")


class Repository:
    """What a home holds, and the thread that makes it durable."""

    def __init__(self, config: StoreConfig, *, visiting: bool = False) -> None:
        """`visiting`: for one command, whose settings may not be those that the home is used with,
        so it removes nothing by itself. `ConfigError` if they lack the remote that the home has
        used."""
        self._config = config
        self.metrics = metrics = Metrics()
        self.machine = uuid.uuid4().hex
        """Identifies this process among those that share a catalogue."""
        self.encrypted = bool(config.encryption_key)
        self.home = config.home_path
        limits = TenantLimits(config)
        with ExitStack() as opened:  # whoever tries again must find the home unlocked
            self._put_together(limits, Home.open(config, metrics.health), opened)
            try:
                self._read(visiting=visiting)
            except StorageError as error:
                raise HomeError(
                    f"home {config.home_path} cannot be read: {error}. See to its disk and the "
                    "rights of its folders, or choose another home"
                ) from error
            self._opened = opened.pop_all()

    def _put_together(self, limits: TenantLimits, home: Home, opened: ExitStack) -> None:
        """Make all parts. `opened` closes them, the last one first."""
        opened.callback(home.close)
        config, metrics = self._config, self.metrics
        self.catalog = home.catalog
        self.keys = home.keys
        self.shared = self.catalog is not None and self.catalog.place.shared
        state = NodeState(config.block_tokens, quotas=limits.quotas)
        self.blocks = BlockStore(home.host, home.below, home.io, state.lock, metrics)
        opened.callback(self.blocks.close)
        self.condemned = self._open_condemned()
        self.uses = self._open_uses(state)
        self.queue = CommitQueue(metrics.health)
        late_s = 2 * self.uses.period if self.shared and self.uses is not None else 0.0
        parts = config, state, self.blocks, self.queue, metrics, limits
        self.nodes = NodeStore(*parts, shared=self.shared, late_s=late_s)
        self.durable = Durable(self.nodes, self.catalog, self.condemned, metrics)
        self.committer = Committer(self.queue, self.nodes, self.durable, metrics)
        opened.callback(self.committer.close)

    def _read(self, *, visiting: bool) -> None:
        """Load what is stored, and mark the home of a store that has a key."""
        lacking = self._lacks_remote()
        if lacking and visiting:
            raise ConfigError(
                "this store has used a remote, and these settings name none: what the remote "
                "has would be left out. Pass the daemon's settings with --config, or name it "
                "in KVSHARE_REMOTE"
            )
        self._recover(self.nodes.state, spare=visiting or lacking)
        if self.encrypted and self.catalog is not None and not visiting:
            mark_encrypted(self.home)

    def _open_condemned(self) -> Condemned | None:
        if self.catalog is None or not self.shared:
            return None
        grace_s = self._config.shared_grace_seconds
        return Condemned(self.catalog.facts, self.machine, grace_s, self.blocks)

    def _open_uses(self, state: NodeState) -> Uses | None:
        """Last uses are written down only where they matter after this process, or to others."""
        if self.catalog is None or not (self.shared or self._config.ttl_seconds):
            return None
        return Uses(self.catalog.uses, state.tree, state.lock, self._config.ttl_seconds)

    def _lacks_remote(self) -> bool:
        """Whether rows may be in a remote that the settings do not name."""
        catalog = self.catalog
        return catalog is not None and not self._config.remote and catalog.had_remote

    def _recover(self, state: NodeState, *, spare: bool) -> None:
        """Load the nodes. Those whose blocks are gone are removed from the catalogue, unless it
        may be the settings that are wrong (`spare`): the next that are right find them there."""
        if self.catalog is None:
            return
        used = self.uses.recorded() if self.uses is not None else {}
        lost = recover(state, self.catalog, self.blocks, used, self.metrics)
        if lost and spare:
            log.warning(
                "kvshare: %d stored prompts are left out, since no tier of these settings has "
                "their rows: name the remote again, or forget them with `kvshare check --repair`",
                len(lost),
            )
        elif lost:
            self.queue.put(self.nodes.removal(lost))
        if self.shared:
            self.nodes.drop_excess()

    def close(self) -> None:
        """Finish what is queued and let go of the home. Everything committed stays."""
        self._opened.close()
