"""What a page shows of classes of traffic: a line for each policy that they get or got."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from kvshare_store.config import policy_names
from kvshare_store.http.chart import HEIGHT, WIDTH, Band, band

SPARK_WIDTH, SPARK_HEIGHT = 160, 36
KINDS_OF_EDIT = {
    "append": "only the end differs",
    "insert": "text was inserted",
    "delete": "text was removed",
    "replace": "text was replaced",
    "several": "several places differ",
}
"""What was done to the donor."""
NONE_STORED = "; no such prompt is known to be stored"

Found = Mapping[str, Any]


class Line(NamedTuple):
    """One policy of a class."""

    policy: str
    role: str
    """What it is to the class now; may be empty."""
    known: Found | None
    """As `PolicyReport`; None: no answer was scored under it."""
    standing: str
    """Against the bound: `within`, `beyond`, or `not known`; empty without a bound."""
    progress: str
    """Of the policy that is tried: how many scores of about how many, and how many requests that
    takes; may be empty."""
    band: Band | None


def lines(one: Found, answer: Found, now: float, *, small: bool) -> list[Line]:
    """Those of a listed class, from the strictest policy to the laxest. `answer`: all of the
    `QualityReport`; `small`: as sparklines."""
    known = {found["policy"]: found for found in one["known"]["policies"]}
    served = one["known"]["rung"] or answer["policy"]
    names = {served, one["known"]["tried"] or served, *known}
    size = (SPARK_WIDTH, SPARK_HEIGHT) if small else (WIDTH, HEIGHT)
    return [
        Line(
            name,
            " ".join(_roles(one["known"], name, answer)),
            known.get(name),
            _standing(name, known.get(name), answer["bound"]),
            _progress(one["known"], known.get(name)) if name == one["known"]["tried"] else "",
            band(known[name]["trend"], answer["bound"], now, *size) if name in known else None,
        )
        for name in sorted(names, key=policy_names().index)
    ]


def described(one: Found) -> tuple[str, str]:
    """Which traffic a listed class is: what differs, in words that end where a node is to be
    named, and the id of that node; empty if none is known."""
    kind: str = one["kind"]
    differs = KINDS_OF_EDIT.get(kind, kind)
    if one["example"]:
        return f"{differs}, as in", one["example"]
    donor = one.get("donor", "")  # a daemon of the release before has none
    return (f"{differs}, in prompts like", donor) if donor else (differs + NONE_STORED, "")


def _roles(known: Found, policy: str, answer: Found) -> Iterator[str]:
    if not answer["bound"]:
        if policy == answer["policy"]:
            yield "configured"
    elif policy == known["rung"]:
        yield "rung"
    elif policy == known["tried"]:
        yield f"tried by {100 * known['share']:.1f} % of requests"


def _standing(policy: str, known: Found | None, bound: float) -> str:
    """By the limits that the ladder goes by."""
    if not bound:
        return ""
    if policy == "exact":
        return "within"
    if known is None:
        return "not known"
    _, low, high = known["extra"]
    return "within" if high <= bound else "beyond" if low > bound else "not known"


def _progress(of_class: Found, known: Found | None) -> str:
    """Empty where some have diverged: then it takes more, and nobody knows how many."""
    needed = of_class.get("needed", 0)  # a daemon of the release before does not say it
    scored, diverged = (known["greedy"], known["diverged"][0]) if known else (0, 0.0)
    if scored >= needed or diverged:
        return ""
    requests = of_class.get("requests", 0)  # nor does it say this
    takes = f", in {requests:,} requests or more" if requests else ""
    return f"{scored:,} of about {needed:,}{takes}"


def summed(scores: Found) -> dict[str, int]:
    """Scored answers since the daemon started: `edited`, of these `greedy` and `diverged`, and
    `controls`."""
    found = dict.fromkeys(("edited", "greedy", "diverged", "controls"), 0)
    for kind, sums in scores.items():
        for chosen, one in sums.items():
            found["controls" if kind == "control" else "edited"] += one["answers"]
            if kind != "control" and chosen == "greedy":
                found["greedy"] += one["answers"]
                found["diverged"] += one["diverged"]
    return found
