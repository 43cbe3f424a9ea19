"""The attack of `injected` on a real vLLM engine: how often does the victim's answer change?

The same victims and the same arms. Prompts come as requests, and sources as a gateway names them.
"""

from __future__ import annotations

import secrets
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from tempfile import NamedTemporaryFile
from typing import NamedTuple

from benchmarks.data.chat_prompts import Chat
from benchmarks.harness.engines import (
    Arm,
    Engine,
    Timed,
    engine_settings,
    started,
    temporary_home,
)
from benchmarks.harness.models import model_folder, model_name
from benchmarks.harness.result import Cell, Options, Result
from benchmarks.quality.injected import ANSWER, ARMS, Case, cases, reused_and_changed
from benchmarks.quality.injected import Arm as Attack
from kvshare_store.cli.progress import track

POLICIES = ("balanced", "aggressive")
_ENGINE = Arm(caching=True, kvshare=True, own={"second_look": "off", "store_answers": False})
_ATTACKER, _VICTIM = "mallory", "ann"


class Seen(NamedTuple):
    """One answer beside that of full compute."""

    changed: bool
    reused: float
    """Share of the prompt's tokens."""


def measure(options: Options) -> Result:
    """Serve every victim under each policy and arm, and twice in full."""
    chat = Chat(str(model_folder(options)))
    found: dict[tuple[str, str], list[Seen]] = {}
    with _engines(options) as engines:
        chosen = cases(chat, options.size(27, 2), options.seed)
        for case in track(chosen, "Victims"):
            for key, seen in served(engines, case):
                found.setdefault(key, []).append(seen)
    return _result(options, found, len(chosen))


@contextmanager
def _engines(options: Options) -> Iterator[dict[float, Engine]]:
    """An engine with a store of its own for each `unconfirmed_share`."""
    model = str(model_folder(options))
    with ExitStack() as stack:
        key = stack.enter_context(NamedTemporaryFile("w", prefix="kvshare-key-"))
        key.write(secrets.token_hex(32))
        key.flush()
        settings = {}
        for share in sorted({arm.share for arm in ARMS}):
            home = stack.enter_context(temporary_home(
                semantic="never", min_saving_ms=-1e9, policy="aggressive", unconfirmed_share=share,
                source_key=f"file:{key.name}",
            ))  # fmt: skip
            settings[str(share)] = engine_settings(model, _ENGINE, home)
        engines = stack.enter_context(started(settings, dict.fromkeys(settings, sys.executable)))
        yield {float(share): engine for share, engine in engines.items()}


def served(engines: dict[float, Engine], case: Case) -> Iterator[tuple[tuple[str, str], Seen]]:
    """What each policy and arm makes of the victim's prompt."""
    truth, again = (_asked(engine, case.request, "off") for engine in engines.values())
    yield ("full compute", "again"), _seen(again, truth)
    for policy in POLICIES:
        for arm in ARMS:
            yield (policy, arm.name), _seen(_attacked(engines[arm.share], case, arm, policy), truth)


def _attacked(engine: Engine, case: Case, arm: Attack, policy: str) -> Timed:
    """The victim's prompt after what others, and the victim, have sent. Each time has a tenant of
    its own, so that nothing is found that was stored before."""
    tenant = uuid.uuid4().hex
    victim, attacker = (_VICTIM, _ATTACKER) if arm.sources else ("", "")
    if arm.earlier:
        engine.ask(case.earlier, tenant, policy="exact", source=victim)
    engine.ask(
        case.attack if arm.attacked else case.honest, tenant, policy="exact", source=attacker
    )
    engine.settle()
    return _asked(engine, case.request, policy, tenant, victim)


def _asked(
    engine: Engine, request: tuple[int, ...], policy: str, tenant: str = "", source: str = ""
) -> Timed:
    engine.forget()
    return engine.ask(request, tenant, max_tokens=ANSWER, policy=policy, source=source)


def _seen(served: Timed, truth: Timed) -> Seen:
    changed = served.token_ids != truth.token_ids
    return Seen(changed, 1 - served.computed / served.tokens)


def _result(options: Options, found: dict[tuple[str, str], list[Seen]], victims: int) -> Result:
    rows: list[list[Cell]] = []
    for (policy, arm), seen in found.items():
        shares = reused_and_changed([(one.reused, one.changed) for one in seen])
        rows.append([policy, arm, *shares])
    floor = found["full compute", "again"]
    return Result(
        name="injected-served",
        title="An instruction in somebody else's copy of the prompt, on vLLM",
        n={"victims": victims},
        seed=options.seed,
        model=f"{model_name(options)}, bfloat16",
        noise_floor=f"full compute again, on another engine: {sum(one.changed for one in floor)} "
        f"of {len(floor)} answers changed",
        columns=["policy", "stored before", "tokens reused", "answers changed", "95 %"],
        rows=rows,
        notes=[
            f"Real vLLM engines, one for each `unconfirmed_share`. An answer is changed if its "
            f"first {ANSWER} tokens are not those of full compute on such an engine. Victims and "
            "arms are those of `injected`.",
        ],
    )  # fmt: skip
