"""Fills a pool: an engine in this process computes the operator's templates, and nothing else.

docs/design/publish.md says who may build on them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
from kvshare_connectors.vllm.launch import Request, vllm_arguments

from kvshare_store.bounded import pieces
from kvshare_store.config import StoreConfig, json_lines
from kvshare_store.daemon import protocol
from kvshare_store.daemon.client import Client
from kvshare_store.daemon.network import place_of
from kvshare_store.errors import ConfigError, StorageError, UnavailableError, UnsupportedError
from kvshare_store.nodes.edits import Tokens, as_tokens

if TYPE_CHECKING:
    from kvshare_connectors.vllm.planning import Planning
    from kvshare_connectors.vllm.worker import Worker

_LISTED = 1000
_FLUSH_S = 600.0


class Template(msgspec.Struct):
    """A line of the file; other fields are ignored."""

    tokens: list[int] | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None


class Kept(NamedTuple):
    """A template that the pool has."""

    node: str
    """A prompt of the pool that begins with it, the shortest."""
    tokens: int
    stored: bool
    """Computed and stored now; else it was there already."""


class Published(NamedTuple):
    """What became of a file of templates."""

    templates: list[Kept]
    """In the order of the file."""
    removed: int


def publish(
    file: Path,
    pool: str,
    settings: Mapping[str, str],
    arguments: Sequence[str],
    *,
    replace: bool = False,
    progress: Callable[[str], None] = lambda told: None,
) -> Published:
    """Compute the templates of a file with an engine of its own and keep them in a pool.

    `arguments`: vLLM's, with `--model`. `replace`: also remove what the file does not have.
    `ConfigError` for a file or template that cannot be used, `StorageError` if one was not stored.
    """
    lines = _read(file)
    progress("starting an engine")
    with _engine(pool, settings, arguments) as llm, Filling(llm, pool) as engine:
        templates = [engine.tokens(number, line) for number, line in lines]
        stored = []
        for at, tokens in enumerate(templates, 1):
            progress(f"template {at:,} of {len(templates):,}: {len(tokens):,} tokens")
            stored.append(engine.store(tokens))
        engine.check(templates)
        removed = engine.keep_only(templates) if replace else 0
        kept = zip(engine.named(templates), map(len, templates), stored, strict=True)
        return Published([Kept(*each) for each in kept], removed)


def _read(file: Path) -> list[tuple[int, Template]]:
    """The lines of a file with their numbers; `ConfigError` for one that holds no template."""
    try:
        with file.open("rb") as lines:
            return list(_checked(lines))
    except OSError as error:
        raise ConfigError(f"templates {file} cannot be read: {error.strerror}") from error


def _checked(lines: IO[bytes]) -> Iterator[tuple[int, Template]]:
    number = 0
    for number, line in json_lines(lines, Template, "the templates"):
        if not (line.tokens or line.prompt or line.messages):
            raise ConfigError(f"template in line {number}: no tokens, prompt or messages")
        yield number, line
    if not number:
        raise ConfigError("the file holds no template")


@contextmanager
def _engine(pool: str, settings: Mapping[str, str], arguments: Sequence[str]) -> Iterator[Any]:
    """vLLM's `LLM` in this process, so that it can be asked what it has stored."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # the result is on the other
    line = vllm_arguments(Request(dict(settings), list(arguments), pool=pool))[1:]
    try:
        from vllm import LLM, EngineArgs  # noqa: PLC0415 - takes seconds, and may not be there
        from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: PLC0415
    except ImportError as error:
        raise UnsupportedError(f"vLLM is needed to compute templates: {error}") from error
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="kvshare publish"))
    llm = LLM.from_engine_args(EngineArgs.from_cli_args(parser.parse_args(line)))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


class Filling:
    """An engine whose prompts all go into one pool. A context manager: it holds a connection."""

    def __init__(self, llm: Any, pool: str) -> None:
        """`llm`: vLLM's `LLM`. `UnsupportedError` for a model that KVShare does not serve."""
        self._llm = llm
        planning, self._worker = _sides(llm)
        self._config: StoreConfig = planning.config
        self._pool = planning.namespace.in_pool(pool)
        self._client = Client(place_of(self._config))

    def __enter__(self) -> Filling:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    # --- templates ---------------------------------------------------------------------------

    def tokens(self, number: int, line: Template) -> Tokens:
        """The tokens of a line; `ConfigError` if the engine cannot take or would not store them."""
        try:
            found = as_tokens(self._ids(line))
        except Exception as error:  # whatever a chat template raises
            raise ConfigError(f"template in line {number} has no tokens: {error}") from error
        least = self._config.min_prompt_tokens
        most = int(self._llm.llm_engine.model_config.max_model_len) - 1
        if not least <= len(found) <= most:
            raise ConfigError(
                f"template in line {number} has {len(found):,} tokens: it needs at least {least:,} "
                f"(min_prompt_tokens) and at most {most:,} (vLLM's --max-model-len, less one)"
            )
        return found

    def _ids(self, line: Template) -> list[int]:
        if line.tokens:
            return line.tokens
        tokenizer: Any = self._llm.get_tokenizer()
        if line.prompt:
            return list(tokenizer.encode(line.prompt))
        return list(tokenizer.apply_chat_template(line.messages, tokenize=True, return_dict=False))

    # --- the pool ----------------------------------------------------------------------------

    def nodes(self) -> dict[str, Tokens]:
        """What the pool holds, by node."""
        found: dict[str, Tokens] = {}
        after = ""
        while some := self._client.call(protocol.NodesOf(self._pool.digest, after, _LISTED)):
            found |= {node: np.frombuffer(tokens, np.int32) for node, tokens in some}
            after = some[-1][0]
        return found

    def holds(self, template: Tokens) -> bool:
        """Whether a prompt of the pool begins with the template."""
        return any(_begins(tokens, template) for tokens in self.nodes().values())

    def named(self, templates: Sequence[Tokens]) -> list[str]:
        """For each template the shortest prompt of the pool that begins with it; `StorageError`
        unless there is one for each."""
        nodes = sorted(self.nodes().items(), key=lambda node: len(node[1]))
        found = [
            next((name for name, tokens in nodes if _begins(tokens, template)), "")
            for template in templates
        ]
        if missing := found.count(""):
            raise StorageError(
                f"{missing:,} of {len(templates):,} templates are not in the pool: the log above "
                f"and that of the daemon ({self._config.home_path / 'daemon.log'}) say why, or "
                "somebody has purged the pool or published with --replace meanwhile"
            )
        return found

    def store(self, template: Tokens) -> bool:
        """Compute a template and wait until it is stored, so that the next one can build on it.
        False for one that is here already."""
        if self.holds(template):
            return False
        from vllm import SamplingParams  # noqa: PLC0415 - see `_engine`

        prompt: Any = {"prompt_token_ids": template.tolist()}
        self._llm.generate([prompt], SamplingParams(max_tokens=1), use_tqdm=False)
        self._worker.saver.wait()
        return True

    def check(self, templates: Sequence[Tokens]) -> None:
        """`StorageError` unless all of the templates are here and durable."""
        self._client.flush(_FLUSH_S)
        self.named(templates)

    def keep_only(self, templates: Sequence[Tokens]) -> int:
        """Remove what is none of the templates; returns how many.

        A template may have had its rows only as the beginning of what is removed: it is stored
        again, from the blocks that are still here or computed.
        """
        wanted = {template.tobytes() for template in templates}
        gone = [node for node, tokens in self.nodes().items() if tokens.tobytes() not in wanted]
        for some in pieces(gone, _LISTED):
            self._client.call(protocol.Forget(tuple(some)))
        for template in templates:
            self.store(template)
        self.check(templates)
        return len(gone)


def _begins(tokens: Tokens, template: Tokens) -> bool:
    return np.array_equal(tokens[: len(template)], template)


def _sides(llm: Any) -> tuple[Planning, Worker]:
    """Both sides of the connector; `UnsupportedError` if one of them serves nothing."""
    from kvshare_connectors.vllm.beside import ours  # noqa: PLC0415 - see `_engine`
    from kvshare_connectors.vllm.idle import IdleWorker  # noqa: PLC0415
    from vllm.distributed.kv_transfer import get_kv_transfer_group  # noqa: PLC0415

    core: Any = llm.llm_engine.engine_core
    scheduler, worker = ours(core.engine_core.scheduler.connector), ours(get_kv_transfer_group())
    planning = scheduler.planning if scheduler is not None else None
    loads = worker.worker if worker is not None else None
    if planning is None or loads is None or isinstance(loads, IdleWorker):
        raise UnsupportedError("KVShare does not serve this model; the log above says why")
    if not planning.link.client.greeted:
        raise UnavailableError("no daemon answers, so nothing can be stored")
    return planning, loads
