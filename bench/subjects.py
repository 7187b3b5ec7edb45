"""Every way to run a milter that we compare with, and ours: what it needs and how it starts.

All of them do the same: they have the whole message in hand at its end (MIMEDefang in a file),
burn some CPU time if told so, and add one header. Each tells the MTA to wait for no answer before
the end of the message where it can.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from bench.server import ADDS_A_HEADER, COUNTS, Server, running

MILTERS = Path(__file__).parent / "milters"

# The Python that Debian's packages are for.
SYSTEM_PYTHON = "/usr/bin/python3"

# Ours if pymilter is there, so that both sides run under the same; else the one that Debian has it
# for.
PYMILTERS_PYTHON = sys.executable if find_spec("Milter") else SYSTEM_PYTHON

# Where Debian puts the sources of Go libraries; they are built without modules.
GO_PATH = Path("/usr/share/gocode")

# Names the directory of an unpacked MIMEDefang package: installing it would start a service.
MIMEDEFANG = "BENCH_MIMEDEFANG"


@dataclass(frozen=True)
class Job:
    """What a milter is to do: burn so many ms of CPU, in so many workers where it has some."""

    ms: float = 0.0
    workers: int = 2


# Folder, address in libmilter's spelling, job; returns the command, whose process is the master.
Command = Callable[[Path, str, Job], Sequence[str]]


@dataclass(frozen=True)
class Subject:
    """A way to run a milter."""

    name: str
    install: str  # how to get it, for those who have not
    available: Callable[[], bool]
    command: Command
    tcp_only: bool = False
    has_workers: bool = False  # processes beside the one that the MTA talks to

    @contextmanager
    def serving(self, job: Job, *, tcp: bool = False, public: bool = False) -> Iterator[Server]:
        """Runs it until the block ends."""

        def command(folder: Path, listen: str) -> Sequence[str]:
            return self.command(folder, listen, job)

        with running(command, tcp=tcp or self.tcp_only, public=public) as server:
            server.settle()
            yield server


def _ours(folder: Path, listen: str, job: Job) -> list[str]:
    return [*_daemon(listen), "--workers", str(job.workers), _milter(folder, job)]


def _ours_counting(folder: Path, listen: str, job: Job) -> list[str]:
    milter = folder / "bench_milter.py"
    milter.write_text(COUNTS)
    return [*_daemon(listen), "--workers", str(job.workers), f"{milter}:milter"]


def _ours_with_a_script(folder: Path, listen: str, job: Job) -> list[str]:
    script = ["--pymilter", str(MILTERS / "pymilter_peer.py"), "--", listen, str(job.ms)]
    return [*_daemon(listen), "--allow-root", "--workers", str(job.workers), *script]


def _in_master(folder: Path, listen: str, job: Job) -> list[str]:
    return [*_daemon(listen), "--in-master", _milter(folder, job)]


def _daemon(listen: str) -> list[str]:
    arguments = ["--log-level", "warn", "--listen", listen, "--socket-mode", "666"]
    return [sys.executable, "-m", "sharded_milter", *arguments]


def _milter(folder: Path, job: Job) -> str:
    milter = folder / "bench_milter.py"
    milter.write_text(ADDS_A_HEADER.format(ms=job.ms))
    return f"{milter}:milter"


def _floor(folder: Path, listen: str, job: Job) -> list[str]:
    return [*_script(sys.executable, "amp_floor.py", folder, listen, job), str(job.workers)]


def _script(python: str, name: str, folder: Path, listen: str, job: Job) -> list[str]:
    return [python, str(MILTERS / name), listen, str(job.ms)]


def _libmilter(folder: Path, listen: str, job: Job) -> list[str]:
    program = str(folder / "libmilter_peer")
    source = str(MILTERS / "libmilter_peer.c")
    subprocess.run(["cc", "-O2", "-o", program, source, "-lmilter", "-lpthread"], check=True)
    return [program, listen, str(job.ms)]


def _go(folder: Path, listen: str, job: Job) -> list[str]:
    program = str(folder / "go_peer")
    env = {**os.environ, "GO111MODULE": "off", "GOPATH": str(GO_PATH)}
    command = ["go", "build", "-o", program, str(MILTERS / "go_peer.go")]
    subprocess.run(command, check=True, env=env)
    return [program, listen, str(job.ms)]


# The milter is the master, the multiplexor and its Perl processes are its children. It does not
# start before the multiplexor's socket is there.
_MIMEDEFANG = """
export PERL5LIB={root}/usr/share/perl5 BENCH_MS={ms}
{root}/usr/bin/mimedefang-multiplexor -D -U {user} -z {home} -s {home}/mx.sock \
    -m {workers} -x {workers} -w 0 -q 128 -Q 60 -r 1000000 \
    -f {home}/mimedefang.pl -F {home}/mimedefang_peer.pl &
until [ -S {home}/mx.sock ]; do sleep 0.1; done
exec {root}/usr/bin/mimedefang -D -U {user} -z {home} -m {home}/mx.sock -p {listen} -q
"""


def _mimedefang(folder: Path, listen: str, job: Job) -> list[str]:
    user = "nobody"  # it does not run as root
    root = os.environ[MIMEDEFANG]
    shutil.copy(MILTERS / "mimedefang_peer.pl", folder)
    worker = folder / "mimedefang.pl"
    # The only file that it would look for where an installed package is.
    source = Path(root, "usr/bin/mimedefang.pl").read_text("latin-1")
    worker.write_text(source.replace('"/etc/mail/', f'"{root}/etc/mail/'), "latin-1")
    worker.chmod(0o755)
    shutil.chown(folder, user)
    script = _MIMEDEFANG.format(
        root=root, home=folder, user=user, listen=listen, ms=job.ms, workers=job.workers
    )
    return ["sh", "-c", script]


def _has_pymilter(python: str) -> bool:
    command = [python, "-c", "import Milter"]
    return Path(python).exists() and not subprocess.run(command, capture_output=True).returncode


def _can_build(*needed: str) -> bool:
    return all(shutil.which(name) or Path(name).exists() for name in needed)


OURS = Subject("sharded-milter", "", lambda: True, _ours, has_workers=True)
IN_MASTER = Subject("ours, --in-master", "", lambda: True, _in_master)
FLOOR = Subject("bare Twisted and AMP", "", lambda: True, _floor, has_workers=True)
# They are always there, and say what ours could be: without workers, and with nothing but them.
BOUNDS = (IN_MASTER, FLOOR)

PYMILTER = Subject(
    "pymilter",
    "pip install pymilter, or apt-get install python3-milter",
    partial(_has_pymilter, PYMILTERS_PYTHON),
    partial(_script, PYMILTERS_PYTHON, "pymilter_peer.py"),
)
# The same script with our workers, which need it for the Python that runs us.
WITH_A_SCRIPT = Subject(
    "ours, --pymilter",
    "pip install pymilter",
    partial(_has_pymilter, sys.executable),
    _ours_with_a_script,
    has_workers=True,
)
# Milters that only count the bytes of a body.
OURS_COUNTING = Subject("sharded-milter", "", lambda: True, _ours_counting, has_workers=True)
PYMILTER_COUNTING = Subject(
    "pymilter",
    PYMILTER.install,
    PYMILTER.available,
    partial(_script, PYMILTERS_PYTHON, "pymilter_counts.py"),
)
LIBMILTER = Subject(
    "libmilter (C)",
    "apt-get install gcc libc6-dev libmilter-dev",
    partial(_can_build, "cc", "/usr/include/libmilter/mfapi.h"),
    _libmilter,
)
PEERS = (
    PYMILTER,
    Subject(
        "purepythonmilter",
        "pip install purepythonmilter",
        lambda: find_spec("purepythonmilter") is not None,
        partial(_script, sys.executable, "purepythonmilter_peer.py"),
        tcp_only=True,
    ),
    Subject(
        "MIMEDefang",
        "apt-get download mimedefang; dpkg -x mimedefang_*.deb DIR; BENCH_MIMEDEFANG=DIR;"
        " apt-get install libmime-tools-perl libunix-syslog-perl libnet-dns-perl; as root",
        lambda: MIMEDEFANG in os.environ and os.getuid() == 0,
        _mimedefang,
        has_workers=True,
    ),
    Subject(
        "go-milter",
        "apt-get install golang-go golang-github-emersion-go-milter-dev",
        partial(_can_build, "go", str(GO_PATH / "src/github.com/emersion/go-milter")),
        _go,
    ),
    LIBMILTER,
)


def installed(peers: Sequence[Subject], say: Callable[[str], None]) -> list[Subject]:
    """Those of the peers that can run; `say` hears which cannot, and what they need."""
    for peer in peers:
        if not peer.available():
            say(f"skipped: {peer.name} ({peer.install})")
    return [peer for peer in peers if peer.available()]


@contextmanager
def all_serving(
    subjects: Sequence[Subject], job: Job, *, tcp: bool = False, public: bool = False
) -> Iterator[dict[str, Server]]:
    """Runs them at the same time until the block ends; those that get no load cost next to none."""
    with ExitStack() as stack:
        yield {
            subject.name: stack.enter_context(subject.serving(job, tcp=tcp, public=public))
            for subject in subjects
        }
