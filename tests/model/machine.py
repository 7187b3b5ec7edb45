"""The machine that Hypothesis drives: what may happen, in any order."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import (
    RULE_MARKER,
    precondition,
    rule,
)

from sharded_milter.ipc.messages import Answer
from sharded_milter.protocol.stages import Stage

from .records import check
from .scenes import Scenes
from .world import MANIFEST, OTHER_STAGES

PICK = st.integers(0, 7)
STAGES = st.sampled_from([Stage.EOM, Stage.EOM, Stage.RCPT, Stage.HELO])
TIMES = st.sampled_from([0.001, 0.01, 0.06, 0.06, 0.3, 1.0, 3.0, 11.0])
CODES = st.sampled_from([b"code", b"code", b"code", b"other code"])


class Machine(Scenes):
    """Drives a world; after each rule all the laws are checked."""

    # Jobs

    @precondition(lambda self: len(self.talking) < 40)
    @rule(
        kind=st.sampled_from(["plain", "plain", "plain", "plain", "object", "replayable"]),
        key=st.sampled_from([b"", b"", b"a", b"b"]),
        stage=STAGES,
        light=st.sampled_from([False, False, True]),
        large=st.sampled_from([False, False, True]),
        content=st.sampled_from([0, 0, 1]),
        more=st.sampled_from([0, 0, 2]),
        told=st.sampled_from([False, True]),
    )
    def connect(
        self,
        kind: str,
        key: bytes,
        stage: Stage,
        light: bool,
        large: bool,
        content: int,
        more: int,
        told: bool,
    ) -> None:
        conversation = self.world.converse(
            pinned=kind != "plain", replayable=kind == "replayable", key=key
        )
        manifests = self.world.pool.manifests
        self.world.submit(
            conversation,
            stage,
            light=light,
            large=large,
            content=content if stage is Stage.EOM else 0,
            manifest=manifests[0] if told and manifests else None,
        )
        conversation.stages_left = more
        self.step()

    @precondition(lambda self: any(each.out is None for each in self.talking))
    @rule(index=PICK, stage=STAGES, light=st.booleans(), large=st.booleans())
    def ask_more(self, index: int, stage: Stage, light: bool, large: bool) -> None:
        conversation = self.pick([each for each in self.talking if each.out is None], index)
        self.world.submit(conversation, stage, light=light, large=large)
        self.step()

    @precondition(lambda self: self.open)
    @rule(index=PICK)
    def cancel(self, index: int) -> None:
        self.world.cancel(self.pick(self.open, index))
        self.step()

    @precondition(lambda self: self.talking)
    @rule(index=PICK)
    def disconnect(self, index: int) -> None:
        self.world.end(self.pick(self.talking, index))
        self.step()

    # Workers

    @precondition(lambda self: self.busy)
    @rule(index=PICK, error=st.sampled_from([False, False, False, True]))
    def answer(self, index: int, error: bool) -> None:
        self.pick(self.busy, index).worker.answer(error=error)
        self.step()

    @precondition(lambda self: self.busy)
    @rule(index=PICK, wait=TIMES)
    def answer_later(self, index: int, wait: float) -> None:
        process = self.pick(self.busy, index)
        self.world.advance(wait)
        if process.worker.alive and process.worker.current:
            process.worker.answer()
        self.step()

    @precondition(lambda self: self.busy)
    @rule(index=PICK)
    def answer_while_the_master_is_busy(self, index: int) -> None:
        self.answer_unread(self.pick(self.busy, index))

    @precondition(lambda self: self.alive)
    @rule(index=PICK, reason=st.sampled_from(["killed by SIGSEGV", "exited with code 3"]))
    def die(self, index: int, reason: str) -> None:
        self.pick(self.alive, index).worker.die(reason)
        self.step()

    @precondition(lambda self: self.busy)
    @rule(index=PICK, answers=st.booleans())
    def die_of_the_message(self, index: int, answers: bool) -> None:
        worker = self.pick(self.busy, index).worker
        if answers:  # of the next one
            worker.answer()
        worker.die("killed by SIGSEGV")
        self.step()

    @precondition(lambda self: self.world.processes())
    @rule(index=PICK)
    def operator_kills(self, index: int) -> None:
        self.world.kill_by_operator(self.pick(self.world.processes(), index))
        self.step()

    @precondition(lambda self: any(each.worker.ready for each in self.alive))
    @rule(
        index=PICK,
        how=st.sampled_from(["unasked", "twice", "out of turn", "withdraws", "ready again"]),
    )
    def break_rule(self, index: int, how: str) -> None:
        process = self.pick([each for each in self.alive if each.worker.ready], index)
        worker = process.worker
        waiting = worker.tag_of_waiting()
        if how == "out of turn" and waiting:
            worker.say(waiting, Answer(b"0 by 0"))
        elif how == "withdraws" and worker.current:
            worker.say(worker.current.tag, Answer(withdrawn=b"1"))
        elif how == "twice" and worker.current:
            tag = worker.current.tag
            worker.answer()
            worker.say(tag, Answer(b"0 by 0"))
        elif how == "ready again":
            worker.load((self.manifest,), self.code)
        else:
            worker.say(b"qfffff", Answer(b"0 by 0"))
        self.step()

    @precondition(lambda self: self.alive)
    @rule(index=PICK)
    def close_channel(self, index: int) -> None:
        self.pick(self.alive, index).worker.wire.close()
        self.step()

    @precondition(lambda self: self.alive)
    @rule(index=PICK, asleep=st.booleans(), stubborn=st.booleans(), full=st.booleans())
    def misbehave(self, index: int, asleep: bool, stubborn: bool, full: bool) -> None:
        process = self.pick(self.alive, index)
        worker = process.worker
        worker.asleep, worker.stubborn = asleep, stubborn
        if full:
            worker.wire.fill()
        else:
            worker.wire.drain()
        self.step()

    @precondition(lambda self: self.starting)
    @rule(index=PICK, code=CODES)
    def ready(self, index: int, code: bytes) -> None:
        self.pick(self.starting, index).worker.load((self.manifest,), code)
        self.step()

    @precondition(lambda self: self.starting)
    @rule()
    def all_ready(self) -> None:
        for process in self.starting:
            process.worker.load((self.manifest,), self.code)
        self.step()

    @precondition(lambda self: self.starting)
    @rule(index=PICK)
    def load_fails(self, index: int) -> None:
        worker = self.pick(self.starting, index).worker
        first = not self.world.outcome and not self.world.book.gone and not worker.stubborn
        unheard = not worker.wire.full and not worker.asleep and worker.wire.connected
        worker.fail_to_load(b"no such module")
        self.step()
        if first and unheard and self.world.reaps and self.world.outcome:
            check("no such module" in str(self.world.outcome[0]), "6 with the reason")
        if unheard and worker.wire.connected:
            check(worker.told_to_leave, "one that cannot load is told to leave")

    # The pool

    @rule()
    def reload(self) -> None:
        self.world.pool.reload()
        self.step()

    @rule(code=CODES, other_stages=st.booleans())
    def change_files(self, code: bytes, other_stages: bool) -> None:
        self.code = code
        self.manifest = OTHER_STAGES if other_stages else MANIFEST

    @rule(change=st.sampled_from([1, -1]))
    def resize(self, change: int) -> None:
        if self.world.spares.size + change <= 4:
            self.world.resize(change)
            self.step()

    @rule(what=st.sampled_from(["memory", "processes", ""]))
    def run_short(self, what: str) -> None:
        self.world.book.short_of.clear()
        if what:
            self.world.book.short_of.add(what)
        self.step()

    @rule(reaps=st.booleans())
    def kernel_is_slow(self, reaps: bool) -> None:
        self.world.reaps = reaps
        self.step()

    # Time

    @rule(seconds=TIMES)
    def advance(self, seconds: float) -> None:
        self.world.advance(seconds)
        self.step()


def directed(scene: str, rules: tuple[str, ...]) -> type[Machine]:
    """A machine that begins with a scene, in which only these rules apply."""
    others = [name for name, what in vars(Machine).items() if hasattr(what, RULE_MARKER)]
    body: dict[str, Any] = {name: None for name in others if name not in rules}
    return type("Directed", (Machine,), {**body, "scene": scene})
