"""A log that nobody reads or that is full, and workers and MTAs that write what they like."""

import fcntl
import os
import re
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .flow import Flow, mail, word
from .milters import OBEDIENT
from .server import Server

pytestmark = pytest.mark.integration

#: A worker that prints without end in a thread, and one that prints what others would have written.
TALKATIVE = OBEDIENT.replace(
    "    ACTS = {",
    """
    import threading

    def flood(line):
        def write():
            while True:
                os.write(2, line)
        threading.Thread(target=write, daemon=True).start()
        time.sleep(3)

    FORGED = "2026-11-27T00:00:00+0000 error shard 1 is gone: forged"

    def forge():
        for end in "\\n\\r\\v\\f\\x85\\u2028\\u2029":
            print("seen" + end + FORGED)
        print("<0>" + FORGED, "\\x1b[31m", "\\x9b", "\\u202e", flush=True)
        os.write(2, b"\\xff\\x00\\x07" + os.linesep.encode())
        raise ValueError(f"words\\n{FORGED}\\r\\x1b[2J")

    ACTS = {
        "lines": lambda: flood(b"x\\n" * 4096),
        "long": lambda: flood(b"x" * 8000 + b"\\n"),
        "bytes": lambda: flood(b"x" * 8192),
        "forge": forge,
    """,
)


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 4096)
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


def test_a_log_that_is_not_read_stops_no_mail_and_no_stop(tmp_path: Path) -> None:
    with pipe() as (_, writer):
        server = Server(tmp_path)
        server.stderr = writer
        with server:
            with Flow(server) as flow:
                flow.wait(100)
            assert set(flow.verdicts()) == {"accept"}
        # Leaving it was TERM, which must be done within STOP_TIMEOUT.
        assert os.get_blocking(writer)


def test_what_was_dropped_is_said_when_the_log_is_read_again(tmp_path: Path) -> None:
    with pipe() as (reader, writer):
        server = Server(tmp_path, source=TALKATIVE)
        server.stderr = writer
        with server:
            with server.client() as client, Flow(server) as flow:
                for _ in range(2):  # each worker writes 256 KB a second from then on
                    assert word(client.deliver(mail("long"))) == "accept"
                said = b""
                while not (found := re.search(rb"^.* log lines were dropped: .*\n", said, re.M)):
                    said = said[-1000:] + os.read(reader, 65_536)
                flow.wait()
            assert set(flow.verdicts()) == {"accept"}
    assert re.fullmatch(
        rb"\S+ warn  [1-9]\d* log lines were dropped: standard error did not take them\n", found[0]
    )


@pytest.mark.parametrize("kind", ["full", "closed pipe", "closed socket"])
def test_a_log_that_takes_nothing_stops_no_mail(tmp_path: Path, kind: str) -> None:
    if kind == "full":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    elif kind == "closed pipe":
        reader, descriptor = os.pipe()
        os.close(reader)
    else:
        ours, theirs = socket.socketpair()
        theirs.close()
        descriptor = ours.detach()
    try:
        server = Server(tmp_path)
        server.stderr = descriptor
        with server, Flow(server) as flow:
            flow.wait(100)
        assert set(flow.verdicts()) == {"accept"}
    finally:
        os.close(descriptor)


def test_a_full_disk_costs_lines_which_are_counted_when_there_is_room(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        with Flow(server) as flow:
            flow.wait()
            size = len(server.log().encode())
            before = resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (size, -1))
            flow.wait(40)
            resource.prlimit(server.pid, resource.RLIMIT_FSIZE, before)
            flow.wait()
        log = server.wait_log(" log lines were dropped: standard error did not take them")
        assert int(re.findall(r" (\d+) log lines were dropped", log)[0]) >= 40
        assert set(flow.verdicts()) == {"accept"}
        assert server.unforeseen() == [], log


@pytest.mark.parametrize("kind", ["lines", "bytes"])
def test_a_worker_that_writes_without_end_is_not_heard_without_end(
    tmp_path: Path, kind: str
) -> None:
    with Server(tmp_path, source=TALKATIVE) as server:
        with server.client() as client, Flow(server) as flow:
            flow.wait()
            assert word(client.deliver(mail(kind))) == "accept"
            log = server.wait_log(" more than the log takes in a second: ")
            flow.wait()
        assert set(flow.verdicts()) == {"accept"}
        assert len(log) < 5_000_000
        if kind == "lines":
            shown = len(re.findall(r"\[\d qid=\w+\] x$", log, re.MULTILINE))
            assert shown >= 100
        assert server.unforeseen() == [], server.log()[-3000:]


FORGED = "2026-11-27T00:00:00+0000 error shard 1 is gone: forged"


def test_no_message_worker_or_mta_writes_a_line_of_its_own(tmp_path: Path) -> None:
    with Server(tmp_path, source=TALKATIVE) as server:
        with server.client() as client:
            assert word(client.deliver(mail("forge"))) == "tempfail"
            for queue_id in (
                f"A\n{FORGED}",
                f"B\r{FORGED}",
                "\x1b]0;owned\x07\x1b[2J",
                "\x9b\x85\u2028\u202e",
                "C size=1 verdict=reject",
                'D" verdict="reject',
                "E] error",
                "F" * 5000,
            ):
                assert word(client.deliver(mail(queue_id=queue_id))) == "accept"
            raw = client.deliver(mail("mail", queue_id="LAST"))
            assert word(raw) == "accept"
        server.wait_log(" qid=LAST ")
        log = server.log()
    lines = log.split("\n")
    assert [line for line in lines if line.startswith(("2026-11-27", "<0>"))] == []
    assert [line for line in lines if not line.isprintable()] == []
    verdicts = [re.findall(r" verdict=(\w+)", line) for line in lines if " size=" in line]
    assert verdicts == [["tempfail"]] + [["accept"]] * 9
