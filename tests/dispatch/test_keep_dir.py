"""Copies of poison messages: their text, their quota, and files that are left incomplete."""

from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path

import pytest

from sharded_milter.dispatch.keep_dir import ABANDONED_AFTER, PARTIAL, KeepDir, as_eml
from sharded_milter.protocol.commands import Body, Data, Eoh, Eom, Header, Macro, Mail, Rcpt
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.replies import Reject

MESSAGE: list[Packet] = [
    Macro("M", (("i", "4F1"),)),
    Mail("<a@x>", ("SIZE=10",)),
    Rcpt("<b@x>"),
    Rcpt("<c@x>"),
    Reject(),
    Data(),
    Header("Subject", " hi\n\tthere"),
    Header("X", "no blank"),
    Eoh(),
    Body(b"one\r\n"),
    Eom(b"two\r\n"),
]


def packed(*packets: Packet) -> memoryview:
    return memoryview(b"".join(packet.encode() for packet in packets))


def test_a_copy_is_a_mail_with_its_envelope() -> None:
    assert b"".join(as_eml(packed(*MESSAGE))) == (
        b"X-Envelope-Sender: <a@x>\r\n"
        b"X-Envelope-Recipient: <b@x>\r\n"
        b"X-Envelope-Recipient: <c@x>\r\n"
        b"Subject: hi\r\n\tthere\r\n"
        b"X: no blank\r\n"
        b"\r\n"
        b"one\r\ntwo\r\n"
    )


def test_copies_are_for_the_operator_only(tmp_path: Path) -> None:
    path = KeepDir(tmp_path, 1000).save("name", packed(*MESSAGE))
    assert path == tmp_path / "name.eml"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_bytes() == b"".join(as_eml(packed(*MESSAGE)))


def test_copies_stay_below_the_quota(tmp_path: Path) -> None:
    size = len(b"".join(as_eml(packed(*MESSAGE))))
    (tmp_path / "folder").mkdir()
    keep = KeepDir(tmp_path, 2 * size)
    assert keep.save("one", packed(*MESSAGE))
    assert keep.save("two", packed(*MESSAGE))
    assert keep.save("three", packed(*MESSAGE)) is None
    (tmp_path / "one.eml").unlink()
    assert keep.save("three", packed(*MESSAGE))


# Copies are complete or absent


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def full(descriptor: int) -> None:
        seen.append(left(tmp_path))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        KeepDir(tmp_path, 1000).save("name", packed(*MESSAGE))
    assert seen == [[f".name.eml.{os.getpid()}{PARTIAL}"]]  # nobody takes it for a copy
    assert left(tmp_path) == []


def test_a_copy_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    real = os.fsync

    def sync(descriptor: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), "name.eml" in left(tmp_path)))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    KeepDir(tmp_path, 1000).save("name", packed(*MESSAGE))
    assert synced == [(False, False), (True, True)]


def test_a_link_in_a_copys_place_is_replaced_and_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    folder = tmp_path / "kept"
    folder.mkdir()
    partial = f".name.eml.{os.getpid()}{PARTIAL}"
    for name in ("name.eml", partial, "huge"):
        (folder / name).symlink_to(precious)
    KeepDir(folder, 1000).save("name", packed(*MESSAGE))
    assert precious.read_text() == "precious"
    assert left(folder) == ["huge", "name.eml"]
    assert not (folder / "name.eml").is_symlink()


def test_a_directory_in_a_copys_place_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "name.eml").mkdir()
    with pytest.raises(IsADirectoryError):
        KeepDir(tmp_path, 1000).save("name", packed(*MESSAGE))
    assert left(tmp_path) == ["name.eml"]


def test_what_a_killed_process_has_left_of_a_copy_goes_after_a_while(tmp_path: Path) -> None:
    for name, age in (("old", ABANDONED_AFTER + 10), ("new", 0.0)):
        path = tmp_path / f".{name}.eml.1{PARTIAL}"
        path.write_text("half")
        os.utime(path, (time.time() - age,) * 2)
    KeepDir(tmp_path, 1000).save("name", packed(*MESSAGE))
    assert left(tmp_path) == [f".new.eml.1{PARTIAL}", "name.eml"]


def test_a_file_that_goes_while_room_is_counted_takes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone:
        name = "gone"

        def stat(self, *, follow_symlinks: bool) -> os.stat_result:
            raise FileNotFoundError

    class Entries(list[Gone]):
        def __enter__(self) -> Entries:
            return self

        def __exit__(self, *exc_info: object) -> None: ...

    monkeypatch.setattr(os, "scandir", lambda folder: Entries([Gone()]))
    assert KeepDir(tmp_path, 1000).save("name", packed(*MESSAGE))
