"""The MTA's macros by stage, as smfi_getsymval finds them.

The value of a later stage hides that of an earlier one. When a stage comes again, the macros of all
later stages are removed.
"""

from __future__ import annotations

from sharded_milter.api.values import other_spelling
from sharded_milter.protocol.commands import Macro

# libmilter's search order since 8.17.2 (before, end of headers came before end of message).
_ORDER = "ENTRMHC"

# The stages whose macros are removed when a command comes, by the command's letter.
_FORGETS = {
    ord("C"): "HMRTNE",
    ord("H"): "MRTNE",
    ord("M"): "RTNE",
    ord("R"): "TNE",
}


class Symbols:
    """The macros that are visible now."""

    def __init__(self) -> None:
        self._stages: dict[str, dict[str, str]] = {}

    def add(self, payload: bytes) -> None:
        """Set all macros of a stage from the payload of a macro packet."""
        macro = Macro.parse(payload)
        self._stages[macro.stage] = dict(macro.pairs)

    def forget_later(self, command: int) -> None:
        """Remove the macros of the stages after the command with this letter."""
        for stage in _FORGETS.get(command, ""):
            self._stages.pop(stage, None)

    def get(self, name: str) -> str | None:
        """Return the value of a macro, or None. Braces around one character do not matter."""
        other = other_spelling(name)
        for stage in _ORDER:
            values = self._stages.get(stage)
            if values:
                value = values.get(name, values.get(other))
                if value is not None:
                    return value
        return None
