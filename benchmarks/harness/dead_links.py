"""Find broken links between the project's documents.

python -m benchmarks.harness.dead_links
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def broken(folder: Path) -> Iterator[str]:
    """`FILE: LINK` for each relative link of `*.md` and `docs/**/*.md` that leads nowhere."""
    for path in sorted([*folder.glob("*.md"), *folder.glob("docs/**/*.md")]):
        for link in _LINK.findall(_prose(path)):
            if "://" in link or link.startswith("mailto:"):
                continue
            file, _, anchor = link.partition("#")
            target = (path.parent / file) if file else path
            if not target.exists() or (anchor and anchor not in anchors(target)):
                yield f"{path.relative_to(folder)}: {link}"


def anchors(path: Path) -> set[str]:
    """Anchors of a document's headings, as code hosts name them."""
    return {slug(text) for text in _HEADING.findall(_prose(path))}


def slug(heading: str, separator: str = "-") -> str:
    """What a heading is called in links."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", separator)


def _prose(path: Path) -> str:
    return _FENCE.sub("", path.read_text(encoding="utf-8"))


def main() -> int:
    """Print what is broken; 1 if something is."""
    found = list(broken(Path.cwd()))
    print("\n".join(found) or "links are fine")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
