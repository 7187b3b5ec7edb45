"""Children that a milter forks in a worker: they end where the milter's code ends."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest
from one_worker import PATIENCE, Worker

# The milter answers with its own pid and the exit code of the child that it has forked; the child
# does what WAY says.
SOURCE = """
import asyncio, atexit, multiprocessing, os, signal, subprocess, sys, threading, time
from sharded_milter import Milter, Reject
from twisted.internet import reactor

milter = Milter("real")
atexit.register(print, "at exit in", os.getpid(), flush=True)

def fail():
    raise RuntimeError("as told")

def channel():
    sockets = [fd for fd in os.listdir("/proc/self/fd")
               if os.path.islink("/proc/self/fd/" + fd)
               and os.readlink("/proc/self/fd/" + fd) == CHANNEL]
    os._exit(len(sockets))

def told_to_end(number):
    os.kill(os.getpid(), number)
    time.sleep(60)

WAYS = {
    "return": lambda: None,
    "raise": fail,
    "exit": lambda: sys.exit(7),
    "text": lambda: sys.exit("a text"),
    "interrupt": lambda: (_ for _ in ()).throw(KeyboardInterrupt),
    "channel": channel,
    "term": lambda: told_to_end(signal.SIGTERM),
    "int": lambda: told_to_end(signal.SIGINT),
    "hup": lambda: told_to_end(signal.SIGHUP),
}
CHANNEL = ""

def of_child(act):
    pid = os.fork()
    if not pid:
        act()
        return "child"
    return f"{os.getpid()} {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}"

def executed(_):
    child = subprocess.Popen(["sleep", "60"])
    child.terminate()
    return f"{os.getpid()} {child.wait()}"

def spawned(_):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    child.terminate()
    child.join()
    return f"{os.getpid()} {child.exitcode}"

def own_handler(_):
    signal.signal(signal.SIGTERM, lambda *_: os._exit(9))
    return of_child(WAYS["term"])

async def awaits():
    if not os.fork():
        await asyncio.sleep(0)
        return "child"
    return f"{os.getpid()} {os.waitstatus_to_exitcode(os.wait()[1])}"

async def task():
    async def fork():
        return os.fork()
    pid = await asyncio.ensure_future(fork())
    if not pid:
        return "child"
    return f"{os.getpid()} {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}"

async def timer():
    fired = asyncio.get_running_loop().create_future()
    pids = []
    def fork():
        pids.append(os.fork())
        if pids[0]:
            fired.set_result(None)
    reactor.callLater(0, fork)
    await fired
    return f"{os.getpid()} {os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1])}"

OTHERS = {"popen": executed, "process": spawned, "own handler": own_handler}
COROUTINES = {"awaits": awaits, "task": task, "timer": timer}
way = os.environ["WAY"]

if way == "import" and not os.fork():
    raise RuntimeError("in the child")

def sync(connection):
    global CHANNEL
    server = reactor.getReaders() if hasattr(reactor, "getReaders") else []
    sockets = [each for each in server if type(each).__name__ == "PassingTransport"]
    CHANNEL = os.readlink(f"/proc/self/fd/{sockets[0].fileno()}")
    act = OTHERS.get(way)
    return Reject(act(way) if act else of_child(WAYS.get(way, WAYS["return"])))

async def coroutine(connection):
    return Reject(await COROUTINES[way]())

@milter.connect
def connect(connection):
    return sync(connection)

if way in COROUTINES:
    milter = Milter("real")
    milter.connect(coroutine)
"""

WAYS = {
    "return": 0,
    "raise": 1,
    "exit": 7,
    "text": 1,
    "interrupt": 1,
    "channel": 0,  # descriptors of it
    "term": -signal.SIGTERM,
    "int": -signal.SIGINT,
    "hup": -signal.SIGHUP,
    "own handler": 9,
    "popen": -signal.SIGTERM,
    "process": -signal.SIGTERM,
    "awaits": 0,
    "task": 0,
    "timer": 0,
    "import": 0,
}


@pytest.mark.parametrize(("way", "code"), WAYS.items())
def test_a_forked_child_answers_nothing_and_ends_where_the_callback_ends(
    tmp_path: Path, way: str, code: int
) -> None:
    with Worker(tmp_path, source=SOURCE, env={"WAY": way, "PYTHONUNBUFFERED": "1"}) as worker:
        master = worker.ready().master
        for _ in range(3):  # nothing is between the answers
            assert master.evaluated() == f"{worker.process.pid} {code}"
        assert master.told == ["real"]
        children = psutil.Process(worker.process.pid).children()
        assert {child.status() for child in children} <= {psutil.STATUS_ZOMBIE}
        worker.sock.close()
        out, _ = worker.process.communicate(timeout=PATIENCE)
    assert b"at exit in" not in out.replace(b"at exit in %d\n" % worker.process.pid, b"")


def test_the_last_words_of_a_child_are_shown(tmp_path: Path) -> None:
    with Worker(tmp_path, source=SOURCE, env={"WAY": "raise"}) as worker:
        worker.ready().master.evaluated()
        worker.sock.close()
        _, errors = worker.process.communicate(timeout=PATIENCE)
    assert b"RuntimeError: as told" in errors
