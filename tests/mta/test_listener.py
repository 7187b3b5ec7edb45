"""Listening sockets: who is served, and who may take a place that is taken."""

from __future__ import annotations

import errno
import grp
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from one_listener import OpenGate, Reactor
from twisted.internet.address import IPv4Address, UNIXAddress
from twisted.internet.protocol import Factory
from twisted.logger import capturedLogs

from sharded_milter.errors import ConfigError, NotPermitted, SocketTaken, SystemRefused
from sharded_milter.mta.addresses import ListenAddress, parse_listen
from sharded_milter.mta.listener import Listener

LOCAL = parse_listen("inet:0@127.0.0.1")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "milter.sock")


@pytest.fixture
def listeners() -> Iterator[list[Listener]]:
    """The listeners that the test opens; closed after it."""
    opened: list[Listener] = []
    yield opened
    for listener in opened:
        listener.close()


def serving(listeners: list[Listener], address: ListenAddress) -> tuple[Listener, Reactor]:
    """A listener that is served, and closed after the test; its acceptor is the one reader."""
    listener, reactor = Listener(address, 0o600, ""), Reactor()
    listeners.append(listener)
    listener.serve(reactor.connections, OpenGate(), reactor)
    return listener, reactor


@pytest.mark.parametrize("kind", ["inet", "unix"])
def test_what_connects_is_given_to_the_factory(
    kind: str, path: str, listeners: list[Listener]
) -> None:
    address = LOCAL if kind == "inet" else parse_listen(path)
    listener, reactor = serving(listeners, address)
    reactor.clients(listener, 2)
    reactor.read()
    reactor.hang_up()
    expected = IPv4Address if kind == "inet" else UNIXAddress
    assert [type(peer) for peer in reactor.connections.peers] == [expected] * 2
    assert (listener.port > 0) == (kind == "inet")
    assert listener.host == ("127.0.0.1" if kind == "inet" else "")


def test_a_listener_that_is_closed_takes_no_more(path: str, listeners: list[Listener]) -> None:
    listener, reactor = serving(listeners, parse_listen(path))
    listener.close()
    assert reactor.readers == set()
    assert not os.path.exists(path)


# Paths


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666, 0o777])
def test_a_unix_socket_has_the_mode_that_was_asked_for(mode: int, path: str) -> None:
    before = os.umask(0o027)
    os.umask(before)
    listener = Listener(parse_listen(path), mode, "")
    assert stat.S_IMODE(os.stat(path).st_mode) == mode
    listener.close()
    after = os.umask(before)
    assert after == before


def test_a_unix_socket_has_the_group_that_was_asked_for(path: str) -> None:
    gid = max(os.getgroups()) if os.getuid() else max(group.gr_gid for group in grp.getgrall())
    listener = Listener(parse_listen(path), 0o660, grp.getgrgid(gid).gr_name)
    assert os.stat(path).st_gid == gid
    listener.close()


def test_a_group_may_be_a_number(path: str) -> None:
    listener = Listener(parse_listen(path), 0o660, str(os.getgid()))
    assert os.stat(path).st_gid == os.getgid()
    listener.close()


def test_a_path_that_may_not_be_removed_stays_with_a_line_that_says_so(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    listener = Listener(parse_listen(path), 0o660, "")
    monkeypatch.setattr(os, "unlink", refuse)
    with capturedLogs() as events:
        listener.close()
        listener.close()
    assert [event["log_format"].format(**event) for event in events] == [
        f"cannot remove {path}: Permission denied; the next start replaces it"
    ]
    monkeypatch.undo()
    Listener(parse_listen(path), 0o660, "").close()


# Directories of somebody else


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A file that only its owner may read."""
    file = tmp_path / "precious"
    file.write_text("precious")
    file.chmod(0o600)
    return file


def on_bind(monkeypatch: pytest.MonkeyPatch, act: Any) -> None:
    """The action of another process between bind and the next call."""

    class Watched(socket.socket):
        def bind(self, where: Any) -> None:
            super().bind(where)
            act(where)

    monkeypatch.setattr(socket, "socket", Watched)


def replaced_by(target: Path) -> Any:
    """Moves the socket away and puts a link in its place."""

    def act(path: str) -> None:
        os.rename(path, f"{path}.moved")
        os.symlink(target, path)

    return act


def unchanged(file: Path) -> bool:
    found = file.lstat()
    return (stat.S_IMODE(found.st_mode), found.st_gid) == (0o600, os.getgid())


def test_no_other_file_gets_the_mode_of_a_socket_that_was_moved(
    path: str, precious: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_bind(monkeypatch, replaced_by(precious))
    with pytest.raises(SocketTaken):
        Listener(parse_listen(path), 0o666, str(os.getgid()))
    assert unchanged(precious)
    assert os.readlink(path) == str(precious)  # which is not ours to remove


def test_no_other_file_gets_the_group_of_a_socket_that_was_moved(
    path: str, precious: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def chown(where: str, uid: int, gid: int) -> None:
        replaced_by(precious)(path)
        given.append((os.stat(where).st_ino, os.stat(f"{path}.moved").st_ino))

    monkeypatch.setattr(os, "chown", chown)
    listener = Listener(parse_listen(path), 0o666, str(os.getgid()))
    [(given_to, moved)] = given
    assert given_to == moved
    assert unchanged(precious)
    with pytest.raises(SocketTaken):
        listener.serve(Factory(), OpenGate(), Reactor())
    listener.close()
    assert os.path.islink(path)


def test_a_socket_has_its_mode_from_the_first_moment_on(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    on_bind(monkeypatch, lambda path: modes.append(stat.S_IMODE(os.stat(path).st_mode)))
    Listener(parse_listen(path), 0o640, "").close()
    assert modes == [0o640]


def test_a_directory_whose_default_is_another_mode_does_not_change_it(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_bind(monkeypatch, lambda path: os.chmod(path, 0o777))  # a default ACL does that
    listener = Listener(parse_listen(path), 0o600, "")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    listener.close()


def test_a_socket_of_another_user_in_its_place_is_left_alone(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(SocketTaken):
        Listener(parse_listen(path), 0o666, "")
    assert os.path.exists(path)


@pytest.mark.parametrize("after", ["file", "nothing"])
def test_what_takes_the_place_of_a_stale_socket_is_not_removed(
    after: str, path: str, precious: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watched(socket.socket):
        def connect(self, where: Any) -> None:
            os.rename(path, f"{path}.moved")
            if after == "file":
                os.rename(precious, path)
            super().connect(where)

    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    monkeypatch.setattr(socket, "socket", Watched)
    with pytest.raises(SocketTaken):
        Listener(parse_listen(path), 0o660, "")
    assert os.path.exists(f"{path}.moved")
    assert (Path(path).read_text() == "precious") if after == "file" else precious.exists()


def test_a_path_is_removed_from_the_directory_that_it_was_made_in(tmp_path: Path) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    listener = Listener(parse_listen(f"{folder}/s"), 0o660, "")
    (other / "s").write_text("precious")
    folder.rename(tmp_path / "moved")
    folder.symlink_to(other)
    listener.close()
    assert (other / "s").read_text() == "precious"
    assert list((tmp_path / "moved").iterdir()) == []


def test_a_closed_listener_keeps_no_descriptor(path: str) -> None:
    before = os.listdir("/proc/self/fd")
    Listener(parse_listen(path), 0o660, "").close()
    with pytest.raises(ConfigError):
        Listener(parse_listen(f"{path}/none"), 0o660, "")
    assert os.listdir("/proc/self/fd") == before


def test_an_unknown_group_is_named(path: str) -> None:
    with pytest.raises(ConfigError, match="'no-such-group': there is no such group"):
        Listener(parse_listen(path), 0o660, "no-such-group")
    assert not os.path.exists(path)


@pytest.mark.parametrize("number", ["4294967295", "99999999999"])
def test_a_number_that_no_group_can_have_is_refused(number: str, path: str) -> None:
    with pytest.raises(ConfigError, match=f"'{number}': the highest number is 4294967294"):
        Listener(parse_listen(path), 0o660, number)
    assert not os.path.exists(path)


def test_a_group_that_may_not_be_given_is_a_matter_of_rights(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)
    group = grp.getgrgid(os.getgid()).gr_name
    with pytest.raises(NotPermitted, match="Operation not permitted") as caught:
        Listener(parse_listen(path), 0o660, group)
    assert f"to --socket-group '{group}'; make " in str(caught.value)
    assert "a member of that group, or start as root with --user " in str(caught.value)
    assert not os.path.lexists(path)


def test_a_socket_on_which_no_process_listens_is_replaced(
    path: str, listeners: list[Listener]
) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
        dead.listen()
    listener, reactor = serving(listeners, parse_listen(path))
    reactor.clients(listener, 1)
    reactor.read()
    reactor.hang_up()
    assert len(reactor.connections) == 1


@pytest.mark.parametrize("busy", [False, True], ids=["accepting", "full"])
def test_a_socket_that_somebody_serves_is_taken(path: str, busy: bool) -> None:
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as client:
        other.bind(path)
        other.listen(0 if busy else 5)
        if busy:
            client.connect(path)
        with pytest.raises(SocketTaken, match="another process listens there"):
            Listener(parse_listen(path), 0o660, "")
        assert os.path.exists(path)


@pytest.mark.parametrize("what", ["file", "directory", "link", "dangling link"])
def test_what_is_no_socket_stays_as_it_is(what: str, path: str, tmp_path: Path) -> None:
    place = Path(path)
    match what:
        case "file":
            place.write_text("precious")
        case "directory":
            place.mkdir()
        case "link":
            (tmp_path / "other").write_text("precious")
            place.symlink_to(tmp_path / "other")
        case _:
            place.symlink_to(tmp_path / "none")
    with pytest.raises(ConfigError, match="it exists and is not a socket"):
        Listener(parse_listen(path), 0o660, "")
    assert os.path.lexists(path)


def test_a_place_that_is_taken_between_start_and_ready_is_left_to_the_other(path: str) -> None:
    first = Listener(parse_listen(path), 0o660, "")
    second, _ = serving([], parse_listen(path))
    with pytest.raises(SocketTaken):
        first.serve(Factory(), OpenGate(), Reactor())
    first.close()
    assert os.path.exists(path)
    second.close()
    assert not os.path.exists(path)


def test_a_path_that_is_gone_already_is_no_trouble(path: str) -> None:
    listener = Listener(parse_listen(path), 0o660, "")
    os.unlink(path)
    listener.close()
    listener.close()


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"/none is not an existing directory"):
        Listener(parse_listen(f"{tmp_path}/none/x"), 0o660, "")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"/file is not an existing directory"):
        Listener(parse_listen(f"{tmp_path}/file/x"), 0o660, "")


def test_a_path_that_is_too_long_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the path is too long for a socket"):
        Listener(parse_listen(f"{tmp_path}/{'x' * 200}"), 0o660, "")


# Ports


def test_a_port_that_is_taken_is_said_to_be(listeners: list[Listener]) -> None:
    first, _ = serving(listeners, LOCAL)
    spec = f"inet:{first.port}@127.0.0.1"
    with pytest.raises(SocketTaken, match=f"cannot listen on {spec}: another process"):
        Listener(parse_listen(spec), 0o660, "")


def test_an_address_of_another_machine_is_said_to_be() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1 is not an address of this machine"):
        Listener(parse_listen("inet:0@192.0.2.1"), 0o660, "")


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 300, "127.0.0.1.5"])
def test_a_host_that_does_not_exist_is_said_to_be(host: str) -> None:
    with pytest.raises(ConfigError, match=f"host '{host}'"):
        Listener(parse_listen(f"inet:0@{host}"), 0o660, "")


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EACCES, NotPermitted), (errno.EPERM, NotPermitted), (errno.ENOBUFS, SystemRefused)],
)
def test_other_refusals_are_the_systems(
    number: int, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(socket.socket):
        def bind(self, where: object) -> None:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket, "socket", Refusing)
    with pytest.raises(kind, match=f"cannot listen on {LOCAL.spec}: {os.strerror(number)}"):
        Listener(LOCAL, 0o660, "")


def test_a_socket_that_may_not_listen_is_the_systems_refusal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Refusing(socket.socket):
        def listen(self, backlog: int = 0) -> None:
            raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket, "socket", Refusing)
    listener = Listener(LOCAL, 0o660, "")
    with pytest.raises(NotPermitted):
        listener.serve(Factory(), OpenGate(), Reactor())
    listener.close()
