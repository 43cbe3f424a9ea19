"""Which test files one process works through, one after the other."""

from __future__ import annotations

from xdist.scheduler import LoadFileScheduling

_SHARED = "an engine for all"
_DEVICE = "an engine with rows on the device"
_PAGES = "daemons with pages"
_TOGETHER = {
    "engine/test_answers.py": _SHARED,
    "engine/test_behaviour.py": _SHARED,
    "engine/test_behaviour_counted.py": _SHARED,
    "engine/test_behaviour_over_time.py": _SHARED,
    "engine/test_page.py": _SHARED,
    "engine/test_partial_prefill.py": _DEVICE,
    "engine/test_reference.py": _DEVICE,
    "engine/test_resident.py": _DEVICE,
    "http/test_api.py": _PAGES,
    "http/test_documents.py": _PAGES,
    "http/test_fuzz.py": _PAGES,
    "http/test_guard.py": _PAGES,
    "http/test_pages.py": _PAGES,
}
"""Files whose tests share what takes seconds to start, by the name of what they share."""


class Spread(LoadFileScheduling):  # type: ignore[misc]
    """A process takes a file at a time, and with it the files that share an engine or a daemon
    with it: what two processes need is started twice."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return _TOGETHER.get(file.removeprefix("tests/"), file)
