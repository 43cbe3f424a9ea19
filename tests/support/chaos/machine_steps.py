"""What may happen to three machines. Each step is a function; `STEPS` says how often it is
drawn."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from unittest.mock import patch

from kvshare_store.errors import ForeignError
from kvshare_store.store import Store
from tests.support.chaos.site import NAMES, SPACE, TTL_S, Site
from tests.support.oracle import Driver
from tests.support.tiers import drop_from_host


def save_new(site: Site) -> None:
    """Save a prompt that no machine has seen."""
    site.save(site.any(), site.new_prompt())


def save_same_on_two(site: Site) -> None:
    """Two machines save the same prompt without knowing of each other's node."""
    one, other = site.chance.sample(sorted(site.machines), 2)
    tokens = site.new_prompt()
    for name in (one, other):
        site.save(site.machines[name], tokens)
    if site.chance.random() < 0.5:
        collect_everything(site, site.machines[other])
        for name in (one, other):
            drop_from_host(site.machines[name].store)
            site.serve(site.machines[name], tokens)


def collect_everything(site: Site, engine: Driver) -> None:
    """This machine's janitor finds unused blocks, condemns and removes them."""
    for _ in range(3):
        minutes_pass(site)
        site.learn(engine)
        engine.store.collect()
    expired(site)


def edit(site: Site) -> None:
    """Save an edited prompt that reuses rows of a stored one."""
    found, engine = site.some(), site.any()
    if found is not None:
        site.learn(engine)
        tokens = list(found[1].tokens)
        tokens[site.chance.randrange(len(tokens) - 1)] = site.chance.randrange(1 << 30)
        site.save(engine, tokens, full=False)


def merge_unheard(site: Site) -> None:
    """One machine merges a node, its donor is removed, and another machine uses the node as it was
    before the merge."""
    one, other = (site.machines[name] for name in site.chance.sample(sorted(site.machines), 2))
    tokens = site.new_prompt()
    site.save(one, tokens)
    edited = [*tokens[:20], 7, *tokens[21:]]
    site.save(one, edited, full=False)
    site.learn(other)
    one.store.collect()
    donors = [node.id for node in one.store.tree if node.tokens.tolist() == tokens]
    one.store.nodes.remove(donors)
    one.store.flush()
    for node_id in donors:
        site.kept.pop(node_id, None)
    collect_everything(site, one)
    drop_from_host(other.store)
    site.serve(other, edited)
    other.store.flush()


def pin_unheard(site: Site) -> None:
    """A node is pinned on one machine and removed on another that has not yet read of the pin."""
    one, other = (site.machines[name] for name in site.chance.sample(sorted(site.machines), 2))
    before = set(site.kept)
    site.save(one, site.new_prompt())
    site.learn(other)
    for node_id in site.kept.keys() - before:  # none if the save was refused
        if not one.store.pin(node_id):
            continue
        kept = site.kept[node_id]
        site.kept[node_id] = kept._replace(pinned=True)
        other.store.nodes.remove([node_id])
        other.store.flush()


def serve(site: Site) -> None:
    """Ask for a known prompt again and compare its rows."""
    if (found := site.some()) is not None:
        site.serve(site.any(), found[1].tokens)


def learn(site: Site) -> None:
    """One machine reads the changes in the catalogue."""
    site.learn(site.any())


def collect(site: Site) -> None:
    """One pass of a machine's janitor: age, garbage, merges."""
    site.any().store.collect()
    expired(site)


def collect_unheard(site: Site) -> None:
    """All passes of a janitor whose machine has not yet read of a new prompt."""
    one, other = (site.machines[name] for name in site.chance.sample(sorted(site.machines), 2))
    site.save(one, site.new_prompt())
    for _ in range(3):
        minutes_pass(site)
        other.store.collect()
    expired(site)


def expired(site: Site) -> None:
    """Time passes, so that nodes which were not used for long may be removed."""
    for node_id, kept in list(site.kept.items()):
        if not kept.pinned and site.passed - kept.used >= TTL_S:
            del site.kept[node_id]


def collect_while_another_saves(site: Site) -> None:
    """A prompt that was removed everywhere is saved again while its blocks are being collected."""
    one, other = (site.machines[name] for name in site.chance.sample("ab", 2))
    tokens = site.new_prompt()
    site.save(one, tokens)
    site.learn(other)
    (node_id,) = [n.id for n in one.store.tree if n.tokens.tolist() == tokens] or [""]
    one.store.nodes.remove([node_id])
    one.store.flush()
    site.kept.pop(node_id, None)
    site.learn(other)
    moment = site.chance.choice([0, 1, 2, 3, 3])
    for at in range(3):
        if at == moment:
            site.save(one if site.chance.random() < 0.3 else other, tokens)
        minutes_pass(site)
        site.learn(one)
        if at == 2 and moment == 3:
            collect_slowly(one, lambda: site.save(other, tokens))
        else:
            one.store.collect()
    expired(site)


def collect_slowly(engine: Driver, meanwhile: Callable[[], None]) -> None:
    """One pass of a janitor; `meanwhile` happens right before it deletes garbage. If that must wait
    for the pass, it goes on afterwards."""
    blocks = engine.store.blocks
    delete = blocks.delete_shared
    other = threading.Thread(target=meanwhile)

    def slow(named: Mapping[str, str]) -> None:
        if other.ident is None:
            other.start()
            other.join(0.5)
        delete(named)

    with patch.object(blocks, "delete_shared", slow):
        engine.store.collect()
    if other.ident is not None:
        other.join()


def minutes_pass(site: Site) -> None:
    """Two hours pass: longer than a grace period. Machines write their last uses to the
    catalogue."""
    site.passed += 120.0
    for engine in site.machines.values():
        if engine.store.repository.uses is not None and engine.store.repository.uses.due():
            engine.store.repository.uses.exchange()


def hours_pass(site: Site) -> None:
    """Machines write their last uses to the catalogue, as they do every few minutes."""
    for _ in range(site.chance.randrange(1, 3)):
        for engine in site.machines.values():
            if engine.store.repository.uses is not None:
                engine.store.repository.uses.exchange()
        site.passed += 3600.0
        serve(site)
    for engine in site.machines.values():
        if engine.store.repository.uses is not None:
            engine.store.repository.uses.exchange()


def pin(site: Site) -> None:
    """An operator pins or unpins a node on one machine."""
    found, engine = site.some(), site.any()
    if found is not None:
        pinned = site.chance.random() < 0.8
        if engine.store.pin(found[0], pinned):
            site.kept[found[0]] = found[1]._replace(pinned=pinned)


def evict(site: Site) -> None:
    """An operator evicts on one machine, which may not know of all pins."""
    engine = site.any()
    before = {node.id for node in engine.store.tree}
    engine.store.evict(nodes=1)
    engine.store.flush()
    for node_id in before - {node.id for node in engine.store.tree}:
        if (kept := site.kept.get(node_id)) is not None and not kept.pinned:
            del site.kept[node_id]


def another_store(site: Site) -> None:
    """A second store is configured with the same remote by mistake, and its janitor runs."""
    settings = {"catalog": str(site.folder / "elsewhere"), "home": str(site.folder / "other")}
    with suppress(ForeignError), Store(site.config("other", **settings)) as store:
        site.set_clocks(store)
        for _ in range(3):
            store.collect()
            minutes_pass(site)


def foreign_file(site: Site) -> None:
    """Someone puts files of their own into the same folder."""
    folder = site.folder / "remote" / "blocks" / site.chance.choice(["mine", SPACE.digest])
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{site.chance.choice(['letter', 'photo'])}-{len(site.foreign)}"
    file.write_text("not yours")
    site.foreign.append(file)


def restart(site: Site) -> None:
    """A machine is shut down in order and starts again."""
    name = site.chance.choice(NAMES)
    site.machines.pop(name).store.close()
    site.open(name)


Step = Callable[[Site], None]
STEPS: dict[Step, int] = {
    save_new: 4,
    save_same_on_two: 3,
    edit: 5,
    merge_unheard: 2,
    pin_unheard: 1,
    serve: 4,
    learn: 8,
    collect: 8,
    collect_unheard: 2,
    collect_while_another_saves: 4,
    minutes_pass: 5,
    hours_pass: 3,
    pin: 3,
    evict: 2,
    another_store: 1,
    foreign_file: 1,
    restart: 1,
}
"""How often each kind of step is drawn. To add a kind, add a function here."""
