"""Local files as streams of bytes, plain or compressed, in bounded memory whatever they hold.

A few kB can decompress to any size. So output comes in pieces of some MB, a file that becomes implausibly much more
than it was is refused, and so is a zstd frame that asks for a large window. All frames of a file are read, and bytes
behind the last that are no frame are a fault: a damaged frame in the middle must not be taken for the end.
"""

from __future__ import annotations

import bz2
import gzip
import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import zstandard

from ds_stacking.common.errors import UserError
from ds_stacking.config import SourceConfig
from ds_stacking.data.names import printable

COMPRESSED = (".gz", ".bz2", ".zst")
"""Compressions that are read."""
FAULTS = (OSError, EOFError, UnicodeDecodeError, zlib.error, zstandard.ZstdError)
"""What reading a damaged file raises."""
CHUNK = 2**20
PLAUSIBLE = 2**26
"""Bytes that a compressed file may become however small it is."""
_SLICE = 1024
"""Compressed bytes that zstandard gets at once: it returns all of their output, at most 128 kB for each 4 of them."""

Count = Callable[[int], object]
"""Is told how many more bytes of the files have been read."""


def open_stream(path: Path, config: SourceConfig, count: Count = lambda _: None) -> BinaryIO:
    """Open a file for reading, decompressed if its name says so; `count` is told the bytes read of the file itself.

    Reading raises one of FAULTS for a damaged file, and UserError for one beyond the bounds of `config`.
    """
    source = _CountedFile(path, count)
    raw = io.BufferedReader(source, CHUNK)
    end = path.suffix.lower()
    if end not in COMPRESSED:
        return raw
    if end == ".gz":
        inner: io.RawIOBase = cast(io.RawIOBase, gzip.GzipFile(fileobj=raw))
    elif end == ".bz2":
        inner = _Frames(raw, bz2.BZ2Decompressor, CHUNK)
    else:
        inner = _Frames(raw, lambda: _ZstdFrame(path, config.zstd_window), _SLICE)
    return io.BufferedReader(_Plausible(inner, source, path, config.max_expansion), CHUNK)


class _CountedFile(io.FileIO):
    """A file that tells how much of it has been read."""

    def __init__(self, path: Path, count: Count) -> None:
        super().__init__(path)
        self._count = count
        self.bytes_read = 0

    def readinto(self, buffer: Any) -> int | None:
        size = super().readinto(buffer)
        self.bytes_read += size or 0
        self._count(size or 0)
        return size


class _Plausible(io.RawIOBase):
    """A decompressed stream; raises UserError when it has become too many times the bytes that were read for it."""

    def __init__(self, stream: io.RawIOBase, source: _CountedFile, path: Path, most: int) -> None:
        self._stream, self._source, self._path, self._most = stream, source, path, most
        self._size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = self._stream.readinto(buffer)
        assert size is not None
        self._size += size
        if self._size > max(PLAUSIBLE, self._most * self._source.bytes_read):
            raise UserError(
                f"{printable(self._path)} becomes more than {self._most:,} times its size when it is decompressed, "
                f"as no text does; remove the file, or raise corpus.max_expansion if it is right."
            )
        return size

    def close(self) -> None:
        self._stream.close()
        self._source.close()
        super().close()


class _Frame(Protocol):
    """A decompressor of one frame, as `bz2` has it."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _ZstdFrame:
    """A frame of zstd, whose window is bounded; the length of the output of one call is not."""

    needs_input = True

    def __init__(self, path: Path, window: int) -> None:
        self._path, self._window = path, window
        self._frame = zstandard.ZstdDecompressor(max_window_size=window).decompressobj()

    @property
    def eof(self) -> bool:
        return self._frame.eof

    @property
    def unused_data(self) -> bytes:
        return self._frame.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        try:
            return self._frame.decompress(data)
        except zstandard.ZstdError as error:
            if "too much memory" not in str(error):
                raise
            raise UserError(
                f"{printable(self._path)} needs a zstd window of more than {self._window:,} bytes of memory; raise "
                f"corpus.zstd_window, to {2**31} at most, or compress the file without --long."
            ) from None


class _Frames(io.RawIOBase):
    """Decompressed bytes of any number of frames, one behind another; raises EOFError where the last is cut short.

    The libraries' own readers take the end of the file, or what is no frame, for the end of the text.
    """

    def __init__(self, file: BinaryIO, make: Callable[[], _Frame], piece: int) -> None:
        """Give `piece` bytes at a time to a decompressor that `make` returns for each frame."""
        self._file, self._make, self._piece = file, make, piece
        self._frame = make()
        self._begun = False
        self._left = b""
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            data = b""
            if self._frame.needs_input:
                data = self._left or self._file.read(self._piece)
                self._left = b""
                if not data:
                    if self._begun:
                        raise EOFError("Compressed file ended before the end of its last frame")
                    return 0
            self._text = memoryview(self._frame.decompress(data, CHUNK))
            self._begun = not self._frame.eof
            if self._frame.eof:
                self._left, self._frame = self._frame.unused_data, self._make()
        size = min(len(buffer), len(self._text))
        buffer[:size] = self._text[:size]
        self._text = self._text[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()
