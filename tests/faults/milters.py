"""The milter that does what the first word of a subject says, and others made from it."""

import textwrap
from pathlib import Path

#: Every accepted message is marked with its own subject and with the worker that scanned it.
OBEDIENT = """
    import ctypes, os, re, signal, subprocess, sys, time
    from sharded_milter import Accept, AddHeader, Milter, Reject

    milter = Milter("obedient")
    kept = []

    def fail():
        raise RuntimeError("as told")

    def loop():
        while True:
            pass

    def leave_child():
        # It inherits standard error, and outlives whoever does not kill it.
        child = subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL)
        print("grandchild", child.pid, flush=True)

    def hang_with_child():
        leave_child()
        loop()

    def die_with_child():
        leave_child()
        os.kill(os.getpid(), signal.SIGKILL)

    ACTS = {
        "exit": lambda: os._exit(0),
        "exit3": lambda: os._exit(3),
        "segfault": lambda: ctypes.string_at(0),
        "sysexit": lambda: sys.exit(1),
        "raise": fail,
        "loop": loop,
        "regex": lambda: re.match("(a+)+$", "a" * 60 + "b"),
        "hangchild": hang_with_child,
        "diechild": die_with_child,
        "hog": lambda: kept.append(bytearray(1 << 30)),
        "grow": lambda: kept.append(b"x" * (64 << 20)),
        "sleep1": lambda: time.sleep(1),
        "sleep3": lambda: time.sleep(3),
        "sleep30": lambda: time.sleep(30),
        "closeall": lambda: (os.closerange(3, 64), time.sleep(600)),
    }

    @milter.eom
    def eom(message):
        subject = message.headers["Subject"]
        print("scans", subject, flush=True)
        # A scan of 30 ms: mail flows, and two workers of it leave the CPUs to what is tested.
        ACTS.get(subject.split()[0], lambda: time.sleep(0.03))()
        return Accept(AddHeader("X-Id", subject), AddHeader("X-Worker", str(os.getpid())))
"""


def write(folder: Path, source: str) -> None:
    """The milter of a test; its file is `milter.py`.

    A file that replaces another within the same second must not be taken for what Python has
    compiled before, so it is put there with another time.
    """
    path = folder / "milter.py"
    (folder / "new").write_text(textwrap.dedent(source))
    (folder / "new").replace(path)
    for compiled in (folder / "__pycache__").glob("*.pyc"):
        compiled.unlink()
