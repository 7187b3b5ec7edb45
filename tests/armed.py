"""What a clock would still do."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import Clock

from sharded_milter.alarms import Alarm


def armed(clock: Clock) -> list[Any]:
    """The calls that would have an effect; an alarm that nothing is set for has none."""
    return [call for call in clock.getDelayedCalls() if not _is_idle(getattr(call, "func", None))]


def _is_idle(function: Any) -> bool:
    alarm = getattr(function, "__self__", None)
    return isinstance(alarm, Alarm) and not alarm._due
