"""The tree in docs/architecture.md, made from the first line of every file's docstring: `python -m tests.tree`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
ROOMS = ("ds_stacking", "kernels", "launchers", "benchmarks", "examples")
BEGIN, END = "<!-- tree -->\n```\n", "```\n<!-- end of tree -->"


def tree() -> str:
    """The Python files of all rooms, a line each."""
    return "".join(f"{line}\n" for room in ROOMS if (ROOT / room).is_dir() for line in _folder(ROOT / room, 0))


def _folder(folder: Path, depth: int) -> Iterator[str]:
    package = folder / "__init__.py"
    yield _line(f"{folder.name}/", depth, _purpose(package) if package.is_file() else "")
    for path in sorted(folder.iterdir()):
        if path.is_dir() and any(path.rglob("*.py")):
            yield from _folder(path, depth + 1)
        elif path.suffix == ".py" and path != package:
            yield _line(path.name, depth + 1, _purpose(path))


def _line(name: str, depth: int, purpose: str) -> str:
    return f"{'  ' * depth + name:<30} {purpose}".rstrip()


def _purpose(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0].rstrip(".")


def with_tree(page: str) -> str:
    """The page with the tree as it is now."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + tree() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(with_tree(PAGE.read_text()))
