"""How soon the page of a daemon with many prompts shows something, in a real browser."""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import httpx

from benchmarks.harness.daemons import serve, serving
from benchmarks.harness.plots import LINES, cumulative
from benchmarks.harness.result import Cell, MissingPartError, Options, Result
from benchmarks.store.metadata import NAMESPACE, TOKENS, fill
from kvshare_store.blocks.block_store import BlockStore
from kvshare_store.cli.progress import track
from kvshare_store.config import StoreConfig
from kvshare_store.daemon.client import Client
from kvshare_store.daemon.protocol import Decline
from kvshare_store.store import Store
from tests.support.browser import Tab, browser, chromium
from tests.support.page import page_url

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NODES, SHORT_NODES = 100_000, 5_000
STARTS, SHORT_STARTS = 5, 2
WARM, SHORT_WARM = 20, 3
REQUESTS = 1_000
"""As many as the log keeps."""
TARGET_MS = 300.0
SCREEN = (1280, 900)
FIRST, FLOOR = "overview", "no page (/healthz)"
PAINTED = """new Promise(done => {
    new PerformanceObserver(list => {
        const found = list.getEntriesByName("first-contentful-paint");
        if (found.length) done(found[0].startTime);
    }).observe({type: "paint", buffered: true});
})"""
ANSWERED = """(() => {
    const {requestStart, responseEnd} = performance.getEntriesByType("navigation")[0];
    return responseEnd - requestStart;
})()"""


class Seen(NamedTuple):
    """One view, opened once; milliseconds."""

    painted: float
    """From the click to the first content on the screen."""
    answered: float
    """From the request for the document to its last byte."""


Samples = dict[str, list[Seen]]


def look(tab: Tab, url: str) -> Seen:
    """Open a view."""
    tab.open(url)
    return Seen(float(tab.run(PAINTED)), float(tab.run(ANSWERED)))


def views(url: str) -> dict[str, str]:
    """The paths of all views, by what they show."""
    space = NAMESPACE.digest

    def first(path: str) -> str:
        return str(httpx.get(url + path, timeout=30.0).json()["nodes"][0]["id"])

    parent = first(f"/api/namespaces/{space}/nodes?limit=1")
    child = first(f"/api/nodes/{parent}/children?limit=1")
    return {
        FIRST: "/",
        "tenants": "/tenants",
        "namespace": f"/namespaces/{space}",
        "namespace, every prompt": f"/namespaces/{space}?whole=true",
        "prompt beside its parent": f"/nodes/{child}",
        "requests": "/requests",
        "quality": "/quality",
        "explain": "/explain",
        FLOOR: "/healthz",
    }


@contextmanager
def started(config: StoreConfig) -> Iterator[str]:
    """A daemon whose log of requests is full; the address of its page."""
    with serving(config, "benchmarks.store.page"):
        with Client(config.home_path) as client:
            for number in range(REQUESTS):
                client.call(Decline("short_prompt", 100 + number))
        yield page_url(config.home_path)


def visit(url: str, tab: Tab, rounds: int) -> tuple[Samples, Samples]:
    """Every view for the first time, the overview before all others, with nothing in the browser's
    cache; then all of them several times."""
    tab.call("Network.clearBrowserCache")
    cold: Samples = {FIRST: [look(tab, f"{url}/")]}
    paths = views(url)
    for name in [name for name in paths if name != FIRST]:
        tab.call("Network.clearBrowserCache")
        cold[name] = [look(tab, url + paths[name])]
    warm: Samples = {name: [] for name in paths}
    for _ in range(rounds):
        for name, path in paths.items():
            warm[name].append(look(tab, url + path))
    return cold, warm


def measure(options: Options) -> Result:
    """Start the daemon several times, and look at each view then and again."""
    if not chromium():
        raise MissingPartError("this machine lacks chromium")
    nodes = options.size(NODES, SHORT_NODES)
    starts, rounds = (SHORT_STARTS, SHORT_WARM) if options.short else (STARTS, WARM)
    cold, warm = Samples(), Samples()
    with tempfile.TemporaryDirectory(prefix="kvshare-page-", dir=Path.cwd()) as place:
        config = StoreConfig(home=str(Path(place) / "home"), host_bytes=64 << 20, gc_seconds=0.0,
                             semantic="never", max_nodes=1 << 30, http="127.0.0.1:0")  # fmt: skip
        with Store(config):
            pass
        fill(config.home_path, nodes, "edited")
        for _ in track(range(starts), "Starts of the daemon"):
            with ExitStack() as stack:
                url = stack.enter_context(started(config))
                tab = stack.enter_context(_browser())
                for kept, found in zip((cold, warm), visit(url, tab, rounds), strict=True):
                    for name, seen in found.items():
                        kept.setdefault(name, []).extend(seen)
    return result_of(cold, warm, nodes, options)


class _Ready(BaseHTTPRequestHandler):
    """A server of one word."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>ready</title><p>ready")

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def _browser() -> Iterator[Tab]:
    """One that has shown another server's page: what it does when it has just started, such as
    starting a process for pages and reading fonts, is not the page's time."""
    with (
        tempfile.TemporaryDirectory(prefix="kvshare-browser-") as folder,
        browser(Path(folder)) as tab,
        ThreadingHTTPServer(("127.0.0.1", 0), _Ready) as other,
    ):
        threading.Thread(target=other.serve_forever, daemon=True).start()
        tab.look(*SCREEN)
        look(tab, f"http://127.0.0.1:{other.server_port}/")
        other.shutdown()
        yield tab


def row_of(name: str, cold: list[Seen], warm: list[Seen]) -> list[Cell]:
    """Medians and the slowest ones of the first looks, medians and p99 of the later ones."""
    row: list[Cell] = [name]
    for seen in (cold, warm):
        for values in ([one.painted for one in seen], [one.answered for one in seen]):
            ranked = sorted(values)
            row += [median(ranked), ranked[round(0.99 * (len(ranked) - 1))]]
    return row


def result_of(cold: Samples, warm: Samples, nodes: int, options: Options) -> Result:
    """The table."""
    first = [one.painted for one in cold[FIRST]]
    return Result(
        name="page",
        title="The page: milliseconds until a view shows something",
        n={"starts of the daemon": len(first), "later looks at a view": len(warm[FIRST])},
        seed=options.seed,
        model=f"none ({nodes:,} nodes of {TOKENS:,} tokens)",
        noise_floor=f"`{FLOOR}`: a word of text, which the daemon's HTTP server knows by itself",
        columns=["view", "first paint, cold", "p99", "document, cold", "p99", "first paint, warm",
                 "p99", "document, warm", "p99"],
        rows=[row_of(name, cold[name], warm[name]) for name in cold],
        paper="not measured",
        notes=[
            f"A real daemon with {nodes:,} prompts in families of ten and {REQUESTS:,} requests in "
            "its log; Chromium without a screen, on the same cores. First paint: from the "
            "navigation to the first contentful paint, as the browser says; document: from the "
            "request to the last byte of HTML.",
            "cold: the daemon has just started and has not shown this view yet, and the browser's "
            "cache is empty; the overview is the first view of all. The browser has shown a page "
            "of another server before. Of so few, p99 is the slowest. warm: all views again and "
            "again.",
            "The prompts have no tokenizer, so token ids are shown. The files of blocks are not "
            "there; no view reads any.",
        ],
        targets=[(
            f"the first view of the page ≤ {TARGET_MS:.0f} ms at {NODES:,} nodes",
            f"{median(first):.0f} ms in the median, {max(first):.0f} ms at most, "
            f"at {nodes:,} nodes",
            max(first) <= TARGET_MS and nodes >= NODES,
        )],
        series={"painted": {
            when: {name: [one.painted for one in seen[name]] for name in cold}
            for when, seen in (("cold", cold), ("warm", warm))
        }},
    )  # fmt: skip


def draw(made: Result) -> Figure:
    """Share of later looks by the time to first paint, for four of the views."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    names = (FIRST, "namespace", "prompt beside its parent", FLOOR)
    for name, (style, _) in zip(names, LINES, strict=True):
        cumulative(axes, made.series["painted"]["warm"][name], style, label=name)
    axes.set(xlabel="milliseconds to first contentful paint, warm", ylabel="share of looks")
    axes.set_xlim(left=0)
    axes.legend()
    return figure


if __name__ == "__main__":
    BlockStore.expect = lambda *_: True  # type: ignore[method-assign]
    serve(sys.argv[1])
