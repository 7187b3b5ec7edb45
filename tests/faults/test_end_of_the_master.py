"""The end of the service, asked for or not: verdicts for all who wait, and nothing left behind."""

import os
import signal
from pathlib import Path

import pytest

from sharded_milter.protocol import replies

from .flow import Flow, mail, word
from .server import Server, is_running, until
from .wire import beginning, end, opened, say, scanned, verdict

pytestmark = [pytest.mark.integration, pytest.mark.each_python]


def test_the_workers_of_a_killed_master_are_gone_and_the_next_one_takes_its_socket(
    tmp_path: Path,
) -> None:
    with Server(tmp_path) as server:
        busy = scanned(server, "sleep30")
        family = server.workers()
        os.kill(server.pid, signal.SIGKILL)
        server.process.wait()
        assert len(family) == 2
        until(lambda: not any(map(is_running, family)), "they are gone", timeout=1)
        assert server.path.exists(), "a stale socket is left"
        busy.close()
        server.start()
        with Flow(server) as flow:
            flow.wait()
        assert set(flow.verdicts()) == {"accept"}
    assert not server.path.exists()


@pytest.mark.parametrize("again", [None, signal.SIGTERM, signal.SIGINT])
def test_at_the_end_all_who_wait_get_a_verdict(
    tmp_path: Path, again: signal.Signals | None
) -> None:
    grace = "2" if again is None else "60"
    with Server(tmp_path, "--graceful-timeout", grace) as server:
        idle = [opened(server) for _ in range(40)]
        midway = [opened(server) for _ in range(40)]
        for sock in midway:
            say(sock, beginning(mail()))
        waiting = [scanned(server, "sleep30") for _ in range(2)]
        for _ in range(18):
            message = mail()
            waiting.append(opened(server))
            say(waiting[-1], [*beginning(message), *end(message)])
        server.signal(signal.SIGTERM)
        server.wait_log("stopping, 100 connections are open")
        with pytest.raises(OSError, match=r"refused|No such file"):
            server.socket()
        if again is not None:
            server.signal(again)
        verdicts = [verdict(sock) for sock in waiting]
        for answer in verdicts:
            assert isinstance(answer, replies.ReplyCode)
            assert answer.text.startswith("451 4.3.2")
        for sock in (*idle, *midway):
            assert verdict(sock) is None
        server.ends()
        assert server.unforeseen() == [], server.log()


def test_within_the_grace_sessions_run_to_their_end(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        open_ones = [server.client() for _ in range(5)]
        waiting = scanned(server, "sleep1")
        server.signal(signal.SIGTERM)
        server.wait_log("stopping, 6 connections are open")
        for client in open_ones:
            assert word(client.deliver(mail())) == "accept"
            client.close()
        assert isinstance(verdict(waiting), replies.Accept)
        waiting.close()
        server.ends()
        assert not server.path.exists()
