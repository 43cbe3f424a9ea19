"""Reads what is exposed to Prometheus."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.parser import text_string_to_metric_families

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
