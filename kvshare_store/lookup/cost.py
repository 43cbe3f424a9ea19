"""What a plan saves, from rates measured while running. Seconds, bytes, tokens."""

from __future__ import annotations

from collections import deque
from statistics import median

_WINDOW = 15


class Rate:
    """An amount per second: the median of the last measurements, `default` while there are none.

    Measurements of less than `smallest` are ignored: they measure the fixed cost around the work.
    """

    def __init__(self, default: float, smallest: float) -> None:
        self._default = default
        self._smallest = smallest
        self._seen: deque[float] = deque(maxlen=_WINDOW)
        self.value = default

    def observe(self, amount: float, seconds: float) -> None:
        """Add one measurement."""
        if amount >= self._smallest and seconds > 0:
            self._seen.append(amount / seconds)
            self.value = median(self._seen)

    def doubt(self) -> None:
        """Forget the oldest measurement: what is declined for its cost is never measured again."""
        if self._seen:
            self._seen.popleft()
        self.value = median(self._seen) if self._seen else self._default

    def seconds(self, amount: float) -> float:
        """How long `amount` takes at this rate."""
        return amount / self.value


class CostModel:
    """Prefill against loading. The defaults only have to be of the right order."""

    def __init__(self) -> None:
        self.prefill = Rate(5_000.0, smallest=128)
        """Tokens per second of the engine's prefill."""
        self.load = {
            "host": Rate(2e9, smallest=1 << 22),
            "disk": Rate(5e8, smallest=1 << 22),
            "remote": Rate(1e8, smallest=1 << 22),
        }
        """Bytes per second from each tier into the paged cache."""
        self.run_seconds = 5e-5
        """What one more placeholder run costs the engine."""
        self.embed = Rate(20_000.0, smallest=1)
        """Tokens per second of the text embedding."""

    def saving_ms(self, reused: int, placeholder_runs: int, tier_bytes: dict[str, int]) -> float:
        """Milliseconds saved by reusing `reused` tokens; negative when it would cost time."""
        load = sum(self.load[tier].seconds(nbytes) for tier, nbytes in tier_bytes.items())
        saved = self.prefill.seconds(reused) - load - placeholder_runs * self.run_seconds
        return saved * 1e3

    def doubt(self) -> None:
        """A plan was declined for what it would cost; let old measurements of loading fade."""
        for rate in self.load.values():
            rate.doubt()

    def embedding_pays(self, tokens: int, share: float = 0.02) -> bool:
        """Whether embedding the prompt costs less than `share` of its prefill."""
        return self.embed.seconds(tokens) <= share * self.prefill.seconds(tokens)
