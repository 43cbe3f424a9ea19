"""KVShare as one of several connectors under vLLM's MultiConnector, on a real engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.harness import Engine, Fresh
from tests.engine.schedulers import kvshare_alone

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

LENGTH = 150
EDIT = 100
"""A position behind the first run of the exact-prefix chain: a shorter common prefix is not
found."""
NEW = [11111, 22222, 33333, 44444, 12345]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    home: Path = tmp_path_factory.mktemp("home")
    settings = {
        "policy": "aggressive", "host_bytes": "256MiB", "idle_exit_s": 5, "min_saving_ms": -1e9,
        "plan_deadline_ms": 10_000,
    }  # fmt: skip
    other = {
        "kv_connector": "Nothing",
        "kv_connector_module_path": "tests.engine.siblings",
        "kv_role": "kv_both",
    }
    engine = Engine(
        home,
        enable_prefix_caching=True,
        kv_transfer_config={
            "kv_connector": "MultiConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "connectors": [other, kvshare_alone(home, **settings)],
            },
        },
    )
    yield engine
    engine.close()


def test_exact_rows_are_served_and_edited_ones_are_not(engine: Engine, fresh: Fresh) -> None:
    """The other connector could take edited rows for exact ones."""
    prompt = fresh(LENGTH)
    follower = [*prompt[:EDIT], *NEW, *prompt[EDIT + 3 :]]
    full = engine.ask(prompt, policy="off")
    full_follower = engine.ask(follower, policy="off")
    engine.clear()
    engine.store(prompt)
    engine.forget()
    with engine.counted() as gained:
        again = engine.ask(prompt)
    assert again.agrees(full)
    assert gained["tokens_reused_exact"] == LENGTH - 1 == again.said["reused"]
    assert again.said["nothing.said"]  # the answer holds what every connector says
    engine.forget()
    with engine.counted() as gained:
        answer = engine.ask(follower)
    assert answer.agrees(full_follower)
    assert (gained["tokens_reused_exact"], gained["tokens_reused_edited"]) == (EDIT, 0)
    assert (answer.said["exact"], answer.said["edited"]) == (EDIT, 0)
    engine.check_idle()
