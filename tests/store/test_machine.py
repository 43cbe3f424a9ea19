"""The state machine that drives a Store against plain dictionaries."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from tests.support.machines import StoreMachine, examples

TestStoreMachine = pytest.mark.timeout(900)(StoreMachine.TestCase)  # shrinking a failure takes long
TestStoreMachine.settings = settings(
    max_examples=examples(15),
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
