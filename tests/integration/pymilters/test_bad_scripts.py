"""Scripts that never come to serve: one line names the script and what it did, exit 78."""

import os
from pathlib import Path

import pytest

from sharded_milter.workers.pymilter_script import DEBIANS

from ..daemon import Daemon, Refusal
from ..milter_client import MilterClient
from .scripts import Environment

pytestmark = pytest.mark.integration

FACTORY = """
import os, sys, threading
import Milter

class Mine(Milter.Base):
    def eom(self):
        self.addheader("X-Seen", "yes")
        return Milter.CONTINUE

Milter.factory = Mine
"""
RUN = FACTORY + "Milter.runmilter('mine', 'unix:' + os.path.abspath('milter.sock'), 60)\n"

BAD = {
    "raises": (FACTORY + "1 / 0", "has raised ZeroDivisionError: division by zero"),
    "is no Python": ("import Milter\nclass:", "has raised SyntaxError: "),
    "ends": (FACTORY, "has ended without calling Milter.runmilter()"),
    "exits": (FACTORY + "sys.exit(3)", "has called sys.exit(3) before Milter.runmilter()"),
    "exits with a word": (FACTORY + "sys.exit('no socket')", "has called sys.exit('no socket')"),
    "exits well": (FACTORY + "sys.exit()", "has called sys.exit(None) before"),
    "sets two factories": (
        FACTORY + "class Other(Mine): pass\nMilter.factory = Other\n" + RUN[len(FACTORY) :],
        "has set Milter.factory to <class '__main__.Mine'> and <class '__main__.Other'>; there is"
        " one factory for all connections",
    ),
    "has a socket that is none": (
        FACTORY + "Milter.runmilter('mine', 'pigeon:coo', 60)",
        "has raised milter.error: cannot opensocket",
    ),
    "cannot build its milter": (
        RUN.replace("def eom", "def __init__(self, what):\n        pass\n    def eom"),
        "negotiate() has failed: TypeError: Mine.__init__() missing 1 required positional",
    ),
    "refuses to negotiate": (
        RUN.replace(
            "def eom", "def negotiate(self, opts):\n        return Milter.REJECT\n    def eom"
        ),
        "negotiate() has failed: InvalidVerdict: negotiate returned 1, not CONTINUE",
    ),
    "asks for too much": (
        RUN.replace(
            "def eom",
            "def negotiate(self, opts):\n        opts[0] = 512\n        return 0\n    def eom",
        ),
        "negotiate() has failed: InvalidVerdict: negotiate requests actions 0x200",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_script_that_does_not_serve(name: str, environment: Environment, tmp_path: Path) -> None:
    source, why = BAD[name]
    (tmp_path / "mine.py").write_text(source)
    refusal = Refusal(
        "--workers", "1", "--pymilter", "mine.py", cwd=tmp_path, python=str(environment.python)
    )
    assert refusal.status == os.EX_CONFIG, refusal
    last = refusal.lines()[-1]
    assert last.startswith("sharded-milter: pymilter script mine.py"), refusal
    assert why in last, refusal
    if "raise" in name:
        assert 'File "mine.py", line 11, in <module>' in refusal.stderr, refusal
        assert "runpy" not in refusal.stderr


def test_a_script_that_is_not_there(environment: Environment, tmp_path: Path) -> None:
    refusal = Refusal("--pymilter", "mine.py", cwd=tmp_path, python=str(environment.python))
    assert refusal.status == os.EX_CONFIG, refusal
    [*_, last] = refusal.lines()
    assert last == "sharded-milter: pymilter script mine.py does not exist"


@pytest.mark.skipif(not os.path.isdir(f"{DEBIANS}/Milter"), reason="needs python3-milter")
def test_debians_pymilter_is_found_from_a_virtual_environment(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(RUN)
    daemon = Daemon("--workers", "1", "--pymilter", "mine.py", cwd=tmp_path)
    with daemon, MilterClient(tmp_path / "milter.sock") as client:
        client.negotiate()
        assert client.message(b"hello")[0] == (b"h", b"X-Seen\0yes\0")


def served(environment: Environment, folder: Path, source: str, *options: str) -> tuple[str, bool]:
    """The log of one run, and whether the milter does its job where it is looked for."""
    (folder / "mine.py").write_text(source)
    daemon = Daemon(
        *("--workers", "1", *options, "--pymilter", "mine.py"),
        cwd=folder,
        python=str(environment.python),
    )
    with daemon, MilterClient(folder / "milter.sock") as client:
        client.negotiate()
        change, _ = client.message(b"hello")
    return daemon.log(), change == (b"h", b"X-Seen\0yes\0")


def test_code_behind_runmilter_runs(environment: Environment, tmp_path: Path) -> None:
    source = RUN + "print('all is over', threading.active_count())"
    log, good = served(environment, tmp_path, source)
    assert good
    assert "] all is over 1\n" in log


def test_a_daemon_of_old(environment: Environment, tmp_path: Path) -> None:
    """It forks twice, leaves everything behind it, and has a pid file that it removes."""
    begin = """
import signal
for _ in range(2):
    if os.fork():
        os._exit(0)
    os.setsid()
os.umask(0)
os.closerange(0, 1024)
for fd in range(20):
    try:
        os.close(fd)
    except OSError:
        pass
null = os.open(os.devnull, os.O_RDWR)
for fd in range(3):
    os.dup2(null, fd)
pid_file = "/nowhere/mine.pid"
assert not os.path.exists(pid_file)
with open(pid_file, "w") as file:
    file.write(str(os.getpid()))
os.chmod(pid_file, 0o600)
os.setgroups([])
os.setgid(12345)
os.setuid(12345)
signal.signal(signal.SIGTERM, lambda *_: print("a signal"))
"""
    source = FACTORY + begin + RUN[len(FACTORY) :] + "os.remove(pid_file)\nprint(os.getuid())\n"
    log, good = served(environment, tmp_path, source)
    assert good
    calls = ("os.fork()", "os.setsid()", "os.umask()", "os.setgroups()", "os.setuid()")
    streams = ("closing of inherited descriptors", "redirecting of standard streams")
    for name in (*calls, *streams, "pid file /nowhere/mine.pid", "the handler of SIGTERM"):
        assert log.count(f"mine.py: {name} is ignored: ") == 1, (name, log)
    assert f"] {os.getuid()}\n" in log
    assert "a signal" not in log


def test_listen_overrules_the_scripts_socket(environment: Environment, tmp_path: Path) -> None:
    source = RUN.replace("milter.sock", "elsewhere.sock")
    _, good = served(environment, tmp_path, source, "--listen", f"unix:{tmp_path}/milter.sock")
    assert good
    assert not (tmp_path / "elsewhere.sock").exists()


def test_an_inherited_socket_is_the_masters_business(
    environment: Environment, tmp_path: Path
) -> None:
    source = FACTORY + "Milter.runmilter('mine', 'fd:3', 60)"
    _, good = served(environment, tmp_path, source, "--listen", f"unix:{tmp_path}/milter.sock")
    assert good


def test_a_socket_that_cannot_be_opened(environment: Environment, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(RUN.replace("milter.sock", "nowhere/milter.sock"))
    refusal = Refusal(
        "--workers", "1", "--pymilter", "mine.py", cwd=tmp_path, python=str(environment.python)
    )
    assert refusal.status == os.EX_CONFIG, refusal
    assert "nowhere is not an existing directory" in refusal.lines()[-1]


def test_a_script_may_stop_itself(environment: Environment, tmp_path: Path) -> None:
    """The worker ends well and another takes its place."""
    source = RUN.replace(
        "        return Milter.CONTINUE", "        Milter.stop()\n        return Milter.CONTINUE"
    )
    (tmp_path / "mine.py").write_text(source + "print('stopped', flush=True)\n")
    daemon = Daemon(
        *("--workers", "1", "--pymilter", "mine.py"), cwd=tmp_path, python=str(environment.python)
    )
    with daemon:
        for _ in range(2):
            with MilterClient(tmp_path / "milter.sock") as client:
                client.negotiate()
                assert client.message(b"hello")[0] == (b"h", b"X-Seen\0yes\0")
            daemon.wait_log("] stopped\n")
    assert daemon.log().count("] stopped\n") == 2
