"""The built-in corpus: docstrings of the standard library and of the installed distributions, read with `ast`.

Real English prose that every installation has, with no download. Nothing is imported or run.
"""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from ds_stacking.data.preparation.documents import clean_text
from ds_stacking.data.preparation.duplicates import Passages

READER = 2
"""To be raised when the same packages no longer give the same documents."""

CORPUS_CHARACTERS = 8_000_000
"""Characters after which the corpus ends: enough for minutes of training and read in seconds."""

_RULER = re.compile(r"([^\w\s])\1{3,}")
"""A line under a heading or around a table: no prose, and everywhere the same."""
_SHORTEST_DOCSTRING = 60
_SHORTEST_DOCUMENT = 200
_LEFT_OUT_FOLDERS = {"test", "tests", "site-packages", "dist-packages", "lib2to3", "__pycache__"}
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def documentation(modules: Iterable[Path] | None = None, characters: int = CORPUS_CHARACTERS) -> Iterator[str]:
    """Yield one document per module: its docstrings in the order of the source, a blank line between two.

    Of the standard library, then the distributions by name, else of `modules`, until there are so many `characters`.
    Short docstrings are dropped, and paragraphs that repeat a passage of an earlier one: packages describe the same
    parameters again and again, in one module after another, and what is held out would stand in the training split.
    """
    passages = Passages()
    for path in installed_modules() if modules is None else modules:
        cleaned = clean_text("\n\n".join(_RULER.sub("", text) for text in docstrings(path)))
        document = "\n\n".join(paragraph for paragraph in cleaned.split("\n\n") if passages.add(paragraph))
        if len(document) < _SHORTEST_DOCUMENT:
            continue
        yield document
        characters -= len(document)
        if characters <= 0:
            return


def installed_versions() -> dict[str, str]:
    """Return what determines the corpus: the versions of Python and of every installed distribution."""
    versions = {dist.name: dist.version for dist in reversed(_distributions())}
    return {"python": platform.python_version(), **versions}


def _distributions() -> list[importlib.metadata.Distribution]:
    # Sorting is stable: of two with one name, the first on the path, which Python would import, stays first.
    return sorted(
        filter(lambda dist: dist.name, importlib.metadata.distributions()), key=lambda dist: dist.name.lower()
    )


def installed_modules() -> Iterator[Path]:
    """Yield the files of the standard library, then those of the distributions by name."""
    for folder, subfolders, names in os.walk(sysconfig.get_paths()["stdlib"]):
        subfolders[:] = sorted(set(subfolders) - _LEFT_OUT_FOLDERS)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))
    for dist in _distributions():
        files = [file for file in dist.files or [] if file.suffix == ".py"]
        yield from (Path(str(file.locate())) for file in sorted(files) if _LEFT_OUT_FOLDERS.isdisjoint(file.parts))


def docstrings(path: Path) -> list[str]:
    """Return the cleaned docstrings of a module, its classes and functions; none if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escape sequences
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    raw = (ast.get_docstring(node, clean=False) for node in _definitions(tree))
    # An escape can spell half of a surrogate pair, which no tokenizer accepts.
    texts = (inspect.cleandoc(text).encode("utf-8", "replace").decode() for text in raw if text)
    return [text for text in texts if len(text) >= _SHORTEST_DOCSTRING]


def _definitions(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the module and its classes and functions in source order, without walking into expressions."""
    yield tree
    waiting: list[ast.AST] = list(reversed(tree.body))
    while waiting:
        node = waiting.pop()
        if isinstance(node, _DEFINITIONS):
            yield node
        for field in ("finalbody", "orelse", "handlers", "body"):
            children = getattr(node, field, None)
            if isinstance(children, list):
                waiting.extend(reversed(children))
