"""The configuration: one table of options, each also a key in the file and a variable.

Defaults < file < environment < command line. The file is TOML; a key is the option's name
without its dashes (`eom-deadline = 60`), and one of a table is joined to the table's name
(`[scanner] rules = "/etc/rules"` is `--scanner-rules`). The file is long because the table is.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from sharded_milter.dialects.spec import checked_spec
from sharded_milter.dispatch.policy import CHOICES
from sharded_milter.errors import ConfigError, UsageError
from sharded_milter.limits import Limits
from sharded_milter.mta.addresses import ListenAddress, parse_listen
from sharded_milter.mta.peers import Peers, parse_peers
from sharded_milter.ops.cpus import usable_cpus
from sharded_milter.ops.logs import LEVELS
from sharded_milter.protocol.negotiation import DATA_SIZES

ENVIRONMENT_PREFIX = "SHARDED_MILTER"
DEFAULT_LISTEN = "inet:8890@127.0.0.1"
DEFAULT_SOCKET_MODE = "660"

F = TypeVar("F", bound=Callable[..., Any])

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # older versions of click have no generic one


@dataclass(frozen=True)
class Settings:
    """Everything an operator can say, checked."""

    milters: tuple[str, ...]  # or the arguments of the script
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


class OctalMode(ParamType):
    """File permissions, as chmod takes them: 660, 0660 or 0o660."""

    name = "mode"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            mode = int(value, 8)
        except ValueError:
            mode = -1
        if not 0 <= mode <= 0o777:
            self.fail(
                f"{value!r} is not an octal mode from 0 to 777; write 660, 0660 or 0o660",
                param,
                ctx,
            )
        return mode


class CpuList(ParamType):
    """`none`, `spread` (all that this process may use), or CPU numbers as taskset takes them."""

    name = "cpus"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if value == "none":
            return ()
        usable = sorted(os.sched_getaffinity(0))
        if value == "spread":
            return tuple(usable)
        try:
            ranges = [piece.partition("-") for piece in str(value).split(",")]
            cpus = [n for a, dash, b in ranges for n in range(int(a), int(b if dash else a) + 1)]
        except ValueError:
            cpus = []
        if not cpus or not set(cpus) <= set(usable):
            self.fail(f"{value!r} is not a list of CPUs out of {usable}", param, ctx)
        return tuple(cpus)


class WordList(ParamType):
    """WordList out of a list, with commas between them."""

    name = "words"

    def __init__(self, known: tuple[str, ...]) -> None:
        self._known = known

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        words = tuple(dict.fromkeys(word.strip() for word in str(value).split(",")))
        if not set(words) <= set(self._known):
            known = " or ".join(self._known)
            self.fail(f"{value!r} is not {known}, or several with commas", param, ctx)
        return words


# How workers are shut in, and what can be allowed to them there.
SANDBOXES = ("auto", "on", "off")
SANDBOX_ALLOW = ("network", "subprocess")

# Copies of poisonous messages: a dozen large ones.
KEEP_QUOTA = 256 * 1024 * 1024


class Seconds(click.FloatRange):
    """A time that ends."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return seconds


class Parsed(ParamType):
    """What `parse` understands, or refuses with a UsageError."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._parse(str(value))
        except UsageError as error:
            self.fail(str(error), param, ctx)


_MILTER = Parsed("milter", checked_spec)
_SECONDS = Seconds(min=0, min_open=True)
_COUNT = click.IntRange(min=1)

# TOML reads 0o660 as the number 432, refuses 0660, and means 660 by 660; chmod means the same by
# all three. So a mode's digits are read as a string: only a number with a leading 0 needs that.
_MODE = re.compile(
    r"""((?:^|[{,])[ \t]*["']?(?:socket["']?[-_.]["']?)?mode["']?[ \t]*=[ \t]*)(0\w+)""",
    re.MULTILINE,
)

# What may be given several times.
_REPEATABLE = ("listen", "milters", "in_master", "allowed_peers", "sandbox_read", "sandbox_write")

# The limits that an operator may set, with what they mean.
_LIMITS: Mapping[str, tuple[Any, str]] = {
    "command_deadline": (_SECONDS, "Seconds for the answer to a command before the content."),
    "eom_deadline": (_SECONDS, "Seconds for the answer to a whole message."),
    "queue_wait": (_SECONDS, "Seconds that a message may wait for a worker."),
    "max_queue": (click.IntRange(min=0), "How many messages may wait for a worker."),
    "reserve": (click.IntRange(min=0), "Workers that large scans leave to light callbacks."),
    "max_messages": (click.IntRange(min=0), "Answers after which a worker is replaced; 0: never."),
    "worker_lifetime": (
        Seconds(min=0),
        "Seconds after which a worker is replaced; 0: never.",
    ),
    "worker_max_rss": (
        click.IntRange(min=0),
        "Bytes of memory above which a worker is replaced; 0: never.",
    ),
    "max_connections": (_COUNT, "MTA connections at a time; more are told to come back."),
    "max_inflight_bytes": (_COUNT, "Bytes held for MTAs; above it new messages get a 452."),
    "retries": (click.IntRange(min=0), "How often a message goes on when its worker died."),
    "worker_start_timeout": (_SECONDS, "Seconds for a worker to import the milter."),
    "idle_timeout": (_SECONDS, "Seconds after which a silent MTA connection is closed."),
    "graceful_timeout": (_SECONDS, "Seconds for open sessions to end on TERM."),
    "progress_interval": (_SECONDS, "Seconds between signs of life to a waiting MTA."),
    "max_data_size": (
        click.Choice(tuple(DATA_SIZES)),
        "Bytes of the largest packets, if the MTA offers more than 64K (smfi_setmaxdatasize).",
    ),
    "max_message_size": (
        _COUNT,
        "Bytes of the largest message, with envelope and macros; more gets a 552.",
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
        show_default=f"that of the script, or {DEFAULT_LISTEN}",
        metavar="SOCKET",
        help="inet:PORT@HOST, inet:HOST:PORT or unix:/PATH; may be given several times.",
    ),
    click.option(
        "--in-master",
        type=_MILTER,
        multiple=True,
        metavar="MILTER",
        help="A light, asynchronous milter that runs in the master, before those in the workers;"
        " may be given several times.",
    ),
    click.option(
        "--workers",
        type=_COUNT,
        default=usable_cpus,
        show_default="the CPUs it may use",
        help="Worker processes.",
    ),
    click.option(
        "--scanner-rules",
        metavar="DIR",
        type=click.Path(),
        help="A directory of YARA rules (*.yar) for the content scanner, beside its own.",
    ),
    click.option(
        "--socket-mode",
        type=OctalMode(),
        default=DEFAULT_SOCKET_MODE,
        show_default=True,
        help="Permissions of a UNIX socket.",
    ),
    click.option(
        "--socket-group", default="", metavar="GROUP", help="Group of a UNIX socket: postfix."
    ),
    click.option(
        "--user",
        default="",
        metavar="USER",
        help="Whom master and workers run as, by name or number, when the service is started as"
        " root: it binds its sockets first.",
    ),
    click.option(
        "--group",
        default="",
        metavar="GROUP",
        help="That user's group, by name or number; its own by default.",
    ),
    click.option(
        "--allow-root",
        is_flag=True,
        help="Run --pymilter and the content scanner as root too.",
    ),
    click.option(
        "--allowed-peers",
        type=Parsed("peers", parse_peers),
        multiple=True,
        metavar="PEER,...",
        help="Who may connect: networks (192.0.2.0/24, ::1) to inet: sockets, user:NAME and"
        " group:NAME to UNIX sockets; all others hear 451. May be given several times.",
    ),
    click.option(
        "--on-error",
        type=click.Choice(CHOICES),
        default="tempfail",
        show_default=True,
        help="What the MTA hears when a milter fails on a message.",
    ),
    click.option(
        "--on-poison",
        type=click.Choice(CHOICES),
        default="tempfail",
        show_default=True,
        help="What the MTA hears about a message that has killed two workers.",
    ),
    click.option(
        "--keep-dir",
        type=click.Path(exists=True, file_okay=False, writable=True),
        metavar="DIR",
        help="Where copies of such messages are kept; none by default.",
    ),
    click.option(
        "--keep-quota",
        type=click.IntRange(min=0),
        default=KEEP_QUOTA,
        show_default=True,
        help="Bytes of all copies.",
    ),
    click.option(
        "--join-retries",
        is_flag=True,
        help="When a client repeats a message whose scan has run for 10 s, the repeat waits for"
        " that scan's answer. The milter then saw only the first one's queue id.",
    ),
    *map(_limit_option, _LIMITS),
    click.option(
        "--cpu-affinity",
        type=CpuList(),
        default="none",
        show_default=True,
        help="Pin workers to CPUs: none, spread, or a list such as 0-3,8.",
    ),
    click.option(
        "--nice",
        type=click.IntRange(0, 19),
        default=0,
        show_default=True,
        help="How much lower the priority of workers is.",
    ),
    click.option(
        "--worker-memory-limit",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Bytes of address space of a worker, a hard limit; 0: none.",
    ),
    click.option(
        "--sandbox",
        type=click.Choice(SANDBOXES),
        default="auto",
        show_default=True,
        help="Shut workers in once their milters are imported. auto: those of the content scanner"
        " and of milters that opt in, as far as the machine can; on: all, or do not start.",
    ),
    *(
        click.option(
            f"--sandbox-{word}",
            type=click.Path(exists=True, resolve_path=True),
            multiple=True,
            metavar="PATH",
            help=f"A file or folder that sandboxed workers may {text}; may be given several times.",
        )
        for word, text in (("read", "read"), ("write", "read and write"))
    ),
    click.option(
        "--sandbox-allow",
        type=WordList(SANDBOX_ALLOW),
        default=(),
        metavar="WORDS",
        help="What sandboxed workers may use: network (IP, no UNIX sockets), subprocess, or both"
        " with a comma.",
    ),
    click.option(
        "--log-level",
        type=click.Choice(LEVELS),
        default="info",
        show_default=True,
        help="The least severe messages that are logged.",
    ),
    click.option(
        "--ready-fd",
        type=click.IntRange(min=0),
        metavar="N",
        help="Write a newline to this descriptor when the service is ready.",
    ),
    click.option(
        "--config",
        type=click.Path(),
        metavar="FILE",
        is_eager=True,
        expose_value=False,
        callback=lambda context, _, path: _use_file(context, path),
        help="A TOML file with any of these options.",
    ),
    # Eager, because what the arguments are depends on it; behind --config, which may set it.
    click.option(
        "--pymilter",
        type=click.Path(),
        metavar="FILE",
        is_eager=True,
        help="An existing pymilter script, which runs unmodified in every worker.",
    ),
)


def _milters(
    context: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...]:
    """The milters, checked; with --pymilter these are the script's arguments, whatever they are."""
    if context.params.get("pymilter"):
        return values
    return tuple(_MILTER.convert(value, param, context) for value in values)


def with_options(command: F) -> F:
    """Decorates a click command so that it is called with all options."""
    return reduce(lambda decorated, option: option(decorated), reversed(OPTIONS), command)


def settings_from(values: Mapping[str, Any]) -> Settings:
    """The settings of the values that a command `with_options` got."""
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
    """The file that --config names, within the command that has read it."""
    context = click.get_current_context(silent=True)
    return None if context is None else context.meta.get(__name__)


def read_file(path: str, known: set[str]) -> dict[str, Any]:
    """The options in a TOML file by parameter name.

    Raises ConfigError, naming the file and the key, for what cannot be read or is not `known`.
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
    """A setting as an operator would type it, so that a file is read as strictly."""
    settings = setting if isinstance(setting, list) else [setting]
    if any(isinstance(each, list | dict) for each in settings) or not settings:
        raise ConfigError(f"{place} = {setting!r} is not a value")
    if name in _REPEATABLE:
        return [str(each) for each in settings]
    if len(settings) > 1:
        raise ConfigError(f"{place} can have one value only")
    return str(settings[0])


def origin_of(error: click.UsageError) -> str:
    """Where a bad value came from: a file's name, `environment`, or empty for the command line."""
    if not isinstance(error, click.BadParameter) or error.ctx is None or error.param is None:
        return ""
    source = error.ctx.get_parameter_source(error.param.name or "")
    if source is ParameterSource.DEFAULT_MAP:
        return f"configuration file {error.ctx.meta[__name__]}"
    return "environment" if source is ParameterSource.ENVIRONMENT else ""
