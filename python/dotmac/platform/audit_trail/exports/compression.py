"""gzip and zstd, in members and frames that can be ended and begun anew at any row."""

from __future__ import annotations

import gzip
import io
import zlib
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Protocol

from dotmac.platform.audit_trail.exports.extras import extra

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "COMPRESSIONS",
    "Compressor",
    "compression_of",
    "damages",
    "decompressed",
    "make_compressor",
    "without_suffix",
]

COMPRESSIONS: Final = ("gzip", "zstd")
_SUFFIXES: Final = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_GZIP_LEVEL, _ZSTD_LEVEL = 6, 3
_GZIP_WINDOW = 31  # 15 bits, and a gzip header instead of zlib's


class Compressor(Protocol):
    """A stream's compressor."""

    def write(self, data: bytes) -> bytes:
        """What comes out for it, maybe later."""

    def end(self) -> bytes:
        """The rest; what is written next begins a new member, which readers take for the same stream."""


def compression_of(name: str) -> str | None:
    """The compression that a file's name tells."""
    return next((kind for suffix, kind in _SUFFIXES.items() if name.lower().endswith(suffix)), None)


def without_suffix(name: str) -> str:
    """The name without the suffix of its compression."""
    lower = name.lower()
    return next((name[: -len(suffix)] for suffix in _SUFFIXES if lower.endswith(suffix)), name)


def make_compressor(kind: str | None) -> Compressor:
    """The compressor of that kind. Raises: MissingExtra: zstandard is not installed."""
    if kind == "gzip":
        return _Members(lambda: zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP_WINDOW))
    if kind == "zstd":
        zstandard = extra("zstandard", "zstd")
        return _Members(lambda: zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compressobj())
    return _Plain()


def decompressed(file: BinaryIO, kind: str | None) -> BinaryIO:
    """A reader of what a compressor wrote, through all of its members."""
    if kind == "gzip":
        return gzip.GzipFile(fileobj=file, mode="rb")  # type: ignore[return-value]  # a reader like others
    if kind == "zstd":
        reader = extra("zstandard", "zstd").ZstdDecompressor().stream_reader(file, read_across_frames=True)
        return io.BufferedReader(reader)
    return file


def damages(kind: str | None) -> tuple[type[Exception], ...]:
    """What reading a damaged stream of that kind raises."""
    found: tuple[type[Exception], ...] = (OSError, EOFError, ValueError, zlib.error)
    return (*found, extra("zstandard", "zstd").ZstdError) if kind == "zstd" else found


class _Plain:
    def write(self, data: bytes) -> bytes:
        return data

    def end(self) -> bytes:
        return b""


class _Members:
    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._one: Any = None

    def write(self, data: bytes) -> bytes:
        if self._one is None:
            self._one = self._make()
        out: bytes = self._one.compress(data)
        return out

    def end(self) -> bytes:
        one, self._one = self._one, None
        return b"" if one is None else one.flush()
