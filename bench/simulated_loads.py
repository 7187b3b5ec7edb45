"""What `simulate` asks: scans, connections and their questions, drawn from a seed.

The same plan is drawn again for each system that is asked, so both get the same scans, keys and
arrivals.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from bench.simulated_time import HOP, MASTER_CPU, Question, System
from sharded_milter.limits import Limits
from sharded_milter.protocol.stages import Stage

# No scan of a Pareto law is longer than so many mean ones.
LONGEST_SCAN = 200

# What a slow neighbour is: this share of the scans takes so many times longer.
SLOW_SHARE = 0.01
SLOW_FACTOR = 100

# Where connections are shorter than MANY jobs, each counts with others, in so many groups.
CLIENTS = 16

# Jobs after which a connection's own mean wait means something.
MANY = 20

# The share of a plan that is not counted at its begin.
WARM_UP = 0.05


@dataclass(frozen=True)
class Scans:
    """How long scans take: a law and its mean in seconds."""

    mean: float
    law: str = "constant"
    shape: float = 0.0  # sigma of a lognormal law, alpha of a Pareto law
    slow: bool = False  # with slow neighbours

    def draw(self, rng: random.Random) -> float:
        """The time of one scan."""
        factor = SLOW_FACTOR if self.slow and rng.random() < SLOW_SHARE else 1
        if self.law == "lognormal":
            return factor * rng.lognormvariate(math.log(self.mean) - self.shape**2 / 2, self.shape)
        if self.law == "pareto":
            least = self.mean * (self.shape - 1) / self.shape
            return factor * min(least * rng.paretovariate(self.shape), LONGEST_SCAN * self.mean)
        if self.law == "exponential":
            return factor * rng.expovariate(1 / self.mean)
        return factor * self.mean

    def __str__(self) -> str:
        ms = f"{1000 * self.mean:g} ms"
        law = "" if self.law == "constant" else f" {self.law}"
        return ms + law + (" slow 1 %" if self.slow else "")


@dataclass(frozen=True)
class Scenario:
    """Shards, and what they are asked."""

    shards: int
    scans: Scans
    load: float = 0.0  # the share of what the shards and the master can do; 0: a closed loop
    clients: int = 0  # in a closed loop; 0: four for each shard
    jobs: int = 5000
    title: str = ""
    connect: tuple[Stage, ...] = ()  # what a connection begins with
    stages: tuple[Stage, ...] = (Stage.EOM,)  # of each message
    messages: int = 1  # of a connection
    light: float = 0.0  # seconds of the jobs before the end of a message, which are light; 0: none
    keys: int = 0
    zipf: float = 0.0  # the exponent; 0: all keys are as frequent
    objects: bool = False
    poison: float = 0.0  # the share of messages that kill whoever scans them
    innocent: float = 0.0  # the share of messages whose first worker dies
    limits: Limits = field(default_factory=Limits)

    @property
    def name(self) -> str:
        """What the table calls it."""
        how = f"{self.load:.0%} load" if self.load else f"{self.concurrency} clients"
        title = f" {self.title}" if self.title else ""
        return f"{self.shards} x {self.scans}, {how}{title}"

    @property
    def concurrency(self) -> int:
        """The clients of a closed loop."""
        return self.clients or 4 * self.shards

    @property
    def kills(self) -> bool:
        """Whether workers die of messages."""
        return bool(self.poison or self.innocent)


@dataclass(eq=False)
class Conversation:
    """A connection: what it asks, one question after the other."""

    number: int
    begins: float  # in an open loop
    questions: list[Question]
    born: float = 0.0


def plan(scenario: Scenario, seed: int) -> list[Conversation]:
    """The connections of a scenario in the order in which they begin."""
    rng = random.Random(f"{seed} {scenario.name}")
    serials, messages = itertools.count(), itertools.count()
    ranks = range(1, scenario.keys + 1)
    weights = list(itertools.accumulate(1 / rank**scenario.zipf for rank in ranks))
    each = len(scenario.connect) + scenario.messages * len(scenario.stages)
    conversations = []
    for number in range(math.ceil(scenario.jobs / each)):
        key = b""
        if scenario.keys:
            key = b"key %d" % rng.choices(ranks, cum_weights=weights)[0]
        questions = []
        for index, stage in _stages(scenario, messages):
            light = scenario.light > 0 and stage is not Stage.EOM
            scan = scenario.light if light else scenario.scans.draw(rng)
            questions.append(
                Question(
                    next(serials),
                    number,
                    index,
                    stage,
                    scan,
                    light,
                    key,
                    _deaths(scenario, stage, rng),
                )
            )
        conversations.append(Conversation(number, 0.0, questions))
    if scenario.load:
        _spread(scenario, conversations, rng)
    return conversations


def _stages(scenario: Scenario, messages: Iterator[int]) -> Iterator[tuple[int, Stage]]:
    index = next(messages)
    for stage in scenario.connect:
        yield index, stage
    for number in range(scenario.messages):
        index = next(messages) if number else index
        for stage in scenario.stages:
            yield index, stage


def _deaths(scenario: Scenario, stage: Stage, rng: random.Random) -> int:
    if not scenario.kills or stage is not Stage.EOM:
        return 0
    drawn = rng.random()
    if drawn < scenario.poison:
        return scenario.limits.retries + 1
    return int(drawn < scenario.poison + scenario.innocent)


def _spread(scenario: Scenario, conversations: Sequence[Conversation], rng: random.Random) -> None:
    """Connections come one by one, independent of each other (Poisson)."""
    scans = fmean(question.scan for each in conversations for question in each.questions)
    rate = scenario.load * min(scenario.shards / scans, 1 / (2 * MASTER_CPU))
    gap = len(conversations[0].questions) / rate
    now = 0.0
    for conversation in conversations:
        now += rng.expovariate(1 / gap)
        conversation.begins = now


class Load:
    """Asks a system all that a plan has."""

    def __init__(
        self, scenario: Scenario, system: System, conversations: list[Conversation]
    ) -> None:
        self._system = system
        self._clock = system.clock
        self._conversations = conversations
        self._clients = 0 if scenario.load else scenario.concurrency
        self._next = iter(conversations)
        self._open = len(conversations)
        self._started = self._clock.seconds()
        self._left: dict[int, Iterator[Question]] = {}

    def run(self) -> None:
        """Until everything is answered."""
        for conversation in itertools.islice(self._next, self._clients):
            self._begin(conversation)
        if not self._clients:
            self._come()
        self._clock.run(lambda: not self._open)

    def _come(self) -> None:
        """The next connection of an open loop."""
        conversation = next(self._next, None)
        if conversation is not None:
            delay = self._started + conversation.begins - self._clock.seconds()
            self._clock.callLater(max(0.0, delay), self._arrive, conversation)

    def _arrive(self, conversation: Conversation) -> None:
        self._begin(conversation)
        self._come()

    def _begin(self, conversation: Conversation) -> None:
        conversation.born = self._clock.seconds()
        self._left[conversation.number] = iter(conversation.questions)
        self._ask(conversation)

    def _ask(self, conversation: Conversation) -> None:
        question = next(self._left[conversation.number], None)
        if question is None:
            self._end(conversation)
            return
        question.asked = self._clock.seconds()
        if question.stage is Stage.MAIL:
            conversation.born = question.asked  # the message begins
        question.born = conversation.born
        self._system.ask(question, lambda each: self._answered(each, conversation))

    def _answered(self, question: Question, conversation: Conversation) -> None:
        question.finished = self._clock.seconds()
        question.answers += 1
        # The MTA hears of it, and its next packet arrives: two hops.
        self._clock.callLater(2 * HOP, self._ask, conversation)

    def _end(self, conversation: Conversation) -> None:
        del self._left[conversation.number]
        self._open -= 1
        self._system.end(conversation.number)
        if self._clients:
            follower = next(self._next, None)
            if follower is not None:
                self._begin(follower)


@dataclass(frozen=True)
class Figures:
    """What a system has made of a plan: jobs a second, waits in seconds, unfairness as ratios."""

    rate: float
    p50: float
    p99: float
    longest: float
    stages: float
    connections: float
    keys: float
    failed: int


def figures(scenario: Scenario, conversations: list[Conversation]) -> Figures:
    """Those of a plan that was asked; of what was asked after the warm-up, while all still came."""
    first = max(int(WARM_UP * len(conversations)), 0 if scenario.load else scenario.concurrency)
    everything = [question for each in conversations for question in each.questions]
    since = conversations[first].questions[0].asked
    until = conversations[-1].questions[0].asked
    counted = [each for each in everything if since <= each.asked <= until]
    done = sum(since <= question.finished <= until for question in everything)
    waits = sorted(question.wait for question in counted if not question.failed)
    long = len(conversations[0].questions) >= MANY
    return Figures(
        rate=done / (until - since),
        p50=percentile(waits, 0.5),
        p99=percentile(waits, 0.99),
        longest=waits[-1],
        stages=_unfairness(counted, lambda each: each.stage),
        connections=_unfairness(
            counted, lambda each: each.conversation if long else each.conversation % CLIENTS
        ),
        keys=_unfairness(counted, lambda each: each.key),
        failed=sum(question.failed for question in everything),
    )


def percentile(values: Sequence[float], share: float) -> float:
    """That of sorted values."""
    return values[min(len(values) - 1, int(share * len(values)))]


def _unfairness(questions: Iterable[Question], group: Callable[[Question], object]) -> float:
    """The longest mean wait of a group, as a multiple of the mean; of those that are large."""
    waits: dict[object, list[float]] = defaultdict(list)
    for question in questions:
        waits[group(question)].append(question.wait)
    mean = fmean(wait for group_ in waits.values() for wait in group_)
    return (
        max((fmean(group_) for group_ in waits.values() if len(group_) >= MANY), default=mean)
        / mean
    )
