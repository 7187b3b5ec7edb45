"""A service that is started as root, or as a user with few rights, with the real daemon."""

import grp
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sharded_milter.testing.mta import Mail, MtaClient

from .daemon import PROGRAM, Daemon, Refusal

pytestmark = pytest.mark.integration

NOBODY = pwd.getpwnam("nobody")
GROUP = grp.getgrgid(NOBODY.pw_gid).gr_name
AS_NOBODY = ("setpriv", "--reuid=nobody", f"--regid={GROUP}", "--clear-groups")
WITHOUT_LEAVE = PROGRAM[:2]

MILTER = """
    import os
    from sharded_milter import Accept, AddHeader, Milter

    milter = Milter("who")

    @milter.eom
    def eom(message):
        if message.headers["Subject"] == "die":
            os._exit(1)
        for attempt in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0])):
            try:
                attempt()
            except PermissionError:
                continue
            return Accept(AddHeader("X-Who", "root"))
        who = f"{os.getuid()} {os.getgid()} {os.getgroups()} {os.environ['HOME']}"
        return Accept(AddHeader("X-Who", who))
"""


@pytest.fixture(autouse=True)
def started_as_root() -> None:
    if os.geteuid() != 0:
        assert os.environ.get("CI") != "true", "CI runs as root"
        pytest.skip("only root can become somebody else")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory of root's that everybody can look into, with a milter."""
    path = Path(tempfile.mkdtemp(prefix="sharded-milter-"))
    path.chmod(0o755)
    (path / "who.py").write_text(textwrap.dedent(MILTER))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def python(folder: Path) -> str:
    """An interpreter that everybody can run: ours, wherever root keeps it.

    Where that is below /root, it is shown there to the daemon alone, in a mount namespace.
    """
    try:
        subprocess.run([sys.executable, "-c", ""], user="nobody", extra_groups=[], check=True)
    except PermissionError:
        pass
    else:
        return sys.executable
    home = Path(os.path.realpath(sys.executable)).parents[1]
    top = Path(*home.parts[:2])
    aside = folder / "aside"
    aside.mkdir()
    script = folder / "python"
    script.write_text(
        textwrap.dedent(f"""\
        #!/bin/sh
        exec unshare --mount sh -c '
            mount --bind {home} {aside} && mount -t tmpfs -o mode=755 none {top} &&
            mkdir -p {home} && mount --bind {aside} {home} && exec "$@"
        ' sh {sys.executable} "$@"
        """)
    )
    script.chmod(0o755)
    return str(script)


def delivered(path: Path, subject: str = "hi") -> str:
    """Who the milter says it is; or the verdict's name where it says nothing."""
    with MtaClient.to_path(str(path)) as client:
        outcome = client.deliver(Mail(f"Subject: {subject}\r\n\r\n.\r\n".encode(), queue_id="Q1"))
    fields = [getattr(action, "value", "").strip() for action in outcome.actions]
    return fields[0] if fields else type(outcome.verdict).__name__


WHO = f"{NOBODY.pw_uid} {NOBODY.pw_gid} [{NOBODY.pw_gid}] {NOBODY.pw_dir}"


def test_master_and_workers_run_as_the_user_who_was_named(folder: Path, python: str) -> None:
    path, kept = folder / "s", folder / "kept"
    kept.mkdir()
    os.chown(kept, NOBODY.pw_uid, NOBODY.pw_gid)
    options = ["--workers=2", "--listen", f"unix:{path}", "--socket-group=mail", "--user=nobody",
               "--keep-dir", str(kept), "./who.py:milter"]  # fmt: skip
    with Daemon(*options, cwd=folder, python=python, program=WITHOUT_LEAVE) as daemon:
        found = path.stat()
        assert (found.st_uid, found.st_gid) == (0, grp.getgrnam("mail").gr_gid)
        assert stat.S_IMODE(found.st_mode) == 0o660
        for pid in (daemon.pid, *daemon.workers()):
            process = psutil.Process(pid)
            assert set(process.uids()) == {NOBODY.pw_uid}
            assert set(process.gids()) == {NOBODY.pw_gid}
        assert delivered(path) == WHO
        before = set(daemon.workers())
        os.kill(daemon.pid, signal.SIGHUP)
        daemon.wait_log("reloaded: 2 new workers serve")
        assert delivered(path) == WHO
        assert set(daemon.workers()) - before
        assert delivered(path, "die") == "TempFail"
        daemon.wait_log("copy kept: ")
        [copy] = kept.iterdir()
        assert (copy.stat().st_uid, stat.S_IMODE(copy.stat().st_mode)) == (NOBODY.pw_uid, 0o600)
        assert "runs as root" not in daemon.log()
    # The directory is root's: what cannot be removed is said, and taken over by the next start.
    assert f"cannot remove {path}: Permission denied" in daemon.log()
    with Daemon(*options, cwd=folder, python=python, program=WITHOUT_LEAVE):
        assert delivered(path) == WHO


def test_a_number_does_and_a_directory_of_the_users_own_is_left_clean(
    folder: Path, python: str
) -> None:
    own = folder / "own"
    own.mkdir()
    os.chown(own, NOBODY.pw_uid, NOBODY.pw_gid)
    options = ["--workers=1", "--listen", f"unix:{own}/s", f"--user={NOBODY.pw_uid}", "--group=8",
               "./who.py:milter"]  # fmt: skip
    with Daemon(*options, cwd=folder, python=python) as daemon:
        assert delivered(own / "s").startswith(f"{NOBODY.pw_uid} 8 ")
    assert list(own.iterdir()) == []
    assert "cannot remove" not in daemon.log()


def test_root_is_warned_and_told_the_cure(folder: Path) -> None:
    options = ["--workers=1", "--listen", f"unix:{folder}/s", "./who.py:milter"]
    with Daemon(*options, cwd=folder, program=WITHOUT_LEAVE) as daemon:
        [warning] = [line for line in daemon.log().splitlines() if "runs as root" in line]
    assert " warn " in warning
    assert warning.endswith("; give --user NAME")


@pytest.mark.parametrize("what", [[], ["--pymilter", "./who.py"]], ids=["scanner", "pymilter"])
def test_what_reads_hostile_mail_is_refused_as_root(folder: Path, what: list[str]) -> None:
    for options in ([], ["--user=root"]):
        refusal = Refusal(
            "--listen", f"unix:{folder}/s", *options, *what, cwd=folder, program=WITHOUT_LEAVE
        )
        assert refusal.status == os.EX_NOPERM, refusal
        [line] = refusal.lines()
        assert "does not run as root" in line
        assert "--user NAME" in line
        assert "--allow-root" in line
        assert not (folder / "s").exists()


def test_the_scanner_runs_as_another_user(folder: Path, python: str) -> None:
    options = ["--workers=1", "--listen", f"unix:{folder}/s", "--user=nobody"]
    with Daemon(*options, cwd=folder, python=python, program=WITHOUT_LEAVE):
        assert delivered(folder / "s").startswith("clean")


@pytest.mark.parametrize(
    ("options", "status", "why"),
    [
        (["--user=no-such-user"], os.EX_CONFIG, "there is no such user"),
        (["--socket-group=99999999999"], os.EX_CONFIG, "the highest number is 4294967294"),
        (["--user=nobody", "--group=no-such-group"], os.EX_CONFIG, "there is no such group"),
        (["--user=12345678"], os.EX_CONFIG, "give --group too"),
        (["--group=mail"], os.EX_USAGE, "--group mail needs --user"),
        (["--user=nobody", "--keep-dir=."], os.EX_NOPERM, "user nobody cannot write to it"),
    ],
)
def test_a_mistake_is_one_line(
    folder: Path, python: str, options: list[str], status: int, why: str
) -> None:
    listen = ["--listen", f"unix:{folder}/s"]
    refusal = Refusal(*listen, *options, "./who.py:milter", cwd=folder, python=python)
    assert refusal.status == status, refusal
    assert why in refusal.lines()[-1]
    assert "Traceback" not in refusal.stderr


def test_a_user_hears_how_to_give_the_socket_to_a_group(folder: Path, python: str) -> None:
    own = folder / "own"
    own.mkdir()
    os.chown(own, NOBODY.pw_uid, NOBODY.pw_gid)
    listen = ["--listen", f"unix:{own}/s", "--socket-group=mail"]
    refusal = run_as_nobody(folder, python, *listen, "./who.py:milter")
    assert refusal.returncode == os.EX_NOPERM, refusal
    [line] = refusal.stderr.splitlines()
    assert "user nobody cannot give the socket to --socket-group 'mail'" in line
    assert "make nobody a member of that group, or start as root with --user nobody" in line
    assert list(own.iterdir()) == []


def test_only_root_becomes_another_user(folder: Path, python: str) -> None:
    refusal = run_as_nobody(folder, python, "--user=mail", "./who.py:milter")
    assert refusal.returncode == os.EX_NOPERM, refusal
    [line] = refusal.stderr.splitlines()
    assert "cannot become --user mail: start the service as root" in line


def run_as_nobody(folder: Path, python: str, *options: str) -> subprocess.CompletedProcess[str]:
    """The daemon as that user, where it is expected not to start."""
    script = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"
    return subprocess.run(
        [python, "-c", script, *AS_NOBODY, sys.executable, *PROGRAM, *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
