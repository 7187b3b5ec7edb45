"""Unpacking a compressed stream under limits: gzip, bzip2, xz, and what the members of a zip hold.

What a stream says about its size is not believed: it is unpacked piece by piece until it ends or a
limit does. An error is a mark on the archive, and what came before it is still matched.
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

# Output is counted after each of these; a bomb is caught within one.
_PIECE = 64 * 1024
# Input goes in by little sips, because an error in a sip loses what the sip would have given.
_SIP = 256
# The window an .xz may ask for. `xz -9` asks for 64 MiB; the format allows 4 GiB.
_XZ_MEMORY = 128 * MIB

GZIP_MAGIC = b"\x1f\x8b\x08"
_PACKED_SUFFIX = re.compile(r"\.(t?)(gz|bz2|xz)$", re.I)

Member = tuple[str, bytes]


class Decompressor(Protocol):
    """What the decompressors of zlib, bz2 and lzma have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


@dataclass(slots=True)
class Archive:
    """An archive being opened: what it may still produce, and what was noticed about it."""

    name: str
    data: bytes
    budget: Budget
    marks: set[Mark] = field(default_factory=set)
    produced: int = 0

    def spend(self, size: int) -> None:
        """Count produced bytes against the ratio of this archive and the total of the message."""
        limits = self.budget.limits
        self.produced += size
        if self.produced > max(limits.ratio_grace, limits.ratio * len(self.data)):
            raise LimitReached(f"{len(self.data)} bytes grow more than {limits.ratio} times")
        self.budget.spend_bytes(size)


def unpack(archive: Archive, stream: Decompressor, start: int, out: io.BytesIO) -> int:
    """Unpack the stream that starts at `start` into `out`; return where it ended."""
    packed, at = archive.data, start
    try:
        while not stream.eof and at < len(packed):
            sip = packed[at : at + _SIP]
            at += len(sip)
            _pour(archive, stream, sip, out)
    except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError):
        archive.marks.add(Mark.BROKEN)
        return len(packed)
    if not stream.eof:
        archive.marks.add(Mark.BROKEN)
    return at - len(stream.unused_data)


def _pour(archive: Archive, stream: Decompressor, sip: bytes, out: io.BytesIO) -> None:
    while not stream.eof:
        piece = stream.decompress(sip, _PIECE)
        archive.spend(len(piece))
        out.write(piece)
        if len(piece) < _PIECE:
            return
        # zlib hands back the input it could not use; the others keep it.
        sip = getattr(stream, "unconsumed_tail", b"")


def bzip2_members(archive: Archive) -> Iterator[Member]:
    """The one member of a .bz2."""
    return _members(archive, bz2.BZ2Decompressor)


def xz_members(archive: Archive) -> Iterator[Member]:
    """The one member of an .xz."""
    return _members(archive, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_MEMORY))


def _members(archive: Archive, new_stream: Callable[[], Decompressor]) -> Iterator[Member]:
    out, start = io.BytesIO(), 0
    magic = archive.data[:3]
    while archive.data.startswith(magic, start):  # streams may follow each other
        start = unpack(archive, new_stream(), start, out)
    yield _inner_name(archive.name), out.getvalue()


def gzip_members(archive: Archive) -> Iterator[Member]:
    """The one member of a .gz, under the name that it was packed with."""
    # The frame is read here because zlib, given the frame, withholds data whose checksum is wrong.
    out, start, name = io.BytesIO(), 0, ""
    while archive.data.startswith(GZIP_MAGIC, start):
        start, stored_name = _gzip_header(archive.data, start)
        name = name or stored_name
        start = unpack(archive, zlib.decompressobj(-15), start, out) + 8
    yield name or _inner_name(archive.name), out.getvalue()


def _inner_name(name: str) -> str:
    """The name without the suffix of packing: `a.exe` for `a.exe.gz`, `a.tar` for `a.tgz`."""
    return _PACKED_SUFFIX.sub(lambda suffix: ".tar" if suffix[1] else "", name)


def _gzip_header(data: bytes, start: int) -> tuple[int, str]:
    """Where the deflated data starts and the stored name (RFC 1952)."""
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
