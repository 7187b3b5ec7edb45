"""Unpacking archives: their members, false sizes, and the limits."""

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scanner_samples import contents, encrypted, gzipped, marks, opened, stopped, tarred, zipped

from sharded_milter.scanner import limits as numbers
from sharded_milter.scanner.archives import expand
from sharded_milter.scanner.limits import Budget, OutOfTime, ScanLimits
from sharded_milter.scanner.parts import Mark, Part

Pack = Callable[[bytes], bytes]
TWO = (("a.txt", b"alpha"), ("b/c.txt", b"beta" * 1000))


def test_the_limits_are_these() -> None:
    assert (numbers.MAX_OPENED, numbers.MAX_MEMBERS) == (268_435_456, 10_000)
    assert (numbers.MAX_ARCHIVE_DEPTH, numbers.MAX_RATIO, numbers.RATIO_GRACE) == (
        8,
        200,
        1_048_576,
    )
    assert (numbers.MAX_MIME_PARTS, numbers.MAX_MIME_DEPTH) == (1_000, 100)
    assert (numbers.MESSAGE_SECONDS, numbers.PART_SECONDS) == (60, 20)
    assert (numbers.MAX_FIELD, numbers.MAX_FIELDS, numbers.MAX_NAME) == (4096, 32, 1024)


@pytest.mark.parametrize(
    "archive",
    [
        zipped(*TWO),
        zipped(*TWO, method=zipfile.ZIP_STORED),
        zipped(*TWO, method=zipfile.ZIP_BZIP2),
        b"a self-extracting program\0" + zipped(*TWO),
        tarred(*TWO),
    ],
    ids=["zip", "stored", "bzip2", "behind a program", "tar"],
)
def test_members_come_out_before_their_archive(archive: bytes) -> None:
    found = opened(archive)
    assert contents(found) == dict(TWO)
    assert found[-1] == Part("attachment", "", archive)
    assert [part.depth for part in found] == [1, 1, 0]


@pytest.mark.parametrize(
    ("archive", "name", "inside"),
    [
        (gzipped(b"data"), "a.pdf.exe.gz", "a.pdf.exe"),
        (bz2.compress(b"data"), "a.exe.bz2", "a.exe"),
        (lzma.compress(b"data"), "a.exe.XZ", "a.exe"),
        (gzipped(b"da") + gzipped(b"ta"), "two", "two"),
        (bz2.compress(b"da") + bz2.compress(b"ta"), "two", "two"),
        (gzipped(b"data") + b"trailing garbage", "a", "a"),
        (gzipped(b"data"), "backup.tgz", "backup.tar"),
    ],
)
def test_a_stream_holds_one_member_with_a_name_of_its_own(
    archive: bytes, name: str, inside: str
) -> None:
    found = opened(archive, name=name)
    assert [(part.name, part.data) for part in found] == [(inside, b"data"), (name, archive)]
    assert not marks(found)


@pytest.mark.parametrize("pack", [gzipped, bz2.compress, lzma.compress])
@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, 200_000])
def test_a_stream_of_any_length_is_whole(pack: Pack, size: int) -> None:
    data = bytes(range(256)) * 1000
    found = opened(pack(data[:size]))
    assert found[0].data == data[:size]
    assert not marks(found)


def test_the_name_inside_a_gzip_wins_over_the_name_outside() -> None:
    out = io.BytesIO()
    with gzip.GzipFile("invoice.pdf.exe", "wb", fileobj=out) as file:
        file.write(b"data")
    header = bytearray(out.getvalue())
    header[3] |= 4 | 16 | 2  # an extra field, a comment and a checksum of the header as well
    name_end = header.index(0, 10) + 1
    whole = bytes(header[:10]) + b"\x03\0xyz" + header[10:name_end] + b"comment\0" + b"\0\0"
    found = opened(whole + bytes(header[name_end:]), name="harmless.gz")
    assert [(part.name, part.data) for part in found[:1]] == [("invoice.pdf.exe", b"data")]


def test_archives_in_archives_are_opened_whatever_they_are_called() -> None:
    inner = gzipped(tarred(("deep.txt", b"core")))
    found = opened(zipped(("picture.jpg", zipped(("notes.txt", inner)))))
    assert [(part.name, part.depth) for part in found] == [
        ("deep.txt", 4),
        ("notes.txt", 3),
        ("notes.txt", 2),
        ("picture.jpg", 1),
        ("attachment", 0),
    ]
    assert found[0].data == b"core"


# ScanLimits


def wrapped(depth: int) -> bytes:
    data = b"core"
    for _ in range(depth):
        data = zipped(("inner", data))
    return data


def test_nesting_beyond_the_limit_is_a_bomb() -> None:
    limits = ScanLimits(archive_depth=3)
    assert not marks(opened(wrapped(3), limits))
    found = opened(wrapped(4), limits)
    assert [(part.depth, set(part.marks)) for part in found] == [
        (3, {Mark.BOMB}),
        (2, set()),
        (1, set()),
        (0, set()),
    ]


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_more_members_than_the_limit_are_a_bomb_and_the_first_are_parts(
    pack: Callable[..., bytes],
) -> None:
    limits = ScanLimits(members=3)
    members = [(f"{number}.txt", b"x") for number in range(4)]
    assert not marks(opened(pack(*members[:3]), limits))
    assert marks(opened(pack(*members), limits)) == {Mark.BOMB}


def test_members_are_counted_over_all_archives_of_a_message() -> None:
    budget = Budget(ScanLimits(members=3), stopped)
    pair = Part("", "", tarred(("1", b""), ("2", b"")))
    assert not marks(list(expand(pair, budget)))
    assert marks(list(expand(pair, budget))) == {Mark.BOMB}


@pytest.mark.parametrize("pack", [gzipped, bz2.compress, lzma.compress, lambda d: zipped(("z", d))])
def test_growing_more_than_the_ratio_is_a_bomb_beyond_the_grace(pack: Pack) -> None:
    archive = pack(bytes(3_000_000))
    assert marks(opened(archive)) == {Mark.BOMB}
    assert not marks(opened(archive, ScanLimits(ratio_grace=3_000_000)))
    assert not marks(opened(archive, ScanLimits(ratio=3_000_000)))


@pytest.mark.parametrize("pack", [gzipped, lambda d: zipped(("z", d)), lambda d: tarred(("t", d))])
def test_more_bytes_than_the_total_are_a_bomb(pack: Pack) -> None:
    archive = pack(bytes(range(256)) * 400)
    assert not marks(opened(archive, ScanLimits(opened=102_400)))
    assert marks(opened(archive, ScanLimits(opened=102_399))) == {Mark.BOMB}


def test_members_that_share_their_bytes_are_a_bomb() -> None:
    """Return an overlapping bomb: all entries of the directory name one stream."""
    archive = zipped(("kernel", bytes(900_000)))
    directory, end = archive.index(b"PK\1\2"), archive.index(b"PK\5\6")
    entry = archive[directory:end] * 50
    record = bytearray(archive[end:])
    struct.pack_into("<HHLL", record, 8, 50, 50, len(entry), directory)
    assert marks(opened(archive[:directory] + entry + record)) == {Mark.BOMB}


def test_a_directory_of_more_entries_than_the_limit_is_not_even_read() -> None:
    assert marks(opened(b"PK\3\4" + b"PK\1\2" * 10_001)) == {Mark.BOMB}


def test_opening_ends_when_the_seconds_of_the_message_are_over() -> None:
    now = iter(range(1000))
    budget = Budget(ScanLimits(ratio=1 << 20), lambda: next(now))
    with pytest.raises(OutOfTime):
        list(expand(Part("", "", gzipped(bytes(10_000_000))), budget))


# Lies and damage


@pytest.mark.parametrize(
    ("offset", "size"), [(20, 0), (20, 3), (20, 0xFFFFFFF0), (24, 0), (24, 1), (24, 0xFFFFFFF0)]
)
def test_sizes_in_the_directory_are_not_believed(offset: int, size: int) -> None:
    archive = bytearray(zipped(("a", b"alpha" * 100)))
    struct.pack_into("<L", archive, archive.index(b"PK\1\2") + offset, size)
    assert contents(opened(bytes(archive)))["a"] == b"alpha" * 100


def test_a_name_that_differs_in_both_places_hides_nothing() -> None:
    archive = zipped(("a", b"alpha")).replace(b"a", b"b", 1)
    assert b"alpha" in contents(opened(archive)).values()


def test_a_wrong_checksum_hides_nothing() -> None:
    archive = bytearray(gzipped(b"alpha"))
    archive[-5] ^= 0xFF
    assert contents(opened(bytes(archive))) == {"attachment": b"alpha"}


@pytest.mark.parametrize("cut", [b"PK\5\6", b"PK\1\2"])
def test_members_are_found_without_a_directory(cut: bytes) -> None:
    archive = zipped(*TWO)
    found = opened(archive[: archive.index(cut)])
    assert contents(found) == dict(TWO)
    assert marks(found) == {Mark.BROKEN}


def test_what_came_before_the_damage_is_kept() -> None:
    text = bytes(range(256)) * 1000
    archive = gzip.compress(text, 0)
    [member, outer] = opened(archive[: len(archive) // 2])
    assert len(member.data) > 100_000
    assert text.startswith(member.data)
    assert outer.marks == {Mark.BROKEN}


@pytest.mark.parametrize(
    "archive",
    [
        b"PK\3\4",
        b"PK\5\6",
        b"PK\3\4" + bytes(100),
        zipped(*TWO)[:-30],
        b"\x1f\x8b\x08",
        b"\x1f\x8b\x08\xff" + bytes(20),
        gzipped(b"data" * 100)[:-20],
        b"BZh9" + bytes(20),
        b"\xfd7zXZ\x00" + bytes(20),
        tarred(("a", b"x" * 600))[:700],
        tarred(("a", b"x" * 600))[:1536] + b"garbage" * 100,
    ],
)
def test_damage_is_a_mark_not_an_error(archive: bytes) -> None:
    assert Mark.BROKEN in marks(opened(archive))


def test_an_unknown_method_is_a_mark_and_the_name_is_still_seen() -> None:
    archive = zipped(("a.exe", b"data"), method=zipfile.ZIP_LZMA)
    found = opened(archive)
    assert contents(found) == {"a.exe": b""}
    assert marks(found) == {Mark.BROKEN}


def test_an_entry_that_points_nowhere_is_a_mark() -> None:
    archive = bytearray(zipped(*TWO))
    struct.pack_into("<L", archive, archive.index(b"PK\1\2") + 42, 7)
    found = opened(bytes(archive))
    assert set(contents(found)) == {"b/c.txt"}
    assert marks(found) == {Mark.BROKEN}


def test_a_zip_that_claims_to_span_disks_is_data() -> None:
    locator = b"PK\6\7" + struct.pack("<LQL", 1, 0, 7)
    end = b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    data = b"some text" + bytes(100) + locator + end
    assert opened(data) == [Part("attachment", "", data)]


# Encryption


def test_an_encrypted_member_is_a_mark_and_its_name_is_still_seen() -> None:
    found = opened(encrypted(zipped(("a.pdf.exe", b"secret"))))
    assert contents(found) == {"a.pdf.exe": b""}
    assert [set(part.marks) for part in found] == [set(), {Mark.ENCRYPTED}]


@pytest.mark.parametrize("where", ["local", "central"])
def test_a_flag_of_encryption_in_one_place_only_hides_nothing(where: str) -> None:
    archive = encrypted(zipped(("a", b"alpha")), local=where == "local", central=where == "central")
    found = opened(archive)
    assert contents(found) == {"a": b"alpha"}
    assert marks(found) == {Mark.ENCRYPTED}


def test_encryption_is_seen_without_a_directory() -> None:
    archive = encrypted(zipped(("a", b"alpha")))
    assert marks(opened(archive[: archive.index(b"PK\1\2")])) == {Mark.ENCRYPTED, Mark.BROKEN}


# Tar


def test_devices_links_and_folders_in_a_tar_hold_nothing() -> None:
    kinds = [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE]
    found = opened(tarred(("a", b"alpha"), kinds=[*kinds, tarfile.DIRTYPE]))
    assert contents(found) == {"a": b"alpha"}
    assert not marks(found)
    assert marks(opened(tarred(kinds=kinds), ScanLimits(members=4))) == {Mark.BOMB}


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_in_a_tar_are_whole(form: int) -> None:
    name = "folder/" * 15 + "invoice.pdf.exe"
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as file:
        file.addfile(tarfile.TarInfo(name))
        file.addfile(tarfile.TarInfo("short"))
    assert list(contents(opened(out.getvalue()))) == [name, "short"]


@pytest.mark.parametrize(
    "size", [b"\x80" + b"\x7f" * 11, b"\xff" * 12, b"77777777777\0", b"garbage!!!!\0"]
)
def test_a_tar_with_a_lying_size_is_read_to_its_end(size: bytes) -> None:
    block = bytearray(tarred(("a", b"x" * 100)))
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    found = opened(bytes(block))
    assert found[-1].data == bytes(block)
    assert len(found) <= 2


# Anything


@given(
    st.binary(max_size=600), st.sampled_from([b"", b"PK\3\4", b"PK\5\6", b"\x1f\x8b\x08", b"BZh9"])
)
def test_any_bytes_are_opened_without_an_error(data: bytes, magic: bytes) -> None:
    assert opened(magic + data)[-1].data == magic + data


SAMPLES = [
    zipped(("a", b"alpha" * 50), ("b", zipped(("c", b"gamma")))),
    zipped(("a", b"alpha" * 50), method=zipfile.ZIP_STORED),
    tarred(("a", b"alpha" * 50), ("b", b"beta")),
    gzipped(tarred(("a", b"alpha" * 50))),
    lzma.compress(b"alpha" * 50),
    bz2.compress(b"alpha" * 50),
]


@given(
    st.sampled_from(SAMPLES),
    st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=8),
    st.integers(0, 1 << 16),
)
def test_any_damage_to_an_archive_is_survived_and_bounded(
    sample: bytes, changes: list[tuple[int, int]], length: int
) -> None:
    damaged = bytearray(sample)
    for at, value in changes:
        damaged[at % len(damaged)] = value
    damaged = damaged[: length % len(damaged) + 1]
    limits = ScanLimits(opened=100_000, members=50)
    found = opened(bytes(damaged), limits)
    assert found[-1].data == bytes(damaged)
    assert sum(len(part.data) for part in found[:-1]) <= limits.opened + limits.members
