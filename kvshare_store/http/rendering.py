"""Templates: everything that they print is escaped, and signs that steer a reader are shown."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from fastapi import Request, Response
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from kvshare_store.errors.wording import short
from kvshare_store.http.chart import HEIGHT, WIDTH
from kvshare_store.http.classes import SPARK_HEIGHT, SPARK_WIDTH, described
from kvshare_store.http.guard import Forms
from kvshare_store.http.history import KINDS
from kvshare_store.readable import (
    REASONS,
    age,
    as_one_name,
    assumed_text,
    bounds,
    many,
    milliseconds,
    miss_text,
    no_tokens_text,
    one_line,
    outcome_text,
    percent,
    printable,
    provenance,
    rates_text,
    share,
    shortened,
    size,
    source_text,
    steering_text,
    then_text,
    too_few,
    took,
    verdict_lines,
)

PART_CHARACTERS = 240
"""Of a run of tokens that are shown, unless all is asked for."""
_CACHED = "in the engine's own cache"
"""How a page names the kind `cached`."""

_environment = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_environment.filters.update(
    size=size,
    age=age,
    ms=milliseconds,
    took=took,
    short=short,
    provenance=provenance,
    shown=printable,
    line=one_line,
    exact=as_one_name,
    grouped=lambda number: f"{number:,}",
    clock=lambda at: time.strftime("%H:%M", time.localtime(at)),
    percent=percent,
    verdict=verdict_lines,
    steering=steering_text,
    then=then_text,
    assumed=assumed_text,
    miss=miss_text,
    outcome=outcome_text,
    no_tokens=no_tokens_text,
    rates=rates_text,
    source=source_text,
    described=described,
    nats=lambda value: f"{value:.4f}",
    query=urlencode,
    many=many,
    kind=lambda name: _CACHED if name == "cached" else name,
    in_order=lambda counts: [(kind, counts.get(kind, 0)) for kind in KINDS],
    zip_same=lambda names: [(name, name) for name in names],
)
_environment.globals.update(
    bounds=bounds,
    too_few=too_few,
    share=share,
    reasons=REASONS,
    whole=(WIDTH, HEIGHT),
    spark=(SPARK_WIDTH, SPARK_HEIGHT),
)

for _name in _environment.list_templates():
    _environment.get_template(_name)  # compiled now: the first who looks need not wait


def rendered(request: Request, template: str, status: int = 200, **names: Any) -> Response:
    """A page. `csrf(path)` in a template makes the token of a form for that path."""
    forms: Forms = request.app.state.forms
    text = _environment.get_template(template).render(
        path=request.url.path, csrf=forms.token, status=status, **names
    )
    return HTMLResponse(text, status)


def words(text: str, *, full: bool) -> str:
    """The text of a run of tokens, shortened in its middle unless all of it is asked for."""
    shown = printable(text)
    return shown if full else shortened(shown, PART_CHARACTERS)
