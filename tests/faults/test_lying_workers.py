"""Workers that were taken over by a message: the master, other mail and other workers go on.

The code that a message brings along runs in its worker, and speaks to the master as it likes.
"""

import re
import resource
from pathlib import Path

import pytest

from sharded_milter.protocol.replies import ReplaceBody
from sharded_milter.testing.mta import Mail

from .flow import Background, Flow, mail, word
from .server import Server, until
from .test_system_limits import Lowered

pytestmark = pytest.mark.integration

#: A milter that runs what a message says, with what it needs to speak for its worker.
TAKEN_OVER = """
    import array, fcntl, mmap, os, socket, sys, time
    from sharded_milter import Accept, AddHeader, Milter, ReplaceBody

    milter = Milter("taken over")
    SEALS = 15

    def frames():
        frame = sys._getframe()
        while frame:
            yield frame.f_locals
            frame = frame.f_back

    def worker():
        return next(f["self"] for f in frames() if type(f.get("self")).__name__ == "Child")

    def channel():
        sock = socket.socket(fileno=os.dup(worker().transport.fileno()))
        sock.setblocking(True)
        return sock

    def tag():
        boxes = [f["box"] for f in frames() if isinstance(f.get("box"), dict)]
        return boxes[0][b"_ask"]

    def box(**values):
        parts = [part for key, value in values.items() for part in (key.encode(), value)]
        return b"".join(len(part).to_bytes(2, "big") + part for part in parts) + bytes(2)

    def send(data, *descriptors):
        numbers = array.array("i", descriptors)
        sent = channel().sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)])
        channel().sendall(data[sent:])

    def memory(content, size=None, seals=SEALS):
        fd = os.memfd_create("evil", os.MFD_ALLOW_SEALING)
        os.write(fd, content)
        if size is not None:
            os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        return fd

    def said(fd, size, **more):
        value = b"@%d %d" % (os.fstat(fd).st_ino, size)
        return box(_answer=tag(), replies=value, **more)

    def given():
        for name in os.listdir("/proc/self/fd"):
            try:
                if "sharded-milter" in os.readlink("/proc/self/fd/" + name):
                    yield "/proc/self/fd/" + name
            except OSError:
                pass

    @milter.eom
    def eom(message):
        subject = message.headers["Subject"]
        if subject.startswith("run"):
            exec(message.body.split(b"END")[0].replace(b"\\r\\n", b"\\n").decode(), globals())
        if subject.startswith("large"):
            return Accept(AddHeader("X-Id", subject), ReplaceBody(subject.encode() * 9000))
        time.sleep(0.01)
        return Accept(AddHeader("X-Id", subject))
"""


def evil(code: str) -> Mail:
    """A message that brings code along."""
    body = code.encode() + b"\nEND"
    message = mail("run")
    return Mail(message.raw.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" + body, message.queue_id)


#: What is sent while the worker is at its message, and the rule that it breaks.
LIES = {
    "truncated": (
        "fd = memory(b'', 1 << 26, 0); send(said(fd, 1 << 26), fd);"
        " time.sleep(0.02); os.ftruncate(fd, 0)",
        "a descriptor that is not sealed memory",
    ),
    "pipe": ("r, w = os.pipe(); send(said(r, 99), r)", "a descriptor that is not sealed memory"),
    "zero": (
        "fd = os.open('/dev/zero', 0); send(said(fd, 99), fd)",
        "a descriptor that is not sealed memory",
    ),
    "other size": (
        "fd = memory(b'x'); send(said(fd, 4096), fd)",
        "memory of 1 bytes and says that it has 4096",
    ),
    "not sent": ("send(box(_answer=tag(), replies=b'@0 9'))", "it has not sent the memory"),
    "huge": (
        "fd = memory(b'', 1 << 40); send(said(fd, 1 << 40), fd)",
        "a value of 1099511627776 bytes (the limit is 134217728)",
    ),
    "tiny packets": (
        "fd = memory(bytes((0, 0, 0, 1, 98)) * 20_000_000); send(said(fd, 100_000_000), fd)",
        "more than 32768 packets",
    ),
    "fewer tiny packets": (
        "fd = memory(bytes((0, 0, 0, 1, 98)) * 200_000); send(said(fd, 1_000_000), fd)",
        "more than 32768 packets",
    ),
    "endless box": (
        "n = 0\nwhile True:\n send(b'\\0\\2k%d\\xff\\xff' % n + bytes(65535)); n = (n + 1) % 10",
        "a box of more than 8 values",
    ),
    "commands": (
        "while True: send(box(_command=b'n' * 200, _ask=b'1') * 200)",
        "it has sent an unknown command",
    ),
    "descriptors": (
        "fd = memory(b'x'); send(b'\\0', *[fd] * 250); time.sleep(600)",
        "33 descriptors that no message claims (the limit is 32)",
    ),
    "garbage": (
        "send(b'GET / HTTP/1.1\\r\\n')",
        "a box with a key of 18245 bytes (the limit is 255)",
    ),
    "empty answer": ("send(box(_answer=tag()))", "replies: it is missing"),
    "twice": (
        "send(box(_answer=tag(), replies=b'=') * 2)",
        "a question that it was not asked",
    ),
    "ready again": (
        "send(box(_command=b'Ready', milters=b'', code=b'', socket=b''))",
        "it has sent its introduction twice",
    ),
    "huge reason": (
        "send(box(_answer=tag(), replies=b'=', reason=b'x' * 65535))",
        "reason: a value of 65535 bytes (the limit is 8192)",
    ),
}


@pytest.mark.parametrize("kind", LIES)
def test_a_worker_that_lies_is_killed_with_one_line_and_costs_no_other_mail(
    kind: str, tmp_path: Path
) -> None:
    code, rule = LIES[kind]
    with Server(tmp_path, source=TAKEN_OVER) as server:
        before, memory = server.descriptors(), server.memory()
        with Flow(server) as flow:
            flow.wait()
            liar = Background(
                server, evil(code + "; time.sleep(600)" if "\n" not in code else code)
            )
            until(lambda: liar.done, "the message that lies has its verdict")
            flow.wait()
        assert set(flow.verdicts()) == {"accept"}
        until(server.is_whole, "two workers run again")
        until(lambda: server.descriptors() <= before, "as many descriptors are open as before")
        assert server.memory() - memory < 150 << 20
        told = re.findall(r" shard \d+ is gone: (.*)", server.log())
        assert told
        assert all(rule in line for line in told), told
        assert len(told) == (1 if kind == "twice" else 2)  # that of a message is answered at once
        assert server.unforeseen() == [], server.log()


def test_no_worker_can_change_what_another_sees(tmp_path: Path) -> None:
    """It opens what it was given anew, for writing, and tries all that would change it."""
    code = """
for path in given():
    for how in (os.O_RDWR, os.O_RDWR | os.O_TRUNC):
        try:
            fd = os.open(path, how)
            os.pwrite(fd, b"changed", 0)
            print("changed", flush=True)
        except OSError as error:
            print("refused", error.errno, flush=True)
"""
    padding = "#" * 100_000
    with Server(tmp_path, source=TAKEN_OVER) as server, server.client() as client:
        outcome = client.deliver(evil(code + padding))
        assert word(outcome) == "accept"
        assert "refused" in server.log()
        assert "changed" not in server.log()
        assert server.unforeseen() == [], server.log()


def test_a_worker_short_of_descriptors_says_so_and_is_replaced(tmp_path: Path) -> None:
    code = (
        "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (3, r.getrlimit(r.RLIMIT_NOFILE)[1]))"
    )
    with Server(tmp_path, source=TAKEN_OVER, workers=1) as server, server.client() as client:
        assert word(client.deliver(evil(code))) == "accept"
        assert word(client.deliver(mail(size=200_000))) == "451"
        server.wait_log("is replaced: it cannot take a question: Too many open files")
        until(lambda: word(client.deliver(mail(size=200_000))) == "accept", "its successor is fine")
        assert server.counters().get("poison", 0) == 0
        assert server.unforeseen() == [], server.log()


def test_a_master_short_of_descriptors_mixes_no_answers_and_kills_no_worker(tmp_path: Path) -> None:
    with Server(tmp_path, source=TAKEN_OVER, workers=1) as server:
        workers = server.workers()
        with server.client() as client, Flow(server, connections=2, words="large") as flow:
            flow.wait(4)
            with Lowered(server, resource.RLIMIT_NOFILE, 3):
                assert word(client.deliver(mail("large"))) == "451"
                flow.wait(4)
            until(lambda: word(client.deliver(mail("large"))) == "accept", "it can take them again")
            flow.wait(4)
        assert set(flow.verdicts()) == {"accept", "451"}
        for answer in flow.answers:
            body = [each for each in answer.outcome.actions if isinstance(each, ReplaceBody)]
            if word(answer.outcome) == "accept":
                said = b"".join(piece.chunk for piece in body)
                subject = answer.mail.raw.partition(b"\r\n")[0].removeprefix(b"Subject: ")
                assert said == subject * 9000
        assert server.workers() == workers
        assert server.unforeseen() == [], server.log()
