"""Admitted requests whose placeholder runs are still to be computed."""

from __future__ import annotations

from kvshare_connectors.vllm.requests import RequestState


class Runs:
    """One per engine; called only from the scheduler's thread."""

    def __init__(self) -> None:
        self._ready: list[RequestState] = []
        self._parked: dict[str, RequestState] = {}
        self._placeholders = 0

    def add(self, state: RequestState) -> None:
        """vLLM has admitted the request: its runs follow in this step, or later if it is parked."""
        self._placeholders += sum(run.length for run in state.runs)
        if state.parked:
            self._parked[state.id] = state
        elif state.runs:
            self._ready.append(state)

    @property
    def parked(self) -> list[RequestState]:
        """Requests that wait for their placeholder runs, in order of admission."""
        return list(self._parked.values())

    def unpark(self, state: RequestState) -> None:
        """The last run is placed, or the request has ended or starts over."""
        self._parked.pop(state.id, None)
        state.parked = False

    def take_ready(self) -> list[RequestState]:
        """Requests admitted in this step whose runs all belong to it."""
        ready, self._ready = self._ready, []
        return ready

    def take_placeholders(self) -> int:
        """Placeholder tokens admitted since the last call: vLLM counts them as cache hits."""
        placeholders, self._placeholders = self._placeholders, 0
        return placeholders
