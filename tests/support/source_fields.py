"""What a class says of itself and of its fields, as its source has it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any, NamedTuple

from tests.support.made_parts import cell, code


class Field(NamedTuple):
    """One field of a class, as the source says it."""

    name: str
    kind: str
    default: str
    about: str

    def __str__(self) -> str:
        default = f" = {self.default}" if self.default else ""
        return code(f"{self.name}: {self.kind}{default}")


def fields_of(kind: type) -> list[Field]:
    """The fields of a class, in order, each with the text that follows it."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(tree, ast.ClassDef)
    found: list[Field] = []
    for line in tree.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            default = ast.unparse(line.value) if line.value is not None else ""
            found.append(Field(line.target.id, _plain(line.annotation), default, ""))
        elif isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and found:
            found[-1] = found[-1]._replace(about=cell(str(line.value.value)))
    return found


def _plain(annotation: ast.expr) -> str:
    """A type without its bounds."""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Annotated":
        assert isinstance(annotation.slice, ast.Tuple)
        return ast.unparse(annotation.slice.elts[0])
    return ast.unparse(annotation)


def about(kind: Any) -> str:
    """What a class says about itself."""
    return cell(inspect.getdoc(kind) or "")
