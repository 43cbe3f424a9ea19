"""Lines of the log, for people or as JSON (`log_format: json`): one line an event, whatever the
event is."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

LOGGER = "kvshare"
_PREFIX = f"{LOGGER}: "
_SELDOM_S = 60.0
_PLAIN = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S%z")


class Seldom:
    """Lines that strangers can cause as often as they like: one a minute of each kind."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._next: dict[str, float] = {}
        self._unsaid: Counter[str] = Counter()

    def warn(self, kind: str, text: str, level: int = logging.WARNING) -> None:
        """Say it, unless something of the kind was said within the last minute."""
        now = self._clock()
        if now < self._next.get(kind, 0.0):
            self._unsaid[kind] += 1
            return
        unsaid = self._unsaid.pop(kind, 0)
        more = f" (and {unsaid:,} more like it since the last such line)" if unsaid else ""
        self._next[kind] = now + _SELDOM_S
        self._log.log(level, "kvshare: %s%s", text, more)


class JsonLines(logging.Formatter):
    """`time`, `level`, `thread` and `message`; what `fields` were given; `error`, if there was one.

    Everything that ends a line is escaped.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        said: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "thread": record.threadName,
            "message": record.getMessage().removeprefix(_PREFIX),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            said["error"] = self.formatException(record.exc_info)
        return json.dumps(said, default=str)


def with_fields(**fields: Any) -> dict[str, Any]:
    """What `extra` of a log call is, so that its line has these fields."""
    return {"fields": fields}


def log_process_as(form: str) -> None:
    """From now on all lines of this process go to standard error in this form (`log_format`), also
    those of libraries. For a process that is KVShare's own."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else _PLAIN)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)


def log_as_json() -> None:
    """From now on KVShare's lines go to standard error as JSON, whatever else is set up."""
    log = logging.getLogger(LOGGER)
    if any(isinstance(handler.formatter, JsonLines) for handler in log.handlers):
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    log.addHandler(handler)
    log.propagate = False
