"""`sharded-milterctl bench` and `tune` with the real daemon, as an operator runs them."""

from __future__ import annotations

import json
import mailbox
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import psutil
import pytest

from sharded_milter.testing import load

pytestmark = pytest.mark.integration

MILTER = """
import time
from sharded_milter import Accept, AddHeader, Message, Milter, Verdict
milter = Milter("own")
@milter.eom
def scan(message: Message) -> Verdict:
    {line}
    return Accept(AddHeader("X-Own", "1"))
"""
HELLO = b"From: a@example.org\nTo: b@example.com\nSubject: hi\n\nhello\n"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(MILTER.format(line="pass"))
    return path


def command(
    *arguments: str, grace: float = load.GRACE, limits: tuple[int, int] | None = None
) -> list[str]:
    # SIGINT is ignored if the tests run in the background of a shell.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        f"import resource; {limits} and resource.setrlimit(resource.RLIMIT_NOFILE, {limits});"
        f"from sharded_milter.testing import load; load.GRACE = {grace};"
        "from sharded_milter.cli.ctl import main; main()"
    )
    return [sys.executable, "-W", "error", "-c", program, *arguments]


def ctl(
    *arguments: str,
    cwd: Path,
    grace: float = load.GRACE,
    limits: tuple[int, int] | None = None,
) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if "SHARDED_MILTER" not in name}
    return subprocess.run(
        command(*arguments, grace=grace, limits=limits),
        capture_output=True,
        text=True,
        cwd=cwd,
        env=env,
        check=False,
    )


def test_a_directory_is_sent_with_each_number_of_workers(own: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mails"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.eml").write_bytes(HELLO)
    (folder / "bad.eml").write_bytes(b"")
    done = ctl(
        "bench", "own.py:milter", "--messages", "mails", "--workers", "1,2", "--count", "12",
        "--json", "figures", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("mails/bad.eml: skipped: it is empty\n")
    assert "milter failed" not in done.stderr
    for words in ("3 different messages", "accept 12", "eom queue", "bottleneck with 1 worker: ",
                  "bottleneck with 2 workers: "):  # fmt: skip
        assert words in done.stdout
    assert "\x1b" not in done.stdout
    saved = json.loads((tmp_path / "figures").read_text())
    assert [run["workers"] for run in saved["runs"]] == [1, 2]
    assert [run["verdicts"] for run in saved["runs"]] == [{"accept": 12}] * 2


def test_an_mbox_is_sent_to_a_milter_that_fails(own: Path, tmp_path: Path) -> None:
    own.write_text(MILTER.format(line='raise ValueError("no table")'))
    box = mailbox.mbox(tmp_path / "box")
    box.add(mailbox.mboxMessage(HELLO))
    box.close()
    done = ctl(
        "bench", "own.py:milter", "--messages", "box", "--workers", "1", "--count", "5",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tempfail 5" in done.stdout
    assert (
        "warning: with 1 worker the milter failed on 5 of 5 messages (5 times: at eom: ValueError:"
        " no table); the figures include these failures\n"
    ) in done.stderr


def test_workers_that_die_are_told(own: Path, tmp_path: Path) -> None:
    # Each worker dies with its third message.
    line = "import os; scan.n = getattr(scan, 'n', 0) + 1; scan.n == 3 and os._exit(3)"
    own.write_text(MILTER.format(line=line))
    done = ctl(
        "bench", "own.py:milter", "--workers", "1", "--connections", "1", "--count", "4",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "died during the run" in done.stderr
    assert ": exited with code 3); messages waited for replacements" in done.stderr


def test_a_milter_that_answers_nothing_cannot_be_measured(own: Path, tmp_path: Path) -> None:
    own.write_text(MILTER.format(line="time.sleep(1000)"))
    done = ctl(
        "bench", "own.py:milter", "--workers", "1", "--seconds", "0.1", "--connections", "2",
        cwd=tmp_path, grace=0.1,
    )  # fmt: skip
    assert done.returncode == os.EX_CONFIG
    assert done.stderr.splitlines()[-1] == (
        "sharded-milterctl: the milter cannot be measured: 2 messages were sent and none got a"
        " verdict"
    )
    assert (done.stderr.count("\n"), "Traceback" in done.stderr) == (1, False)


def test_the_scanner_is_measured_where_no_milter_is_named(tmp_path: Path) -> None:
    done = ctl("bench", "--workers", "1", "--seconds", "0.1", "--connections", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "accept" in done.stdout


def test_a_milter_in_the_master_has_no_workers(own: Path, tmp_path: Path) -> None:
    own.write_text(MILTER.format(line="pass").replace("def scan", "async def scan"))
    done = ctl(
        "bench", "--in-master", "own.py:milter", "--connections", "2", "--count", "2", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "bottleneck with 0 workers: " in done.stdout
    done = ctl("tune", "--in-master", "own.py:milter", cwd=tmp_path)
    assert done.returncode == os.EX_USAGE


def test_tune_recommends_and_draws(own: Path, tmp_path: Path) -> None:
    done = ctl(
        "tune", "own.py:milter", "--workers", "2,1", "--rounds", "1", "--count", "12",
        "--svg", "curve.svg", "--json", "figures", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "milter failed" not in done.stderr
    saved = json.loads((tmp_path / "figures").read_text())
    best = saved["recommended_workers"]
    assert [run["workers"] for run in saved["runs"]] == [1, 2]
    assert f"recommended: --workers {best}, the fewest within 5% of the best rate" in done.stdout
    assert "█" in done.stdout
    # The clock of CPU times ticks every 10 ms, and there were only 12 messages.
    assert "one master becomes the limit at" in done.stdout or "too little CPU" in done.stdout
    assert "own.py:milter" in "".join(
        ElementTree.parse(tmp_path / "curve.svg").getroot().itertext()
    )


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nothing.py:milter"], os.EX_CONFIG, "milter file nothing.py does not exist"),
        (["nonsense"], os.EX_USAGE, "neither MODULE:NAME nor FILE.py:NAME"),
        (["--workers", "0"], os.EX_USAGE, "'0' is not a number of workers"),
        (["--messages", "nothing"], os.EX_USAGE, "'nothing' does not exist"),
        (["--messages", "empty"], os.EX_USAGE, "no message in empty"),
        (["--config", "nothing"], os.EX_CONFIG, "configuration file nothing"),
        (["--count", "1", "--seconds", "1"], os.EX_USAGE, "cannot be given together"),
        (["--json", "nothing/x"], os.EX_USAGE, "'nothing/x' cannot be written"),
        (["--connections", "99999999"], os.EX_USAGE, "--connections 99999999 is too high: "),
        (["--workers", "1,99999999"], os.EX_USAGE, "--workers 99999999 is too high: "),
        (["--in-master", "x:y", "--workers", "1,4"], os.EX_USAGE, "leave out --workers"),
    ],
)
def test_a_mistake_is_one_line_and_a_code(
    tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    (tmp_path / "empty").mkdir()
    done = ctl("bench", *arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_limit_of_descriptors_is_raised_as_far_as_it_may_be(own: Path, tmp_path: Path) -> None:
    done = ctl(
        "bench", "own.py:milter", "--workers", "1", "--connections", "150", "--count", "150",
        cwd=tmp_path, limits=(100, 400),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = ctl("bench", "own.py:milter", "--connections", "400", cwd=tmp_path, limits=(100, 400))
    assert done.returncode == os.EX_USAGE
    assert done.stderr == (
        "sharded-milterctl: --connections 400 is too high: it needs 464 file descriptors, and the"
        " limit (ulimit -Hn) is 400\n"
    )
    assert done.stdout == ""


def test_figures_on_standard_output_have_it_for_themselves(own: Path, tmp_path: Path) -> None:
    done = ctl(
        "bench", "own.py:milter", "--workers", "1", "--count", "5", "--json", "-", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["runs"][0]["messages"] == 5
    assert "bottleneck with 1 worker: " in done.stderr
    assert not (tmp_path / "-").exists()


@pytest.mark.parametrize("arguments", [[], ["--json", "-"], ["--json", "/dev/full"]])
def test_what_cannot_be_written_is_one_line(
    own: Path, tmp_path: Path, arguments: list[str]
) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command("bench", "own.py:milter", "--workers", "1", "--count", "2", *arguments),
            stdout=subprocess.DEVNULL if "/dev/full" in arguments else full,
            stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False,
        )  # fmt: skip
    assert done.returncode == os.EX_IOERR, done.stderr
    where = "/dev/full" if "/dev/full" in arguments else "standard output"
    assert done.stderr.splitlines()[-1] == f"sharded-milterctl: {where}: No space left on device"
    assert "Traceback" not in done.stderr


def test_the_authors_traceback_is_above_the_line(own: Path, tmp_path: Path) -> None:
    own.write_text("raise ValueError('no database')\n")
    done = ctl("bench", "own.py:milter", cwd=tmp_path)
    assert done.returncode == os.EX_CONFIG
    assert "    raise ValueError('no database')\n" in done.stderr
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_behind(
    own: Path, tmp_path: Path, number: signal.Signals
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    # The scan writes the ids of its processes, and hangs when the pipe has no reader any more.
    line = f"import os; open({str(fifo)!r}, 'w').write(f'{{os.getpid()}} {{os.getppid()}}\\n')"
    own.write_text(MILTER.format(line=line))
    arguments = command("bench", str(own) + ":milter", "--workers", "1")
    told = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    # A folder of its own with a short name: a socket's path has 107 bytes at most.
    with tempfile.TemporaryDirectory(prefix="tmp") as folder, subprocess.Popen(
        arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        env={**os.environ, "TMPDIR": folder},
    ) as program:  # fmt: skip
        assert select.select([told], [], [], 60)[0], "it has not begun to scan"
        worker, master = (psutil.Process(int(pid)) for pid in os.read(told, 100).split()[:2])
        os.close(told)
        program.send_signal(number)
        _, complaints = program.communicate()
        left_there = os.listdir(folder)
    assert (program.returncode, complaints.strip()) == (128 + number, "")
    psutil.wait_procs([worker, master], timeout=10)
    left = [process for process in (worker, master) if process.is_running()]
    assert [each for each in left if each.status() != psutil.STATUS_ZOMBIE] == []
    assert left_there == []
