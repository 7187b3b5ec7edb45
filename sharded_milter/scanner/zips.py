"""Read the members of a zip. Its directory gives their names; their sizes are not trusted."""

import bz2
import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .limits import LimitReached
from .parts import Mark
from .streams import Archive, Decompressor, Member, unpack

ZIP_MAGICS = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
# Signature, flags, method, packed size, size, lengths of name and extra field.
_LOCAL_HEADER = struct.Struct("<4s2xHH8xLLHH")
_ZIP_END = 22 + 0xFFFF  # bytes of the end record and the longest comment after it
_ENCRYPTED = 0x2041  # bit 0: this member; bit 6: strong; bit 13: the directory, too


@dataclass(frozen=True, slots=True)
class _Entry:
    """A member and the offset of its bytes. `size` is not trusted; only stored members use it."""

    name: str
    encrypted: bool
    method: int
    size: int
    start: int


def ends_as_zip(data: bytes) -> bool:
    """Return True if a zip follows other data, as in a self-extracting program."""
    if b"PK\x05\x06" not in data[-_ZIP_END:]:
        return False
    try:
        return zipfile.is_zipfile(io.BytesIO(data))
    except zipfile.BadZipFile:  # it claims to span disks
        return False


def zip_members(archive: Archive) -> Iterator[Member]:
    """Yield each member with its name, unpacked as far as possible; raise LimitReached."""
    # The standard library would keep an object for each entry of the directory, without a limit.
    if archive.data.count(b"PK\x01\x02") > archive.budget.limits.members:
        raise LimitReached(f"a zip directory has more than {archive.budget.limits.members} entries")
    empty = True
    for entry in _directory(archive):
        empty = False
        yield entry.name, _read(archive, entry)
    if empty:
        for entry in _salvage(archive):
            archive.marks.add(Mark.BROKEN)
            yield entry.name, _read(archive, entry)


def _directory(archive: Archive) -> Iterator[_Entry]:
    """Yield the entries of the central directory, which mail programs show to their users."""
    try:
        listed = zipfile.ZipFile(io.BytesIO(archive.data)).infolist()
    except Exception:  # BadZipFile, NotImplementedError, struct.error, UnicodeDecodeError, ...
        archive.marks.add(Mark.BROKEN)
        return
    for info in listed:
        local = _local_entry(archive.data, info.header_offset)
        if local is None:
            archive.marks.add(Mark.BROKEN)
            continue
        encrypted = bool(info.flag_bits & _ENCRYPTED)
        if encrypted != local.encrypted:  # programs trust one or the other, so unpack it
            archive.marks.add(Mark.ENCRYPTED)
        yield replace(
            local,
            name=info.filename,
            encrypted=encrypted and local.encrypted,
            method=info.compress_type,
            size=max(info.compress_size, info.file_size),
        )


def _salvage(archive: Archive) -> Iterator[_Entry]:
    """Yield the entries that are found without a directory, as repair programs find them."""
    at = archive.data.find(b"PK\x03\x04")
    while at != -1:
        entry = _local_entry(archive.data, at)
        if entry is not None:
            yield entry
        at = archive.data.find(b"PK\x03\x04", at + 4)


def _local_entry(data: bytes, at: int) -> _Entry | None:
    if at < 0 or at + _LOCAL_HEADER.size > len(data):
        return None
    signature, flags, method, packed, size, name_size, extra = _LOCAL_HEADER.unpack_from(data, at)
    if signature != b"PK\x03\x04":
        return None
    name_at = at + _LOCAL_HEADER.size
    return _Entry(
        name=data[name_at : name_at + name_size].decode("utf-8", "replace"),
        encrypted=bool(flags & _ENCRYPTED),
        method=method,
        size=max(packed, size),
        start=name_at + name_size + extra,
    )


def _read(archive: Archive, entry: _Entry) -> bytes:
    """Return the data; b"" and a mark if it needs a password or an unsupported method."""
    if entry.encrypted:
        archive.marks.add(Mark.ENCRYPTED)
        return b""
    if entry.method == zipfile.ZIP_STORED:
        stored = archive.data[entry.start : entry.start + entry.size]
        archive.spend(len(stored))
        return stored
    stream: Decompressor
    if entry.method == zipfile.ZIP_DEFLATED:
        stream = zlib.decompressobj(-15)
    elif entry.method == zipfile.ZIP_BZIP2:
        stream = bz2.BZ2Decompressor()
    else:
        archive.marks.add(Mark.BROKEN)
        return b""
    out = io.BytesIO()
    unpack(archive, stream, entry.start, out)
    return out.getvalue()
