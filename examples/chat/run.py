"""Conversations through `kvshare vllm serve`, beside vLLM with its own prefix caching alone.

    python -m examples.chat [--data PATH] [--model PATH] [--out chat-report.json] [--turns N]

Two servers with the same settings: `vllm serve`, whose prefix caching is on, and the same with
KVShare and the policy `balanced`. A client of the OpenAI API sends each of them the same
conversations, whose histories are left as they are or rewritten in four ways (`REWRITES`).

How it is measured:

- Conversations run side by side: the first turn of all, then the second of all, without a pause.
  One server serves all conversations of a kind, then the other one does, so that what KVShare
  stores in the background delays its own next turns and nobody else's.
- The time to the first word runs from sending the request to the first word of the stream, at the
  client. Tokens computed are what KVShare logs of a request, and what vLLM says was not cached.
- Each kind of history has a `cache_salt` of its own: nothing is shared between kinds.
- The written answers are sent as history, whatever the model answers. It answers 16 tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import yaml
from rich.console import Console

from examples.chat.measured import ARMS, Turn, problems, report
from examples.chat.table import LEGEND, table
from examples.engines.process import EngineError
from examples.engines.server import Server, Streamed, arguments
from examples.engines.small_model import SmallModelError, prepare_model
from examples.engines.store import StoreView, temporary_home
from examples.prompts.histories import REWRITES, Asked, Message, Rewrite, recorded, requests
from kvshare_store.cli.progress import progress
from kvshare_store.errors import KVShareError

_ANSWER_TOKENS = 16
_RECORDED = 6
"""Conversations of a recording that are sent."""
_SET = Path("tau", "airline.jsonl")
"""The recordings in a folder of data sets (docs/benchmarks/data.md)."""


def written() -> list[list[Message]]:
    """The conversations that come with the example."""
    path = Path(__file__).parent / "conversations.yaml"
    script = yaml.safe_load(path.read_text(encoding="utf-8"))
    system = {"role": "system", "content": script["system"].strip()}
    return [
        [system, *({**said, "content": said["content"].strip()} for said in each["messages"])]
        for each in script["conversations"]
    ]


def conversations(options: argparse.Namespace) -> list[list[Message]]:
    """Those that the options ask for."""
    if options.data is None:
        return written()[: options.conversations]
    path = options.data / _SET if options.data.is_dir() else options.data
    return list(islice(recorded(path), options.conversations or _RECORDED))


class Chat:
    """Both servers, and the conversations to send them."""

    def __init__(
        self, servers: dict[str, Server], store: StoreView, spoken: list[list[Message]], turns: int
    ) -> None:
        self.servers, self.store, self.spoken, self.turns = servers, store, spoken, turns

    @property
    def steps(self) -> int:
        """The number of requests that `serve` sends."""
        return len(ARMS) * sum(len(self.asked(rewrite)) for rewrite in REWRITES)

    def asked(self, rewrite: Rewrite) -> list[Asked]:
        """The requests of one kind of history, in the order of sending."""
        return list(requests(self.spoken, rewrite, self.turns))

    def warm_up(self) -> None:
        """Have every server answer two turns that are not measured."""
        for arm in ARMS:
            self._answers(arm, self.asked(REWRITES[0])[:2], lambda: None)
        self.store.rest()

    def serve(self, advance: Callable[[], None]) -> Iterator[Turn]:
        """Have all turns answered by both servers; `advance` is called for each answer."""
        for number, rewrite in enumerate(REWRITES):
            asked = self.asked(rewrite)
            given: dict[str, list[Streamed]] = {}
            for arm in ARMS if number % 2 else reversed(ARMS):
                given[arm] = self._answers(arm, asked, advance)
                self.store.rest()
            for at, one in enumerate(asked):
                answers = {arm: given[arm][at] for arm in ARMS}
                yield Turn(rewrite.name, one.conversation, one.turn, answers)

    def _answers(
        self, arm: str, asked: Sequence[Asked], advance: Callable[[], object]
    ) -> list[Streamed]:
        salt = uuid.uuid4().hex
        answers = []
        for one in asked:
            answers.append(self.servers[arm].ask(one.messages, salt, _ANSWER_TOKENS))
            advance()
        return answers


def measure(options: argparse.Namespace, console: Console) -> list[Turn]:
    """Start both servers and serve all turns; everything ends with it."""
    spoken = conversations(options)
    logs = {arm: options.out.with_suffix(f".{arm}.log") for arm in ARMS}
    with ExitStack() as stack:
        home = stack.enter_context(temporary_home())
        console.print("Starting two servers, a minute or two ...")
        settings = {"home": home, "policy": "balanced", "log_requests": "true"}
        plain = Server("prefix", arguments(options.model, None), logs["prefix"])
        stack.enter_context(plain)
        command = arguments(options.model, settings)
        ours = Server("kvshare", command, logs["kvshare"], kvshare=True)
        stack.enter_context(ours)
        servers = {"prefix": plain, "kvshare": ours}
        for server in servers.values():
            server.ready()
        store = StoreView(home)
        stack.callback(store.close)
        chat = Chat(servers, store, spoken, options.turns)
        console.print("Warming up ...")
        chat.warm_up()
        with progress() as shown:
            what = f"Serving {len(spoken)} conversations side by side"
            task = shown.add_task(what, total=chat.steps)
            return list(chat.serve(lambda: shown.advance(task)))


def parse_arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.chat",
        description="Serve conversations with rewritten histories through the OpenAI API, by vLLM "
        "with and without KVShare, and compare.",
    )
    parser.add_argument(
        "--data", type=Path, metavar="PATH",
        help='recorded conversations: a file with {"messages": [...]} a line, or the folder of the '
        "data sets (default: the example's own)",
    )  # fmt: skip
    parser.add_argument("--conversations", type=int, metavar="N", help="only the first N")
    parser.add_argument("--turns", type=int, default=6, metavar="N", help="of each (default: 6)")
    parser.add_argument("--model", type=Path, help="a model folder (default: the demo's own)")
    parser.add_argument("--out", type=Path, default=Path("chat-report.json"), help="the report")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Run the example; the exit status says whether it worked."""
    options = parse_arguments(given)
    console = Console()
    logs = options.out.with_suffix(".*.log")
    try:
        options.model = options.model or prepare_model()
        turns = measure(options, console)
    except (EngineError, SmallModelError, KVShareError, OSError, ValueError) as error:
        console.print(f"The example did not work: {error}. Details: {logs}", style="red")
        return 1
    made = report(options.model.name, turns)
    options.out.write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(table(turns))
    console.print(LEGEND)
    found = problems(turns)
    for problem in found:
        console.print(f"The example did not work: {problem}. Details: {logs}", style="red")
    console.print(f"Report: {options.out}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
