"""Where text comes from: the installed documentation, local files or a hub dataset, as one stream of documents."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from ds_stacking.common.errors import RunFailed, UserError
from ds_stacking.config import SourceConfig
from ds_stacking.data.names import first_line, named_path, printable
from ds_stacking.data.preparation.documents import cut
from ds_stacking.data.sources.documentation import READER, documentation, installed_versions
from ds_stacking.data.sources.mediawiki import clean_wikitext
from ds_stacking.data.sources.parquet_files import require_column
from ds_stacking.data.sources.streams import Count
from ds_stacking.data.sources.text_files import SUFFIXES, as_text, is_dump, is_supported, read_file

_CACHED = ("datasets--", "models--")
"""Folders of a hub's cache begin so; `snapshots` in one consists of links to its `blobs`."""
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class RawDocument(NamedTuple):
    """A document as its source has it."""

    text: str
    """Never empty."""
    is_wikitext: bool = False
    """Whether the text is MediaWiki's markup."""

    def plain(self) -> str:
        """The text without markup."""
        return clean_wikitext(self.text) if self.is_wikitext else self.text


def raw_documents(
    source: str, config: SourceConfig, skipped: dict[str, str] | None = None, count: Count = lambda _: None
) -> Iterator[RawDocument]:
    """Yield the non-empty documents of a corpus as they are, always in the same order.

    `source` is one of

    - `docs`: docstrings of the installed Python packages (a folder of that name is `./docs`);
    - a folder (searched with its subfolders), file or glob (`**` crosses folders) of .txt, .jsonl, .parquet files or
      MediaWiki dumps (.xml), all but parquet also as .gz, .bz2 or .zst; files are read in the order of their paths. In
      .txt files blank lines separate documents. For one split of a folder of parquet files give a glob, such as
      `folder/train-*.parquet`;
    - the name of a dataset on the Hugging Face hub; code that comes with a dataset is never run.

    Longer documents than LONGEST_DOCUMENT come in pieces. Files that are not readable text are left out and noted in
    `skipped` (file name -> what is wrong); `count` is told the bytes read of local files. Raises UserError, at once
    for a source that does not exist, at the end for one without any text.
    """
    skipped = {} if skipped is None else skipped
    documents: Iterator[RawDocument]
    if source == "docs":
        documents = map(RawDocument, documentation())
    elif files := local_files(source, config):
        documents = (
            RawDocument(text, is_dump(path)) for path in files for text in read_file(path, config, skipped, count)
        )
    else:
        documents = map(RawDocument, _hub_documents(source, config))
    pieces = (RawDocument(text, whole.is_wikitext) for whole in documents for text in cut(whole.text) if text.strip())
    return _require_text(islice(pieces, config.max_documents or None), source, skipped)


def iterate_documents(source: str, config: SourceConfig, skipped: dict[str, str] | None = None) -> Iterator[str]:
    """Yield the documents of `raw_documents` without markup."""
    return filter(None, (document.plain() for document in raw_documents(source, config, skipped)))


def identify_source(source: str, config: SourceConfig) -> dict[str, Any]:
    """Return what determines the documents, as JSON values: two equal answers mean the same documents.

    Files are known by path, size and time of change, the documentation by the installed versions, a hub dataset by
    its name and revision alone: pin the revision.
    """
    shared = {"source": printable(source), "max_documents": config.max_documents}
    if source == "docs":
        return {**shared, "reader": READER, "versions": installed_versions()}
    if files := local_files(source, config):
        stats = [(printable(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return {**shared, "column": config.column, "files": stats}
    names = ("subset", "split", "revision", "column")
    return {**shared, **{name: getattr(config, name) for name in names}}


def local_files(source: str, config: SourceConfig) -> list[Path]:
    """Return the files of a local source in reading order; none if it has the form of a hub name.

    Raises UserError for a path that does not exist or holds no file in a known format, and without
    `config.follow_links` for a link that leads out of the folder or of that of the glob.
    """
    path = named_path(source)
    try:
        files = _found_files(source, path)
        if not config.follow_links and not path.is_file():
            _refuse_links_out(source, path, files)
        return files
    except OSError as error:  # such as a folder that may not be searched, or a name too long
        raise UserError(
            f"The data source {printable(source)!r} cannot be read ({error.strerror}); give an existing folder, file "
            f"or glob."
        ) from None


def _found_files(source: str, path: Path) -> list[Path]:
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = [file for file in path.rglob("*") if not _is_hidden(file.relative_to(path))]
    elif glob.has_magic(source):
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]
    elif _HUB_NAME.fullmatch(source) and not source.startswith(".") and not is_supported(path):
        return []
    else:
        raise UserError(
            f"The data source {printable(source)!r} does not exist; give an existing folder, file or glob."
        )
    files = sorted(file for file in found if file.is_file() and is_supported(file))
    if not files:
        raise UserError(
            f"The data source {printable(source)!r} holds no file to read; known formats are {', '.join(SUFFIXES)}."
        )
    return files


def _refuse_links_out(source: str, path: Path, files: list[Path]) -> None:
    """Raise UserError for a file that lies elsewhere; the source may be a link itself, or lie in a hub's cache."""
    plain = takewhile(lambda part: not glob.has_magic(part), path.parts)  # of a glob, the folder that its user named
    root = (path if path.is_dir() else Path(*plain)).resolve()
    allowed = [root]
    allowed += [folder / "blobs" for folder in (root, *root.parents) if folder.name.startswith(_CACHED)]
    for file in files:
        target = file.resolve()
        if not any(target.is_relative_to(folder) for folder in allowed):
            raise UserError(
                f"{printable(file)} leads to {printable(target)}, outside of the data source {printable(source)!r}; "
                f"give that file or its folder as --data, or set corpus.follow_links to read it as a part of this."
            )


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _require_text(documents: Iterator[RawDocument], source: str, skipped: dict[str, str]) -> Iterator[RawDocument]:
    empty = True
    for document in documents:
        empty = False
        yield document
    if empty and skipped:
        name, fault = next(iter(skipped.items()))
        raise UserError(
            f"The data source {printable(source)!r} holds no readable text: {len(skipped)} files, {name} {fault}."
        )
    if empty:
        raise UserError(f"The data source {printable(source)!r} holds no text; give one that does.")


def _hub_documents(source: str, config: SourceConfig) -> Iterator[str]:
    import datasets  # takes a second; only hub corpora need it

    try:
        dataset = datasets.load_dataset(
            source, config.subset, split=config.split, revision=config.revision, streaming=config.streaming
        )
    except Exception as error:  # a missing name, split, network or permission: each a class of its own
        raise UserError(
            f"{printable(source)!r} is neither a local path nor a hub dataset that can be loaded "
            f"({first_line(error)}); check the name, corpus.subset, corpus.split and the network."
        ) from error
    if dataset.column_names is not None:
        require_column(source, config.column, dataset.column_names)
        dataset = dataset.select_columns([config.column])
    return _rows(dataset, source, config)


def _rows(dataset: Any, source: str, config: SourceConfig) -> Iterator[str]:
    column = config.column
    batches = dataset.iter(batch_size=256)
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # of the network or of a file there: each a class of its own
            raise RunFailed(
                f"The hub dataset {source!r} cannot be read to its end ({first_line(error)}); give the same command "
                f"again when it can."
            ) from None
        if batch is None:
            return
        require_column(source, column, list(batch))
        for value in batch[column]:
            text = as_text(value, source, column)
            if len(text) > config.max_document:
                raise UserError(
                    f"A document of {source} has {len(text):,} characters, more than corpus.max_document "
                    f"({config.max_document:,}); raise that to read it."
                )
            yield text
