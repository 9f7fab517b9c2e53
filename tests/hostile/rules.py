"""What is done to files, by rule: each rule fits any file of its kind, and none knows the program that reads it."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Mutation = tuple[str, Callable[[Path], None]]
"""A name, and what does it to a file (which the rule may replace by something else)."""

SECRET = "top-secret-0123456789"
"""What must never be read by way of a link, a path out of the folder or an expansion of any kind."""
DEEP = 100_000
"""Levels of nesting, beyond any parser's stack."""


def wholly(text: bool = True) -> list[Mutation]:
    """Mutations of a file as such: gone, of another kind, cut, garbage, a link out of the folder."""
    rules: list[Mutation] = [
        ("gone", lambda path: path.unlink()),
        ("empty", lambda path: _write(path, b"")),
        ("half", lambda path: _write(path, path.read_bytes()[: path.stat().st_size // 2])),
        ("garbage", lambda path: _write(path, hashlib.sha512(path.name.encode()).digest() * 40)),
        ("zeros", lambda path: _write(path, bytes(path.stat().st_size))),
        ("longer", lambda path: _write(path, path.read_bytes() + b"\0" * 17)),
        ("folder", _folder),
        ("pipe", _pipe),
        ("link to a secret", lambda path: _link(path, "secret.txt")),
        ("link to nothing", lambda path: _link(path, "nothing")),
        ("link to itself", lambda path: (path.unlink(), path.symlink_to(path.name))[0]),
        ("sparse and huge", _huge),
    ]
    if text:
        rules += [
            ("UTF-16", lambda path: _write(path, path.read_bytes().decode("utf-8").encode("utf-16"))),
            ("byte order mark", lambda path: _write(path, b"\xef\xbb\xbf" + path.read_bytes())),
            ("Latin-1", lambda path: _write(path, path.read_bytes() + b"\xe9\xff")),
            ("NUL inside", lambda path: _write(path, path.read_bytes().replace(b"e", b"\0", 1))),
        ]
    return rules


def bits(path: Path, positions: int = 6) -> list[Mutation]:
    """One bit flipped, at places spread over the file and its header."""
    size = path.stat().st_size
    places = sorted({min(size - 1, at) for at in (0, 7, 9, *(size * i // positions for i in range(1, positions)))})
    return [(f"bit {at}", lambda path, at=at: _flip(path, at)) for at in places]


def in_json(path: Path, limit: int = 30) -> list[Mutation]:
    """Mutations of a JSON file's structure: every field (at most `limit`, spread evenly) by several of the rules."""
    content = json.loads(path.read_bytes())
    places = list(_places(content))
    chosen = places if len(places) <= limit else [places[len(places) * i // limit] for i in range(limit)]
    found: list[Mutation] = [
        ("an array", lambda path: _write(path, b"[]")),
        ("an empty object", lambda path: _write(path, b"{}")),
        ("null", lambda path: _write(path, b"null")),
        ("a number", lambda path: _write(path, b"1e999")),
        ("nested arrays", lambda path: _write(path, b"[" * DEEP + b"]" * DEEP)),
        ("nested objects", lambda path: _write(path, b'{"a":' * DEEP + b"1" + b"}" * DEEP)),
    ]
    for place in chosen:
        where = ".".join(map(str, place))
        old = _get(content, place)
        rules = [("dropped", None), *_other_values(old)]
        # which rules meet which field is spread by hash: all rules on all fields would be thousands of cases
        start = int(hashlib.sha256(where.encode()).hexdigest(), 16)
        for step in range(3):
            name, value = rules[(start + step * (1 + len(rules) // 3)) % len(rules)]
            found.append((f"{where} {name}", lambda path, p=place, n=name, v=value: _change(path, p, n, v)))
    return found


def in_lines(path: Path) -> list[Mutation]:
    """Mutations of a file of lines: one line of another kind, cut, doubled, very long, and out of order."""

    def edit(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Path], None]:
        return lambda path: _write(path, b"".join(change(path.read_bytes().splitlines(keepends=True))))

    return [
        ("line without an end", edit(lambda lines: [*lines[:-1], lines[-1][: len(lines[-1]) // 2]])),
        ("line cut inside", edit(lambda lines: [lines[0], lines[1][:9] + b"\n", *lines[2:]])),
        ("lines reversed", edit(lambda lines: lines[::-1])),
        ("lines doubled", edit(lambda lines: [line for line in lines for _ in range(2)])),
        ("empty lines", edit(lambda lines: [line for old in lines for line in (old, b"\n")])),
        ("other line ends", edit(lambda lines: [line.replace(b"\n", b"\r\n") for line in lines])),
        ("a line of 64 MiB", edit(lambda lines: [lines[0], b"x" * (64 << 20) + b"\n", *lines[1:]])),
        ("a nested line", edit(lambda lines: [lines[0], b"[" * DEEP + b"\n", *lines[1:]])),
        ("a line that is no text", edit(lambda lines: [lines[0], b"\xff\xfe\x00\n", *lines[1:]])),
        ("half of each line", edit(lambda lines: [line[: len(line) // 2] + b"\n" for line in lines])),
    ]  # fmt: skip


def _other_values(old: Any) -> list[tuple[str, Any]]:
    """Values of other types than `old`, and of its type but far from it."""
    values = [
        ("null", None),
        ("text", "surprise"),
        ("empty text", ""),
        ("an array", [old]),
        ("an object", {"a": old}),
        ("true", True),
        ("minus one", -1),
        ("a fraction", 0.5),
        ("NaN", float("nan")),
        ("infinite", "\1e999\1"),
        ("huge", 10**18),
        ("of 5,000 digits", "\1" + "9" * 5000 + "\1"),
        ("..", "../../outside/secret.txt"),
        ("absolute", "/etc/passwd"),
        ("markup", "<script>alert(1)</script>"),
        ("long text", "x" * 100_000),
        ("no text", "\ud800"),
    ]
    kinds = (bool, int, float, str, list, dict, type(None))
    kind = next(kind for kind in kinds if isinstance(old, kind))
    same = {"true": bool, "text": str, "an array": list, "an object": dict, "null": type(None)}
    return [(name, value) for name, value in values if same.get(name) is not kind]


def _places(content: Any, place: tuple = ()) -> Iterator[tuple]:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*place, key)
        yield from _places(value, (*place, key))


def _get(content: Any, place: tuple) -> Any:
    for key in place:
        content = content[key]
    return content


def _change(path: Path, place: tuple, name: str, value: Any) -> None:
    content = copy.deepcopy(json.loads(path.read_bytes()))
    parent = _get(content, place[:-1])
    if name == "dropped":
        del parent[place[-1]]
    else:
        parent[place[-1]] = value
    # numbers that Python cannot hold are written as text between marks, which go
    _write(path, json.dumps(content).replace('"\\u0001', "").replace('\\u0001"', "").encode())


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 16
    path.write_bytes(content)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _huge(path: Path) -> None:
    """A file of 200 GB that takes no room."""
    with path.open("r+b") as file:
        file.truncate(200 << 30)


def _link(path: Path, to: str) -> None:
    """A link to something outside of the world in which the program works."""
    outside = next(parent for parent in path.parents if parent.name == "work").parent / "outside"
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.symlink_to(outside / to)


def folders() -> list[Mutation]:
    """Mutations of a folder: gone, empty, a file, a link to a folder outside."""
    return [
        ("gone", shutil.rmtree),
        ("emptied", lambda path: (shutil.rmtree(path), path.mkdir())[1]),
        ("a file", lambda path: (shutil.rmtree(path), path.write_text("x"))[1]),
        ("link out", lambda path: _link(path, "folder")),
        ("link to nothing", lambda path: _link(path, "nothing")),
    ]
