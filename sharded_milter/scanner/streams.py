"""Unpack compressed streams within limits: gzip, bzip2, xz, and the members of a zip.

The size that a stream gives is not trusted: it is unpacked in chunks until it ends or a limit is
reached. An error becomes a mark on the archive, and the bytes before it are still matched.
"""

import bz2
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from .limits import MIB, Budget, LimitReached
from .parts import Mark

# Bytes of output after which the limits are checked.
_CHUNK = 64 * 1024
# Bytes of input at a time. It is small, because an error loses the output of its whole input.
_INPUT = 256
# Bytes of memory for the window of an .xz. `xz -9` needs 64 MiB; the format allows 4 GiB.
_XZ_MEMORY = 128 * MIB

GZIP_MAGIC = b"\x1f\x8b\x08"
_PACKED_SUFFIX = re.compile(r"\.(t?)(gz|bz2|xz)$", re.I)

Member = tuple[str, bytes]


class Decompressor(Protocol):
    """The interface that the decompressors of zlib, bz2 and lzma share."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


@dataclass(slots=True)
class Archive:
    """An archive that is being unpacked, with its budget and its marks."""

    name: str
    data: bytes
    budget: Budget
    marks: set[Mark] = field(default_factory=set)
    produced: int = 0

    def spend(self, size: int) -> None:
        """Count output bytes against the archive's ratio and the message's total.

        Raise LimitReached or OutOfTime.
        """
        limits = self.budget.limits
        self.produced += size
        if self.produced > max(limits.ratio_grace, limits.ratio * len(self.data)):
            raise LimitReached(
                f"an archive of {len(self.data)} bytes grows to more than {limits.ratio} times that"
            )
        self.budget.spend_bytes(size)


def unpack(archive: Archive, stream: Decompressor, start: int, out: io.BytesIO) -> int:
    """Unpack the stream that starts at `start` into `out`; return the offset of its end."""
    packed, at = archive.data, start
    try:
        while not stream.eof and at < len(packed):
            data = packed[at : at + _INPUT]
            at += len(data)
            _decompress(archive, stream, data, out)
    except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError):
        archive.marks.add(Mark.BROKEN)
        return len(packed)
    if not stream.eof:
        archive.marks.add(Mark.BROKEN)
    return at - len(stream.unused_data)


def _decompress(archive: Archive, stream: Decompressor, data: bytes, out: io.BytesIO) -> None:
    while not stream.eof:
        chunk = stream.decompress(data, _CHUNK)
        archive.spend(len(chunk))
        out.write(chunk)
        if len(chunk) < _CHUNK:
            return
        # zlib gives back the input that it has not used; the others keep it.
        data = getattr(stream, "unconsumed_tail", b"")


def bzip2_members(archive: Archive) -> Iterator[Member]:
    """Yield the member of a .bz2."""
    return _members(archive, bz2.BZ2Decompressor)


def xz_members(archive: Archive) -> Iterator[Member]:
    """Yield the member of an .xz."""
    return _members(archive, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_MEMORY))


def _members(archive: Archive, new_stream: Callable[[], Decompressor]) -> Iterator[Member]:
    out, start = io.BytesIO(), 0
    magic = archive.data[:3]
    while archive.data.startswith(magic, start):  # streams may follow each other
        start = unpack(archive, new_stream(), start, out)
    yield _inner_name(archive.name), out.getvalue()


def gzip_members(archive: Archive) -> Iterator[Member]:
    """Yield the member of a .gz, with the name that is stored in it."""
    # The gzip header is parsed here, because zlib would not return data with a wrong checksum.
    out, start, name = io.BytesIO(), 0, ""
    while archive.data.startswith(GZIP_MAGIC, start):
        start, stored_name = _gzip_header(archive.data, start)
        name = name or stored_name
        start = unpack(archive, zlib.decompressobj(-15), start, out) + 8
    yield name or _inner_name(archive.name), out.getvalue()


def _inner_name(name: str) -> str:
    """Return the name without its suffix: `a.exe` for `a.exe.gz`, `a.tar` for `a.tgz`."""
    return _PACKED_SUFFIX.sub(lambda suffix: ".tar" if suffix[1] else "", name)


def _gzip_header(data: bytes, start: int) -> tuple[int, str]:
    """Return the offset of the deflated data and the stored name (RFC 1952)."""
    flags, at, name = data[start + 3 : start + 4], start + 10, ""
    bits = flags[0] if flags else 0
    if bits & 4:  # FEXTRA
        at += 2 + int.from_bytes(data[at : at + 2], "little")
    if bits & 8:  # FNAME
        name, at = _zero_terminated(data, at)
    if bits & 16:  # FCOMMENT
        at = _zero_terminated(data, at)[1]
    if bits & 2:  # FHCRC
        at += 2
    return at, name


def _zero_terminated(data: bytes, at: int) -> tuple[str, int]:
    end = data.find(b"\0", at)
    end = len(data) if end == -1 else end
    return data[at:end].decode("utf-8", "replace"), end + 1
