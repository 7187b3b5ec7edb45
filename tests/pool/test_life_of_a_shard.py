"""What a shard says and hears, what it takes from a worker, and how it ends."""

from __future__ import annotations

from typing import Any

import pytest
from one_pool import FakePlace, texts
from one_shard import ANSWER, FIELDS, LOSS, Room
from twisted.logger import capturedLogs

from sharded_milter.dispatch.affinity import ObjectAffinity
from sharded_milter.dispatch.job import Blame, Job, Loss
from sharded_milter.errors import MilterLoadError
from sharded_milter.ipc.messages import WITHDRAWN, Answer, LoadFailed, Ready, read_question
from sharded_milter.pool.shard import (
    EXIT_GRACE,
    LINGER_GRACE,
    Shard,
    ShardState,
)
from sharded_milter.protocol.negotiation import Manifest, SessionAffinity
from sharded_milter.protocol.stages import Stage

# Starting


def test_ready_brings_the_manifests() -> None:
    room = Room()
    room.shard.ready([{**FIELDS, "affinity": b"replayable"}, FIELDS], b"code", b"unix:/s")
    assert (room.shard.code, room.shard.socket) == (b"code", "unix:/s")
    light = frozenset({Stage.RCPT, Stage.HELO})
    first, second = room.shard.manifests
    assert second == Manifest("spamguard", light=light, shard_by="sender")
    assert first.affinity is SessionAffinity("replayable")
    assert room.shard.serves(1, second)
    assert not room.shard.serves(0, second)
    assert not room.shard.serves(2, second)
    room.clock.advance(60.0)
    assert room.shard.state is ShardState.SERVING


def test_a_milter_that_cannot_be_loaded_is_told_and_the_worker_ends() -> None:
    room = Room()
    room.place.say(LoadFailed, reason=b"milter x: no", details=b"traceback")
    room.place.deliver()
    error = room.shard.load_error
    assert isinstance(error, MilterLoadError)
    assert (str(error), error.details) == ("milter x: no", "traceback")
    assert room.place.worker.is_told_to_exit
    room.place.exit()
    assert room.log[-1] == "NOT_STARTED"


def test_the_reason_of_a_load_that_failed_is_read_before_the_exit_counts() -> None:
    room = Room()
    room.place.say(LoadFailed, reason=b"milter x: no", details=b"")
    room.place.exit()
    assert str(room.shard.load_error) == "milter x: no"


def test_one_that_is_not_ready_in_time_is_killed() -> None:
    room = Room()
    room.clock.advance(60.0)
    room.place.exit("killed by SIGKILL")
    why = "it was not ready within --worker-start-timeout (60 s)"
    assert room.log == ["unavailable", "kill", "unavailable", "end family", f"lost: {why}",
                        "NOT_STARTED"]  # fmt: skip
    assert room.shard.loss == Loss(why, Blame.PLACE)


def test_a_system_that_refuses_is_an_error_of_the_start() -> None:
    room = Room()
    place = FakePlace(1)
    place.refuse = OSError(11, "no more")
    with pytest.raises(OSError, match="no more"):
        Shard(1, place, room, room, room.clock).start(60.0)


# Questions and answers


def question(room: Room, number: int) -> Any:
    room.place.deliver()
    return read_question(room.place.worker.asked[number], room.place.worker)


def test_a_job_is_asked_with_all_there_is() -> None:
    room = Room(ShardState.SERVING)
    room.shard.give(5, Job(Stage.EOM, b"connection", b"message", milter=2))
    assert question(room, 0) == ((b"E", 2, 0, 0), b"connection", b"message", b"")
    room.shard.give(6, Job(Stage.UNKNOWN, b"connection", b"message", b"command"))
    room.clock.advance(0)
    assert question(room, 1)[1:] == (b"connection", b"command", b"")


def test_an_objects_job_is_asked_with_what_is_new() -> None:
    room = Room(ShardState.SERVING)
    affinity = ObjectAffinity(replayable=True)
    affinity.assign(None, 9)
    affinity.next_update(b"connection", b"mes")
    job = Job(Stage.EOM, b"connection", b"message", b"command", affinity=affinity)
    room.shard.give(5, job)
    assert question(room, 0) == ((b"E", 0, 9, 0), b"", b"sage", b"command")


def test_a_question_is_withdrawn_by_its_number() -> None:
    room = Room(ShardState.SERVING)
    room.shard.give(17, Job(Stage.EOM, b"", b"message"))
    room.shard.withdraw(17)
    room.place.deliver()
    assert room.place.worker.withdrawn == [b"q11"]


def test_answers_that_have_arrived_are_taken_when_dispatch_asks() -> None:
    room = Room(ShardState.SERVING)
    room.place.answer(1)
    assert room.log == []
    room.shard.catch_up()
    assert room.log == ["read output", "answer 1"]


def test_a_shard_whose_last_words_cannot_be_read_is_gone_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise RuntimeError("a defect")

    room = Room(ShardState.SERVING)
    monkeypatch.setattr(room.place.channel, "finish", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        room.place.exit()
    assert room.shard.state is ShardState.GONE
    assert room.log[-1] == "DIED"


def test_a_shard_is_worn_after_so_many_answers_and_says_so_once() -> None:
    room = Room(ShardState.SERVING)
    room.shard.recycle_after = 2
    for number in range(4):
        room.shard.answered(number, ANSWER)
    said = [word for word in room.log if word.startswith("worn")]
    assert said == ["worn: it has given 2 answers"]
    assert room.shard.answers == 4


WORN = "worn: it has given 1 answers"


def test_a_shard_that_is_short_of_something_is_replaced() -> None:
    room = Room(ShardState.SERVING)
    room.place.answer(1, Answer(short=b"it cannot take a question: Too many open files"))
    room.place.deliver()
    assert room.log[-1] == "worn: it cannot take a question: Too many open files"


def test_to_confirm_a_withdrawal_is_no_answer() -> None:
    room = Room(ShardState.SERVING)
    room.shard.recycle_after = 1
    room.shard.answered(1, WITHDRAWN)
    assert (room.shard.answers, WORN in room.log) == (0, False)
    room.shard.answered(2, ANSWER)
    room.shard.answered(3, WITHDRAWN)
    assert room.log.count(WORN) == 1


# Rules that are broken


@pytest.mark.parametrize(
    "field",
    [
        {"negotiation": b""},
        {"negotiation": b"x" * 40},
        {"light": b"?"},
        {"affinity": b"nowhere"},
    ],
)
def test_milters_that_cannot_be_are_a_broken_rule(field: dict[str, bytes]) -> None:
    room = Room()
    room.place.say(Ready, milters=[{**FIELDS, **field}], code=b"", socket=b"")
    room.place.deliver()
    assert (room.shard.state, room.log) == (ShardState.KILLED, ["deaf", "unavailable", "kill"])
    assert room.shard.loss is not None
    assert room.shard.loss.reason.startswith("its milters' manifests are invalid: ")


def test_nothing_more_is_taken_from_a_worker_that_has_broken_a_rule() -> None:
    room = Room(ShardState.SERVING)
    room.broken = "it has answered questions out of order"
    room.place.answer(1)
    room.place.answer(2)
    room.place.read()
    assert room.log == ["read output", "answer 1", "deaf", "unavailable", "kill"]
    room.place.answer(3)
    room.place.exit()
    assert "answer 2" not in room.log
    assert "answer 3" not in room.log
    assert room.shard.loss == Loss("it has answered questions out of order", Blame.MESSAGE)


def test_what_had_arrived_before_a_kill_is_taken() -> None:
    room = Room(ShardState.SERVING)
    room.place.answer(1)
    room.shard.kill(LOSS)
    room.place.exit()
    assert room.log.index("answer 1") < room.log.index("lost: for a reason")


@pytest.mark.parametrize(
    "state", [ShardState.STARTING, ShardState.SERVING, ShardState.DRAINING, ShardState.EXITING]
)
def test_a_rule_that_is_broken_is_like_a_death_in_every_state(state: ShardState) -> None:
    room = Room(state)
    room.shard.broke_rule("it is odd")
    assert (room.shard.state, room.log) == (ShardState.KILLED, ["deaf", "unavailable", "kill"])
    assert room.shard.loss == Loss("it is odd", Blame.MESSAGE)


# Ends


@pytest.mark.parametrize("has_work", [True, False])
def test_a_shard_that_is_gone_says_whether_it_was_at_work(has_work: bool) -> None:
    room = Room(ShardState.SERVING)
    room.has_work = has_work
    room.place.exit()
    assert room.shard.died_at_work is has_work


def test_the_exit_says_why_and_the_message_is_to_blame() -> None:
    room = Room(ShardState.SERVING)
    room.place.exit("killed by SIGSEGV")
    assert room.shard.loss == Loss("killed by SIGSEGV", Blame.MESSAGE)
    room.place.hang_up()
    room.clock.advance(60.0)
    assert "kill" not in room.log


def test_the_first_reason_to_kill_it_is_the_reason() -> None:
    room = Room(ShardState.SERVING)
    room.shard.kill(Loss("it took too long", Blame.MESSAGE))
    room.shard.kill(LOSS)
    room.place.exit("killed by SIGKILL")
    assert room.shard.loss == Loss("it took too long", Blame.MESSAGE)
    assert room.log.count("kill") == 1


@pytest.mark.parametrize("state", [ShardState.STARTING, ShardState.SERVING, ShardState.DRAINING])
def test_a_worker_that_closes_its_socket_and_lives_on_is_killed_after_a_second(
    state: ShardState,
) -> None:
    room = Room(state)
    room.place.hang_up()
    assert room.log == ["unavailable"]
    room.clock.advance(LINGER_GRACE - 0.1)
    assert "kill" not in room.log
    room.clock.advance(0.1)
    assert "kill" in room.log
    assert room.shard.loss == Loss("its socket was closed", Blame.MESSAGE)


@pytest.mark.parametrize("closed_before", [True, False])
def test_a_leaving_worker_has_its_time_to_exit_though_its_socket_is_closed(
    closed_before: bool,
) -> None:
    room = Room(ShardState.DRAINING)
    if closed_before:
        room.place.hang_up()
    room.shard.drained()
    if not closed_before:
        room.place.hang_up()
    room.clock.advance(EXIT_GRACE - 0.1)
    assert (room.shard.state, "kill" in room.log) == (ShardState.EXITING, False)
    room.clock.advance(0.1)
    assert "kill" in room.log
    room.place.exit("killed by SIGKILL")
    assert room.log[-1] == "ENDED"
    assert room.shard.loss == Loss("it did not exit when it was told", Blame.PLACE)


def test_a_worker_that_leaves_in_time_has_ended() -> None:
    room = Room(ShardState.EXITING)
    room.place.deliver()
    assert room.place.worker.is_told_to_exit
    room.place.exit("exited with code 0")
    assert (room.log[-1], room.clock.getDelayedCalls()) == ("ENDED", [])


def test_objects_have_their_time_when_a_shard_drains() -> None:
    room = Room(ShardState.SERVING)
    room.shard.drain(30.0)
    room.clock.advance(29.9)
    assert room.log == ["retire"]
    room.clock.advance(0.1)
    assert room.log == ["retire", "give up objects"]


@pytest.mark.parametrize("has_work", [True, False])
def test_at_the_end_of_the_service_only_a_busy_worker_is_killed(has_work: bool) -> None:
    room = Room(ShardState.SERVING)
    room.has_work = has_work
    room.shard.stop()
    assert room.shard.state is (ShardState.KILLED if has_work else ShardState.EXITING)
    assert room.log[:2] == ["give up objects", "retire"]
    assert room.log[-1] == ("kill" if has_work else "exit")


# Words


def test_output_is_logged_with_slot_and_message() -> None:
    room = Room(ShardState.SERVING)
    with capturedLogs() as events:
        room.shard.output(b"one")
        room.shard.current_queue_id = "1"
        room.shard.output(b"caf\xe9")
    assert texts(events) == ["[3] one", "[3 qid=1] caf\udce9"]


def test_stacks_are_dumped_by_workers_that_understand_the_signal() -> None:
    room = Room()
    room.shard.dump_stacks()
    assert room.log == []
    room.place.be_ready()
    room.shard.dump_stacks()
    assert room.log == ["ready", "stacks"]


def test_a_shard_prints_its_number_and_process() -> None:
    assert repr(Room().shard) == "shard 3 (pid 77)"
