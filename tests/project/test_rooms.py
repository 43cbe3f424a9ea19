"""Folders and the modules beside them are rooms: what the imports between them look like."""

from __future__ import annotations

from graphlib import TopologicalSorter

import grimp

PACKAGE = "kvshare_store"
MOST_MODULES = 8
"""In the package itself."""


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
    imports = rooms()
    arrows = sum(map(len, imports.values()))
    print(f"{len(imports)} rooms, {arrows} arrows")
    TopologicalSorter(imports).prepare()  # CycleError names the rooms


def test_few_modules_lie_in_no_folder() -> None:
    graph = grimp.build_graph(PACKAGE)
    loose = [name for name in graph.find_children(PACKAGE) if not graph.find_children(name)]
    assert len(loose) <= MOST_MODULES, sorted(loose)
