"""MTAs that send or hold too much: each bound has its own verdict and its own counter."""

from pathlib import Path

import pytest

from sharded_milter.protocol import commands, replies
from sharded_milter.protocol.negotiation import KNOWN_ACTIONS, VERSION

from .flow import Flow, mail, word
from .server import Server, until
from .wire import GREETING, beginning, end, negotiated, opened, read, say, verdict

pytestmark = pytest.mark.integration

MB = 1 << 20


def test_a_header_without_end_costs_no_memory_and_is_answered_552(tmp_path: Path) -> None:
    with Server(tmp_path, "--max-message-size", str(2 * MB)) as server:
        with Flow(server) as flow:
            flow.wait()
            sock, before = opened(server), server.memory()
            say(sock, beginning(mail()))
            field = commands.Header("X-More", "x" * 60_000).encode()
            for _ in range(1000):
                sock.sendall(field)
            grown = server.memory() - before
            say(sock, [commands.Eom()])
            answer = verdict(sock)
            flow.wait()
            with server.client() as client:
                assert word(client.deliver(mail(size=2 * MB - 1000))) == "accept"
                assert word(client.deliver(mail(size=2 * MB))) == "552"
                assert word(client.deliver(mail())) == "accept"
        assert isinstance(answer, replies.ReplyCode)
        assert answer.text.startswith("552 5.3.4")
        assert grown < 10 * MB, f"{grown / MB:.1f} MB for a header of 60 MB"
        assert set(flow.verdicts()) == {"accept"}
        assert server.counters()["refused_too_large"] == 2


def test_above_the_bytes_in_flight_new_messages_hear_452(tmp_path: Path) -> None:
    with Server(tmp_path, "--max-inflight-bytes", str(MB)) as server:
        with server.client() as client:
            holder = opened(server)
            held = mail(size=900_000)
            say(holder, [*beginning(held), *end(held)[:-1]])
            assert word(client.deliver(mail())) == "accept"
            assert word(client.deliver(mail(size=200_000))) == "452"
            say(holder, [commands.Eom()])
            assert isinstance(verdict(holder), replies.Accept)
            assert word(client.deliver(mail(size=200_000))) == "accept"
        assert server.counters()["refused_no_room"] == 1


def test_connections_above_the_bound_hear_451_at_once(tmp_path: Path) -> None:
    with Server(tmp_path, "--max-connections", "3") as server:
        early = [server.client() for _ in range(3)]
        late = negotiated(server.socket())
        answer = verdict(late)
        assert isinstance(answer, replies.ReplyCode)
        assert answer.text.startswith("451 4.3.2")
        assert [word(client.deliver(mail())) for client in early] == ["accept"] * 3
        late.close()
        early.pop().close()
        until(lambda: takes_one_more(server), "there is room again")
        assert server.counters()["overload_connections"] >= 1


def takes_one_more(server: Server) -> bool:
    with server.client() as client:
        return word(client.deliver(mail())) == "accept"


def test_an_mta_that_does_not_read_is_not_read_either(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        sock, before = server.socket(), server.memory()
        # An MTA that knows no flags waits for an answer to everything; here the master gives it.
        say(sock, [commands.Negotiate(VERSION, KNOWN_ACTIONS, 0)])
        say(sock, GREETING)
        for _ in range(3):
            read(sock)
        sock.setblocking(False)
        sent, hello = 0, commands.Helo("x").encode() * 1000
        stuck = 0
        while stuck < 50 and sent < 200 * MB:
            try:
                sent += sock.send(hello)
                stuck = 0
            except BlockingIOError:
                stuck += 1
                server.descriptors()  # takes a moment
        grown = server.memory() - before
        print(f"{sent / MB:.1f} MB of commands taken, {grown / MB:.1f} MB more memory")
        assert stuck == 50, "it was read for ever"
        assert grown < 10 * MB
        sock.settimeout(30)
        received = 0
        while received < sent // len(commands.Helo("x").encode()) * 5:
            received += len(sock.recv(1 << 16))
        assert server.unforeseen() == [], server.log()


def test_a_large_reply_to_a_slow_reader_arrives_whole(tmp_path: Path) -> None:
    source = """
        from sharded_milter import Accept, Milter, ReplaceBody
        milter = Milter("large")

        @milter.eom
        def eom(message):
            return Accept(ReplaceBody(b"y" * 5_000_000))
    """
    with Server(tmp_path, source=source) as server:
        sock, message = opened(server), mail()
        say(sock, [*beginning(message), *end(message)])
        with server.client() as other:
            assert word(other.deliver(mail())) == "accept"
        received = bytearray()
        while not received.endswith(replies.Accept().encode()):
            received += sock.recv(10_000)
        assert received.count(b"y") == 5_000_000
