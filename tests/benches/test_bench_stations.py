"""What a message passes: which functions are stations, and that the real master is counted."""

from __future__ import annotations

from bench.stations import measured, way

READ = ("p.connection", "Connection.read")
CUT = ("p.connection", "Connection.cut")
TAKE = ("p.conversation", "Conversation.take")
SPLIT = ("p.text", "split")
TICK = ("p.pool", "Pool.tick")


def test_a_station_is_called_from_outside_and_calls_another_module() -> None:
    passed = way(
        [(None, READ, 10), (READ, CUT, 20), (CUT, TAKE, 10), (READ, SPLIT, 10), (TAKE, SPLIT, 10)],
        10,
    )
    assert passed.stations == {READ, TAKE}  # nobody else calls CUT, and SPLIT calls nobody
    assert passed.functions == {READ: 1, CUT: 2, TAKE: 1, SPLIT: 2}
    assert (passed.calls, len(passed.modules)) == (6, 3)


def test_what_few_messages_pass_is_no_part_of_their_way() -> None:
    passed = way([(None, READ, 10), (READ, SPLIT, 10), (None, TICK, 1), (TICK, SPLIT, 1)], 10)
    assert passed.stations == {READ}
    assert passed.modules == {"p.connection", "p.text"}
    assert passed.calls == 2.2


def test_functions_are_listed_by_module_in_the_order_of_their_first_call() -> None:
    passed = way([(None, READ, 10), (READ, TAKE, 10), (TAKE, SPLIT, 5), (READ, CUT, 20)], 10)
    assert list(passed.lines()) == [
        "p.connection",
        "    1.00 * Connection.read",
        "    2.00   Connection.cut",
        "p.conversation",
        "    1.00 * Conversation.take",
        "p.text",
        "    0.50   split",
    ]


def test_the_calls_of_the_real_master_are_counted() -> None:
    messages = 40
    passed = measured(messages, warm_up=40)
    regular = [calls for calls in passed.functions.values() if calls > 0.5]
    assert sum(calls.is_integer() for calls in regular) > 0.9 * len(regular)
    assert 0 < len(passed.stations) < len(regular)
    assert len(passed.modules) > 1
