"""What the manifests of prepared folders and of their shards say, and how each is read and checked."""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypeVar

from pydantic import Field
from typing_extensions import TypedDict

from ds_stacking.common.errors import UserError
from ds_stacking.common.json_files import KEEP_OTHERS, Count, Finite, read_json
from ds_stacking.config import LARGEST_VOCABULARY

MANIFEST = "manifest.json"
BEGUN = "preparation.json"
TOKENIZER = "tokenizer"
SPLITS: tuple[Literal["train"], Literal["eval"]] = ("train", "eval")

_SHARD = re.compile("shard-[0-9]{5}")

Shape = TypeVar("Shape")
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Rows = Annotated[int, Field(gt=0, le=LARGEST_VOCABULARY)]
Number = Annotated[Finite, Field(ge=0)]
Dtype = Literal["uint16", "uint32"]


class Damaged(UserError):
    """Prepared data that are not what was written, or that nobody wrote."""


class Sums(TypedDict):
    """A split over all shards of a folder."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    documents: Count
    tokens: Count
    sha256: Digest
    """Of the digests of its shards."""
    tokens_sha256: NotRequired[Digest]
    """Of its token ids, however they are spread over shards; older folders lack it."""


class Arrays(TypedDict):
    """A split of one shard."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    documents: Count
    tokens: Count
    sha256: Digest
    offsets_sha256: Digest
    sentences_sha256: NotRequired[Digest]


class Others(TypedDict):
    """The hashes of what a shard holds beside its splits."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    digests: Digest
    counts: Digest
    signatures: NotRequired[Digest]


class ShardManifest(TypedDict):
    """manifest.json of a shard."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    dtype: Dtype
    vocab_size: Rows
    train: Arrays
    eval: Arrays
    read: Annotated[Count, Field(lt=2**62)]
    totals: dict[str, Count]
    sha256: Others
    examples: list[str]


class FoundLeak(TypedDict):
    """How much of the held-out split was found in the training split, as leaks.py counts it."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    ngrams: Count
    found: Count


class Trained(TypedDict):
    """What a tokenizer was trained with."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    vocab_size: int
    lowercase: bool


class Identity(TypedDict):
    """What decided a prepared folder."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    eval_percent: Finite
    sentences: bool
    near_duplicates: Finite
    tokenizer: str | Trained


class Begun(TypedDict):
    """preparation.json: what a prepared folder was begun with."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    format: Count
    source: dict[str, Any]
    tokenizer: str | Trained
    eval_percent: Finite
    sentences: bool
    near_duplicates: Finite
    shard_tokens: Count


class FolderManifest(TypedDict):
    """manifest.json of a prepared folder."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    dtype: Dtype
    vocab_size: Rows
    train: Sums
    eval: Sums
    unigram_entropy: Number
    tokenizer: str
    tokenizer_sha256: Digest
    leak: FoundLeak
    max_leak: Finite
    shards: Annotated[list[str], Field(min_length=1)]
    identity: Identity


def read_manifest(folder: Path, shape: type[Shape], *, inside: Path | None = None) -> Shape:
    """Return what a shard or a prepared folder says of itself; no link below `inside` is followed.

    Raises Damaged for a manifest of another shape, and for one that is not there.
    """
    path = folder / MANIFEST
    try:
        return read_json(path, shape, mend="prepare these data again", inside=inside or folder)
    except UserError as error:
        raise Damaged(str(error)) from None
    except OSError as error:
        raise Damaged(f"{path} cannot be read ({error.strerror}); prepare these data again.") from None


def read_shards(folder: Path, manifest: FolderManifest) -> dict[str, ShardManifest]:
    """Return the manifests of a folder's shards by name, in order. Raises Damaged where they are not its own."""
    names = manifest["shards"]
    if names != [shard_name(number) for number in range(len(names))]:
        raise Damaged(f"{folder / MANIFEST} names shards that are none: {names[:3]}; prepare these data again.")
    shards = {name: read_manifest(folder / name, ShardManifest, inside=folder) for name in names}
    for name, shard in shards.items():
        for field in ("dtype", "vocab_size"):
            if shard[field] != manifest[field]:  # type: ignore[literal-required]
                raise Damaged(f"{folder / name} has another {field} than {folder}; prepare these data again.")
    for split in SPLITS:
        if any(manifest[split][field] != value for field, value in sum_up(split, list(shards.values())).items()):  # type: ignore[literal-required]
            raise Damaged(f"The shards of {folder} are not those of its manifest.json; prepare these data again.")
    return shards


def shard_name(number: int) -> str:
    """The folder of a shard."""
    return f"shard-{number:05d}"


def shard_folders(folder: Path) -> list[Path]:
    """What has the name of a shard in a folder, in order; names that only begin like one are somebody else's."""
    return sorted(path for path in folder.glob("shard-*") if _SHARD.fullmatch(path.name))


def is_unfinished_shard(path: Path) -> bool:
    """Whether `path` has the name of a shard while it is written."""
    return path.name.startswith(".") and _SHARD.fullmatch(path.name[1:]) is not None


def sum_up(split: Literal["train", "eval"], shards: list[ShardManifest]) -> dict[str, Any]:
    """A split over all shards: counts, and one digest of theirs."""
    digests = "".join(shard[split]["sha256"] for shard in shards)
    return {
        "documents": sum(shard[split]["documents"] for shard in shards),
        "tokens": sum(shard[split]["tokens"] for shard in shards),
        "sha256": sha256(digests.encode()).hexdigest(),
    }
