"""Reads what is exposed to Prometheus."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from kvshare_store.observability.exposition import exposition

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(text: str) -> Series:
    """All samples, by exported name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Exposed:
    """One scrape."""

    def __init__(self, text: str) -> None:
        self.series = samples(text)

    def value(self, name: str, **labels: str) -> float:
        """The one sample of that name and those labels, whatever its other labels are."""
        found = self.matching(name, labels.items())
        assert len(found) == 1, f"{name} {labels}: {len(found)} samples"
        return found[0]

    def total(self, name: str, **labels: str) -> float:
        """The sum over all samples of that name and those labels."""
        return sum(self.matching(name, labels.items()))

    def matching(self, name: str, labels: Iterable[tuple[str, str]]) -> list[float]:
        """Values of the samples of that name that have these labels."""
        wanted = set(labels)
        return [value for (at, has), value in self.series.items() if at == name and wanted <= has]

    def by(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """The sums by values of these labels, without those that are zero."""
        sums: dict[tuple[str, ...], float] = {}
        for (at, has), value in self.series.items():
            if at == name and value:
                key = tuple(dict(has).get(label, "") for label in labels)
                sums[key] = sums.get(key, 0.0) + value
        return sums


NOT_EXPOSED = {
    "pid": "names a process and measures nothing",
    "daemon/pid": "the same",
    "daemon/seconds": "since the start, of which the moment is exposed",
    "seconds/*/p[59]*": "made of the last durations; Prometheus makes quantiles of the buckets",
    "tiers/*/kept_free": "a part of the budget that is set aside for the catalogue",
    "quality/shown/*": "those of `quality/extra` that have enough scores for people to read",
    "scores/*": "the sums of `scores_by_edit`, which are exposed",
    "scores_by_edit/*/sampled/diverged": "another draw is no error: only greedy answers count",
}
"""Numbers of the statistics that no metric has, and why."""


def unread(stats: dict[str, Any]) -> set[str]:
    """Paths of the numbers in the statistics that change no metric, without `NOT_EXPOSED`."""
    told = exposition(stats)
    return {
        path
        for path, changed in _with_one_more(stats)
        if not any(fnmatch(path, known) for known in NOT_EXPOSED) and exposition(changed) == told
    }


def _with_one_more(stats: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """For each number its path, and the statistics with another number in its place."""
    for path in _numbers(stats):
        changed = copy.deepcopy(stats)
        *above, last = path
        place: Any = changed
        for key in above:
            place = place[key]
        place[last] = not place[last] if isinstance(place[last], bool) else place[last] + 1
        yield "/".join(map(str, path)), changed


def _numbers(found: Any) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to each number, in dictionaries and lists within each other."""
    if isinstance(found, int | float):
        yield ()
    elif isinstance(found, dict | list | tuple):
        for key, value in found.items() if isinstance(found, dict) else enumerate(found):
            yield from ((key, *path) for path in _numbers(value))
