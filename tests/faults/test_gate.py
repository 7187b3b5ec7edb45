"""At the limit of descriptors, and at the gate: who is not served hears 451, and mail flows on."""

import os
import random
import resource
import signal
import socket
import threading
from pathlib import Path
from typing import Self

import pytest
from integration.daemon import Refusal
from integration.machine import free_port

from sharded_milter.protocol import replies
from sharded_milter.testing.mta import MtaClient

from .flow import Flow, mail, word
from .server import Server, until
from .test_system_limits import Lowered
from .wire import negotiated, verdict

pytestmark = pytest.mark.integration

#: As few descriptors as a small container has: about 17 connections of MTAs beside one worker.
FEW = 60

#: The daemon with a limit of its own.
LIMITED = (
    "-c",
    "import fcntl, os, resource, runpy, sys;"
    # The tests may have so many files open that the number is above the limit.
    "at = sys.argv.index('--ready-fd') + 1; high = int(sys.argv[at]);"
    "sys.argv[at] = str(fcntl.fcntl(high, fcntl.F_DUPFD, 3)); os.close(high);"
    f"resource.setrlimit(resource.RLIMIT_NOFILE, ({FEW}, {FEW}));"
    "runpy.run_module('sharded_milter', run_name='__main__')",
)

#: A user and a group that no test runs as.
NOBODY = 4_294_967_294


class Churn:
    """Connections that come and go in silence, far more of them than there are descriptors."""

    def __init__(self, server: Server, most: int = FEW) -> None:
        self._path = str(server.path)
        self._most = most
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        held: list[socket.socket] = []
        choice = random.Random(14)
        while not self._stopping.wait(0.001):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(self._path))
            held.append(sock)
            while len(held) > self._most or (held and choice.random() < 0.3):
                held.pop(choice.randrange(len(held))).close()
        for sock in held:
            sock.close()


def crowd(server: Server) -> list[socket.socket]:
    """Silent connections that take all that there is."""
    return [server.socket() for _ in range(FEW)]


def hears_451(sock: socket.socket) -> str:
    """The text, without the code."""
    answer = verdict(negotiated(sock))
    assert isinstance(answer, replies.ReplyCode)
    code, _, text = answer.text.partition(" ")
    assert code == "451"
    return text


def test_mail_flows_while_many_come_and_go_at_the_limit(tmp_path: Path) -> None:
    with Server(tmp_path, workers=1, program=LIMITED) as server:
        before = server.descriptors()
        with Flow(server) as flow:
            flow.wait()
            with Churn(server):
                until(lambda: "refused a connection: " in server.log(), "it is full")
                flow.wait(40)
                os.kill(server.workers()[0], signal.SIGKILL)
                flow.wait(40)
        assert set(flow.verdicts()) == {"accept"}
        until(lambda: server.descriptors() <= before, "as many are open as before")
        assert "(--max-connections), because of the limit of 60 file descriptors" in server.log()
        assert server.log().count("refused a connection: ") == 1
        assert server.unforeseen() == [], server.log()


def test_large_messages_at_the_limit_have_their_own_answer(tmp_path: Path) -> None:
    with Server(tmp_path, workers=1, program=LIMITED) as server:
        before = server.descriptors()
        with Flow(server, 12, size=200_000) as flow:
            flow.wait()
            with Churn(server):
                until(lambda: "refused a connection: " in server.log(), "it is full")
                flow.wait(60)
        assert set(flow.verdicts()) <= {"accept", "452"}
        assert flow.verdicts()["accept"] >= 20
        until(lambda: server.descriptors() <= before, "as many are open as before")
        assert server.unforeseen() == [], server.log()


def test_at_the_limit_a_connection_hears_451_though_others_are_silent(tmp_path: Path) -> None:
    with Server(tmp_path, workers=1, program=LIMITED) as server, server.client() as early:
        silent = crowd(server)
        assert hears_451(server.socket()).startswith("4.3.2 ")
        assert word(early.deliver(mail())) == "accept"
        for sock in silent:
            sock.close()
        until(lambda: takes_one_more(server), "there is room again")


def takes_one_more(server: Server) -> bool:
    with server.client() as client:
        return word(client.deliver(mail())) == "accept"


def test_a_deadline_and_a_death_at_the_limit_are_as_at_any_time(tmp_path: Path) -> None:
    options = ("--eom-deadline", "6", "--retries", "0")
    with Server(tmp_path, *options, workers=1, program=LIMITED) as server:
        with server.client() as client:
            crowd(server)
            for order in ("loop", "exit3", "loop"):
                assert word(client.deliver(mail(order))) == "tempfail"
                assert word(client.deliver(mail())) == "accept"
        assert server.counters()["deadlines"] == 2
        assert server.unforeseen() == [], server.log()


def test_a_new_generation_starts_at_the_limit(tmp_path: Path) -> None:
    with Server(tmp_path, workers=2, program=LIMITED) as server, Flow(server, 2) as flow:
        flow.wait()
        crowd(server)
        assert hears_451(server.socket())
        before = server.workers()
        server.signal(signal.SIGHUP)
        until(lambda: server.is_whole() and not set(before) & set(server.workers()), "it is new")
        flow.wait()


def test_without_any_descriptor_a_spare_one_is_used_for_the_answer(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        with server.client() as early:
            with Lowered(server, resource.RLIMIT_NOFILE, server.descriptors() - 1):
                for _ in range(3):
                    assert hears_451(server.socket()).startswith("4.3.2 ")
                assert word(early.deliver(mail())) == "accept"
            until(lambda: takes_one_more(server), "there is room again")
        # None where a lower number was free.
        assert server.log().count("no file descriptor is left for a connection to") <= 1
        assert server.unforeseen() == [], server.log()


def test_a_limit_that_is_too_low_for_the_workers_is_refused_in_one_line(tmp_path: Path) -> None:
    refusal = Refusal(
        "--workers",
        "20",
        "--listen",
        f"unix:{tmp_path}/s",
        cwd=tmp_path,
        wrapper=("prlimit", f"--nofile={FEW}"),
    )
    (line,) = refusal.lines()
    assert refusal.status == os.EX_OSERR
    assert "60 file descriptors is too low for --workers 20" in line
    assert "LimitNOFILE=" in line


def test_workers_have_the_soft_limit_that_the_operator_has_set(tmp_path: Path) -> None:
    program = (LIMITED[0], LIMITED[1].replace(f"({FEW}, {FEW})", "(200, 400)"))
    with Server(tmp_path, workers=1, program=program) as server:
        (worker,) = server.workers()
        assert resource.prlimit(server.pid, resource.RLIMIT_NOFILE) == (400, 400)
        assert resource.prlimit(worker, resource.RLIMIT_NOFILE) == (200, 400)


# Who may connect


def test_users_who_are_not_named_hear_451_and_are_named_once(tmp_path: Path) -> None:
    with Server(tmp_path, "--allowed-peers", f"user:{NOBODY},192.0.2.1") as server:
        for _ in range(20):
            assert hears_451(server.socket()).startswith("4.3.5 ")
        assert server.counters()["refused_peers"] == 20
        refusals = [
            line for line in server.log().splitlines() if "refused a connection from" in line
        ]
        (line,) = refusals
        assert "user " in line
        assert f"(uid {os.geteuid()})" in line
        assert " warn " in line


@pytest.mark.parametrize("kind", ["user", "group", "networks only"])
def test_users_who_are_named_are_served(tmp_path: Path, kind: str) -> None:
    peers = {
        "user": f"user:{NOBODY},user:{os.geteuid()}",
        "group": f"group:{os.getegid()}",
        "networks only": "192.0.2.1",
    }[kind]
    with Server(tmp_path, "--allowed-peers", peers) as server:
        with server.client() as client:
            assert word(client.deliver(mail())) == "accept"
        said = [line for line in server.log().splitlines() if " warn " in line]
        assert [line for line in said if "runs as root" not in line] == []


@pytest.mark.parametrize(
    ("listen", "peers", "warns", "serves"),
    [
        ("inet:{}@127.0.0.1", "", False, True),
        ("inet:{}@0.0.0.0", "", True, True),
        ("inet:{}@0.0.0.0", "127.0.0.0/8,::1", False, True),
        ("inet:{}@0.0.0.0", "192.0.2.0/24", False, False),
        ("inet6:{}@::", "127.0.0.0/8", False, True),
        ("inet:{}@127.0.0.1", "192.0.2.0/24", False, False),
        ("inet:{}@127.0.0.1", f"user:{NOBODY}", True, True),
    ],
)
def test_hosts_are_served_that_are_in_a_network(
    tmp_path: Path, listen: str, peers: str, warns: bool, serves: bool
) -> None:
    port = free_port()
    options = ["--allowed-peers", peers] if peers else []
    with Server(tmp_path, "--listen", listen.format(port), *options) as server:
        sock = socket.create_connection(("127.0.0.1", port), timeout=30)
        if serves:
            with MtaClient(sock) as client:
                assert word(client.deliver(mail())) == "accept"
        else:
            assert hears_451(sock).startswith("4.3.5 ")
            sock.close()
            assert (
                "refused a connection from 127.0.0.1: --allowed-peers does not include it"
                in server.log()
            )
        warnings = [line for line in server.log().splitlines() if " warn  inet" in line]
        assert len(warnings) == warns
        assert all("--allowed-peers" in line for line in warnings)
