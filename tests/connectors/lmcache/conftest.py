"""The tests in `inside` import LMCache, so they run where it is installed: see `test_inside.py`."""

from __future__ import annotations

import importlib.util

collect_ignore = [] if importlib.util.find_spec("lmcache") else ["inside"]
