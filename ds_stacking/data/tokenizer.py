"""The tokenizer: a WordPiece trained on the corpus, a local folder or a name on the Hugging Face hub."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
import tokenizers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase
from typing_extensions import TypedDict

from ds_stacking.common.errors import UserError
from ds_stacking.common.json_files import KEEP_OTHERS, parse_json
from ds_stacking.common.model_folder import check_links, means_a_folder, model_file
from ds_stacking.common.own_files import read_named
from ds_stacking.config import LARGEST_VOCABULARY, SourceConfig
from ds_stacking.data.names import first_line, named_path, printable

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TRAINING_CHARACTERS = 200_000_000
"""Characters of the corpus, from its beginning, that a tokenizer is trained on at most."""
TRAINING_DOCUMENTS = 5_000_000
"""Documents, likewise."""

_MAX_POSITIONS = 512
_WORD_MARKS = ("\u0120", "\u2581")  # a blank before the token, in byte-level BPE and in SentencePiece
_MAX_ALPHABET = 1000


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """Token ids with a meaning of their own."""

    pad: int
    """Padding."""
    cls: int
    """First token of every sequence."""
    sep: int
    """End of a document, a segment and a sequence."""
    mask: int
    """Stands for a token that is to be predicted."""
    all_ids: tuple[int, ...]
    """All special ids, the unknown token included; none of them is ever predicted."""


def train_tokenizer(documents: Sequence[str], vocab_size: int, lowercase: bool) -> BertTokenizer:
    """Train a WordPiece vocabulary of at most `vocab_size` entries; the same documents give the same vocabulary.

    `tokenizers` numbers the characters in the order of a hash table that differs from process to process, and equally
    frequent pairs are merged in the order of those numbers. So the alphabet is counted here and handed over as
    "special" tokens, which are numbered in the order given.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    alphabet = _alphabet(documents, tokenizer.normalizer, min(_MAX_ALPHABET, vocab_size // 8))
    numbered = [*SPECIAL_TOKENS, *alphabet, *(f"##{character}" for character in alphabet)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=numbered, limit_alphabet=len(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    # Built anew from the vocabulary, in which the alphabet is ordinary again.
    return BertTokenizer(vocab=tokenizer.get_vocab(), do_lower_case=lowercase, model_max_length=_MAX_POSITIONS)


def _alphabet(documents: Sequence[str], normalizer: normalizers.Normalizer, limit: int) -> list[str]:
    """Return at most `limit` of the most frequent characters, sorted; of a tie at the limit none."""
    counts: Counter[str] = Counter()
    for text in documents:
        counts.update(normalizer.normalize_str(text))
    frequencies = sorted((count for character, count in counts.items() if not character.isspace()), reverse=True)
    least = frequencies[limit] + 1 if len(frequencies) > limit else 1
    return sorted(character for character, count in counts.items() if count >= least and not character.isspace())


class _Config(TypedDict):
    """What is read of tokenizer_config.json and config.json before a library reads them: that they are objects."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    tokenizer_class: NotRequired[str | None]


class _Backend(TypedDict):
    """What is read of tokenizer.json before a library reads it."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    model: dict[str, Any]


_JSON_FILES: dict[str, Any] = {"tokenizer.json": _Backend} | dict.fromkeys(
    ("tokenizer_config.json", "config.json", "special_tokens_map.json", "added_tokens.json"), _Config
)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the hub, never running code that comes with it, nor following links out of it.

    Raises UserError if there is none, or it is damaged, lacks a special token or a fast (Rust) implementation.
    """
    path, shown = named_path(name), printable(name)
    is_folder = os.path.isdir(path)
    if not is_folder and means_a_folder(name):
        raise UserError(f"The tokenizer folder {shown!r} does not exist; give a folder, a hub name or `train`.")
    if is_folder:
        _check_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path) if is_folder else name, trust_remote_code=False)
        backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        size = count_vocabulary(tokenizer)
    except BaseException as error:  # a missing file, a bad one, no network: each a class of its own; panics are none
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        raise UserError(
            f"The tokenizer {shown!r} cannot be loaded ({first_line(error)}); give a folder with a tokenizer.json, "
            f"a hub name or `train`."
        ) from error
    if backend is None:
        raise UserError(f"The tokenizer {shown!r} has no tokenizer.json; convert it to a fast tokenizer first.")
    if size > LARGEST_VOCABULARY:
        raise UserError(
            f"The tokenizer {shown!r} has the token id {size - 1:,}; no more than {LARGEST_VOCABULARY:,} entries are "
            f"supported."
        )
    special_ids(tokenizer)
    if size <= len(set(tokenizer.all_special_ids)):
        # transformers makes an empty tokenizer for a folder that holds a model and no tokenizer
        raise UserError(f"{shown} holds no tokenizer; put its tokenizer.json there, or give --tokenizer.")
    return tokenizer


def _check_folder(folder: Path) -> None:
    """Raise UserError for a link out of a tokenizer's folder (or its model in a hub cache), and for damaged JSON."""
    check_links(folder)
    for name, shape in _JSON_FILES.items():
        try:
            content = read_named(model_file(folder, name))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"{printable(folder / name)} cannot be read ({error.strerror}).") from None
        parse_json(content, shape, where=printable(folder / name), mend="restore it, or give another --tokenizer")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer as a Hugging Face folder. Raises OSError where the disk does not take it."""
    try:
        tokenizer.save_pretrained(str(folder))
    except OSError:
        raise
    except Exception as error:  # `tokenizers` has no class of its own for it
        raise OSError(f"{folder} cannot be written ({first_line(error)})") from None


def special_ids(tokenizer: PreTrainedTokenizerBase) -> SpecialIds:
    """Return the special ids of a tokenizer; UserError if one that masked language modelling needs is missing."""
    found = {name: getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep", "mask")}
    missing = [name for name, token_id in found.items() if token_id is None]
    if missing:
        raise UserError(
            f"The tokenizer {tokenizer.name_or_path!r} has no {', '.join(missing)} token; "
            f"give one made for masked language modelling, or `train`."
        )
    return SpecialIds(**found, all_ids=tuple(sorted(tokenizer.all_special_ids)))


def count_vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the rows that an embedding needs: the largest id plus one, since a vocabulary may have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def continuing_tokens(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return which ids go on with a word that another began, [vocabulary] bool.

    Known are WordPiece's prefix and the marks of a blank in front, of byte pairs and of SentencePiece. Raises
    UserError for a tokenizer with neither.
    """
    vocabulary = tokenizer.get_vocab()
    continues = np.zeros(count_vocabulary(tokenizer), bool)
    prefix = getattr(tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None)
    mark = next((mark for mark in _WORD_MARKS if any(token.startswith(mark) for token in vocabulary)), None)
    if prefix:
        continues[[i for token, i in vocabulary.items() if token.startswith(prefix)]] = True
    elif mark:
        continues[[i for token, i in vocabulary.items() if not token.startswith(mark)]] = True
    else:
        raise UserError(
            f"The tokenizer {tokenizer.name_or_path!r} does not tell where words begin; set corpus.masking to token."
        )
    return continues


def text_encoder(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a copy of the Rust tokenizer that takes text at its word: `[MASK]` in a text is no special token."""
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    return encoder


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of everything that determines the ids of a text."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["truncation"] = state["padding"] = None  # settings of the last call, not of the tokenizer
    return sha256(json.dumps([state, tokenizer.all_special_ids], sort_keys=True).encode()).hexdigest()


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase | None, config: SourceConfig) -> Any:
    """Return what determines the ids of a text, as JSON values; with None of a tokenizer yet to be trained."""
    if tokenizer is not None:
        return tokenizer_hash(tokenizer)
    return {"vocab_size": config.vocab_size, "lowercase": config.lowercase, "by": tokenizers.__version__}
