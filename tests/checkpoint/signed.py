"""Checkpoints of made-up content, with sizes and checksums that are right: what somebody hostile can hand over."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from ds_stacking.checkpoint.format import INDEX, MANIFEST, STATE
from ds_stacking.checkpoint.manifest import checksum

TENSORS, GENERATORS = "rank-00000.safetensors", "rank-00000.json"


def sign(path: Path, **fields: Any) -> None:
    """Make the manifest right for the files that are there now; `fields` replace its own."""
    content = json.loads((path / MANIFEST).read_text())
    content["files"] = {file.name: record(file) for file in sorted(path.iterdir()) if file.name != MANIFEST}
    content |= fields
    sign_manifest(path, content)


def sign_manifest(path: Path, content: dict[str, Any]) -> None:
    """Write a manifest with a right checksum of its own."""
    content.pop("sha256", None)
    (path / MANIFEST).write_text(json.dumps(content | {"sha256": checksum(content)}))


def record(file: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


REMOVED = object()


def put(name: str, place: str, value: Any) -> Callable[[Path], None]:
    """Set the field at `place`, such as extra.position.step, of a JSON file, or remove it."""

    def mutate(path: Path) -> None:
        content = json.loads((path / name).read_text())
        *parents, last = place.split(">")
        inner = content
        for parent in parents:
            inner = inner[int(parent) if isinstance(inner, list) else parent]
        if value is REMOVED:
            del inner[last]
        else:
            inner[int(last) if isinstance(inner, list) else last] = value
        if name == MANIFEST:
            sign_manifest(path, content)
        else:
            (path / name).write_text(json.dumps(content))
            sign(path)

    return mutate


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Replace a whole file."""

    def mutate(path: Path) -> None:
        (path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        sign(path)

    return mutate


def rows(change: Callable[[torch.Tensor], Any], key: str = "pieces") -> Callable[[Path], None]:
    """Replace the table of pieces."""

    def mutate(path: Path) -> None:
        made = change(load_file(path / INDEX)["pieces"])
        text(INDEX, save(made if isinstance(made, dict) else {key: made.contiguous()}))(path)

    return mutate


def cell(row: int, column: int, value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A change of one number of the table."""

    def change(table: torch.Tensor) -> torch.Tensor:
        table = table.clone()
        table[row, column] = value
        return table

    return change


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Replace the header of the file of tensors; its data stay."""

    def mutate(path: Path) -> None:
        content = (path / TENSORS).read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        entries = json.loads(content[8 : 8 + size])
        made = json.dumps(change(entries), separators=(",", ":")).encode()
        made += b" " * (-len(made) % 8)
        text(TENSORS, struct.pack("<Q", len(made)) + made + content[8 + size :])(path)

    return mutate


def renamed(entries: dict[str, Any]) -> dict[str, Any]:
    """A header of the same length in which one tensor has another name."""
    names = list(entries)
    return {("exp_avg/x" + name[9:] if name == names[-1] else name): value for name, value in entries.items()}


DEEP = "[" * 100_000
MUTATIONS: dict[str, tuple[Callable[[Path], None], str]] = {
    **{f"manifest without {name}": (put(MANIFEST, name, REMOVED), f"manifest.json .*{name}: field required")
       for name in ("step", "sequence", "keep", "world_size", "identity", "files")},
    "step is text": (put(MANIFEST, "step", "200"), "manifest.json .*step: .*valid integer, and is '200'"),
    "step is negative": (put(MANIFEST, "step", -1), "manifest.json .*step: "),
    "step is huge": (put(MANIFEST, "step", 10**30), "manifest.json .*step: "),
    "sequence is a list": (put(MANIFEST, "sequence", [1]), "manifest.json .*sequence: "),
    "sequence is no number": (put(MANIFEST, "sequence", float("nan")), "manifest.json .*sequence: "),
    "keep is text": (put(MANIFEST, "keep", "no"), "manifest.json .*keep: "),
    "no ranks": (put(MANIFEST, "world_size", 0), "manifest.json .*world_size: "),
    "too many ranks": (put(MANIFEST, "world_size", 10**9), "manifest.json .*world_size: "),
    "a rank too many": (put(MANIFEST, "world_size", 2), "has the tensors of 1 ranks, but its world_size is 2"),
    "identity is a list": (put(MANIFEST, "identity", []), "manifest.json .*identity: "),
    "files is a list": (put(MANIFEST, "files", []), "manifest.json .*files: "),
    "a file without size": (put(MANIFEST, f"files>{STATE}>size", REMOVED), f"manifest.json .*{STATE}.size: "),
    "a file of text size": (put(MANIFEST, f"files>{STATE}>size", "9"), f"manifest.json .*{STATE}.size: "),
    "a file without sha256": (put(MANIFEST, f"files>{STATE}>sha256", None), f"manifest.json .*{STATE}.sha256: "),
    "a file too little": (put(MANIFEST, f"files>{INDEX}", REMOVED), f"manifest.json lacks {INDEX}"),
    "no tensors": (put(MANIFEST, f"files>{TENSORS}", REMOVED), "has the tensors of 0 ranks"),
    "state.json is empty": (text(STATE, ""), f"{STATE} .*is no JSON"),
    "state.json is deep": (text(STATE, DEEP), f"{STATE} .*is no JSON .*recursion"),
    "state.json is a list": (text(STATE, "[]"), f"{STATE} .*should be an object"),
    "state.json is of another step": (put(STATE, "step", 7), f"{STATE} is of step 7, and {MANIFEST} of step 200"),
    **{f"state.json without {name}": (put(STATE, name, REMOVED), f"{STATE} .*{name}: field required")
       for name in ("step", "parameters", "extra")},
    "extra is a list": (put(STATE, "extra", []), f"{STATE} .*extra: "),
    "parameters is a list": (put(STATE, "parameters", []), f"{STATE} .*parameters: "),
    "a parameter is null": (put(STATE, "parameters>embedding", None), f"{STATE} .*parameters.embedding: "),
    "no numel": (put(STATE, "parameters>embedding>numel", REMOVED), f"{STATE} .*embedding.numel: field required"),
    "numel is text": (put(STATE, "parameters>embedding>numel", "9"), f"{STATE} .*embedding.numel: "),
    "numel is negative": (put(STATE, "parameters>embedding>numel", -9), f"{STATE} .*embedding.numel: "),
    "numel is huge": (put(STATE, "parameters>embedding>numel", 2**52), "more than its files hold"),
    "numel is larger": (put(STATE, "parameters>embedding>numel", 1010), "does not hold all of embedding"),
    "numel is smaller": (put(STATE, "parameters>embedding>numel", 1008), f"{INDEX}: its pieces lie outside"),
    "decay is text": (put(STATE, "parameters>embedding>decay", "y"), f"{STATE} .*embedding.decay: "),
    "birth is a float": (put(STATE, "parameters>embedding>birth", 0.5), f"{STATE} .*embedding.birth: "),
    "a step is negative": (put(STATE, "parameters>embedding>step", -5), f"{STATE} .*embedding.step: "),
    "a name is long": (put(STATE, "parameters>" + "9" * 5000, {"numel": 0, "decay": True}), f"{STATE} .*parameters"),
    "a parameter too many": (put(STATE, "parameters>more", {"numel": 3, "decay": True}), "does not hold all of more"),
    "an empty index": (text(INDEX, b""), f"{INDEX} cannot be read"),
    "an index with a huge header": (text(INDEX, struct.pack("<Q", 2**60) + b"{}"), f"{INDEX} cannot be read"),
    "an index of text": (text(INDEX, "x" * 100), f"{INDEX} cannot be read"),
    "an index of floats": (rows(lambda table: table.float()), f"{INDEX} holds pieces .*float32; it must hold"),
    "an index of 3 columns": (rows(lambda table: table[:, :3]), f"{INDEX} holds pieces .*; it must hold"),
    "an index in a line": (rows(lambda table: table.flatten()), f"{INDEX} holds pieces .*; it must hold"),
    "an index by another name": (rows(lambda table: table, "rows"), f"{INDEX} holds rows .*; it must hold"),
    "an index of two": (rows(lambda table: {"pieces": table, "more": table.clone()}), f"{INDEX} holds .*more"),
    "an index without rows": (rows(lambda table: table[:0]), "does not hold all of embedding"),
    "a piece of no parameter": (rows(cell(0, 0, 99)), f"{INDEX}: its pieces are of unknown parameters"),
    "a piece of parameter -1": (rows(cell(0, 0, -1)), f"{INDEX}: its pieces are of unknown parameters"),
    "a piece from -1": (rows(cell(0, 1, -1)), f"{INDEX}: its pieces lie outside their parameters"),
    "a piece to far away": (rows(cell(0, 2, 2**62)), f"{INDEX}: its pieces lie outside their parameters"),
    "a piece backwards": (rows(cell(0, 1, 1009)), "does not hold all of embedding"),
    "a piece in file 9": (rows(cell(0, 3, 9)), f"{INDEX}: its pieces are in unknown files"),
    "a piece in file -1": (rows(cell(0, 3, -1)), f"{INDEX}: its pieces are in unknown files"),
    "a piece twice": (rows(lambda table: torch.cat([table, table[:1]])), "does not hold all of embedding"),
    "pieces in another order": (rows(lambda table: table.flip(0)), f"the header of {TENSORS} is not that"),
    "a file too short": (text(TENSORS, b"\0" * 64), "more than its files hold"),
    "a header of 2**60 bytes": (
        lambda path: text(TENSORS, struct.pack("<Q", 2**60) + (path / TENSORS).read_bytes()[8:])(path),
        f"the header of {TENSORS} is not that",
    ),
    "another type": (
        header(lambda e: {n: v | ({"dtype": "I32"} if "dtype" in v else {}) for n, v in e.items()}),
        f"the header of {TENSORS} is not that",
    ),
    "another shape": (
        header(lambda e: {n: v | ({"shape": [1, *v["shape"]]} if "shape" in v else {}) for n, v in e.items()}),
        f"the header of {TENSORS} is not that",
    ),
    "another name": (header(renamed), f"the header of {TENSORS} is not that"),
    "a tensor too little": (header(lambda e: dict(list(e.items())[:-1])), f"the header of {TENSORS} is not that"),
    "no generators": (text(GENERATORS, "{}"), f"{GENERATORS} .*python: field required"),
    "deep generators": (text(GENERATORS, DEEP), f"{GENERATORS} .*is no JSON"),
    "generators are null": (text(GENERATORS, "null"), f"{GENERATORS} .*should be an object"),
    "no words": (put(GENERATORS, "python>words", ""), f"{GENERATORS}: python is no state"),
    "words that are no base64": (put(GENERATORS, "python>words", "\u00e4"), f"{GENERATORS}: python is no state"),
    "another version": (put(GENERATORS, "python>version", 9), f"{GENERATORS}: python is no state"),
    "few keys": (put(GENERATORS, "numpy>keys", "AAAA"), f"{GENERATORS}: numpy is no state"),
    "a position beyond": (put(GENERATORS, "numpy>position", 10**9), f"{GENERATORS} .*numpy.position: "),
    "a gauss that is text": (put(GENERATORS, "numpy>cached_gauss", "x"), f"{GENERATORS} .*numpy.cached_gauss: "),
    "torch is null": (put(GENERATORS, "torch", None), f"{GENERATORS} .*torch: "),
    "torch is short": (put(GENERATORS, "torch", "AAAA"), f"{GENERATORS}: torch is no state"),
    "torch is of zeros": (put(GENERATORS, "torch", "A" * 6744), f"{GENERATORS}: torch is no state"),
    "cuda is a list": (put(GENERATORS, "cuda", [1]), f"{GENERATORS} .*cuda: "),
    "cuda is short": (put(GENERATORS, "cuda", "AAAA"), f"{GENERATORS}: cuda is no state"),
}  # fmt: skip
"""What is made up, and what is said of it."""
