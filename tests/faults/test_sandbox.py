"""The real daemon with sandboxed workers, as an ordinary user: what code in a worker can do to
master, siblings, other mail and the machine; and that everything else goes on."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from integration.daemon import Daemon, Refusal
from kernel import required
from ordinary import as_ordinary_user, ordinary_folder

from sharded_milter.protocol import replies
from sharded_milter.testing.mta import Mail, MtaClient, Outcome
from sharded_milter.testing.samples import samples

from .flow import mail, marks, word
from .server import Server, until

pytestmark = [pytest.mark.integration, pytest.mark.each_python]

#: Does what the subject of a message says: a name of those below.
MILTER = """
import ctypes, os, signal, socket, subprocess
from pathlib import Path
from sharded_milter import Accept, AddHeader, Milter

milter = Milter("told", sandbox=OPTED_IN)
master, me, here = os.getppid(), os.getpid(), Path(__file__).parent
libc = ctypes.CDLL(None, use_errno=True)

def siblings():
    children = Path(f"/proc/{master}/task/{master}/children").read_text().split()
    return [int(pid) for pid in children if int(pid) != me]

def memory():
    for line in open(f"/proc/{master}/maps"):
        if "[heap]" in line:
            with open(f"/proc/{master}/mem", "rb+", 0) as file:
                file.seek(int(line.split("-")[0], 16))
                return len(file.read(16))

def trace(pid):
    libc.ptrace.argtypes = [ctypes.c_long] * 4
    if libc.ptrace(0x4206, pid, 0, 0):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return "attached"

def connect():
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(here / "s"))

TRIES = {
    "memory": memory,
    "descriptors": lambda: [
        os.open(entry.path, os.O_RDONLY) for entry in os.scandir(f"/proc/{master}/fd")
    ],
    "environment": lambda: Path(f"/proc/{master}/environ").read_text(),
    "trace-master": lambda: trace(master),
    "trace-sibling": lambda: [trace(pid) for pid in siblings()],
    "trace-number": lambda: trace(me + 1),
    "keep": lambda: os.listdir(here / "keep"),
    "tcp": lambda: socket.create_connection(("127.0.0.1", 25)),
    "connect": connect,
    "program": lambda: subprocess.run(["/bin/sh", "-c", "id"], capture_output=True),
    "fork": lambda: os.fork(),
    "replace": lambda: open(__file__, "a").close(),
    "unlink": lambda: os.rename(here / "s", here / "t"),
    "stop-sibling": lambda: [os.kill(pid, signal.SIGSTOP) for pid in siblings()],
    "kill-master": lambda: os.kill(master, signal.SIGKILL),
    "group": lambda: os.killpg(os.getpgid(master), signal.SIGKILL),
    "read": lambda: Path("/etc/passwd").read_text(),
    "data": lambda: (here / "data").read_text(),
    "lazy": lambda: __import__("colorsys"),
    "state": lambda: [l for l in open("/proc/self/status") if l.startswith("Seccomp:")],
    "write": lambda: (here / "out" / "file").write_text("x"),
}

@milter.eom
def eom(message):
    name = message.headers["Subject"].split()[0]
    return Accept(AddHeader("X-Result", repr(TRIES[name]() if name in TRIES else "-")[:200]))
"""

ATTACKS = (
    *("memory", "descriptors", "environment", "trace-master", "trace-sibling", "trace-number"),
    *("keep", "tcp", "connect", "program", "fork", "replace", "unlink", "stop-sibling"),
    *("kill-master", "group", "read", "write"),
)


class Service(Server):
    """The daemon of an ordinary user."""

    def __init__(self, folder: Path, *options: str, opted_in: bool = False) -> None:
        source = MILTER.replace("OPTED_IN", str(opted_in))
        super().__init__(folder, "--keep-dir", f"{folder}/keep", *options, source=source)
        prefix = as_ordinary_user()
        if prefix:
            self.python, self.program = prefix[0], (*prefix[1:], sys.executable, *self.program)

    def does(self, what: str) -> str:
        """What came of it: the milter's word, or the verdict where it raised."""
        with self.client() as client:
            outcome = client.deliver(mail(what))
        return marks(outcome).get("X-Result") or word(outcome)


@pytest.fixture
def folder() -> Iterator[Path]:
    required()
    with ordinary_folder() as folder:
        for name in ("keep", "out"):
            (folder / name).mkdir()
        (folder / "data").write_text("beside")
        for path in (folder / "keep", folder / "out", folder / "data"):
            os.chown(path, folder.stat().st_uid, folder.stat().st_gid)
        yield folder


@pytest.mark.parametrize(
    ("options", "opted_in"), [(("--sandbox", "on"), False), ((), True)], ids=["on", "auto"]
)
def test_every_attempt_on_others_fails(
    folder: Path, options: tuple[str, ...], opted_in: bool
) -> None:
    with Service(folder, *options, opted_in=opted_in) as server:
        workers = server.workers()
        assert server.log().count("workers are sandboxed, with Landlock ") == 1
        for attack in ATTACKS:
            assert server.does(attack) == "tempfail", attack
            assert re.search(r"(PermissionError|OSError): \[Errno 1\d?\] ", server.log()), attack
        assert server.does("data") == "'beside'"
        assert "colorsys" in server.does("lazy")
        assert server.does("state") == "['Seccomp:\\t2\\n']"
        assert server.workers() == workers
        assert server.unforeseen() == []


def test_what_a_process_can_do_that_is_not_sandboxed_and_what_not(folder: Path) -> None:
    """Its memory and that of others is hidden in any case."""
    with Service(folder) as server:
        log = server.log()
        assert log.count("workers are not sandboxed: told has not opted in") == 1
        hidden = ("memory", "descriptors", "environment", "trace-master", "trace-sibling")
        for attack in hidden:
            assert server.does(attack) == "tempfail", attack
        for possible in ("keep", "fork", "read", "write", "state"):
            assert server.does(possible) != "tempfail", possible


def test_what_would_allow_it_is_logged(folder: Path) -> None:
    with Service(folder, "--sandbox", "on") as server:
        for what, option in {
            "read": "--sandbox-read /etc/passwd",
            "keep": f"--sandbox-read {folder}/keep",
            "write": f"--sandbox-write {folder}/out",
            "tcp": "--sandbox-allow network",
            "connect": "--sandbox-allow network",
            "program": "--sandbox-allow subprocess",
            "fork": "--sandbox-allow subprocess",
        }.items():
            before = len(server.log())
            assert server.does(what) == "tempfail"
            said = f"the sandbox has refused this; {option} would allow it\n"
            until(lambda said=said, before=before: said in server.log()[before:], said)  # type: ignore[misc]


def test_and_allows_it(folder: Path) -> None:
    options = ("--sandbox-read", "/etc/passwd", "--sandbox-write", f"{folder}/out")
    more = ("--sandbox-allow", "subprocess")
    with Service(folder, "--sandbox", "on", *options, *more) as server:
        assert "root" in server.does("read")
        assert server.does("write") == "1"
        assert "uid=" in server.does("program")
        assert server.does("keep") == server.does("tcp") == "tempfail"


def test_stacks_memory_recycling_and_reload_go_on(folder: Path) -> None:
    """The master looks at its workers with the rights of their own user."""
    options = ("--sandbox", "on", "--max-messages", "3", "--worker-max-rss", "1")
    with Service(folder, *options) as server:
        server.signal(signal.SIGUSR2)
        server.wait_log("Current thread")
        server.wait_log("bytes of memory", timeout=60)
        before = set(server.workers())
        server.signal(signal.SIGHUP)
        server.wait_log("reloaded: 2 new workers serve")
        until(lambda: not before & set(server.workers()), "the old workers have left")
        for _ in range(8):
            assert server.does("mail") == "'-'"
        server.wait_log("it has given 3 answers")
        assert server.log().count("workers are sandboxed") == 1
        assert server.unforeseen() == []


def test_on_does_not_start_where_a_part_is_missing(folder: Path) -> None:
    """A thread that a milter has started when it was imported is not covered by Landlock."""
    (folder / "threads.py").write_text(
        "import threading\nfrom sharded_milter import Milter\nmilter = Milter('threads')\n"
        "milter.eom(lambda message: None)\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    listen = ("--workers", "1", "--listen", f"unix:{folder}/s", f"{folder}/threads.py:milter")
    refusal = Refusal("--sandbox", "on", *listen, cwd=folder)
    assert refusal.status == os.EX_CONFIG, refusal
    assert re.fullmatch(r"sharded-milter: --sandbox on, but .* 1 threads .*", refusal.lines()[-1])


class Scanner(Daemon):
    """The content scanner, which is sandboxed unless told otherwise."""

    def __init__(self, folder: Path, *options: str) -> None:
        prefix = as_ordinary_user()
        self.path = f"{folder}/s"
        arguments: dict[str, Any] = {}
        if prefix:
            program = (*prefix[1:], sys.executable, "-m", "sharded_milter")
            arguments = {"python": prefix[0], "program": program}
        super().__init__("--workers", "1", "--listen", f"unix:{self.path}", *options, cwd=folder,
                         **arguments)  # fmt: skip


def test_the_content_scanner_is_sandboxed_and_finds_what_it_should(folder: Path) -> None:
    with Scanner(folder) as server:
        assert "workers are sandboxed, with Landlock " in server.log()
        for sample in samples():
            with MtaClient.to_path(server.path) as client:
                assert result_of(client.deliver(Mail(sample.raw))) == sample.expected, sample.name


def result_of(outcome: Outcome) -> str:
    """What the scanner says of a message, in a word."""
    if isinstance(outcome.verdict, replies.ReplyCode):
        return "rejected"
    return marks(outcome)["X-Scan-Result"].partition(";")[0]
