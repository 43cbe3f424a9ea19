"""The order in which nodes were last used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator


class LastUses:
    """Ids of nodes, and when each was last used; in the order in which that was said."""

    def __init__(self) -> None:
        self._at: OrderedDict[str, float] = OrderedDict()
        """By place. A place has the name of the node that came there first."""
        self._places: dict[str, str] = {}
        """Of nodes that are in a place of another name."""
        self._ids: dict[str, str] = {}
        """The reverse."""

    def __len__(self) -> int:
        return len(self._at)

    def __iter__(self) -> Iterator[str]:
        """Those used longest ago first."""
        return (self._ids.get(place, place) for place in self._at)

    def __reversed__(self) -> Iterator[str]:
        return (self._ids.get(place, place) for place in reversed(self._at))

    def items(self) -> Iterator[tuple[str, float]]:
        """Each with the moment of its last use."""
        return ((self._ids.get(place, place), at) for place, at in self._at.items())

    def of(self, node_id: str) -> float:
        """When it was last used; `KeyError` if it is not here."""
        return self._at[self._places.get(node_id, node_id)]

    def add(self, node_id: str, at: float) -> None:
        """One that is not here was used."""
        place = node_id
        while place in self._at:  # what is left of a node has its place, and the node is back
            place += "+"
        self._at[place] = at
        self._enter(node_id, place)

    def use(self, node_id: str, at: float) -> None:
        """One that is here was used."""
        if node_id in self._places:
            self.remove(node_id)
            self.add(node_id, at)
            return
        self._at[node_id] = at
        self._at.move_to_end(node_id)

    def remove(self, node_id: str) -> None:
        """`KeyError` if it is not here."""
        del self._at[self._leave(node_id)]

    def swap(self, one: str, other: str) -> None:
        """Each takes the place of the other, as long unused. Both are here."""
        place, others = self._leave(one), self._leave(other)
        self._enter(one, others)
        self._enter(other, place)

    def _enter(self, node_id: str, place: str) -> None:
        if place != node_id:
            self._places[node_id], self._ids[place] = place, node_id

    def _leave(self, node_id: str) -> str:
        place = self._places.pop(node_id, node_id)
        self._ids.pop(place, None)
        return place
