"""Prepared data, opened: a prepared folder, which each entry of the cache is too, or a mixture of such folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import numpy as np
from typing_extensions import TypedDict

from ds_stacking.common.environment import cache_folder
from ds_stacking.common.errors import UserError
from ds_stacking.common.files import write_json
from ds_stacking.common.json_files import KEEP_OTHERS, Finite, read_json
from ds_stacking.config import CorpusConfig
from ds_stacking.data.manifests import SPLITS, TOKENIZER, Damaged, FolderManifest, Identity, read_shards
from ds_stacking.data.mixture import Mixture, read_mixture
from ds_stacking.data.preparation.claim import locked
from ds_stacking.data.preparation.leaks import find_leak
from ds_stacking.data.prepared_folder import is_prepared, open_folder, own_tokenizer, token_counts, verify_folder
from ds_stacking.data.token_file import Split, unigram_entropy
from ds_stacking.data.tokenizer import SpecialIds, continuing_tokens, load_tokenizer, special_ids, tokenizer_hash

STRETCHES, STRETCH = 32, 1024
"""How many places of a split are read to tell it from another, and tokens at each."""


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """A tokenised corpus and its tokenizer."""

    folder: Path
    """The prepared folder; of a mixture the first one."""
    tokenizer_dir: Path
    """Hugging Face folder of the tokenizer, for AutoTokenizer."""
    vocab_size: int
    """Rows that the embedding needs."""
    special: SpecialIds
    """Special token ids."""
    train: Split | Mixture
    """Training split."""
    eval: Split | Mixture
    """Held-out split."""
    unigram_entropy: float
    """Entropy in nats of the ordinary train tokens: what guessing by frequency alone loses on that very text."""
    unigram: np.ndarray
    """Frequencies of the ordinary train tokens, one added to each count, [vocab_size] float64; 0 for special ones."""
    continuing: np.ndarray | None
    """Which tokens go on with a word, [vocab_size] bool; None where single tokens are masked."""
    fingerprint: str
    """What `fingerprint` makes of them; of a mixture, of its parts and their weights."""
    manifest: dict[str, Any]
    """What manifest.json holds: counts, digests, the source and the files that were left out."""


def fingerprint(manifest: FolderManifest) -> str:
    """16 hexadecimal digits of the tokenizer and of the token ids of both splits, however these are sharded.

    Equal on two machines exactly if they hold the same data; in a folder that an older version made, of the digests of
    its shards. Documents need no digest of their own, for each ends with [SEP], nor do sentences, which a rule finds
    in the text, but for whether they are known. The source, its place and the reader's settings do not count.
    """
    splits = [manifest[split] for split in SPLITS]
    digests = [manifest["tokenizer_sha256"], *(split.get("tokens_sha256", split["sha256"]) for split in splits)]
    return sha256("".join([*digests, *["sentences"] * manifest["identity"]["sentences"]]).encode()).hexdigest()[:16]


def sampled_fingerprint(data: PreparedData) -> str:
    """16 hexadecimal digits of `data.fingerprint` and of tokens read at places spread over both splits.

    The fingerprint is of what was written once; a file that was copied in part, or that rotted since, has its old one.
    """
    hashed = sha256(data.fingerprint.encode())
    for split in (data.train, data.eval):
        arrays = [file.tokens for part in Mixture.of(split).splits for file in part.files]
        ends = np.cumsum([0, *map(len, arrays)])
        for at in np.linspace(0, max(0, ends[-1] - STRETCH), STRETCHES).astype(np.int64):
            number = int(np.searchsorted(ends, at, side="right")) - 1
            begin = at - ends[number]
            hashed.update(arrays[number][begin : begin + STRETCH].tobytes())
    return hashed.hexdigest()[:16]


def open_prepared(folder: Path, tokenizer: str, config: CorpusConfig, log: Callable[[str], None]) -> PreparedData:
    """Open a folder of prepare_data.py, which has decided the tokenizer and the split; say where it was otherwise."""
    if config.verify:
        verify_folder(folder, log)
    manifest, splits = open_folder(folder)
    if tokenizer != "train" and tokenizer_hash(load_tokenizer(tokenizer)) != manifest["tokenizer_sha256"]:
        raise UserError(
            f"{folder} was tokenised with {manifest['tokenizer']!r}, not with {tokenizer!r}; "
            f"give --tokenizer train to take the folder's, or prepare the data anew."
        )
    say_decided(folder, manifest["identity"], config, log)
    shards = read_shards(folder, manifest)
    counts = token_counts(folder, shards)
    if counts.min() < 0 or counts.sum() != manifest["train"]["tokens"]:
        raise Damaged(f"{folder} holds the counts of other tokens; prepare these data again.")
    for split in SPLITS:
        _require_one_sequence(split, manifest[split]["tokens"], config)
    tokenizer_of_data = own_tokenizer(folder, manifest["vocab_size"])
    special = special_ids(tokenizer_of_data)
    return PreparedData(
        folder=folder,
        tokenizer_dir=folder / TOKENIZER,
        vocab_size=manifest["vocab_size"],
        special=special,
        continuing=None if config.masking == "token" else continuing_tokens(tokenizer_of_data),
        train=splits["train"],
        eval=splits["eval"],
        unigram_entropy=manifest["unigram_entropy"],
        unigram=smoothed(counts, special),
        fingerprint=fingerprint(manifest),
        manifest=dict(manifest),
    )


def say_decided(folder: Path, identity: Identity, config: CorpusConfig, log: Callable[[str], None]) -> None:
    """Say where data that were prepared before have decided something otherwise than the configuration."""
    decided: dict[str, Any] = {name: identity[name] for name in ("eval_percent", "sentences", "near_duplicates")}  # type: ignore[literal-required]
    if isinstance(identity["tokenizer"], dict):
        decided |= {name: identity["tokenizer"][name] for name in ("vocab_size", "lowercase")}
    for name, value in decided.items():
        if getattr(config, name) != value:
            log(f"corpus.{name} is {value} in {folder}; the configuration's {getattr(config, name)} has no effect.")


def open_mixture(path: Path, tokenizer: str, config: CorpusConfig, log: Callable[[str], None]) -> PreparedData:
    """Open the folders of a mixture as one; they must share a tokenizer, and none may hold another's held-out text."""
    weights = read_mixture(path)
    for folder in weights:
        if not is_prepared(str(folder)):
            raise UserError(f"{folder}, named in {path}, is no folder of prepare_data.py; prepare it first.")
    parts = [open_prepared(folder, tokenizer, config, log) for folder in weights]
    first = parts[0]
    for part in parts[1:]:
        if part.manifest["tokenizer_sha256"] != first.manifest["tokenizer_sha256"]:
            raise UserError(
                f"{part.folder} and {first.folder} were tokenised differently; prepare one with --tokenizer "
                f"{first.tokenizer_dir}."
            )
    fingerprint = sha256(
        json.dumps([(part.fingerprint, w) for part, w in zip(parts, weights.values(), strict=True)]).encode()
    )
    _refuse_mixed_leak(parts, cache_folder(config.cache_dir), log)
    shares = list(weights.values())
    frequencies = [w * counts / max(1, counts.sum()) for w, counts in zip(shares, map(_ordinary, parts), strict=True)]
    return replace(
        first,
        train=Mixture(splits=[cast(Split, part.train) for part in parts], weights=shares),
        eval=Mixture(splits=[cast(Split, part.eval) for part in parts], weights=shares),
        unigram_entropy=unigram_entropy(np.sum(frequencies, axis=0), ()),
        unigram=np.average([part.unigram for part in parts], axis=0, weights=shares),
        fingerprint=fingerprint.hexdigest()[:16],
        manifest={"mixture": {str(part.folder): part.manifest for part in parts}},
    )


def _ordinary(part: PreparedData) -> np.ndarray:
    """Frequencies of the ordinary train tokens, [vocab_size]."""
    manifest = cast(FolderManifest, part.manifest)
    counts = token_counts(part.folder, read_shards(part.folder, manifest))
    counts[list(part.special.all_ids)] = 0
    return counts


def _refuse_mixed_leak(parts: list[PreparedData], root: Path, log: Callable[[str], None]) -> None:
    """Raise UserError where held-out text of one part stands in the training split of another; looked up once."""
    for part in parts:
        others = [other for other in parts if other is not part]
        if not others:
            return
        key = sha256("".join([part.fingerprint, *(other.fingerprint for other in others)]).encode()).hexdigest()[:24]
        found = root / f"{key}.leak.json"
        with locked(root, found.stem, log):
            if _known_leak(found) is None:
                log(f"Looking for the held-out text of {part.folder.name} in the rest of the mixture.")
                train = Split(files=[file for other in others for file in cast(Split, other.train).files])
                leak = find_leak(train, cast(Split, part.eval), part.special.sep)
                write_json(found, {"percent": leak.percent})
            percent = _known_leak(found)
        assert percent is not None
        if percent > part.manifest["max_leak"]:
            raise UserError(
                f"{percent:.1f} % of the held-out text of {part.folder} stands in the training splits of the other "
                f"folders; prepare their sources together, in one folder."
            )


class _Leak(TypedDict):
    """A leak between folders, as the cache keeps it."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    percent: Finite


def _known_leak(path: Path) -> float | None:
    """What was found before, in percent; None where nothing, or nothing readable, was."""
    try:
        return read_json(path, _Leak, mend="remove it", inside=path.parent)["percent"]
    except (FileNotFoundError, UserError):
        return None


def smoothed(counts: np.ndarray, special: SpecialIds) -> np.ndarray:
    """Shares of the ordinary tokens after one was added to each count, [vocab_size]; 0 for special ones."""
    shares = counts + 1.0
    shares[list(special.all_ids)] = 0
    return shares / shares.sum()


def _require_one_sequence(split: str, tokens: int, config: CorpusConfig) -> None:
    if tokens >= config.sequence_length:
        return
    mend = "raise" if split == "eval" else "lower"
    raise UserError(
        f"The {split} split has {tokens} tokens, fewer than one sequence of {config.sequence_length}; "
        f"give more documents, {mend} corpus.eval_percent ({config.eval_percent:g}) or shorten corpus.sequence_length."
    )
