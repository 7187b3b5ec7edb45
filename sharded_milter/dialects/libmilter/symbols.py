"""The MTA's macros, by stage, as smfi_getsymval finds them: what a later stage said hides what an
earlier one did, and a stage that begins anew forgets what came behind it.
"""

from __future__ import annotations

from sharded_milter.api.values import other_spelling
from sharded_milter.protocol.commands import Macro

# libmilter's search order (from 8.17.2 on; before, end of headers came before end of message).
_ORDER = "ENTRMHC"

# The stages whose macros are of no use any more when another is reached.
_FORGETS = {
    ord("C"): "HMRTNE",
    ord("H"): "MRTNE",
    ord("M"): "RTNE",
    ord("R"): "TNE",
}


class Symbols:
    """The macros that can be seen now."""

    def __init__(self) -> None:
        self._stages: dict[str, dict[str, str]] = {}

    def add(self, payload: bytes) -> None:
        """The payload of a macro packet: all macros of its stage."""
        macro = Macro.parse(payload)
        self._stages[macro.stage] = dict(macro.pairs)

    def forget_later(self, command: int) -> None:
        """The command with this letter has come, behind its macros."""
        for stage in _FORGETS.get(command, ""):
            self._stages.pop(stage, None)

    def get(self, name: str) -> str | None:
        """The value of a macro; a name of one character is found with and without braces."""
        other = other_spelling(name)
        for stage in _ORDER:
            values = self._stages.get(stage)
            if values:
                value = values.get(name, values.get(other))
                if value is not None:
                    return value
        return None
