"""A chain asks the MTA for exactly what its milters need: the bytes of our OPTNEG reply.

What is expected is worked out here anew, stage by stage, from the words of the documents.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from itertools import combinations, product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport

from sharded_milter import Milter as Functions
from sharded_milter.embedded import Milter, MilterProtocolFactory
from sharded_milter.protocol.commands import Negotiate

FUNCTIONS = ("connect", "helo", "mail", "rcpt", "data", "eoh", "eom", "unknown")
CALLBACKS = ("connect", "helo", "envfrom", "envrcpt", "data", "unknown", "header", "eoh", "body",
             "eom", "abort", "close")  # fmt: skip

#: NO and NR bit of each command, from mfdef.h.
NO = {"connect": 0x1, "helo": 0x2, "mail": 0x4, "rcpt": 0x8, "body": 0x10, "header": 0x20,
      "eoh": 0x40, "unknown": 0x100, "data": 0x200}  # fmt: skip
NR = {"header": 0x80, "connect": 0x1000, "helo": 0x2000, "mail": 0x4000, "rcpt": 0x8000,
      "data": 0x10000, "unknown": 0x20000, "eoh": 0x40000, "body": 0x80000}  # fmt: skip
LEADSPC = 0x100000

#: What a function's arguments are made of.
SEEN = {
    "connect": {"connect"},
    "helo": {"connect", "helo"},
    "mail": {"connect", "helo", "mail"},
    "rcpt": {"connect", "helo", "mail", "rcpt"},
    "data": {"connect", "helo", "mail", "rcpt", "data"},
    "eoh": {"connect", "helo", "mail", "rcpt", "header", "eoh"},
    "eom": {"connect", "helo", "mail", "rcpt", "header", "body"},
    "unknown": {"connect", "helo", "unknown"},
}
COMMAND = {"envfrom": "mail", "envrcpt": "rcpt"}
FUNCTION_ACTIONS = OBJECT_ACTIONS = 0xFF


def functions(stages: tuple[str, ...]) -> Functions:
    milter = Functions("functions")
    for stage in stages:
        getattr(milter, stage)(lambda *_: None)
    return milter


def coroutines(stages: tuple[str, ...]) -> Functions:
    async def nothing(*_: object) -> None: ...

    milter = Functions("coroutines")
    for stage in stages:
        getattr(milter, stage)(nothing)
    return milter


def objects(callbacks: tuple[str, ...]) -> type[Milter]:
    def callback(self: Milter, *_: object) -> Any:
        return self.ReturnCodes.CONTINUE

    return type("Objects", (Milter,), {f"xxfi_{name}": callback for name in callbacks})


# The stages of functions, of an object and of coroutines; a part that is empty is not there.
Cell = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]


def milters(first: tuple[str, ...], second: tuple[str, ...], third: tuple[str, ...]) -> list[Any]:
    """Those of a cell."""
    makers: list[tuple[Callable[..., Any], tuple[str, ...]]]
    makers = [(functions, first), (objects, second), (coroutines, third)]
    return [make(stages) for make, stages in makers if stages]


def reply(*milters: Any) -> bytes:
    """What the MTA is answered to an offer of everything."""
    factory = MilterProtocolFactory(list(milters), reactor=Clock())
    connection, transport = factory.buildProtocol(None), StringTransport()
    connection.makeConnection(transport)  # type: ignore[no-untyped-call]
    connection.dataReceived(struct.pack(">IcIII", 13, b"O", 6, 0x1FF, 0x1FFFFF))
    written: bytes = transport.value()
    return written


def expected(first: tuple[str, ...], second: tuple[str, ...], third: tuple[str, ...]) -> bytes:
    """What the MTA is to be answered for a cell."""
    seen: set[str] = set()
    answered: set[str] = set()
    actions = 0
    for stages in (first, third):
        seen |= {command for stage in stages for command in SEEN[stage]}
        answered |= set(stages)
        actions |= FUNCTION_ACTIONS if "eom" in stages else 0
    own = {COMMAND.get(name, name) for name in second} - {"abort", "close", "eom"}
    seen |= own
    # An object's verdict on content is given at the end of the message, which is always answered.
    answered |= own - {"header", "eoh", "body"}
    actions |= OBJECT_ACTIONS if "eom" in second else 0
    # Whoever can see or write header fields does so with the blank behind the colon; an object
    # that did not ask for that has it hidden.
    protocol = LEADSPC if "header" in seen or actions else 0
    for command in NO:
        if command not in seen:
            protocol |= NO[command]
        elif command not in answered or (command == "eoh" and "eoh" not in first + third):
            protocol |= NR[command]
    return struct.pack(">IcIII", 13, b"O", 6, actions, protocol)


def subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [chosen for n in range(1, len(names) + 1) for chosen in combinations(names, n)]


def differences(cells: Iterable[Cell]) -> dict[Cell, str]:
    """What is answered where it is not what is expected."""
    found = {}
    for cell in cells:
        try:
            answer = reply(*milters(*cell)).hex()
        except Exception as error:  # it is of one cell, and the others count too
            answer = repr(error)
        wanted = expected(*cell).hex()
        if answer != wanted:
            found[cell] = f"{answer} instead of {wanted}"
    return found


def test_functions_alone() -> None:
    for_each = subsets(FUNCTIONS)
    assert differences((stages, (), ()) for stages in for_each) == {}
    assert differences(((), (), stages) for stages in for_each) == {}


def test_an_object_alone() -> None:
    assert differences(((), callbacks, ()) for callbacks in subsets(CALLBACKS[:10])) == {}


def test_one_stage_each() -> None:
    cells = product(FUNCTIONS, CALLBACKS, FUNCTIONS)
    assert differences(((first,), (second,), (third,)) for first, second, third in cells) == {}


@settings(max_examples=300)
@given(
    *(st.sets(st.sampled_from(names), min_size=1) for names in (FUNCTIONS, CALLBACKS, FUNCTIONS))
)
def test_any_stages_together(first: set[str], second: set[str], third: set[str]) -> None:
    parts = (tuple(first), tuple(second), tuple(third))
    assert reply(*milters(*parts)).hex() == expected(*parts).hex()


def test_without_any_wanted_stage_only_end_of_message_is_sent() -> None:
    everything = sum(NO.values())
    assert reply() == struct.pack(">IcIII", 13, b"O", 6, 0, everything)
    assert reply(Milter) == struct.pack(">IcIII", 13, b"O", 6, 0, everything)


@pytest.mark.parametrize("versions", [(6, 6), (6, 4), (3, 6), (2, 2)])
def test_what_one_of_them_speaks_can_be_spoken(versions: tuple[int, ...]) -> None:
    def of(version: int) -> type[Milter]:
        class Old(Milter):
            def xxfi_negotiate(self, actions: int, protocol: int) -> Any:
                return [self.ReturnCodes.CONTINUE, version, 0, 0]

        return Old

    assert reply(*map(of, versions))[5:9] == struct.pack(">I", max(versions))


def test_macros_are_those_of_all() -> None:
    class Curious(Milter):
        def xxfi_negotiate(self, actions: int, protocol: int) -> Any:
            self.smfi_setsymlist(self.MacroStages.EOM, "{msg_size}, i")
            return super().xxfi_negotiate(actions, protocol)

    other = Functions("f", macros={"eom": ["{auth_authen}"], "connect": ["{client_ptr}"]})
    other.eom(lambda message: None)
    answer = reply(Curious, other)
    words = Negotiate.parse(answer[5:])
    assert words.actions & 0x100
    lists = {number: set(names.split()) for number, names in words.symlists}
    assert set(lists) == {0, 5, 6}  # Sendmail wants 6 beside 5
    assert {"{msg_size}", "{auth_authen}", "i"} <= lists[5]
    assert "{client_ptr}" in lists[0]
