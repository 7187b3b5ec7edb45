"""Unique messages under way while something breaks, and the account of every one of them."""

import itertools
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from sharded_milter.errors import RemoteProtocolError
from sharded_milter.protocol import replies
from sharded_milter.testing.mta import Mail, MtaClient, Outcome

from .server import PATIENCE, Server, until

_numbers = itertools.count(1)


def mail(word: str = "mail", size: int = 100, queue_id: str = "") -> Mail:
    """A message like no other; the first word of its subject is an order to the milter."""
    number = next(_numbers)
    raw = b"Subject: %s %d\r\n\r\n%s\r\n" % (word.encode(), number, b"x" * size)
    return Mail(raw, queue_id=queue_id or f"Q{number}")


def subject(message: Mail) -> str:
    return message.raw.partition(b"\r\n")[0].decode().removeprefix("Subject: ")


def word(outcome: Outcome) -> str:
    """A verdict in one word: `accept`, `tempfail`, `451`."""
    verdict = outcome.verdict
    if isinstance(verdict, replies.ReplyCode):
        return verdict.text.split()[0]
    return type(verdict).__name__.lower()


def marks(outcome: Outcome) -> dict[str, str]:
    """The header fields that the milter has added."""
    return {a.name: a.value.strip() for a in outcome.actions if isinstance(a, replies.InsertHeader)}


@dataclass(frozen=True)
class Answer:
    """What became of a message; `after` answers had come when it was begun."""

    mail: Mail
    outcome: Outcome
    after: int


class Flow:
    """Messages on several connections as long as the `with` lasts; then all is accounted for.

    All connections are there before the first message is sent. Each says goodbye only when it has
    its verdicts and nothing else has come. A connection that is told 421 comes again, as an MTA
    does.
    """

    def __init__(
        self, server: Server, connections: int = 4, words: str = "mail", size: int = 100
    ) -> None:
        self.answers: list[Answer] = []
        self.lost: list[str] = []
        self._under_way: set[str] = set()
        self._words = itertools.cycle(words.split())
        self._size = size
        self._server = server
        self._stopping = threading.Event()
        self._all_there = threading.Barrier(connections, timeout=PATIENCE)
        self._threads = [threading.Thread(target=self._run) for _ in range(connections)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        if kind is None:
            self.check()

    def check(self) -> None:
        """Every message has its own answer, and nothing else was said."""
        log = self._server.log
        assert self.lost == [], log()
        subjects = [subject(answer.mail) for answer in self.answers]
        assert len(set(subjects)) == len(subjects)
        for answer in self.answers:
            if word(answer.outcome) == "accept":
                assert marks(answer.outcome)["X-Id"] == subject(answer.mail)

    def verdicts(self) -> Counter[str]:
        return Counter(word(answer.outcome) for answer in list(self.answers))

    def wait(self, more: int = 8) -> None:
        """Returns when so many more messages have their verdict."""
        enough = len(self.answers) + more
        until(lambda: len(self.answers) >= enough, f"{more} more verdicts")

    def settle(self) -> None:
        """Returns when all messages that are under way now have their verdict."""
        now = set(self._under_way)
        until(lambda: not now & self._under_way, "verdicts of what was under way")

    def _run(self) -> None:
        try:
            self._one_connection(self._all_there.wait)
            while not self._stopping.is_set():
                self._one_connection()
        except (RemoteProtocolError, OSError, threading.BrokenBarrierError) as error:
            self.lost.append(repr(error))
            self._all_there.abort()

    def _one_connection(self, once_negotiated: Callable[[], object] = lambda: None) -> None:
        sock = self._server.socket()
        with MtaClient(sock, timeout=PATIENCE) as client:
            once_negotiated()
            while not self._stopping.is_set():
                message, after = mail(next(self._words), self._size), len(self.answers)
                self._under_way.add(subject(message))
                outcome = client.deliver(message)
                self.answers.append(Answer(message, outcome, after))
                self._under_way.discard(subject(message))
                if word(outcome) == "421":
                    return
            sock.setblocking(False)
            try:
                self.lost.append(f"unasked: {sock.recv(100)!r}")
            except BlockingIOError:
                pass
            finally:
                sock.settimeout(PATIENCE)


class Background:
    """One message on its own connection; `outcome` is there when it is `done`."""

    def __init__(self, server: Server, message: Mail) -> None:
        self.mail = message
        self.outcome: Outcome | None = None
        self.error = ""
        self._client = server.client()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.outcome = self._client.deliver(self.mail)
        except (RemoteProtocolError, OSError) as error:
            self.error = repr(error)
        finally:
            self._client.close()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def word(self) -> str:
        """The verdict, waited for."""
        self._thread.join()
        assert self.outcome is not None, self.error
        return word(self.outcome)
