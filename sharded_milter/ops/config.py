"""The configuration: one table of options. Each is also a key of the file and a variable.

The command line overrides the environment, which overrides the file, which overrides the defaults.
The file is TOML. A key is the option's name without the leading dashes (`eom-deadline = 60`); the
name of a table is joined to its keys (`[scanner] rules = "/etc/rules"` is `--scanner-rules`).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from sharded_milter.dialects.spec import checked_spec
from sharded_milter.dispatch.policy import CHOICES
from sharded_milter.errors import ConfigError
from sharded_milter.limits import Limits
from sharded_milter.mta.addresses import ListenAddress, parse_listen
from sharded_milter.mta.peers import Peers, parse_peers
from sharded_milter.ops.cpus import usable_cpus
from sharded_milter.ops.logs import LEVELS
from sharded_milter.ops.option_types import CpuList, OctalMode, Parsed, Seconds, WordList
from sharded_milter.protocol.negotiation import DATA_SIZES

ENVIRONMENT_PREFIX = "SHARDED_MILTER"
DEFAULT_LISTEN = "inet:8890@127.0.0.1"
DEFAULT_SOCKET_MODE = "660"

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Settings:
    """The values of all options, checked."""

    milters: tuple[str, ...]  # with `pymilter`, the arguments of the script
    pymilter: str | None
    in_master: tuple[str, ...]
    listen: tuple[ListenAddress, ...]
    workers: int
    scanner_rules: str | None
    socket_mode: int
    socket_group: str
    user: str
    group: str
    allow_root: bool
    allowed_peers: Peers
    on_error: str
    on_poison: str
    keep_dir: str | None
    keep_quota: int
    cpu_affinity: tuple[int, ...]
    nice: int
    worker_memory_limit: int
    sandbox: str
    sandbox_read: tuple[str, ...]
    sandbox_write: tuple[str, ...]
    sandbox_allow: tuple[str, ...]
    log_level: str
    ready_fd: int | None
    limits: Limits


# When workers are sandboxed, and the permissions that --sandbox-allow can give them.
SANDBOXES = ("auto", "on", "off")
SANDBOX_ALLOW = ("network", "subprocess")

# Bytes of all copies of poisonous messages: about ten large messages.
KEEP_QUOTA = 256 * 1024 * 1024


_MILTER = Parsed("milter", checked_spec)
_SECONDS = Seconds(min=0, min_open=True)
_COUNT = click.IntRange(min=1)

# Finds a socket mode with a leading 0, to put it in quotes. TOML reads 0o660 as the number 432 and
# refuses 0660, but chmod takes 660, 0660 and 0o660 as the same mode.
_MODE = re.compile(
    r"""((?:^|[{,])[ \t]*["']?(?:socket["']?[-_.]["']?)?mode["']?[ \t]*=[ \t]*)(0\w+)""",
    re.MULTILINE,
)

# Options that may be given several times.
_REPEATABLE = ("listen", "milters", "in_master", "allowed_peers", "sandbox_read", "sandbox_write")

# The options for `Limits`, with their types and help texts.
_LIMITS: Mapping[str, tuple[Any, str]] = {
    "command_deadline": (
        _SECONDS,
        "Seconds in which a milter must answer a command before end of message; then --on-error.",
    ),
    "eom_deadline": (
        _SECONDS,
        "Seconds in which a milter must answer at end of message, with the time in the queue;"
        " then --on-error, and its worker is killed.",
    ),
    "queue_wait": (_SECONDS, "Seconds that a message may wait for a worker; then it gets 451."),
    "max_queue": (
        click.IntRange(min=0),
        "Messages that may wait for a worker at a time; more get 451.",
    ),
    "reserve": (
        click.IntRange(min=0),
        "Number of workers that run no heavy callbacks, so that light ones need not wait.",
    ),
    "max_messages": (
        click.IntRange(min=0),
        "Replace a worker after this number of answers; 0: never.",
    ),
    "worker_lifetime": (
        Seconds(min=0),
        "Replace a worker after this number of seconds; 0: never.",
    ),
    "worker_max_rss": (
        click.IntRange(min=0),
        "Replace a worker whose resident memory exceeds this number of bytes; 0: never.",
    ),
    "max_connections": (_COUNT, "MTA connections at a time; more are refused with 451."),
    "max_inflight_bytes": (
        _COUNT,
        "Bytes of memory for messages in progress; above it new messages get 452.",
    ),
    "retries": (
        click.IntRange(min=0),
        "How often a message is scanned again after its worker died; then --on-error.",
    ),
    "worker_start_timeout": (
        _SECONDS,
        "Seconds in which a worker must import the milter; then it is killed.",
    ),
    "idle_timeout": (
        _SECONDS,
        "Close an MTA connection on which nothing has arrived for this number of seconds.",
    ),
    "graceful_timeout": (
        _SECONDS,
        "Seconds that open sessions may go on after TERM; then they get 451.",
    ),
    "progress_interval": (
        _SECONDS,
        "Seconds between two PROGRESS replies to an MTA that waits for a verdict.",
    ),
    "max_data_size": (
        click.Choice(tuple(DATA_SIZES)),
        "Bytes of the largest packets, if the MTA offers more than 64K (smfi_setmaxdatasize).",
    ),
    "max_message_size": (
        _COUNT,
        "Bytes of the largest message, with envelope and macros; larger ones get 552.",
    ),
}


def _limit_option(name: str) -> Callable[[F], F]:
    kind, text = _LIMITS[name]
    return click.option(
        f"--{name.replace('_', '-')}",
        type=kind,
        default=getattr(Limits, name),
        show_default=True,
        help=text,
    )


OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.argument(
        "milters",
        metavar="[MILTER]...",
        nargs=-1,
        callback=lambda context, param, value: _milters(context, param, value),
        envvar=f"{ENVIRONMENT_PREFIX}_MILTERS",
    ),
    click.option(
        "--listen",
        type=Parsed("socket", parse_listen),
        multiple=True,
        show_default=f"the script's, or {DEFAULT_LISTEN}",
        metavar="SOCKET",
        help="Socket for MTAs: inet:PORT@HOST, inet:HOST:PORT or unix:/PATH. May be given several"
        " times.",
    ),
    click.option(
        "--in-master",
        type=_MILTER,
        multiple=True,
        metavar="MILTER",
        help="A light, asynchronous milter that runs in the master. Its functions are called"
        " before those in the workers. May be given several times.",
    ),
    click.option(
        "--workers",
        type=_COUNT,
        default=usable_cpus,
        show_default="one for each usable CPU",
        help="Number of worker processes.",
    ),
    click.option(
        "--scanner-rules",
        metavar="DIR",
        type=click.Path(),
        help="Directory with YARA rules (*.yar) for the content scanner, in addition to its own.",
    ),
    click.option(
        "--socket-mode",
        type=OctalMode(),
        default=DEFAULT_SOCKET_MODE,
        show_default=True,
        help="Permissions of a UNIX socket.",
    ),
    click.option(
        "--socket-group",
        default="",
        metavar="GROUP",
        help="Group of a UNIX socket, for example postfix.",
    ),
    click.option(
        "--user",
        default="",
        metavar="USER",
        help="If started as root, run master and workers as this user (name or number). The"
        " sockets are bound before that.",
    ),
    click.option(
        "--group",
        default="",
        metavar="GROUP",
        help="Group of --user (name or number). By default the user's own group.",
    ),
    click.option(
        "--allow-root",
        is_flag=True,
        help="Allow --pymilter and the content scanner to run as root.",
    ),
    click.option(
        "--allowed-peers",
        type=Parsed("peers", parse_peers),
        multiple=True,
        metavar="PEER,...",
        help="Peers that may connect: networks (192.0.2.0/24, ::1) to inet: sockets, user:NAME"
        " and group:NAME to UNIX sockets. All others get 451. May be given several times.",
    ),
    click.option(
        "--on-error",
        type=click.Choice(CHOICES),
        default="tempfail",
        show_default=True,
        help="Verdict on a message on which a milter fails.",
    ),
    click.option(
        "--on-poison",
        type=click.Choice(CHOICES),
        default="tempfail",
        show_default=True,
        help="Verdict on a message that has killed two workers.",
    ),
    click.option(
        "--keep-dir",
        type=click.Path(exists=True, file_okay=False, writable=True),
        metavar="DIR",
        help="Directory for copies of messages that have killed two workers. By default no copy"
        " is kept.",
    ),
    click.option(
        "--keep-quota",
        type=click.IntRange(min=0),
        default=KEEP_QUOTA,
        show_default=True,
        help="Disk quota of --keep-dir, in bytes.",
    ),
    click.option(
        "--join-retries",
        is_flag=True,
        help="If a client sends a message again whose scan has run for 10 s, give the second one"
        " the verdict of that scan. The milter then has only the queue id of the first.",
    ),
    *map(_limit_option, _LIMITS),
    click.option(
        "--cpu-affinity",
        type=CpuList(),
        default="none",
        show_default=True,
        help="CPUs for workers: none (no pinning), spread (over all CPUs), or a list such as"
        " 0-3,8.",
    ),
    click.option(
        "--nice",
        type=click.IntRange(0, 19),
        default=0,
        show_default=True,
        help="Niceness that is added to workers; a higher number gives them less CPU time.",
    ),
    click.option(
        "--worker-memory-limit",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Hard limit on the address space of a worker, in bytes; 0: no limit.",
    ),
    click.option(
        "--sandbox",
        type=click.Choice(SANDBOXES),
        default="auto",
        show_default=True,
        help="Sandbox the workers after their milters are imported. auto: only for the content"
        " scanner and milters that opt in, with what the kernel supports. on: all workers; the"
        " service does not start if the kernel cannot do it.",
    ),
    *(
        click.option(
            f"--sandbox-{word}",
            type=click.Path(exists=True, resolve_path=True),
            multiple=True,
            metavar="PATH",
            help=f"File or folder that sandboxed workers may {text}. May be given several times.",
        )
        for word, text in (("read", "read"), ("write", "read and write"))
    ),
    click.option(
        "--sandbox-allow",
        type=WordList(SANDBOX_ALLOW),
        default=(),
        metavar="WORDS",
        help="Permissions of sandboxed workers: network (IP, no UNIX sockets), subprocess, or"
        " both with a comma.",
    ),
    click.option(
        "--log-level",
        type=click.Choice(LEVELS),
        default="info",
        show_default=True,
        help="Minimum severity of logged messages.",
    ),
    click.option(
        "--ready-fd",
        type=click.IntRange(min=0),
        metavar="N",
        help="Write a newline to this file descriptor when the service is ready.",
    ),
    click.option(
        "--config",
        type=click.Path(),
        metavar="FILE",
        is_eager=True,
        expose_value=False,
        callback=lambda context, _, path: _use_file(context, path),
        help="TOML file with any of these options.",
    ),
    # Eager, because it decides what the arguments mean; after --config, which may set it.
    click.option(
        "--pymilter",
        type=click.Path(),
        metavar="FILE",
        is_eager=True,
        help="An existing pymilter script. It runs unmodified in every worker.",
    ),
)


def _milters(
    context: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...]:
    """Check the milters. With --pymilter they are the script's arguments and are not checked."""
    if context.params.get("pymilter"):
        return values
    return tuple(_MILTER.convert(value, param, context) for value in values)


def with_options(command: F) -> F:
    """Decorate a click command with all options."""
    return reduce(lambda decorated, option: option(decorated), reversed(OPTIONS), command)


def settings_from(values: Mapping[str, Any]) -> Settings:
    """Return the settings from the values of a command that is decorated by `with_options`."""
    limits = Limits(
        **{field.name: values[field.name] for field in fields(Limits) if field.name in values}
    )
    rest = {field.name: values[field.name] for field in fields(Settings) if field.name in values}
    if not rest["listen"] and not rest["pymilter"]:
        rest["listen"] = (parse_listen(DEFAULT_LISTEN),)
    rest["allowed_peers"] = Peers.union(rest["allowed_peers"])
    return Settings(limits=limits, **rest)


def _use_file(context: click.Context, path: str | None) -> None:
    if path is None:
        return
    params = context.command.params
    known = {param.name for param in params if param.name and param.expose_value}
    context.default_map = read_file(path, known)
    context.meta[__name__] = path


def config_file() -> str | None:
    """Return the path that --config gave to the running command; None if there is none."""
    context = click.get_current_context(silent=True)
    return None if context is None else context.meta.get(__name__)


def read_file(path: str, known: set[str]) -> dict[str, Any]:
    """Return the options of a TOML file by parameter name.

    Raise ConfigError, which names the file and the key, if the file cannot be read or a key is not
    in `known`.
    """
    try:
        with open(path, "rb") as file:
            tables = tomllib.loads(_MODE.sub(r'\1"\2"', file.read().decode()))
    except OSError as error:
        raise ConfigError(f"configuration file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {path}: {error}") from None
    values: dict[str, Any] = {}
    for key, value in tables.items():
        nested = value.items() if isinstance(value, dict) else [("", value)]
        for inner, setting in nested:
            words = [word for word in (key, inner) if word]
            name = "_".join(words).replace("-", "_")
            place = f"configuration file {path}: {'.'.join(words)}"
            if name not in known:
                raise ConfigError(f"{place} is an unknown key")
            values[name] = _as_typed(name, setting, place)
    return values


def _as_typed(name: str, setting: Any, place: str) -> Any:
    """Return a setting as it would be typed on the command line, so that the same checks apply."""
    settings = setting if isinstance(setting, list) else [setting]
    if any(isinstance(each, list | dict) for each in settings) or not settings:
        raise ConfigError(
            f"{place} = {setting!r} is not a string, number, boolean or list of these"
        )
    if name in _REPEATABLE:
        return [str(each) for each in settings]
    if len(settings) > 1:
        raise ConfigError(f"{place} = {setting!r} has more than one value")
    return str(settings[0])


def origin_of(error: click.UsageError) -> str:
    """Return where a bad value came from: the file, `environment`, or "" for the command line."""
    if not isinstance(error, click.BadParameter) or error.ctx is None or error.param is None:
        return ""
    source = error.ctx.get_parameter_source(error.param.name or "")
    if source is ParameterSource.DEFAULT_MAP:
        return f"configuration file {error.ctx.meta[__name__]}"
    return "environment" if source is ParameterSource.ENVIRONMENT else ""
