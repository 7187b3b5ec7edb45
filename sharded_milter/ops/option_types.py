"""The types of the options: each converts the text of a value, or fails with a usage error."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from sharded_milter.errors import UsageError

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # older versions of click have no generic one


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
    """`none`, `spread` (all CPUs that this process may use), or a list of CPUs such as 0-3,8."""

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
            self.fail(
                f"{value!r} is not none, spread or a list such as 0-3,8 of the CPUs {usable}",
                param,
                ctx,
            )
        return tuple(cpus)


class WordList(ParamType):
    """Words from a list, separated by commas."""

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
            self.fail(f"{value!r} is not {known}, or both with a comma", param, ctx)
        return words


class Seconds(click.FloatRange):
    """A finite number of seconds."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return seconds


class Parsed(ParamType):
    """A value that `parse` converts; it raises UsageError for a bad one."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._parse(str(value))
        except UsageError as error:
            self.fail(str(error), param, ctx)
