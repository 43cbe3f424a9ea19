"""Folders and the modules beside them are rooms: what the imports between them look like."""

from __future__ import annotations

from graphlib import TopologicalSorter

import grimp

PACKAGE = "kvshare_store"
MOST_MODULES = 8
"""In the package itself."""
MOST_ROOMS, MOST_ARROWS = 32, 166


def rooms() -> dict[str, set[str]]:
    """For each room those that it imports from."""
    graph = grimp.build_graph(PACKAGE)
    folders = {name for name in graph.modules if graph.find_children(name)} - {PACKAGE}

    def room_of(module: str) -> str:
        folder = module.rpartition(".")[0]
        return module if module in folders or folder == PACKAGE else folder

    imports: dict[str, set[str]] = {}
    for module in graph.modules - {PACKAGE}:
        room = room_of(module)
        others = {room_of(one) for one in graph.find_modules_directly_imported_by(module)}
        imports.setdefault(room, set()).update(others - {room, PACKAGE})
    return imports


def test_no_room_leads_back_to_itself() -> None:
    TopologicalSorter(rooms()).prepare()  # CycleError names the rooms


def test_few_rooms_with_few_arrows() -> None:
    """Where this fails, look for a name that lies far from those who use it, and move it there."""
    imports = rooms()
    assert len(imports) <= MOST_ROOMS
    assert sum(map(len, imports.values())) <= MOST_ARROWS


def test_few_modules_lie_in_no_folder() -> None:
    graph = grimp.build_graph(PACKAGE)
    loose = [name for name in graph.find_children(PACKAGE) if not graph.find_children(name)]
    assert len(loose) <= MOST_MODULES, sorted(loose)
