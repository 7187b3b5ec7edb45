"""Milters in this process: in order for each object, within their deadlines, and heard of."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import Any

import pytest
from armed import armed
from one_mta import packed
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs

from sharded_milter.dialects.loader import as_dialect
from sharded_milter.dispatch.affinity import ObjectAffinity
from sharded_milter.dispatch.job import Job
from sharded_milter.embedded import Milter, MilterFactory, ReturnCodes
from sharded_milter.errors import CallbackFailed, DeadlineExceeded, JobFailed, WorkerLost
from sharded_milter.in_master import MAX_BLOCKING, InMaster
from sharded_milter.ipc import memory
from sharded_milter.limits import Limits
from sharded_milter.protocol import commands, replies
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.stages import Stage

CONTINUE, ACCEPT = packed(replies.Continue()), packed(replies.Accept())
OFFER = commands.Negotiate(6, 0x1FF, 0x1FFFFF)
CLIENT = commands.Connect("client", "4", 25, "192.0.2.1")
CONNECTION = packed(OFFER, OFFER, CLIENT)
MESSAGE: list[Packet] = [commands.Mail("<a>"), commands.Rcpt("<b>")]


class Stopwatch:
    """Time as the milter's code spends it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class House:
    """A milter in the master, and what it was called with."""

    def __init__(self, *, replays: bool = False, **callbacks: Any) -> None:
        self.called: list[Any] = []
        self.clock = Clock()
        self.stopwatch = Stopwatch()
        self.counters: Counter[str] = Counter()
        house = self

        class Here(Milter):
            replayable = replays

            def xxfi_abort(self) -> None:
                house.called.append("abort")

            def xxfi_close(self) -> None:
                house.called.append("close")

        for name, callback in callbacks.items():
            setattr(Here, name, callback)
        limits = Limits(command_deadline=20.0, eom_deadline=200.0)
        dialect = as_dialect(Here)
        self.host = InMaster(dialect, limits, self.clock, self.counters, self.stopwatch)
        self.affinity = ObjectAffinity(replayable=replays)
        self.message = b""

    def job(self, stage: Stage | None, *packets: Packet) -> Job:
        self.message += packed(*packets)
        return Job(stage, CONNECTION, memory.packed(self.message), queue_id="1",
                   manifest=self.host.manifest, affinity=self.affinity)  # fmt: skip

    def submit(self, stage: Stage | None, *packets: Packet) -> list[Any]:
        self.latest = self.job(stage, *packets)
        return self.take(self.latest)

    def take(self, job: Job) -> list[Any]:
        """What the job ends with, at once or later."""
        ended: list[Any] = []
        try:
            answer = self.host.submit(job)
        except JobFailed as error:
            return [error]
        if isinstance(answer, bytes):
            return [answer]
        assert not answer.called
        answer.addCallbacks(ended.append, lambda failure: ended.append(failure.value))
        return ended

    def message_over(self) -> None:
        self.affinity.end_message()
        self.message = b""


def waiting(called: list[Any], answers: list[Deferred[Any]]) -> Any:
    """A callback that answers when the test says so."""

    async def callback(self: Milter, *arguments: Any) -> Any:
        called.append(arguments)
        answers.append(Deferred())
        return await answers[-1]

    return callback


def test_a_callback_is_called_with_what_the_mta_said() -> None:
    calls: list[Any] = []

    def helo(self: Milter, name: str) -> ReturnCodes:
        calls.append(name)
        return ReturnCodes.ACCEPT

    house = House(xxfi_helo=helo)
    job = house.job(Stage.HELO)
    job.connection = CONNECTION + packed(commands.Helo("me"))
    assert (house.take(job), calls) == ([ACCEPT], ["me"])
    assert armed(house.clock) == []


def test_an_object_is_not_called_again_before_it_has_answered() -> None:
    called: list[Any] = []
    answers: list[Deferred[Any]] = []
    house = House(xxfi_envrcpt=waiting(called, answers))
    first = house.submit(Stage.RCPT, *MESSAGE)
    second = house.submit(Stage.RCPT, commands.Rcpt("<c>"))
    assert called == [(("<b>",),)]
    answers[0].callback(ReturnCodes.CONTINUE)
    assert (first, second) == ([CONTINUE], [])
    assert called == [(("<b>",),), (("<c>",),)]
    answers[1].callback(ReturnCodes.ACCEPT)
    assert second == [ACCEPT]


def test_two_connections_do_not_wait_for_each_other() -> None:
    called: list[Any] = []
    answers: list[Deferred[Any]] = []
    house = House(xxfi_envrcpt=waiting(called, answers))
    first = house.submit(Stage.RCPT, *MESSAGE)
    house.affinity = ObjectAffinity(replayable=False)
    second = house.submit(Stage.RCPT)
    answers[1].callback(ReturnCodes.CONTINUE)
    assert (first, second) == ([], [CONTINUE])


def test_an_object_finishes_a_cancelled_job_before_the_next_one() -> None:
    called: list[Any] = []
    answers: list[Deferred[Any]] = []
    house = House(xxfi_envrcpt=waiting(called, answers))
    first = house.submit(Stage.RCPT, *MESSAGE)
    house.host.cancel(house.latest)
    house.message_over()
    second = house.submit(Stage.RCPT, *MESSAGE)
    assert house.called == []
    answers[0].callback(ReturnCodes.CONTINUE)
    assert first == []  # whoever asked has left
    assert house.called == ["abort"]
    answers[1].callback(ReturnCodes.CONTINUE)
    assert second == [CONTINUE]


def test_a_question_that_is_cancelled_while_it_waits_is_never_asked() -> None:
    called: list[Any] = []
    answers: list[Deferred[Any]] = []
    house = House(xxfi_envrcpt=waiting(called, answers))
    house.submit(Stage.RCPT, *MESSAGE)
    house.submit(Stage.RCPT, commands.Rcpt("<c>"))
    house.host.cancel(house.latest)
    answers[0].callback(ReturnCodes.CONTINUE)
    assert called == [(("<b>",),)]
    assert armed(house.clock) == []


def test_at_the_deadline_the_job_fails_and_the_coroutine_is_cancelled() -> None:
    called: list[Any] = []
    answers: list[Deferred[Any]] = []
    house = House(xxfi_envrcpt=waiting(called, answers))
    first = house.submit(Stage.RCPT, *MESSAGE)
    second = house.submit(Stage.RCPT, commands.Rcpt("<c>"))
    house.clock.advance(20.0)
    assert [type(error) for error in first + second] == [DeadlineExceeded, DeadlineExceeded]
    assert "qid=1 was not answered within 20 s by Here" in str(first[0])
    assert house.counters["deadlines"] == 2
    third = house.submit(Stage.RCPT, commands.Rcpt("<d>"))
    assert called[-1] == (("<d>",),)
    answers[-1].callback(ReturnCodes.CONTINUE)
    assert third == [CONTINUE]


def stubborn(called: list[Any], answers: list[Deferred[Any]]) -> Any:
    """A callback that goes on waiting when it is cancelled, until the test answers."""

    async def callback(self: Milter, *arguments: Any) -> Any:
        called.append(arguments)
        answer: Deferred[Any] = Deferred()
        answers.append(answer)
        told: list[Any] = []
        waiting: Deferred[None] = Deferred()

        def note(value: Any) -> None:
            told.append(value)
            waiting.callback(None)

        answer.addCallback(note)
        while not told:
            waiting = Deferred()
            with suppress(CancelledError):
                await waiting
        return told[0]

    return callback


def test_an_object_that_is_given_up_costs_its_message_and_is_not_rebuilt_within_it() -> None:
    called: list[Any] = []
    answers: list[Deferred[Any]] = []
    house = House(xxfi_envrcpt=stubborn(called, answers))
    given_up = house.submit(Stage.RCPT, *MESSAGE)
    house.clock.advance(20.0)
    assert [type(error) for error in given_up] == [DeadlineExceeded]
    rest = house.submit(Stage.EOM, commands.Eom())
    assert [type(error) for error in rest] == [WorkerLost]
    assert called == [(("<b>",),)]
    house.message_over()
    following = house.submit(Stage.RCPT, *MESSAGE)
    assert called == [(("<b>",),)] * 2
    answers[1].callback(ReturnCodes.CONTINUE)
    assert following == [CONTINUE]
    assert house.called == []
    answers[0].callback(ReturnCodes.REJECT)  # at last, to nobody
    assert house.called == ["abort", "close"]
    assert (given_up, rest, following) == ([given_up[0]], [rest[0]], [CONTINUE])


def test_one_that_can_be_rebuilt_is_another_object_for_the_rest_of_the_message() -> None:
    called: list[Any] = []
    answers: list[Deferred[Any]] = []
    house = House(replays=True, xxfi_envrcpt=stubborn(called, answers))
    given_up = house.submit(Stage.RCPT, *MESSAGE)
    house.clock.advance(20.0)
    assert [type(error) for error in given_up] == [DeadlineExceeded]
    rest = house.submit(Stage.RCPT, commands.Rcpt("<c>"))
    assert called == [(("<b>",),)] * 2  # the new object hears all there is
    answers[1].callback(ReturnCodes.CONTINUE)
    answers[2].callback(ReturnCodes.ACCEPT)
    assert rest == [ACCEPT]


def test_a_question_that_waited_for_an_object_that_is_given_up_is_another_objects() -> None:
    asked: list[Milter] = []
    called: list[Any] = []
    answers: list[Deferred[Any]] = []
    wait = stubborn(called, answers)

    async def callback(self: Milter, argv: object) -> Any:
        asked.append(self)
        return await wait(self, argv)

    house = House(xxfi_envrcpt=callback)
    house.submit(Stage.RCPT, *MESSAGE)
    house.host.cancel(house.latest)
    house.message_over()
    house.clock.advance(10.0)
    second = house.submit(Stage.RCPT, *MESSAGE)
    house.clock.advance(10.0)  # the first has had its time, and nobody to tell
    assert house.counters["deadlines"] == 1
    answers[0].callback(ReturnCodes.CONTINUE)
    answers[1].callback(ReturnCodes.ACCEPT)
    assert second == [ACCEPT]
    assert len(set(asked)) == 2
    assert house.called == ["abort", "close"]  # the first, which hears nothing of the second's


def test_an_exit_at_the_close_of_an_object_that_was_given_up_is_in_the_log_alone() -> None:
    called: list[Any] = []
    answers: list[Deferred[Any]] = []

    async def close(self: Milter) -> None:
        raise SystemExit(3)

    house = House(xxfi_envrcpt=stubborn(called, answers), xxfi_close=close)
    house.submit(Stage.RCPT, *MESSAGE)
    house.clock.advance(20.0)
    with capturedLogs() as events:
        answers[0].callback(ReturnCodes.CONTINUE)
    assert [event["log_failure"].type for event in events] == [SystemExit]


def test_a_question_waits_for_its_object_no_longer_than_its_own_deadline() -> None:
    called: list[Any] = []
    answers: list[Deferred[Any]] = []
    house = House(xxfi_envrcpt=stubborn(called, answers))
    house.submit(Stage.RCPT, *MESSAGE)
    house.host.cancel(house.latest)
    house.message_over()
    house.clock.advance(10.0)
    second = house.submit(Stage.RCPT, *MESSAGE)
    house.clock.advance(20.0)
    assert [type(error) for error in second] == [DeadlineExceeded]
    answers[0].callback(ReturnCodes.CONTINUE)
    assert len(called) == 1


def test_after_its_release_the_next_question_is_for_a_new_object() -> None:
    objects: list[Milter] = []

    def helo(self: Milter, name: str) -> ReturnCodes:
        objects.append(self)
        return ReturnCodes.CONTINUE

    house = House(xxfi_helo=helo)
    for _ in range(2):
        job = house.job(Stage.HELO)
        job.connection = CONNECTION + packed(commands.Helo("me"))
        assert house.take(job) == [CONTINUE]
        assert house.submit(None) == [b""]
        house.host.release(house.affinity)
    assert len(set(objects)) == 2


def test_a_failure_of_a_cancelled_job_is_only_logged() -> None:
    called: list[Any] = []
    answers: list[Deferred[Any]] = []
    house = House(xxfi_envrcpt=waiting(called, answers))
    ended = house.submit(Stage.RCPT, *MESSAGE)
    house.host.cancel(house.latest)
    with capturedLogs() as events:
        answers[0].errback(ValueError("bad"))
    assert ended == []
    assert [event["log_level"] for event in events] == [LogLevel.critical]
    assert armed(house.clock) == []


@pytest.mark.parametrize("error", [ValueError("bad"), SystemExit(3), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("later", [False, True])
def test_what_a_callback_raises_is_logged_and_fails_the_job_alone(
    error: BaseException, later: bool
) -> None:
    async def coroutine(self: Milter, argv: object) -> Any:
        raise error

    def plain(self: Milter, argv: object) -> Any:
        raise error

    house = House(xxfi_envrcpt=coroutine if later else plain)
    with capturedLogs() as events:
        ended = house.submit(Stage.RCPT, *MESSAGE)
    assert [type(end) for end in ended] == [CallbackFailed]
    assert type(error).__name__ in str(ended[0])
    assert [e["log_level"] for e in events] == [LogLevel.critical]
    assert house.submit(None) == [b""]
    assert house.called == ["abort", "close"]


def test_a_synchronous_callback_that_holds_the_reactor_up_is_named() -> None:
    def slow(self: Milter, argv: object) -> ReturnCodes:
        house.stopwatch.now += 1.1 * MAX_BLOCKING
        return ReturnCodes.CONTINUE

    house = House(xxfi_envrcpt=slow)
    with capturedLogs() as events:
        house.submit(Stage.RCPT, *MESSAGE)
    (event,) = events
    assert (
        event["log_format"]
        .format(**event)
        .startswith("Here blocked the reactor for 55 ms in xxfi_envrcpt")
    )
    assert house.counters["blocked_reactor"] == 1


def test_a_coroutine_that_holds_the_reactor_up_between_two_waits_is_named() -> None:
    answers: list[Deferred[Any]] = []

    async def slow(self: Milter, argv: object) -> ReturnCodes:
        answers.append(Deferred())
        await answers[-1]
        house.stopwatch.now += 2 * MAX_BLOCKING
        return ReturnCodes.CONTINUE

    house = House(xxfi_envrcpt=slow)
    with capturedLogs() as events:
        ended = house.submit(Stage.RCPT, *MESSAGE)
        house.stopwatch.now += 100.0  # it waits: nobody is held up
        assert list(events) == []
        answers[0].callback(None)
    assert ended == [CONTINUE]
    assert [event["name"] for event in events] == ["rcpt"]


def test_what_is_fast_enough_is_not_named() -> None:
    def fast(self: Milter, argv: object) -> ReturnCodes:
        house.stopwatch.now += 0.9 * MAX_BLOCKING
        return ReturnCodes.CONTINUE

    house = House(xxfi_envrcpt=fast)
    with capturedLogs() as events:
        house.submit(Stage.RCPT, *MESSAGE)
    assert list(events) == []


def test_a_large_message_is_read_from_memory() -> None:
    sizes: list[int] = []

    def body(self: Milter, chunk: bytes) -> ReturnCodes:
        sizes.append(len(chunk))
        return ReturnCodes.CONTINUE

    house = House(xxfi_envrcpt=lambda self, argv: ReturnCodes.CONTINUE, xxfi_body=body)
    house.submit(Stage.RCPT, *MESSAGE)
    chunks = [commands.Body(b"x" * 60_000)] * 3
    assert house.submit(Stage.EOM, *chunks, commands.Eom()) == [CONTINUE]
    assert sizes == [60_000] * 3


def test_an_unknown_command_is_asked_about_where_the_message_stands() -> None:
    seen: list[str] = []

    def unknown(self: Milter, command: str) -> ReturnCodes:
        seen.append(command)
        return ReturnCodes.REJECT

    house = House(xxfi_unknown=unknown)
    job = house.job(Stage.UNKNOWN, *MESSAGE)
    job.command = packed(commands.Unknown("XYZZY"))
    assert (house.take(job), seen) == ([packed(replies.Reject())], ["XYZZY"])


def test_functions_are_cancelled_with_their_job() -> None:
    from sharded_milter import Milter as Functions

    cancelled: list[str] = []
    milter = Functions("f")

    @milter.mail
    async def mail(envelope: object) -> None:
        await Deferred(lambda _: cancelled.append("cancelled"))

    clock = Clock()
    host = InMaster(as_dialect(milter), Limits(), clock, Counter())
    job = Job(Stage.MAIL, b"", packed(MESSAGE[0]), queue_id="1")
    with capturedLogs() as events:
        host.submit(job)
        host.cancel(job)
    assert cancelled == ["cancelled"]
    assert list(events) == []
    assert armed(clock) == []


def test_the_objects_of_a_factory_share_it() -> None:
    class Counting(MilterFactory):
        built = 0

        def build_milter(self, protocol: Any) -> Milter:
            self.built += 1
            return Milter(self, protocol)

    factory = Counting()
    as_dialect(factory)
    assert factory.built == 1  # the one that negotiates
