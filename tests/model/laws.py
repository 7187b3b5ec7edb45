"""What must hold at every step: the eight rules of dispatch and pool, checked on the model's book.

Nothing here looks into the queue or the pool.
"""

from __future__ import annotations

from sharded_milter.dispatch.dispatcher import Dispatcher
from sharded_milter.errors import (
    CallbackFailed,
    DeadlineExceeded,
    JobFailed,
    Overloaded,
    Poisoned,
    Superseded,
    WorkerLost,
)
from sharded_milter.pool.shard import EXIT_GRACE, LINGER_GRACE

from .book import Book
from .records import EPSILON, Asked, Process, Try, check


def allows_heavy(book: Book) -> bool:
    """Whether another shard may begin a heavy job, with some reserved for light ones."""
    if not book.limits.reserve:
        return True
    serving = [process for process in book.processes.values() if process.takes_any]
    heavy = sum(process.heavy for process in serving)
    return heavy < max(1, len(serving) - book.limits.reserve)


def may_take(book: Book, process: Process, asked: Asked) -> bool:
    """Whether a process that is idle may be given the job now."""
    job = asked.job
    holder = job.affinity.holder if job.affinity is not None else None
    if holder is not None:
        if holder.shard is not process.shard or process.is_unavailable or not process.serves:
            return False
        # What waits for an object on a shard that drains is not kept back by the reserve.
        return job.light or not process.takes_any or process.heavy or allows_heavy(book)
    if not process.takes_any or (job.solo and not process.fresh):
        return False
    if job.manifest is not None and not process.shard.serves(job.milter, job.manifest):
        return False
    return job.light or process.heavy or allows_heavy(book)


def check_given(book: Book, process: Process, asked: Asked) -> None:
    """A job is about to be given to a process."""
    job = asked.job
    idle = not process.hand
    check(not asked.over, "3 only a job that is wanted is given", asked)
    check(process.serves and not process.is_unavailable, "3 it can be told nothing", process)
    holder = job.affinity.holder if job.affinity is not None else None
    if holder is not None:
        check(holder.shard is process.shard, "an object is asked where it is", asked, process)
    else:
        check(not process.retired, "a shard that drains gets no new job", asked, process)
    check(
        all(one.asked is not asked for one in process.hand),
        "2 a process has at most one attempt of a job",
        asked,
        process,
    )
    check(len(asked.tries) < 2, "2 a job has at most two attempts", asked)
    if asked.tries:
        check(idle and asked.is_behind(book.now + EPSILON), "only what waits is taken over", asked)
    if book.must_run_alone(asked):
        check(process.fresh, "a message that may be poison runs in a fresh process", asked)
    alone = next((one for one in process.hand if book.must_run_alone(one.asked)), None)
    if alone is not None:
        # Where the death came to light later than the job was given, it is not alone.
        check(not alone.asked.job.solo or not asked.can_move, "it runs alone", alone, asked)
    if not job.light and not idle and not process.heavy and asked.can_move:
        check(allows_heavy(book), "shards are reserved for light jobs", asked, process)
    _check_order(book, process, asked)


def _check_order(book: Book, process: Process, asked: Asked) -> None:
    if asked.job.solo:  # it gets the fresh process: any other job can do without
        return
    idle = not process.hand
    for other in book.open.values():
        if other is asked or other.age >= asked.age - EPSILON:
            continue
        if not (other.waits or (idle and other.is_behind(book.now - EPSILON))):
            continue
        if not may_take(book, process, other) or (not idle and not other.waits):
            continue
        if not idle and _is_stuck_before(book, other):
            continue
        if other in asked.neighbours and asked not in other.passed_by:
            other.passed_by.add(asked)
            continue
        check(False, "4 a job is not overtaken", f"{other} by {asked} on {process}")


def _is_stuck_before(book: Book, asked: Asked) -> bool:
    """Whether an older job waits behind another: no younger one goes behind any meanwhile."""
    holder = asked.job.affinity.holder if asked.job.affinity is not None else None
    if holder is not None:  # it can go nowhere else
        return False
    return any(
        one.age < asked.age and one.is_behind(book.now + EPSILON) for one in book.open.values()
    )


def check_outcome(book: Book, asked: Asked, outcome: bytes | JobFailed) -> None:
    """Who submitted a job hears this."""
    job, now = asked.job, book.now
    if asked.told is outcome:  # with the job for whose answer it waited
        return
    if isinstance(outcome, bytes):
        check(outcome == asked.expected, "8 the answer is the job's own", asked, outcome)
        return
    waited = now - asked.submitted
    deadline = book.limits.deadline(job.stage)
    late = job.stage is not None and waited >= deadline - EPSILON
    if isinstance(outcome, CallbackFailed):
        check(str(outcome).encode() == asked.expected, "8 the error is its own", asked, outcome)
    elif isinstance(outcome, DeadlineExceeded):
        check(late, "a deadline has passed", asked, waited)
    elif isinstance(outcome, Poisoned):
        deaths = book.deaths[asked.message] + asked.blamed
        check(deaths >= 2 or (late and deaths >= 1), "poison has killed twice", asked, deaths)
    elif isinstance(outcome, WorkerLost):
        lost = asked.blamed > book.limits.retries or asked.conversation.lost or job.stage is None
        check(lost, "what is lost was to blame, or an object's", asked, outcome)
    elif isinstance(outcome, Superseded):
        check(job.manifest is not None, "other milters serve", asked)
    else:
        source = asked.leader or asked
        check(isinstance(outcome, Overloaded), "a known failure", asked, outcome)
        full = "queue is full" in str(outcome)
        queued = now - source.queued_since >= book.limits.queue_wait - EPSILON
        short = "memory" in book.short_of
        check(late or full or queued or short, "it is too busy", asked, outcome)


def check_all(book: Book, dispatcher: Dispatcher) -> None:
    """Checked after every step, and between the calls of the clock."""
    _check_counts(book, dispatcher)
    _check_jobs(book)
    idle = [process for process in book.processes.values() if process.is_idle]
    resting = [each for each in book.processes.values() if each.retired and not each.hand]
    if idle or resting:
        _check_nothing_waits(book, [*idle, *resting])
    for process in book.processes.values():
        _check_process(book, process)


def _check_counts(book: Book, dispatcher: Dispatcher) -> None:
    counters, counts, in_hand = dispatcher.counters, book.counts, len(book.in_hand)
    check(counters["attempts"] == counts["given"], "7 attempts given", counters, counts)
    for how in ("answered", "lost", "superseded", "withdrawn"):
        check(counters[f"attempts_{how}"] == counts[how], f"7 attempts {how}", counters, counts)
    ended = counts["answered"] + counts["lost"] + counts["superseded"] + counts["withdrawn"]
    check(counts["given"] == ended + in_hand, "7 attempts add up", counts, in_hand)
    waiting = [asked for asked in book.open.values() if asked.waits]
    check(dispatcher.queued == len(waiting), "7 jobs that wait", dispatcher.queued, waiting)
    check(book.started == book.gone + len(book.processes), "7 processes add up")


def _check_jobs(book: Book) -> None:
    limits, now = book.limits, book.now
    for asked in book.open.values():
        job = asked.job
        check(asked.expected is None, "1 an answer that has arrived is handed on", asked)
        check(not job.done, "1 a job that is done is answered", asked)
        if asked.leader is None:
            check(job.blamed == asked.blamed, "2 blame", asked, job.blamed, asked.blamed)
        check(asked.blamed <= limits.retries, "2 blamed at most once more than retries", asked)
        if job.stage is None:
            continue
        late = now - asked.submitted > limits.deadline(job.stage) + EPSILON
        check(not late, "a job is answered at its deadline", asked)
        if asked.waits:
            wait = now - asked.queued_since
            check(wait <= limits.queue_wait + EPSILON, "a job waits for queue_wait", asked, wait)
    for asked in book.known.values():
        if asked.over:
            job = asked.job
            check(not (job.connection or job.message or job.command), "bytes are let go", asked)


def _check_nothing_waits(book: Book, idle: list[Process]) -> None:
    for asked in book.open.values():
        waits = asked.waits
        if not (waits or asked.is_behind(book.now - EPSILON)):
            continue
        for process in idle:
            if may_take(book, process, asked):
                rule = "3 no job waits beside an idle shard"
                check(False, rule, asked, "queued" if waits else asked.tries, process)


def _check_process(book: Book, process: Process) -> None:
    now, worker = book.now, process.worker
    if worker.killed is not None or worker.reaped:
        return
    if worker.wire.shut_down_at is not None:
        late = now - worker.wire.shut_down_at > EXIT_GRACE + EPSILON
        check(not late, "5 one that leaves is gone within its grace", process)
    elif worker.wire.lost_at is not None:
        late = now - worker.wire.lost_at > LINGER_GRACE + EPSILON
        check(not late, "one that has closed its socket is killed", process)
    elif not worker.ready:
        late = now - process.started > book.limits.worker_start_timeout + EPSILON
        check(not late, "6 a start ends", process)
    elif process.retired and not process.hand and not worker.wire.full and not worker.asleep:
        check(has_objects(book, process), "5 a shard that has drained leaves", process)
    for one in process.hand:
        _check_try(book, one)


def _check_try(book: Book, one: Try) -> None:
    if one.live:
        return
    if one.is_first:
        assert one.began is not None
        late = book.now - one.began > book.limits.deadline(one.asked.job.stage) + EPSILON
        check(not late, "a superseded attempt has a deadline of its own", one)
    elif one.asked.can_move and not one.process.is_unavailable:
        check(one.withdrawn, "an attempt that is not wanted is withdrawn", one)


def has_objects(book: Book, process: Process) -> bool:
    """Whether connections have their object on the process."""
    return any(
        each.affinity is not None
        and each.affinity.holder is not None
        and each.affinity.holder.shard is process.shard
        for each in book.conversations
    )
