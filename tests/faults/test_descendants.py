"""What milters start and leave running: it ends with its worker, and with nothing else."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from .flow import Background, Flow, mail, word
from .milters import OBEDIENT
from .server import Server, is_running, until
from .wire import scanned

pytestmark = [pytest.mark.integration, pytest.mark.each_python]

#: A milter that leaves programs in sessions of their own before it does what it is told to.
LEAVING = (
    OBEDIENT
    + """
    def leave(*command):
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                 stderr=subprocess.DEVNULL, start_new_session=True, env={})
        print("grandchild", int(child.stdout.readline()), flush=True)

    def leaving(act):
        def leave_and_act():
            leave("/bin/sh", "-c", "echo $$; exec sleep 600 >/dev/null")
            leave("/bin/sh", "-c", "setsid sh -c 'echo $$; setsid sleep 600 >/dev/null &"
                  " exec sleep 600 >/dev/null' &")
            act()
        return leave_and_act

    for name, act in list(ACTS.items()):
        ACTS["leave-" + name] = leaving(act)
    ACTS["leave-nothing"] = leaving(lambda: None)
"""
)


@pytest.mark.parametrize("way", ["exit", "segfault", "loop"])
def test_daemons_end_with_their_worker_however_that_ends(tmp_path: Path, way: str) -> None:
    with Server(tmp_path, "--retries", "0", "--eom-deadline", "3", source=LEAVING) as server:
        before = server.descriptors()
        with Flow(server) as flow:
            assert Background(server, mail(f"leave-{way}")).word() == "tempfail"
            flow.wait()
        assert set(flow.verdicts()) == {"accept"}, flow.verdicts()
        pids = server.grandchildren()
        assert len(pids) == 2
        until(lambda: not any(map(psutil.pid_exists, pids)), "the daemons are gone, and reaped")
        until(server.is_whole, "two workers run, and nothing else")
        until(lambda: server.descriptors() <= before, "no descriptor is left")
        assert len(psutil.Process(server.pid).children(recursive=True)) == 2
        assert server.unforeseen() == [], server.log()


def test_daemons_of_workers_that_live_are_left_alone_and_end_with_the_service(
    tmp_path: Path,
) -> None:
    with Server(tmp_path, source=LEAVING) as server:
        with server.client() as client:
            assert word(client.deliver(mail("leave-nothing"))) == "accept"
        pids = server.grandchildren()
        with Flow(server) as flow:
            flow.wait(50)
        assert all(map(is_running, pids))
    assert not any(map(is_running, pids))


def test_recycling_ends_the_daemons_of_the_worker_that_leaves(tmp_path: Path) -> None:
    with Server(tmp_path, "--max-messages", "5", workers=1, source=LEAVING) as server:
        with server.client() as client:
            assert word(client.deliver(mail("leave-nothing"))) == "accept"
        pids = server.grandchildren()
        with Flow(server) as flow:
            until(lambda: "is replaced: it has given" in server.log(), "it is recycled")
            until(lambda: not any(map(is_running, pids)), "its daemons are gone")
        assert set(flow.verdicts()) == {"accept"}, flow.verdicts()


def test_as_the_first_process_the_master_reaps_and_ends_what_is_left(tmp_path: Path) -> None:
    """As in a container, in a namespace of process ids."""
    wrapper = "import os, sys; os.execvp('unshare', ['unshare', '--pid', '--fork',\
 '--mount-proc', '--kill-child', sys.executable, '-m', 'sharded_milter', *sys.argv[1:]])"
    options = ["--retries", "0"]
    server = Server(tmp_path, *options, source=LEAVING, program=("-c", wrapper))
    server.start()
    try:
        [master] = psutil.Process(server.pid).children()
        for way in ("exit", "segfault"):
            assert Background(server, mail(f"leave-{way}")).word() == "tempfail"
        until(
            lambda: (
                len(master.children(recursive=True)) == 2
                and all(child.status() != psutil.STATUS_ZOMBIE for child in master.children())
            ),
            "two workers run, and nothing else",
        )
        with server.client() as client:
            assert word(client.deliver(mail())) == "accept"
        master.terminate()
        assert server.process.wait(60) == 0, server.log()
        assert server.unforeseen() == [], server.log()
    finally:
        server.kill()


def test_a_milter_in_the_master_keeps_what_it_has_started(tmp_path: Path) -> None:
    (tmp_path / "light.py").write_text(
        "import subprocess\n"
        "from sharded_milter import Milter\n"
        "milter = Milter('light')\n"
        "child = subprocess.Popen(['sh', '-c', 'setsid sleep 600 & echo $!; exec sleep 600'],\n"
        "                         stdout=subprocess.PIPE)\n"
        "print('the grandchild', int(child.stdout.readline()), flush=True)\n"
        "print('the grandchild', child.pid, flush=True)\n"
        "@milter.helo\n"
        "def helo(hello): return None\n"
    )
    options = ["--in-master", "./light.py:milter", "--retries", "0"]
    with Server(tmp_path, *options, source=LEAVING) as server:
        mine = server.grandchildren()
        assert len(mine) == 2
        assert Background(server, mail("leave-exit")).word() == "tempfail"
        others = [pid for pid in server.grandchildren() if pid not in mine]
        until(lambda: not any(map(is_running, others)), "the worker's daemons are gone")
        assert all(map(is_running, mine))
        for pid in mine:
            psutil.Process(pid).kill()
        assert scanned(server, "mail") is not None
