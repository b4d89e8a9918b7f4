"""docs/model.md names functions and tests: they must exist, or the page derives what is not there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
REFERENCE = re.compile(r"`([\w/]+\.py):\s+([\w.]+)`")


@cache
def names_in(path: Path) -> set[str]:
    """Functions and classes of a module, methods as Class.method."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def missing(page: str) -> list[str]:
    """References of a page to what is not there; a bare test module lies beside this one."""
    wrong = []
    for file, name in REFERENCE.findall(page):
        path = ROOT / file if "/" in file else Path(__file__).parent / file
        if not path.is_file() or name not in names_in(path):
            wrong.append(f"{file}: {name}")
    return wrong


def test_everything_the_page_names_exists() -> None:
    """Each `file.py: name` is a function, class or method of that file, and there are many of them."""
    page = (ROOT / "docs" / "model.md").read_text()
    assert missing(page) == []
    assert len(REFERENCE.findall(page)) > 100
    assert len(re.findall(r"`[^`]*\.py: ", page)) == len(REFERENCE.findall(page)), "a reference in another form"


def test_what_does_not_exist_is_found() -> None:
    """A function renamed, a method of another class, a file that moved."""
    page = "`medsegdiff/diffusion.py: alpha_bars`, `medsegdiff/diffusion.py: betas`, `test_gone.py: test_a`, "
    page += "`medsegdiff/diffusion.py: Diffusion.sample`, `medsegdiff/diffusion.py: Diffusion.loss`"
    assert missing(page) == [
        "medsegdiff/diffusion.py: betas",
        "test_gone.py: test_a",
        "medsegdiff/diffusion.py: Diffusion.sample",
    ]
