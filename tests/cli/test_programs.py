"""Both programs: each mistake of an operator gives one line and an exit code of sysexits(3)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click
import pytest

from sharded_milter import __version__
from sharded_milter.cli.ctl import ctl
from sharded_milter.cli.daemon import daemon
from sharded_milter.cli.programs import run
from sharded_milter.errors import (
    ConfigError,
    MilterLoadError,
    NotPermitted,
    NotWritten,
    SocketTaken,
    StartError,
    SystemRefused,
    UsageError,
)


@pytest.fixture
def ended(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Run a program; return its exit code, standard output and standard error."""

    def end(command: click.Command, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["test", *arguments])
        with pytest.raises(SystemExit) as caught:
            run(command, "test")
        assert isinstance(caught.value.code, int)
        return caught.value.code, *capsys.readouterr()

    return end


def raising(error: BaseException) -> click.Command:
    @click.command()
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("a"), 64),
        (SocketTaken("a"), 69),
        (StartError("a"), 70),
        (SystemRefused("a"), 71),
        (NotWritten("a"), 74),
        (NotPermitted("a"), 77),
        (ConfigError("a"), 78),
        (MilterLoadError("a"), 78),
    ],
    ids=repr,
)
def test_what_keeps_it_from_starting_is_one_line_and_a_code(
    ended: Any, error: StartError, code: int
) -> None:
    assert ended(raising(error)) == (code, "", "test: a\n")


def test_a_line_stays_one_line(ended: Any) -> None:
    assert ended(raising(ConfigError("one\n  two"))) == (78, "", "test: one two\n")


def test_the_authors_traceback_comes_before_the_line(ended: Any) -> None:
    error = MilterLoadError("milter x: no", "  File x\nValueError: no\n")
    assert ended(raising(error))[2] == "  File x\nValueError: no\ntest: milter x: no\n"


def test_an_interrupt_is_what_a_shell_calls_it(ended: Any) -> None:
    assert ended(raising(KeyboardInterrupt()))[0] == 130
    assert ended(raising(click.Abort()))[0] == 130


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["test"])
    with pytest.raises(ZeroDivisionError):
        run(raising(ZeroDivisionError()), "test")


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_what_a_command_returns_is_the_exit_code(
    ended: Any, returned: int | None, code: int
) -> None:
    @click.command()
    def command() -> int | None:
        return returned

    assert ended(command)[0] == code


@pytest.mark.parametrize("program", [daemon, ctl], ids=["daemon", "ctl"])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_printed(ended: Any, program: click.Command, flag: str) -> None:
    code, out, err = ended(program, flag)
    assert (code, err) == (0, "")
    assert out.startswith("Usage: test [OPTIONS]")


@pytest.mark.parametrize("program", [daemon, ctl], ids=["daemon", "ctl"])
def test_the_version_is_printed(ended: Any, program: click.Command) -> None:
    code, out, err = ended(program, "--version")
    assert (code, err) == (0, "")
    assert out.endswith(f"version {__version__}\n")


def test_the_tool_without_a_command_shows_what_there_is(ended: Any) -> None:
    code, out, err = ended(ctl)
    assert (code, out) == (os.EX_USAGE, "")
    assert err.startswith("Usage: test [OPTIONS] COMMAND [ARGS]...\n")
    assert "demo" in err


@pytest.mark.parametrize("arguments", [["nonsense"], ["demo", "--workers=0"], ["--nonsense"]])
def test_a_wrong_command_is_64(ended: Any, arguments: list[str]) -> None:
    code, out, err = ended(ctl, *arguments)
    assert (code, out, err.count("\n")) == (os.EX_USAGE, "", 1)
