"""What a plan saves, from rates measured while running. Seconds, bytes, tokens."""

from __future__ import annotations

import threading
from collections import deque
from statistics import median

from kvshare_store.bounded import Latest

_WINDOW = 15
_MODELS = 64
"""Models whose rates are kept."""
_ASSUMED_PREFILL = 5_000.0
"""Tokens per second of a prefill, before any was measured."""


class Rate:
    """An amount per second: the median of the last measurements, `default` while there are none.

    Measurements of less than `smallest` are ignored: they measure the fixed cost around the work.
    """

    def __init__(self, default: float, smallest: float) -> None:
        self._default = default
        self.smallest = smallest
        self._seen: deque[float] = deque(maxlen=_WINDOW)
        self.value = default

    def observe(self, amount: float, seconds: float) -> None:
        """Add one measurement."""
        if amount >= self.smallest and seconds > 0:
            self._seen.append(amount / seconds)
            self.value = median(self._seen)

    def doubt(self) -> None:
        """Forget the oldest measurement: what is declined for its cost is never measured again."""
        if self._seen:
            self._seen.popleft()
        self.value = median(self._seen) if self._seen else self._default

    @property
    def assumed(self) -> float:
        """The rate where it is an assumption; 0 where it was measured."""
        return 0.0 if self._seen else self._default

    def seconds(self, amount: float) -> float:
        """How long `amount` takes at this rate."""
        return amount / self.value


class CostModel:
    """Prefill against loading, for one model. The defaults only have to be of the right order."""

    def __init__(self, load: dict[str, Rate] | None = None) -> None:
        """`load`: rates that models share."""
        self.prefill = Rate(_ASSUMED_PREFILL, smallest=128)
        """Tokens per second of the engine's prefill."""
        self.load = loading_rates() if load is None else load
        self.run_seconds = 5e-5
        """What one more placeholder run costs the engine."""

    def saving_ms(self, reused: int, placeholder_runs: int, tier_bytes: dict[str, int]) -> float:
        """Milliseconds saved by reusing `reused` tokens; negative when it would cost time."""
        load = sum(self.load[tier].seconds(nbytes) for tier, nbytes in tier_bytes.items())
        saved = self.prefill.seconds(reused) - load - placeholder_runs * self.run_seconds
        return saved * 1e3

    def doubt(self) -> None:
        """A plan was declined for what it would cost; let old measurements of loading fade."""
        for rate in self.load.values():
            rate.doubt()


def loading_rates(*, far: bool = False) -> dict[str, Rate]:
    """Bytes per second from each tier into the paged cache; `far`: of another machine."""
    return {
        "host": Rate(5e8 if far else 2e9, smallest=1 << 22),
        "disk": Rate(3e8 if far else 5e8, smallest=1 << 22),
        "remote": Rate(1e8, smallest=1 << 22),
    }


class Costs:
    """A cost model for each model that is served: a small one next to a large one on the same
    machine prefills many times as fast. Bytes load at the same rate for all. Thread-safe."""

    def __init__(self, *, far: bool = False) -> None:
        """`far`: for engines on other machines, which the network is between."""
        self.load = loading_rates(far=far)
        self._models: Latest[str, CostModel] = Latest(_MODELS)
        self._lock = threading.Lock()

    def of(self, model: str) -> CostModel:
        """The rates of a model (`Namespace.model_digest`); defaults before its first measurement.

        Of more than `_MODELS` the one asked for the longest ago is forgotten.
        """
        with self._lock:
            cost = self._models[model] = self._models.get(model) or CostModel(self.load)
            return cost

    def observe(self, model: str, tokens: int, seconds: float) -> None:
        """An engine has prefilled `tokens` tokens in so many seconds. `model`: its digest; empty
        for an engine that does not say, whose measurement then counts for every model."""
        if model:
            self.of(model).prefill.observe(tokens, seconds)
            return
        with self._lock:
            known = list(self._models.values())
        for cost in known:
            cost.prefill.observe(tokens, seconds)
