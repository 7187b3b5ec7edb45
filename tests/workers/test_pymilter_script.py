"""A script as the main program: what it finds, and what the master is told of its end."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from amp_link import Link
from twisted.protocols import amp

from sharded_milter.errors import MilterLoadError
from sharded_milter.ipc.messages import Ready
from sharded_milter.protocol.stages import Stage
from sharded_milter.workers import pymilter_script as script_module
from sharded_milter.workers.child import Child
from sharded_milter.workers.pymilter_script import Script

#: The Python half, as far as this needs it.
HALF = """
from milter import *
import milter
_seq = 0
factory = None

def uniqueID():
    global _seq
    _seq += 1
    return _seq

def runmilter(name, socket):
    milter.register(name, negotiate=lambda ctx, opts: CONTINUE)
    milter.set_eom_callback(lambda ctx: CONTINUE)
    milter.setconn(socket)
    milter.opensocket(True)
    milter.main()
"""

RUN = "import Milter\nMilter.factory = object\nMilter.runmilter('x', '/run/s')\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current directory with a Python half that can be found."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "half").mkdir()
    (tmp_path / "half/Milter.py").write_text(HALF)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "half"), *sys.path])
    monkeypatch.setattr(sys, "argv", ["x"])
    monkeypatch.setattr(script_module, "DEBIANS", str(tmp_path / "none"))
    for name in ("milter", "Milter"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path
    for name in ("milter", "Milter"):
        sys.modules.pop(name, None)


class Worker:
    """Runs a script; the loop ends at once."""

    name = "mine.py"

    def __init__(self, source: str, *arguments: str) -> None:
        Path(self.name).write_text(source)
        self.children: list[Child] = []
        self.halted: list[Child] = []
        self.script = Script(self.name, arguments, self.serve, self.halted.append)

    def serve(self, child: Child) -> None:
        self.children.append(child)

    def run(self) -> Worker:
        self.script.run()
        return self

    @property
    def child(self) -> Child:
        [child] = self.children
        return child

    def failure(self) -> MilterLoadError:
        with pytest.raises(MilterLoadError) as caught:
            self.child._loading("mine.py")
        return caught.value


def test_a_script_serves_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    worker = Worker(f"import sys\n{RUN}print('over', sys.argv, __name__)", "-a", "b").run()
    dialect = worker.child._loading("mine.py")
    assert (dialect.manifest.name, worker.child._socket) == ("x", "unix:/run/s")
    assert dialect.manifest.answers(Stage.EOM)
    assert capsys.readouterr().out == "over ['mine.py', '-a', 'b'] __main__\n"


class Odd(Worker):
    """A script whose name says nothing; keeps what its child says to the master."""

    name = "mine"

    def serve(self, child: Child) -> None:
        super().serve(child)
        link = Link()
        child.makeConnection(link)
        data = b"".join(part for part in link.sent if isinstance(part, bytes))
        [self.said] = amp.parseString(data)


def test_its_code_is_told_whatever_it_is_called_and_wherever_it_goes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "elsewhere").mkdir()
    codes = []
    for comment in ("# one", "# one", "# two"):
        monkeypatch.chdir(folder)
        for name in ("milter", "Milter"):  # each is a process of its own
            sys.modules.pop(name, None)
        worker = Odd(f"import os\nos.chdir('elsewhere')\n{RUN}{comment}")
        worker.run()
        assert worker.said[amp.COMMAND] == Ready.commandName
        codes.append(worker.said[b"code"])
    assert codes[0] == codes[1] != codes[2]


def test_numbers_are_unique_among_processes(capsys: pytest.CaptureFixture[str]) -> None:
    import os

    Worker(f"import Milter\nprint(Milter.uniqueID())\n{RUN}").run()
    assert capsys.readouterr().out == f"{os.getpid()}000000001\n"


def test_modules_beside_the_script_are_found(folder: Path) -> None:
    (folder / "beside_it.py").write_text("")
    assert Worker(f"import beside_it\n{RUN}").run().child._socket
    del sys.modules["beside_it"]


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("", "has ended without calling Milter.runmilter()"),
        ("1 / 0", "has raised ZeroDivisionError: division by zero"),
        ("raise SystemExit", "has called sys.exit(None) before Milter.runmilter()"),
        ("class:", "has raised SyntaxError: invalid syntax"),
        (
            "import Milter\nMilter.factory = int\n" + RUN.replace("object", "str"),
            "has set Milter.factory to <class 'int'> and <class 'str'>; there is one factory for"
            " all connections",
        ),
        (
            RUN.replace("Milter.run", "try:\n    Milter.run") + "except Exception: pass",
            "",
        ),
    ],
)
def test_what_does_not_serve_is_told(source: str, why: str) -> None:
    worker = Worker(source).run()
    if why:
        assert str(worker.failure()) == f"pymilter script mine.py {why}"
    else:
        assert worker.child._socket


def test_a_failure_that_the_script_hides_is_told() -> None:
    source = "import Milter\nMilter.negotiate = 1\n" + RUN.replace(
        "Milter.runmilter('x', '/run/s')",
        "import milter\n"
        "milter.register('x', negotiate=lambda ctx, opts: 1)\n"
        "try:\n    milter.main()\nexcept Exception:\n    pass",
    )
    failure = Worker(source).run().failure()
    assert str(failure).startswith("pymilter script mine.py: negotiate() has failed: InvalidVerd")
    assert "Traceback" in failure.details


def test_the_traceback_begins_with_the_script() -> None:
    details = Worker("def f():\n    1 / 0\nf()").run().failure().details
    assert details.startswith('  File "mine.py", line 3, in <module>')
    assert details.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize(("end", "kind"), [("1 / 0", ZeroDivisionError), ("exit(3)", SystemExit)])
def test_what_comes_after_serving_is_the_scripts_own_affair(
    end: str, kind: type[BaseException]
) -> None:
    worker = Worker(f"import sys\n{RUN}{end.replace('exit', 'sys.exit')}")
    with pytest.raises(kind):
        worker.run()
    assert worker.child._socket


def test_a_script_that_is_not_there(folder: Path) -> None:
    worker = Worker("")
    (folder / "mine.py").unlink()
    assert str(worker.run().failure()) == "pymilter script mine.py does not exist"


def test_runmilter_may_be_called_in_a_thread() -> None:
    source = (
        "import threading, time\n"
        "def serve():\n"
        "    time.sleep(0.2)\n"
        + "".join(f"    {line}\n" for line in RUN.splitlines())
        + "threading.Thread(target=serve).start()\n"
    )
    worker = Worker(source).run()
    assert worker.child._socket
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join(5)


def test_stop_ends_the_loop() -> None:
    worker = Worker(f"import Milter\nMilter.stop()\n{RUN}Milter.stop()").run()
    assert worker.halted == [worker.child]


def test_without_pymilter_it_is_said_how_to_get_it(folder: Path) -> None:
    (folder / "half/Milter.py").unlink()
    failure = str(Worker(RUN).run().failure())
    assert failure.startswith("--pymilter needs pymilter's own Python half")
    assert "`pip install pymilter`, or Debian's python3-milter" in failure


def test_debians_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "half/Milter.py").rename(folder / "half.py")
    (folder / "debian/Milter").mkdir(parents=True)
    (folder / "half.py").rename(folder / "debian/Milter/__init__.py")
    monkeypatch.setattr(script_module, "DEBIANS", str(folder / "debian"))
    assert Worker(RUN).run().child._socket
    assert sys.path[-1] == str(folder / "debian")


def test_a_broken_pymilter_is_not_taken_for_none(folder: Path) -> None:
    (folder / "half/Milter.py").write_text("import no_such_module")
    failure = str(Worker(RUN).run().failure())
    assert failure == "pymilter cannot be imported: No module named 'no_such_module'"


def test_what_a_script_must_not_do_is_said_in_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    Worker(f"import os\nos.setsid()\n{RUN}").run()
    said = capsys.readouterr().err
    assert said == "mine.py: os.setsid() is ignored: workers run as the master does\n"


def test_a_child_that_stops_itself_ends_well() -> None:
    class Transport:
        lost = False

        def loseConnection(self) -> None:
            self.lost = True

    child: Any = Child([])
    child.transport = Transport()
    child.stop()
    assert child.shutdown
    assert child.transport.lost
    assert isinstance(sys.modules.get("sys"), ModuleType)
