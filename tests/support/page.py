"""A real daemon with its HTTP server, holding prompts that are full of HTML; and pages as they are
sent, of that daemon or of a store in this process."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.by_id import held
from kvshare_store.daemon.client import Client, plan_request
from kvshare_store.daemon.questions import answer
from kvshare_store.errors import KVShareError
from kvshare_store.http.app import routes
from kvshare_store.http.asking import Asking
from kvshare_store.http.history import History
from kvshare_store.namespace import Namespace
from kvshare_store.plan import Outcome, ReusePlan
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout
from tests.support.daemons import START_S, ClientDriver, Daemon
from tests.support.stores import SMALL

EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
SHOP = "You answer for a bike shop. Today: 3 May. "
CATALOGUE = "".join(f"Bike {n} costs {n * 37} francs & weighs < {n} kg. " for n in range(1, 12))
PARENT = f"{SHOP}{EVIL}{CATALOGUE}Do you sell bells?"
CHILD = PARENT.replace("3 May", "14 May").replace("bells", "locks")
TENANT = "<i>alice</i>"
TOKEN = "a-token-of-tests-and-of-nothing-else"
BEARING = {"authorization": f"Bearer {TOKEN}"}


ALLOWED = {
    "html", "head", "meta", "title", "link", "script", "body", "a", "header", "nav", "ul", "ol",
    "li", "main", "h1", "h2", "h3", "p", "div", "section", "span", "strong", "dl", "dt", "dd",
    "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "form", "input", "label",
    "select", "option", "textarea", "button", "meter", "figure", "figcaption", "svg", "rect",
    "blockquote", "br", "polygon", "polyline", "line",
}  # fmt: skip
"""Elements that the templates have. `script` is one, with an address of ours."""


class Page(HTMLParser):
    """Checks while it reads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert tag in ALLOWED, tag
        assert not [name for name in found if name.startswith("on") or name == "style"], found
        if tag == "script":
            assert found["src"] == "/static/page.js"
        for name in ("href", "src", "action"):
            assert not found.get(name) or re.match(r"[/?#]", found[name] or ""), found
        if identity := found.get("id"):
            self.ids.append(identity)
        self.elements.append((tag, found))

    def handle_data(self, data: str) -> None:
        self.text += data


class Inside:
    """A store that is asked in this process, as the daemon asks its own."""

    def __init__(self, store: Store) -> None:
        self.store, self.config = store, store.config

    def ask(self, message: Any, given_up: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(msgspec.to_builtins(self._found(message)))
        except KVShareError as error:
            future.set_exception(error)
        return future

    def _found(self, message: Any) -> Any:
        if isinstance(message, protocol.Stats):
            return self.store.stats()
        if isinstance(message, protocol.Held):
            return held(self.store, message.model)
        return answer(self.store, message)


def seen(store: Store, path: str = "/", *, history: History | None = None) -> httpx.Response:
    """A page of a store in this process."""
    transport = httpx.ASGITransport(routes(Asking(Inside(store), history or History())))
    accept = {} if path.startswith("/api/") else {"accept": "text/html"}

    async def get() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get(path, headers=accept)

    return asyncio.run(get())


def byte_tokenizer(folder: Path) -> Path:
    """A tokenizer with one token per byte."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({sign: at for at, sign in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(folder / "tokenizer.json"))
    return folder


def tokens_of(space: Namespace, text: str) -> list[int]:
    """The tokens of a text, as the namespace's tokenizer splits it."""
    made = Tokenizer.from_file(f"{space.tokenizer}/tokenizer.json")
    return list(made.encode(text, add_special_tokens=False).ids)


class Numb:
    """A daemon that accepts questions and answers none until it is told to."""

    def __init__(self) -> None:
        self.config = StoreConfig(http="127.0.0.1:0")
        self.asked: list[tuple[Any, Callable[[], bool]]] = []
        self.answers: list[Future[Any]] = []

    def ask(self, message: Any, given_up: Callable[[], bool]) -> Future[Any]:
        self.answers.append(Future())
        self.asked.append((message, given_up))
        return self.answers[-1]


class World(NamedTuple):
    """A daemon, the prompts in it, and how to ask it."""

    daemon: Daemon
    url: str
    space: Namespace
    parent: str
    child: str
    foreign: str
    """A prompt of `TENANT`."""

    def ask(self, method: str, path: str, **how: Any) -> httpx.Response:
        """One request on a connection of its own."""
        # without the list of authorities, which takes longer to load than an answer to come
        return httpx.request(method, self.url + path, timeout=30.0, verify=False, **how)

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text, as the world's tokenizer splits it."""
        return tokens_of(self.space, text)


def page_url(home: Path) -> str:
    """The address of the page of a home's daemon, from its output, without a slash at the end; if
    there were several daemons, of the last one."""
    deadline = time.monotonic() + START_S
    while True:
        log = (home / "daemon.log").read_text()
        found: list[str] = re.findall(r"the page is on (http://\S+)/\n", log)
        if found:
            return found[-1]
        assert time.monotonic() < deadline, log
        time.sleep(0.02)


@contextlib.contextmanager
def world(folder: Path, **settings: Any) -> Iterator[World]:
    """A parent, its edited child, a prompt of another tenant; a declined request, and a served one
    with a hostile name."""
    home = folder / "home"
    chosen = SMALL | {"http": "127.0.0.1:0"} | settings
    config = StoreConfig(home=str(home), **chosen)
    tokenizer = byte_tokenizer(folder / "tokenizer")
    space = Namespace("org/<model>", KVLayout(2, 1, 4, "float32"), tokenizer=str(tokenizer))
    with Daemon(config) as daemon, Client(home) as client:
        made = World(daemon, page_url(config.home_path), space, "", "", "")
        engine = ClientDriver(client, space)
        parent = engine.save(made.tokens(PARENT))
        child_tokens = np.asarray(made.tokens(CHILD), np.int32)
        asked = client.send(plan_request(child_tokens, space, None, f"chat-{EVIL}"))
        plan = msgspec.convert(client.receive(asked, 20.0), ReusePlan)
        left = plan.tokens - plan.reused
        client.finish(plan.lease, Outcome(plan.exact, plan.reused - plan.exact, left, seconds=0.2))
        child = engine.save(child_tokens.tolist(), plan)
        other = ClientDriver(client, space.for_tenant(TENANT), engine.book)
        assert other.plan(made.tokens(PARENT)).declined == "empty_store"
        foreign = other.save(made.tokens(PARENT))
        client.flush()
        assert parent is not None
        assert child is not None
        assert foreign is not None
        yield made._replace(parent=parent, child=child, foreign=foreign)


def owned_world(folder: Path) -> contextlib.AbstractContextManager[World]:
    """A world whose daemon wants `TOKEN`, and has limits that nobody reaches."""
    secret = folder / "token"
    secret.write_text(TOKEN + "\n")
    secret.chmod(0o600)
    limits = {"namespace_nodes": 1000, "plans_per_second": 5000.0, "saves_per_second": 2500.5}
    return world(folder, http_token=str(secret), log_prompts=True, **limits)
