"""`kvshare quality`, and what `kvshare stats` says of quality."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from kvshare_store.cli import quality, stats
from kvshare_store.cli.main import app
from kvshare_store.daemon import protocol
from kvshare_store.daemon.questions import answer
from kvshare_store.errors.wording import short
from kvshare_store.http.classes import described
from kvshare_store.quality.ladder import STALE, Terms
from kvshare_store.quality.report import ALL
from kvshare_store.quality.score import Score
from kvshare_store.readable import bounds, limits
from tests.cli.test_cli import STATS, rendered
from tests.support.commands import one_line, run
from tests.support.oracle import Driver, prompt
from tests.support.page import EVIL

Open = Callable[..., Driver]


def teach(engine: Driver, count: int = 400, kind: str = "replace", *, bad: bool = False) -> None:
    digest = engine.namespace.digest
    for at in range(count):
        engine.store.quality.observe(
            Score(
                namespace=digest,
                traffic=f"{digest[:12]}/0a1b2c3d/{kind}",
                policy="faithful",
                regrets=(1.5 if bad else 0.0,),
                greedy=True,
                control=False,
                computed=at / count,
                distance=at,
            )
        )


def found(engine: Driver, **asked: Any) -> Any:
    return msgspec.to_builtins(answer(engine.store, protocol.Quality(**asked)))


@pytest.fixture
def engine(driver: Open) -> Driver:
    return driver(quality_bound=0.02, policy="aggressive")


def rows(engine: Driver, *, parts: bool = False) -> list[str]:
    shown = rendered(quality.classes_table(found(engine), 140, parts=parts), width=140)
    return [" ".join(line.split()) for line in shown.splitlines()]


def test_each_class_says_its_policies_and_what_is_known(engine: Driver) -> None:
    teach(engine)
    teach(engine, 40, "insert", bad=True)
    table = rows(engine)
    digest = engine.namespace.digest
    assert table[2] == f"{digest[:12]}/0a1b2c3d/replace of {digest[:12]}"
    assert table[3] == "text was replaced; no such prompt is known to be stored"
    assert table[4].startswith("faithful 400 0.0 % (")
    assert table[5:7] == ["rung, within the bound", "balanced - - -"]
    assert re.fullmatch(r"tried by .* not known yet: scored 0 of about 304", table[7])
    (bad,) = [row for row in table if row.startswith("faithful 40 100.0 % (")]
    assert bad.endswith(" 1.5000")
    assert table[table.index(bad) + 1].startswith("tried by 2.0 % of requests, ")
    assert not any("computed" in row for row in table)


def test_a_class_names_a_prompt_that_can_be_shown(engine: Driver) -> None:
    donor = prompt(1, 300)
    stored = engine.save(donor)
    tokens = [*donor[:100], *prompt(5, 3), *donor[103:]]
    engine.serve(tokens)
    of = {"namespace": engine.namespace.digest, "policy": "faithful"}
    traffic = explained(engine, tokens)
    engine.store.quality.observe(
        Score(**of, traffic=traffic, regrets=(0.0,), greedy=True, control=False)  # type: ignore[arg-type]
    )
    (one,) = found(engine)["classes"]
    assert (one["example"], one["donor"]) == ("", stored)
    assert f"text was replaced, in prompts like {short(stored)}" in rows(engine)
    scored = one | {"example": "f" * 64}
    assert described(scored) == ("text was replaced, as in", "f" * 64)
    del one["donor"]  # as a daemon of the release before answers
    assert described(one) == ("text was replaced; no such prompt is known to be stored", "")
    engine.store.clear()
    assert "text was replaced; no such prompt is known to be stored" in rows(engine)


def explained(engine: Driver, tokens: list[int]) -> str:
    """The class of a prompt."""
    steering = engine.store.explain(tokens, engine.namespace).steering
    assert steering is not None
    return steering.traffic


def test_parts_follow_their_policy(engine: Driver) -> None:
    teach(engine)
    table = rows(engine, parts=True)
    at = next(at for at, row in enumerate(table) if row.startswith("faithful"))
    assert [row.split(" 0.0 % (")[0] for row in table[at + 2 : at + 9]] == [
        "0 to 9 % recomputed 40", "10 to 24 % recomputed 60", "25 to 49 % recomputed 100",
        "50 or more % recomputed 200", "0 to 63 tokens behind an edit 64",
        "64 to 255 tokens behind an edit 192", "256 to 1,023 tokens behind an edit 144",
    ]  # fmt: skip


def test_an_answer_of_the_release_before_has_no_parts(engine: Driver) -> None:
    teach(engine)
    older = found(engine)
    for policy in older["classes"][0]["known"]["policies"]:
        del policy["computed"], policy["distance"]
    assert "computed" not in rendered(quality.classes_table(older, 120, parts=True))


def test_names_of_others_cannot_steer_the_terminal(engine: Driver) -> None:
    teach(engine)
    one = found(engine)
    one["classes"][0]["space"]["tenant"] = "\x1b[31m" + EVIL
    assert "\x1b" not in rendered(quality.classes_table(one, 120, parts=False))


def test_the_headline_says_the_bound_or_that_there_is_none(engine: Driver) -> None:
    teach(engine, 5)
    teach(engine, 4, "insert")
    assert quality.headline("/h", found(engine, limit=1)) == (
        "/h: bound 2.0 %, confidence 95.0 %, policy aggressive; classes: 2, these are 1 of "
        "them; with scored answers: 2"
    )
    assert "no bound (quality_bound)" in quality.headline("/h", found(engine) | {"bound": 0.0})


def test_the_headline_says_where_scores_come_from_while_there_are_none(engine: Driver) -> None:
    assert "engines with second_look score answers" in quality.headline("/h", found(engine))


def test_the_command_reads_a_home_that_nobody_serves(engine: Driver) -> None:
    teach(engine)
    home = str(engine.store.config.home_path)
    engine.store.close()
    for options in ([], ["--parts"], ["--json"]):
        ran = CliRunner().invoke(app, ["quality", "--home", home, *options])
        assert ran.exit_code == 0, ran.output
    assert json.loads(ran.output)["classes"] == []


def test_a_class_that_is_not_there_is_wrong_usage(engine: Driver) -> None:
    teach(engine)
    home, name = str(engine.store.config.home_path), f"{engine.namespace.digest[:12]}/0a1b2c3d"
    engine.store.close()
    asked = ["quality", "--home", home, "--config", str(settings_of(engine)), "--class"]
    line = one_line(run(*asked, "several"), 2)
    assert line == f"kvshare: no class is named 'several'; there are: {name}/replace\n"
    assert "replace of" in run(*asked, f"{name}/replace")[1]


def settings_of(engine: Driver) -> Path:
    """A settings file with the bound: a home read under other policies has learned nothing."""
    file = engine.store.config.home_path.parent / "settings.yaml"
    file.write_text("quality_bound: 0.02\npolicy: aggressive\n")
    return file


def test_a_class_without_scores_says_what_it_takes(engine: Driver) -> None:
    donor = prompt(1, 300)
    stored = engine.save(donor)
    engine.serve([*donor[:100], *prompt(5, 3), *donor[103:]])
    table = rows(engine)
    assert table[3] == f"text was replaced, in prompts like {short(stored)}"
    assert table[4:8] == [
        "exact - - -",
        "rung, within the bound",
        "faithful - - -",
        "tried by 2.0 % of requests, not known yet: scored 0 of about 304, in 1,517 requests or "
        "more",
    ]
    assert quality.headline("/h", found(engine)).endswith(
        "classes: 1; with scored answers: 0; engines with second_look score answers while they "
        "are idle"
    )
    engine.store.quality.reload(Terms(0.0, 0.05))
    assert not found(engine)["classes"], "without a bound nothing waits for scores"


def test_a_rate_of_few_scores_or_controls_is_not_shown(engine: Driver) -> None:
    def numbers() -> str:
        (row,) = [row for row in rows(engine) if row.startswith("faithful")]
        return row

    teach(engine, 3)
    control(engine)
    assert "too few scores (3, 1 control)" in numbers()
    teach(engine, 297)
    assert "too few scores (300, 1 control)" in numbers()
    said = STATS | {"quality": engine.store.stats()["quality"]}
    assert re.search(r"faithful +\S+ +too few scores", rendered(*stats.tables(said)))
    for _ in range(29):
        control(engine)
    assert " \N{MINUS SIGN}3.3 % (" in numbers()
    assert any(row.startswith("floor (30 controls), diverged 30 3.3 % (") for row in rows(engine))
    said = STATS | {"quality": engine.store.stats()["quality"]}
    assert re.search(r"faithful +\S+ +0.0 % to ", rendered(*stats.tables(said)))


def control(engine: Driver) -> None:
    """The first one diverges."""
    digest = engine.namespace.digest
    first = not engine.store.quality.floors(ALL)
    engine.store.quality.observe(
        Score(
            namespace=digest,
            traffic="",
            policy="exact",
            regrets=(float(first),),
            greedy=True,
            control=True,
        )
    )


@pytest.mark.parametrize("columns", [60, 80])
def test_the_name_of_a_class_stays_in_one_line(engine: Driver, columns: int) -> None:
    teach(engine)
    shown = rendered(quality.classes_table(found(engine), columns, parts=True), width=columns)
    digest = engine.namespace.digest[:12]
    for line in (
        f"{digest}/0a1b2c3d/replace of {digest}",
        "  text was replaced; no such prompt is known to be stored",
    ):
        assert line in map(str.rstrip, shown.splitlines())
    assert "regret" in shown
    assert max(map(len, shown.splitlines())) <= columns


def test_in_eighty_columns_a_policy_stays_in_one_line(engine: Driver) -> None:
    teach(engine, 40)
    shown = rendered(quality.classes_table(found(engine), 80, parts=True), width=80)
    assert re.search(r"^  faithful +40  ", shown, re.MULTILINE)
    assert re.search(r"^    0 to 63 tokens behind an edit +40  ", shown, re.MULTILINE)
    assert "    tried by 13.2 % of requests, not known yet: scored 40 of about 304, in 620" in shown


def test_statistics_say_the_bound_the_classes_and_the_doubt(engine: Driver) -> None:
    teach(engine)
    teach(engine, 40, "insert", bad=True)
    teach(engine, 400, "delete")
    digest = engine.namespace.digest
    for _ in range(STALE):
        engine.store.quality.rung(digest, f"{digest[:12]}/0a1b2c3d/delete", "aggressive")
    said = STATS | {"quality": engine.store.stats()["quality"]}
    table = [" ".join(row.split()) for row in rendered(*stats.tables(said)).splitlines()]
    (head,) = [at for at, row in enumerate(table) if row.startswith("quality: bound 2.0 %")]
    assert "confidence 95.0 %" in table[head]
    assert table[head + 2] == "exact 2 -"
    assert table[head + 3].startswith("faithful 1 ")
    assert table[head + 3].endswith(" to 100.0 %")
    assert "in doubt: more diverge lately 1" in table
    assert "silent: not scored for long 1" in table


def test_statistics_without_bound_and_classes_or_of_the_release_before(engine: Driver) -> None:
    known = engine.store.stats()["quality"]
    nothing = known | {"bound": 0.0}
    for said in (STATS, STATS | {"quality": nothing}):
        assert "quality" not in rendered(*stats.tables(said))
    teach(engine)
    older = {name: one for name, one in engine.store.stats()["quality"].items()
             if name != "doubted"}  # fmt: skip
    assert "in doubt" not in rendered(*stats.tables(STATS | {"quality": older}))
    unbound = rendered(*stats.tables(STATS | {"quality": older | {"bound": 0.0}}))
    assert "quality: no bound" in unbound


def test_limits_and_bounds_in_words() -> None:
    assert limits((0.01, -0.002, 0.03)) == "1.0 % (\N{MINUS SIGN}0.2 to 3.0 %)"
    assert (bounds(0, 64), bounds(1024, None)) == ("0 to 63", "1,024 or more")


def test_a_home_without_a_store_is_an_error(tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, ["quality", "--home", str(tmp_path / "none")])
    assert ran.exit_code != 0
