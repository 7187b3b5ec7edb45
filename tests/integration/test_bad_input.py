"""What the real daemon says to wrong options, wrong milters and sockets that cannot be had."""

import os
import shutil
import socket
import stat
from pathlib import Path

import pytest

from .daemon import Daemon, Refusal
from .mails import GOOD, write_milter
from .milter_client import MilterClient

pytestmark = pytest.mark.integration

USAGE, UNAVAILABLE, NO_PERMISSION, CONFIG = 64, 69, 77, 78


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with a milter in it that works: `./good.py:milter`."""
    write_milter(tmp_path, "good.py", GOOD)
    return tmp_path


def assert_one_clear_line(refusal: Refusal, *values: str) -> None:
    """The operator's mistake is named, with its value, in one line; Python is not mentioned."""
    assert "Traceback" not in refusal.stderr + refusal.stdout, refusal
    assert len(refusal.lines()) == 1, refusal
    for value in values:
        assert value in refusal.stderr, refusal


# Wrong options


@pytest.mark.parametrize(
    ("options", "values"),
    [
        (["--workers", "0"], ["--workers", "0"]),
        (["--workers", "-3"], ["--workers", "-3"]),
        (["--workers", "many"], ["--workers", "many"]),
        (["--no-such-option"], ["--no-such-option"]),
        (["--wrkers", "3"], ["--wrkers"]),
        (["--workers"], ["--workers"]),
        (["--listen", "inet:"], ["--listen", "inet:"]),
        (["--listen", "inet:abc@127.0.0.1"], ["--listen", "inet:abc@127.0.0.1"]),
        (["--listen", "inet:127.0.0.1:99999"], ["--listen", "99999"]),
        (["--listen", "carrier-pigeon:coo"], ["--listen", "carrier-pigeon:coo"]),
        (["--listen", "unix:"], ["--listen", "unix:"]),
        (["--listen", ""], ["--listen"]),
        (["--socket-mode", "rw"], ["--socket-mode", "rw"]),
        (["--socket-mode", "999"], ["--socket-mode", "999"]),
        (["--eom-deadline", "-1"], ["--eom-deadline", "-1"]),
        (["--eom-deadline", "soon"], ["--eom-deadline", "soon"]),
        (["--ready-fd", "none"], ["--ready-fd", "none"]),
    ],
    ids=" ".join,
)
def test_a_wrong_option_is_refused_with_its_name_and_value(
    folder: Path, options: list[str], values: list[str]
) -> None:
    refusal = Refusal("./good.py:milter", *options, cwd=folder)
    assert refusal.status == USAGE, refusal
    assert_one_clear_line(refusal, *values)


# Wrong milters


@pytest.mark.parametrize(
    ("milter", "values"),
    [
        ("no.such.module:milter", ["no.such.module:milter"]),
        ("no_such_module:milter", ["no_such_module"]),
        ("./absent.py:milter", ["absent.py"]),
        ("./good.py:nothing", ["good.py", "nothing"]),
        ("./good.py:Accept", ["good.py", "Accept"]),
    ],
)
def test_a_milter_that_does_not_exist_is_a_configuration_error(
    folder: Path, milter: str, values: list[str]
) -> None:
    refusal = Refusal(
        "--workers", "1", "--listen", f"unix:{folder}/milter.sock", milter, cwd=folder
    )
    assert refusal.status == CONFIG, refusal
    assert_one_clear_line(refusal, *values)


@pytest.mark.parametrize("milter", ["./good.py", "./good.py:", ":milter"])
def test_a_milter_without_file_or_name_is_refused(folder: Path, milter: str) -> None:
    refusal = Refusal(
        "--workers", "1", "--listen", f"unix:{folder}/milter.sock", milter, cwd=folder
    )
    assert refusal.status in {USAGE, CONFIG}, refusal
    assert_one_clear_line(refusal, milter)


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("import settings_of_mine\n", "ModuleNotFoundError: No module named 'settings_of_mine'"),
        ("def load():\n    return 1 / 0\n\nload()\n", "ZeroDivisionError: division by zero"),
        ("milter = = 3\n", "SyntaxError"),
        ("raise SystemExit(0)\n", "SystemExit"),
    ],
)
def test_a_milter_that_fails_at_import_shows_its_own_traceback_and_none_of_ours(
    folder: Path, source: str, cause: str
) -> None:
    (folder / "broken.py").write_text(source)
    refusal = Refusal(
        "--workers", "2", "--listen", f"unix:{folder}/milter.sock", "./broken.py:milter", cwd=folder
    )
    assert refusal.status == CONFIG, refusal
    assert "broken.py" in refusal.stderr, refusal
    assert cause in refusal.stderr, refusal
    assert refusal.stderr.count("Traceback (most recent call last)") <= 1, (
        "once, not once per worker"
    )
    assert ours_in(refusal.stderr) == [], refusal


def ours_in(text: str) -> list[str]:
    """The frames of a traceback that are not the author's."""
    frames = [line.strip() for line in text.splitlines() if line.strip().startswith('File "')]
    return [frame for frame in frames if "broken.py" not in frame]


def test_one_line_says_that_the_milter_could_not_be_loaded(folder: Path) -> None:
    (folder / "broken.py").write_text("1 / 0\n")
    refusal = Refusal(
        "--workers", "1", "--listen", f"unix:{folder}/milter.sock", "./broken.py:milter", cwd=folder
    )
    telling = [
        line for line in refusal.lines() if "./broken.py:milter" in line and "File " not in line
    ]
    assert len(telling) == 1, refusal


# Wrong rules


@pytest.mark.parametrize(
    ("content", "values"),
    [
        (b"rule good { condition: true }\nrule bad { condition: tru }\n", ["broken.yar:2", "tru"]),
        (b"rule latin_1 { condition: true } // gr\xfcn\n", ["broken.yar:1"]),
        (b'rule r { meta: action = "explode" condition: true }\n', ["broken.yar:1"]),
    ],
)
def test_a_rule_that_cannot_be_used_is_a_configuration_error(
    folder: Path, content: bytes, values: list[str]
) -> None:
    (folder / "broken.yar").write_bytes(content)
    refusal = Refusal(
        "--workers",
        "1",
        "--listen",
        f"unix:{folder}/m.sock",
        "--scanner-rules",
        str(folder),
        cwd=folder,
    )
    assert refusal.status == CONFIG, refusal
    assert_one_clear_line(refusal, *values)


def test_a_folder_of_rules_that_does_not_exist_is_refused(folder: Path) -> None:
    rules = folder / "absent"
    refusal = Refusal(
        "--workers",
        "1",
        "--listen",
        f"unix:{folder}/m.sock",
        "--scanner-rules",
        str(rules),
        cwd=folder,
    )
    assert refusal.status in {USAGE, CONFIG}, refusal
    assert_one_clear_line(refusal, str(rules))


# Sockets that cannot be had


def test_a_socket_in_a_missing_directory_is_a_configuration_error(folder: Path) -> None:
    path = folder / "absent" / "milter.sock"
    refusal = Refusal("--workers", "1", "--listen", f"unix:{path}", "./good.py:milter", cwd=folder)
    assert refusal.status == CONFIG, refusal
    assert_one_clear_line(refusal, str(path))


def test_a_unix_socket_of_a_live_server_is_not_taken_over(folder: Path) -> None:
    path = folder / "taken.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        refusal = Refusal(
            "--workers", "1", "--listen", f"unix:{path}", "./good.py:milter", cwd=folder
        )
        assert refusal.status == UNAVAILABLE, refusal
        assert_one_clear_line(refusal, str(path))
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_a_port_of_a_live_server_is_named(folder: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        refusal = Refusal(
            "--workers", "1", "--listen", f"inet:{port}@127.0.0.1", "./good.py:milter", cwd=folder
        )
    assert refusal.status == UNAVAILABLE, refusal
    assert_one_clear_line(refusal, str(port))


def test_a_file_that_is_no_socket_is_left_alone(folder: Path) -> None:
    path = folder / "precious.txt"
    path.write_text("a file of somebody else")
    refusal = Refusal("--workers", "1", "--listen", f"unix:{path}", "./good.py:milter", cwd=folder)
    assert refusal.status in {UNAVAILABLE, CONFIG}, refusal
    assert_one_clear_line(refusal, str(path))
    assert path.read_text() == "a file of somebody else"


def test_the_socket_of_a_dead_server_is_replaced_and_removed_at_the_end(folder: Path) -> None:
    path = folder / "stale.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
    options = ["--workers", "1", "--listen", f"unix:{path}"]
    with Daemon(*options, "./good.py:milter", cwd=folder), MilterClient(path) as client:
        client.negotiate()
        client.assert_served(b"alive")
    assert not path.exists()


def test_a_socket_path_that_is_too_long_is_a_configuration_error(folder: Path) -> None:
    path = folder / ("x" * 120)
    refusal = Refusal("--workers", "1", "--listen", f"unix:{path}", "./good.py:milter", cwd=folder)
    assert refusal.status in {USAGE, CONFIG}, refusal
    assert_one_clear_line(refusal, path.name)


def test_a_directory_that_may_not_be_written_is_a_permission_error(folder: Path) -> None:
    locked = folder / "locked"
    locked.mkdir()
    wrapper: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("setpriv (util-linux) is not installed, and root may write everywhere")
        # Root without the power to ignore file modes, in a directory of somebody else.
        wrapper = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner"]
        shutil.chown(locked, user="nobody")
    locked.chmod(0o555)
    path = locked / "milter.sock"
    refusal = Refusal(
        "--workers",
        "1",
        "--listen",
        f"unix:{path}",
        "./good.py:milter",
        cwd=folder,
        wrapper=wrapper,
    )
    assert refusal.status == NO_PERMISSION, refusal
    assert_one_clear_line(refusal, str(path))


def test_a_socket_has_the_mode_of_the_option(folder: Path) -> None:
    path = folder / "milter.sock"
    for options, mode in [([], 0o660), (["--socket-mode", "600"], 0o600)]:
        with Daemon(
            "--workers", "1", "--listen", f"unix:{path}", *options, "./good.py:milter", cwd=folder
        ):
            assert stat.S_IMODE(path.stat().st_mode) == mode
