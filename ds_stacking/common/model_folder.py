"""A model's folder that may have come from somebody else: which files count, where links lead, what config.json is.

A folder in a hub cache consists of links, `models--x/snapshots/<revision>/config.json -> ../../blobs/<hash>`: a link
that stays inside the same `models--x` is followed, any other is refused. Code that lies in such a folder is never run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from ds_stacking.common.errors import UserError
from ds_stacking.common.json_files import KEEP_OTHERS, Count, Finite, parse_json, read_json
from ds_stacking.common.own_files import is_inside, open_inside
from ds_stacking.common.words import shown

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt"),
    *("vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json"),
)
TEXTS = ("generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth", "model.ckpt")
MOST_BLOCKS = 1000
"""More blocks than any model has; a number in a file must not decide about memory."""
MEND = "restore that folder, or name another"

_Size = Annotated[int, Field(ge=1, le=2**31)]
_Sizes = _Size | list[_Size]
_Depth = Annotated[int, Field(ge=1, le=MOST_BLOCKS)]


class ModelConfigFile(TypedDict):
    """The fields of config.json that decide about memory or code; none must be there."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    architectures: NotRequired[list[str] | None]
    model_type: NotRequired[str]
    num_hidden_layers: NotRequired[_Depth | None]
    num_layers: NotRequired[_Depth | None]
    n_layer: NotRequired[_Depth | None]
    n_layers: NotRequired[_Depth | None]
    hidden_size: NotRequired[_Size | None]
    num_attention_heads: NotRequired[_Sizes | None]
    intermediate_size: NotRequired[_Sizes | None]
    vocab_size: NotRequired[_Size | None]
    max_position_embeddings: NotRequired[_Size | None]
    type_vocab_size: NotRequired[Count | None]
    layer_norm_eps: NotRequired[Finite | None]
    initializer_range: NotRequired[Finite | None]


class _Index(TypedDict):
    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    weight_map: dict[str, str]


def means_a_folder(name: str) -> bool:
    """Whether a name that is no folder was meant as one: a hub name has one slash, and no folder of ours before it."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or ("/" in name and Path(name).parent.is_dir())


def model_file(folder: Path, name: str) -> Path:
    """The file `name` of a model's folder; links are followed inside one model of a hub cache only.

    Raises UserError for a name that leads elsewhere and for what is no regular file, FileNotFoundError.
    """
    if not is_inside(name) or len(Path(name).parts) != 1:
        raise UserError(f"{folder} names the file {shown(name)}, which leads out of it; {MEND}.")
    path = folder / name
    if path.is_symlink() and (model := _hub_model(folder)):
        target = path.resolve(strict=True)
        if target.is_relative_to(model):
            open_file(model, str(target.relative_to(model)))
            return target
    open_file(folder, name)
    return path


def open_file(folder: Path, name: str) -> None:
    """Raise UserError unless `name` is a regular file of `folder`, no link; OSError."""
    open(open_inside(folder, name), "rb").close()


def check_links(folder: Path) -> None:
    """Raise UserError where a file that a library might open by its name is a link that leads elsewhere."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.is_dir():
            try:
                model_file(folder, path.name)
            except FileNotFoundError:
                raise UserError(f"{path} is a link to what is not there; {MEND}.") from None


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json. Raises UserError where it is damaged or says what no model is; OSError."""
    content: Any = read_json(model_file(folder, CONFIG), ModelConfigFile, mend=MEND, limit=1 << 24)
    return content


def check_numbers(config: dict[str, Any], where: str) -> None:
    """Raise UserError where a configuration that a library has read says what no model is."""
    parse_json(json.dumps(config, default=str), ModelConfigFile, where=f"The configuration of {where}", mend=MEND)


def weight_files(folder: Path) -> dict[str, Path]:
    """The safetensors files of a folder by their names, in order. Raises UserError where there are none."""
    index = weight_map(folder)
    names = sorted(set(index.values())) if index else [SINGLE]
    files = {}
    for name in names:
        if not name.endswith(".safetensors"):
            raise UserError(f"{folder / INDEX} names {shown(name)}, which is no safetensors file; {MEND}.")
        try:
            files[name] = model_file(folder, name)
        except FileNotFoundError:
            raise _no_weights(folder, name) from None
    return files


def weight_map(folder: Path) -> dict[str, str]:
    """The file of every tensor by the folder's index; empty where all are in one file."""
    if (folder / SINGLE).exists() or not (folder / INDEX).exists():
        return {}
    content = read_json(model_file(folder, INDEX), _Index, mend=MEND)["weight_map"]
    if not content:
        raise UserError(f"{folder / INDEX} names no tensor; {MEND}.")
    return content


def check_folder(folder: Path) -> dict[str, Any]:
    """The content of config.json of a folder that a library may then open. Raises UserError."""
    check_links(folder)
    try:
        return read_config(folder)
    except FileNotFoundError:
        raise UserError(f"{folder} has no {CONFIG}; name the folder of a model.") from None
    except OSError as error:
        raise UserError(f"{folder / CONFIG} cannot be read ({error.strerror}); {MEND}.") from None


@contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """Make one UserError, "`what`: first line", of whatever a library says of files that a user named.

    Libraries written in Rust panic with what is no Exception.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        lines = (str(error).strip() or type(error).__name__).splitlines()
        words = ascii(lines[0].strip()[:300])[1:-1].replace("\\'", "'")
        raise UserError(f"{what} ({words.rstrip('.')}); {MEND}.") from None


def _hub_model(folder: Path) -> Path | None:
    """The `models--...` folder of a hub cache that `folder` is a snapshot of."""
    parts = folder.resolve()
    return next((parent for parent in parts.parents if parent.name.startswith("models--")), None)


def _no_weights(folder: Path, name: str) -> UserError:
    pickled = [file for file in PICKLES if (folder / file).exists()]
    if pickled:
        return UserError(
            f"{folder} has its weights as {pickled[0]} only, a format that can run code when it is read; where you "
            f"trust it, load it with transformers and save it anew with save_pretrained, which writes {SINGLE}."
        )
    return UserError(f"{folder} has no {name}; {MEND}.")
