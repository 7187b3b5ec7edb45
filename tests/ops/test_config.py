"""Every option, from all four places: default < file < environment < command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

from sharded_milter.cli.programs import run
from sharded_milter.errors import ConfigError
from sharded_milter.limits import Limits
from sharded_milter.mta.addresses import parse_listen
from sharded_milter.mta.peers import ALL_PEERS, parse_peers
from sharded_milter.ops.config import (
    DEFAULT_LISTEN,
    Settings,
    read_file,
    settings_from,
    with_options,
)
from sharded_milter.ops.cpus import usable_cpus

CPU = min(os.sched_getaffinity(0))

#: Option, three values as an operator writes them, and what each of them means.
VALUES: dict[str, tuple[tuple[str, str, str], Callable[[str], Any]]] = {
    "listen": (("inet:1@127.0.0.1", "unix:/a", "inet:[::1]:3"), lambda v: (parse_listen(v),)),
    "pymilter": (("a.py", "/b", "c"), str),
    "in_master": (("a:b", "c.py:d", "e:f"), lambda v: (v,)),
    "workers": (("1", "2", "3"), int),
    "scanner_rules": (("/a", "/b", "/c"), str),
    "socket_mode": (("600", "666", "0640"), lambda v: int(v, 8)),
    "socket_group": (("a", "b", "c"), str),
    "user": (("a", "b", "1"), str),
    "group": (("a", "b", "1"), str),
    "allow_root": (("true", "false", "true"), lambda v: v == "true"),
    "allowed_peers": (("127.0.0.0/8,::1", "user:0", "group:0,192.0.2.7"), parse_peers),
    "on_error": (("accept", "reject", "tempfail"), str),
    "on_poison": (("accept", "reject", "tempfail"), str),
    "keep_dir": (("/", "/usr", "/usr/bin"), str),
    "keep_quota": (("0", "1", "2"), int),
    "cpu_affinity": (
        ("none", str(CPU), "spread"),
        {
            "none": (),
            str(CPU): (CPU,),
            "spread": tuple(sorted(os.sched_getaffinity(0))),
        }.__getitem__,
    ),
    "nice": (("1", "2", "19"), int),
    "worker_memory_limit": (("1", "2", "3"), int),
    "sandbox": (("on", "off", "auto"), str),
    "sandbox_read": (("/", "/usr", "/etc"), lambda v: (v,)),
    "sandbox_write": (("/", "/usr", "/etc"), lambda v: (v,)),
    "sandbox_allow": (
        ("network", "subprocess", "network, subprocess"),
        lambda v: tuple(v.split(", ")),
    ),
    "log_level": (("debug", "warn", "error"), str),
    "ready_fd": (("7", "8", "9"), int),
    "join_retries": (("true", "false", "true"), lambda v: v == "true"),
    "command_deadline": (("1.5", "2", "3"), float),
    "eom_deadline": (("1.5", "2", "3"), float),
    "queue_wait": (("1.5", "2", "3"), float),
    "max_queue": (("0", "1", "2"), int),
    "reserve": (("0", "1", "2"), int),
    "retries": (("0", "1", "2"), int),
    "worker_start_timeout": (("1.5", "2", "3"), float),
    "max_messages": (("0", "1", "2"), int),
    "worker_lifetime": (("0", "1.5", "2"), float),
    "worker_max_rss": (("0", "1", "2"), int),
    "idle_timeout": (("1.5", "2", "3"), float),
    "graceful_timeout": (("1.5", "2", "3"), float),
    "progress_interval": (("1.5", "2", "3"), float),
    "max_connections": (("1", "2", "3"), int),
    "max_inflight_bytes": (("1", "2", "3"), int),
    "max_message_size": (("1", "2", "3"), int),
    "max_data_size": (("256K", "1M", "64K"), str),
}
OPTIONS = list(VALUES)
NO_OPTIONS = {"respawn_first", "respawn_longest", "max_waiting"}


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to an empty directory, and remove our variables."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("SHARDED_MILTER_"):
            monkeypatch.delenv(name)


def settings(*arguments: str) -> Settings:
    """Return the settings of arguments, environment and file."""
    seen: list[Settings] = []

    @click.command()
    @with_options
    def command(**values: Any) -> int:
        seen.append(settings_from(values))
        return 0

    assert exit_code(command, *arguments) == 0
    return seen[0]


def exit_code(command: click.Command, *arguments: str) -> int:
    before, sys.argv = sys.argv, ["test", *arguments]
    try:
        with pytest.raises(SystemExit) as caught:
            run(command, "test")
    finally:
        sys.argv = before
    assert isinstance(caught.value.code, int)
    return caught.value.code


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Return the exit code and the one line that is printed."""

    @click.command()
    @with_options
    def command(**values: Any) -> int:
        settings_from(values)
        return 0

    code = exit_code(command, *arguments)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return code, err.rstrip("\n")


def value_of(settings: Settings, option: str) -> Any:
    return getattr(settings if hasattr(settings, option) else settings.limits, option)


def written(option: str, value: str) -> list[str]:
    flag = f"--{option.replace('_', '-')}"
    if option in ("join_retries", "allow_root"):
        return [flag] if value == "true" else []
    return [flag, value]


def file_with(option: str, value: str, name: str = "file.toml") -> list[str]:
    Path(name).write_text(f'{option.replace("_", "-")} = "{value}"')
    return ["--config", name]


def test_every_setting_is_tested_here() -> None:
    names = {field.name for field in (*fields(Settings), *fields(Limits))}
    assert set(OPTIONS) == names - NO_OPTIONS - {"limits", "milters"}


def test_the_defaults_are_those_of_the_code() -> None:
    found = settings()
    assert found.limits == Limits()
    assert found.milters == ()
    assert found.listen == (parse_listen(DEFAULT_LISTEN),)
    assert found.workers == usable_cpus()
    assert found.socket_mode == 0o660
    assert (found.on_error, found.on_poison, found.log_level) == ("tempfail", "tempfail", "info")
    assert found.allowed_peers == ALL_PEERS
    assert (found.socket_group, found.cpu_affinity, found.nice) == ("", (), 0)
    assert (found.scanner_rules, found.keep_dir, found.ready_fd) == (None, None, None)


@pytest.mark.parametrize("option", OPTIONS)
def test_the_file_overrules_the_default(option: str) -> None:
    (value, *_), meaning = VALUES[option]
    assert value_of(settings(*file_with(option, value)), option) == meaning(value)


@pytest.mark.parametrize("option", OPTIONS)
def test_the_environment_overrules_the_file(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (first, second, _), meaning = VALUES[option]
    monkeypatch.setenv(f"SHARDED_MILTER_{option.upper()}", second)
    assert value_of(settings(*file_with(option, first)), option) == meaning(second)


@pytest.mark.parametrize("option", OPTIONS)
def test_the_command_line_overrules_all(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (first, second, third), meaning = VALUES[option]
    monkeypatch.setenv(f"SHARDED_MILTER_{option.upper()}", second)
    arguments = [*file_with(option, first), *written(option, third)]
    assert value_of(settings(*arguments), option) == meaning(third)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_key_is_spelled_with_dashes_or_underscores(option: str) -> None:
    (value, *_), meaning = VALUES[option]
    Path("x.toml").write_text(f'{option} = "{value}"')
    assert value_of(settings("--config", "x.toml"), option) == meaning(value)


def test_the_file_itself_may_be_named_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDED_MILTER_CONFIG", file_with("nice", "5")[1])
    assert settings().nice == 5


@pytest.mark.parametrize("where", ["file", "environment", "command line"])
def test_milters_are_named_in_all_three_places(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["a:b", "c:d"] if where == "command line" else []
    if where == "environment":
        monkeypatch.setenv("SHARDED_MILTER_MILTERS", "a:b c:d")
    if where == "file":
        Path("x.toml").write_text('milters = ["a:b", "c:d"]')
        arguments = ["--config", "x.toml"]
    assert settings(*arguments).milters == ("a:b", "c:d")


@pytest.mark.parametrize("where", ["file", "environment", "both", "command line"])
def test_behind_a_script_come_its_own_arguments(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not checked; the script's socket is used unless another is given."""
    arguments = ["--pymilter", "s.py", "--", "--socket", "unix:/s", "-P"]
    if where in ("environment", "both"):
        monkeypatch.setenv("SHARDED_MILTER_PYMILTER", "s.py")
        arguments = arguments[2:]
    if where == "both":
        Path("x.toml").write_text("nice = 3")
        monkeypatch.setenv("SHARDED_MILTER_CONFIG", "x.toml")
    if where == "file":
        Path("x.toml").write_text('pymilter = "s.py"\nmilters = ["--socket", "unix:/s", "-P"]')
        arguments = ["--config", "x.toml"]
    found = settings(*arguments)
    assert (found.pymilter, found.milters) == ("s.py", ("--socket", "unix:/s", "-P"))
    assert found.listen == ()
    assert settings("--listen", "unix:/a", *arguments).listen == (parse_listen("unix:/a"),)


def test_sockets_may_be_several() -> None:
    two = (parse_listen("unix:/a"), parse_listen("unix:/b"))
    assert settings("--listen", "unix:/a", "--listen", "unix:/b").listen == two
    Path("x.toml").write_text('listen = ["unix:/a", "unix:/b"]')
    assert settings("--config", "x.toml").listen == two


def test_tables_and_numbers_are_read_as_they_would_be_typed() -> None:
    Path("x.toml").write_text(
        "eom-deadline = 60\nworkers = 3\nsocket-mode = 640\njoin-retries = true\n"
        '[scanner]\nrules = "/etc/rules"\n[worker]\nmax-rss = 1_000_000\n'
    )
    found = settings("--config", "x.toml")
    assert (found.limits.eom_deadline, found.workers, found.socket_mode) == (60.0, 3, 0o640)
    assert (found.scanner_rules, found.limits.worker_max_rss) == ("/etc/rules", 1_000_000)
    assert found.limits.join_retries


@pytest.mark.parametrize(
    "line",
    ["socket-mode = 0o660", 'socket-mode = "0660"', 'socket-mode = "660"', "socket-mode = 660",
     "socket-mode = 0660", "socket_mode=0o660 # as chmod", 'socket-mode = "0o660"',
     "[socket]\nmode = 0o660", "socket = { mode = 0o660 }", '"socket-mode" = 0o660',
     "socket.mode = 0o660", "nice = 1\r\nsocket-mode = 0o660\r\n"],
)  # fmt: skip
def test_a_mode_means_the_same_however_it_is_spelled(line: str) -> None:
    Path("x.toml").write_bytes(line.encode())
    assert settings("--config", "x.toml").socket_mode == 0o660


@pytest.mark.parametrize("value", ["660", "0660", "0o660"])
def test_a_mode_means_the_same_outside_of_a_file(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settings("--socket-mode", value).socket_mode == 0o660
    monkeypatch.setenv("SHARDED_MILTER_SOCKET_MODE", value)
    assert settings().socket_mode == 0o660


@pytest.mark.parametrize("value", ["0x1b0", "0b110", "1000", "0o1777", "648", "6.6", "true"])
def test_what_is_no_mode_is_refused_with_how_to_write_it(
    value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("x.toml").write_text(f"socket-mode = {value}")
    code, line = refused(capsys, "--config", "x.toml")
    assert code == os.EX_CONFIG
    assert line.endswith("is not an octal mode from 0 to 777; write 660, 0660 or 0o660")


# Mistakes

BAD: list[tuple[str, str]] = [
    ("listen", "pigeon:coo"), ("listen", "inet:99999@a"), ("workers", "0"), ("workers", "many"),
    ("workers", "2.7"), ("socket_mode", "rw"), ("socket_mode", "1777"), ("socket_mode", "-1"),
    ("on_error", "drop"), ("on_poison", "drop"), ("keep_dir", "/no/such/dir"),
    ("keep_dir", "/etc/passwd"), ("keep_quota", "-1"), ("cpu_affinity", "all"),
    ("cpu_affinity", "99999"), ("cpu_affinity", "1-"), ("cpu_affinity", ""), ("nice", "20"),
    ("nice", "-1"), ("worker_memory_limit", "-1"), ("log_level", "loud"), ("ready_fd", "-1"),
    ("eom_deadline", "0"), ("eom_deadline", "-1"), ("eom_deadline", "nan"),
    ("eom_deadline", "inf"), ("eom_deadline", "soon"), ("queue_wait", "0"), ("max_queue", "-1"),
    ("retries", "1.5"), ("max_message_size", "0"), ("max_connections", "0"),
    ("allowed_peers", "postfix"), ("allowed_peers", "user:no-such"), ("allowed_peers", "::1,"),
    ("allowed_peers", "10.0.0.1/8"), ("allowed_peers", "group:-1"), ("allowed_peers", "user:"),
    ("worker_lifetime", "-1"), ("worker_lifetime", "nan"), ("worker_lifetime", "inf"),
    ("sandbox", "maybe"), ("sandbox_read", "/no/such"), ("sandbox_write", "/no/such"),
    ("sandbox_allow", "network,printers"), ("sandbox_allow", ""),
]  # fmt: skip


@pytest.mark.parametrize(("option", "value"), BAD)
def test_a_bad_value_on_the_command_line_is_64(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = refused(capsys, f"--{option.replace('_', '-')}={value}")
    assert code == os.EX_USAGE
    assert line.startswith(f"test: Invalid value for '--{option.replace('_', '-')}': ")


@pytest.mark.parametrize(("option", "value"), BAD)
def test_a_bad_value_in_the_file_is_78_and_names_file_and_option(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = refused(capsys, *file_with(option, value, "bad.toml"))
    assert code == os.EX_CONFIG
    name = option.replace("_", "-")
    assert line.startswith(f"test: configuration file bad.toml: Invalid value for '--{name}': ")


@pytest.mark.parametrize(("option", "value"), [(o, v) for o, v in BAD if v])
def test_a_bad_value_in_the_environment_is_78(
    option: str, value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"SHARDED_MILTER_{option.upper()}", value)
    code, line = refused(capsys)
    assert code == os.EX_CONFIG
    assert line.startswith("test: environment: Invalid value for '--")


@pytest.mark.parametrize("spec", ["nonsense", "a:", "x.py"])
def test_a_bad_milter_is_refused_where_it_stands(
    spec: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, spec)[0] == os.EX_USAGE
    code, line = refused(capsys, *file_with("milters", spec))
    assert code == os.EX_CONFIG
    assert "file.toml" in line
    assert spec in line


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("wokers = 3", "wokers is an unknown key"),
        ("[scanner]\nwokers = 3", "scanner.wokers is an unknown key"),
        ("config = 'x'", "config is an unknown key"),
        ("version = true", "version is an unknown key"),
        ("help = true", "help is an unknown key"),
        ("workers = [1, 2]", "workers = [1, 2] has more than one value"),
        ("listen = []", "listen = [] is not a string, number, boolean or list"),
        (
            "listen = [['unix:/a']]",
            "listen = [['unix:/a']] is not a string, number, boolean or list",
        ),
        (
            "[socket.group]\na = 1",
            "socket.group = {'a': 1} is not a string, number, boolean or list",
        ),
        ("workers = ", "Invalid value (at "),
        ("\xff", "Invalid statement (at line 1, column 1)"),
    ],
)
def test_a_file_with_a_mistake_is_78_and_names_it(
    text: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.toml").write_text(text)
    code, line = refused(capsys, "--config", "bad.toml")
    assert code == os.EX_CONFIG
    assert line.startswith(f"test: configuration file bad.toml: {why}")


def test_a_file_in_another_encoding_is_78(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.toml").write_bytes(b"socket-group = '\xff'")
    code, line = refused(capsys, "--config", "bad.toml")
    assert (code, "can't decode" in line) == (os.EX_CONFIG, True)


@pytest.mark.parametrize(("path", "why"), [("none", "No such file"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_78(
    path: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = refused(capsys, "--config", path)
    assert code == os.EX_CONFIG
    assert line.startswith(f"test: configuration file {path}: {why}")


def test_an_unknown_option_is_64(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "--wokers=3")[0] == os.EX_USAGE


def test_a_file_is_read_by_its_known_names(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("a = 1\nb-c = 'x'")
    assert read_file(str(tmp_path / "x.toml"), {"a", "b_c"}) == {"a": "1", "b_c": "x"}
    with pytest.raises(ConfigError, match="b-c is an unknown key"):
        read_file(str(tmp_path / "x.toml"), {"a"})
