"""What mkdocs calls while it builds the site: pages that are not in docs/, and their order."""

from __future__ import annotations

import fnmatch
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import reference  # noqa: E402

from benchmarks.harness.dead_links import slug  # noqa: E402

_LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s:]+)\)")
_MOVED = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
_MOVED |= {"CHANGELOG.md": "changelog.md", "LICENSE": ""}
"""Where files beside docs/ are on the site; the empty name: nowhere."""


def on_config(config: Any) -> Any:
    """Put the pages that the patterns in the navigation stand for in their places."""
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    pages |= {name for name in _MOVED.values() if name}
    config.mdx_configs["toc"]["slugify"] = slug  # links are the same on the site and in the sources
    config.nav = _expanded(config.nav, sorted(pages - set(_named(config.nav))))
    return config


def _named(entries: Any) -> list[str]:
    if isinstance(entries, str):
        return [] if "*" in entries else [entries]
    inner = entries.values() if isinstance(entries, dict) else entries
    return [name for entry in inner for name in _named(entry)]


def _expanded(entries: Any, rest: list[str]) -> Any:
    if isinstance(entries, dict):
        return {title: _expanded(entry, rest) for title, entry in entries.items()}
    if isinstance(entries, str):
        return entries
    found: list[Any] = []
    for entry in entries:
        if isinstance(entry, str) and "*" in entry:
            depth = entry.count("/")
            found += [n for n in rest if fnmatch.fnmatch(n, entry) and n.count("/") == depth]
        else:
            found.append(_expanded(entry, rest))
    return found


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that have no file in docs/."""
    for name, moved in _MOVED.items():
        if moved:
            text = _links(ROOT / name, (ROOT / name).read_text("utf-8"), moved)
            files.append(File.generated(config, moved, content=text))
    files.append(File.generated(config, "options.md", content=reference.page()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to where things are on the site."""
    if page.file.generated_by:
        return markdown
    return _links(Path(page.file.abs_src_path), markdown, page.file.src_uri)


def _links(source: Path, text: str, here: str) -> str:
    """The text of a page at `here`: links out of docs/ become names of files."""

    def moved(match: re.Match[str]) -> str:
        name, hash_, anchor = match[2].partition("#")
        if not name:
            return match[0]
        path = (source.parent / name).resolve().relative_to(ROOT).as_posix()
        target = path.removeprefix("docs/") if path.startswith("docs/") else _MOVED.get(path, "")
        if not target:
            return f"{match[1].strip('[]!')} (`{path}` in the sources)"
        found = posixpath.relpath(target, posixpath.dirname(here) or ".")
        return f"{match[1]}({found}{hash_}{anchor})"

    return _LINK.sub(moved, text)
