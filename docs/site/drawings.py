"""The drawings of docs/how.md, as SVG.

python docs/site/drawings.py
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "drawings"
KINDS = {"exact": "#2e7d32", "continued": "#8e24aa", "edited": "#00838f", "computed": "#f9a825"}
_INK, _PAPER, _BOX = "#37474f", "#ffffff", "#eceff1"

Parts = list[str]


def box(x: int, y: int, width: int, text: str, below: str = "", fill: str = _BOX) -> str:
    """A box with its name and, smaller, what it does."""
    ink = _INK if fill in {_BOX, _PAPER} else "#ffffff"
    frame = f'<rect x="{x}" y="{y}" width="{width}" height="52" rx="6" fill="{fill}"/>'
    middle = x + width // 2
    if not below:
        return frame + words(middle, y + 31, text, ink=ink, bold=True)
    lines = words(middle, y + 23, text, ink=ink, bold=True)
    return frame + lines + words(middle, y + 41, below, ink=ink, size=11)


def words(
    x: int,
    y: int,
    text: str,
    ink: str = _INK,
    size: int = 13,
    anchor: str = "middle",
    bold: bool = False,
) -> str:
    """Text at a point."""
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x}" y="{y}" fill="{ink}" font-size="{size}" text-anchor="{anchor}"{weight}>'
        f"{escape(text)}</text>"
    )


def arrow(x: int, y: int, to_x: int, to_y: int) -> str:
    """A straight line with a head."""
    return f'<path d="M{x} {y} L{to_x} {to_y}" stroke="{_INK}" marker-end="url(#head)"/>'


def drawing(title: str, width: int, height: int, parts: Parts) -> str:
    """A whole file; the title is what screen readers read."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'font-family="sans-serif"><title>{escape(title)}</title>'
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
        f'markerHeight="8" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{_INK}"/></marker></defs>'
        f'<rect width="{width}" height="{height}" rx="8" fill="{_PAPER}"/>'
    )
    return "\n".join([head, *parts, "</svg>\n"])


def flows() -> str:
    """Serving above, saving below, the store between."""
    serve = [("lookup", "who is similar?"), ("plan", "which rows, where to"), ("load", "rows move")]
    serve += [("engine", "computes the rest"), ("first token", "")]
    parts = [words(20, 28, "serve", anchor="start", bold=True)]
    for place, (name, what) in enumerate(serve):
        parts.append(box(20 + 152 * place, 40, 128, name, what))
        if place:
            parts.append(arrow(20 + 152 * place - 24, 66, 20 + 152 * place - 2, 66))
    parts += [box(20, 160, 280, "DELTA tree", "tokens, edits, where each row lies")]
    parts += [box(324, 160, 432, "blocks", "device │ host │ disk │ remote")]
    parts += [arrow(84, 160, 84, 94), arrow(388, 160, 388, 94), arrow(540, 94, 540, 158)]
    parts += [words(549, 130, "save: rows that the engine computed", anchor="start", size=12)]
    parts += [arrow(322, 186, 302, 186), words(20, 236, "A node points at its rows; blocks hold "
              "them, named by their content.", anchor="start", size=12)]  # fmt: skip
    return drawing("How a prompt is served and saved", 780, 256, parts)


def partial_prefill() -> str:
    """A stored prompt, a request, and what of the request is computed."""
    stored, asked = (_prompt("3", "bells"), _prompt("4", "red"))
    computed = {8, 9, 16}
    parts = [words(16, 44, "stored", anchor="start"), words(16, 118, "request", anchor="start")]
    for place, (old, new) in enumerate(zip(stored, asked, strict=True)):
        x = 84 + 54 * place
        kind = "exact" if place < min(computed) else "edited"
        kind = "computed" if place in computed else kind
        parts += [cell(x, 22, old, _BOX), cell(x, 96, new, KINDS[kind])]
        if kind != "computed":
            parts.append(arrow(x + 25, 58, x + 25, 93))
    for place, (kind, text) in enumerate(_legend()):
        parts.append(f'<rect x="{84 + 290 * place}" y="154" width="14" height="14" '
                     f'fill="{KINDS[kind]}"/>')  # fmt: skip
        parts.append(words(104 + 290 * place, 166, text, anchor="start", size=12))
    return drawing("Which rows of a request are loaded and which computed", 1020, 190, parts)


def _prompt(day: str, what: str) -> list[str]:
    text = f"You answer for a shop . Today : {day} May . Offers bells lamps locks ? {what}"
    return text.split()


def _legend() -> Iterator[tuple[str, str]]:
    yield "exact", "exact: the same text before it"
    yield "computed", "computed: the edit and a window behind it"
    yield "edited", "edited: loaded, computed behind other text"


def cell(x: int, y: int, text: str, fill: str) -> str:
    """A token."""
    ink = _INK if fill in {_BOX, KINDS["computed"]} else "#ffffff"
    shape = f'<rect x="{x}" y="{y}" width="50" height="34" rx="4" fill="{fill}"/>'
    return shape + words(x + 25, y + 22, text, ink=ink, size=10)


def tree() -> str:
    """Three prompts, each from the one before, and the blocks that they share."""
    nodes = [("A", "1,000 tokens", "stores 1,000 rows"), ("B", "A with 10 replaced", "stores 10")]
    nodes += [("C", "B with 5 added", "stores 5")]
    parts: Parts = []
    for place, (name, what, stores) in enumerate(nodes):
        x = 20 + 250 * place
        parts += [box(x, 20, 200, f"{name}: {what}", stores)]
        if place:
            parts.append(arrow(x - 50, 46, x - 2, 46))
            parts.append(words(x - 26, 38, "edits", size=11))
    for place, (width, text) in enumerate([(440, "blocks of A"), (110, "of B"), (110, "of C")]):
        x = [20, 480, 610][place]
        parts.append(box(x, 150, width, text))
    parts += [arrow(120, 72, 120, 148), arrow(350, 72, 240, 148), arrow(390, 72, 520, 148)]
    parts += [arrow(590, 72, 380, 148), arrow(620, 72, 550, 148), arrow(650, 72, 660, 148)]
    parts.append(words(20, 228, "Segments point at blocks, not at parents: A may be forgotten, and "
                       "B and C still have all their rows.", anchor="start", size=12))  # fmt: skip
    return drawing("Three prompts and the blocks that they share", 760, 246, parts)


DRAWINGS = {"flows.svg": flows, "partial-prefill.svg": partial_prefill, "tree.svg": tree}


def main() -> None:
    """Write all of them."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (FOLDER / name).write_text(draw(), "utf-8")


if __name__ == "__main__":
    main()
