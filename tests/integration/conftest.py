"""One Postfix for all integration tests, and daemons that listen where it looks for its milters."""

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from .daemon import Daemon
from .machine import free_port
from .postfix import Postfix, require_postfix


@pytest.fixture(scope="session")
def common_ground() -> Iterator[Path]:
    """A directory that root, postfix and nobody can all reach (pytest's own is root's only)."""
    path = Path(tempfile.mkdtemp(prefix="sharded-milter-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@dataclass(frozen=True)
class Sockets:
    """Where the milters of the shared Postfix listen: service "x" asks the milter on `x`."""

    folder: Path
    inet_port: int = field(default_factory=free_port)

    @property
    def scanner(self) -> str:
        return f"unix:{self.folder}/scanner.sock"

    @property
    def policy(self) -> str:
        return f"unix:{self.folder}/policy.sock"

    @property
    def lab(self) -> str:
        return f"unix:{self.folder}/lab.sock"

    @property
    def mtas(self) -> str:
        """One daemon listens here for many modules; where another one is tested it is elsewhere."""
        return f"unix:{self.folder}/mtas.sock"

    @property
    def objects(self) -> str:
        return f"unix:{self.folder}/objects.sock"

    @property
    def slow(self) -> str:
        return f"unix:{self.folder}/slow.sock"

    @property
    def pymilter(self) -> str:
        return f"unix:{self.folder}/pymilter.sock"

    @property
    def nobody(self) -> str:
        """Nothing ever listens here."""
        return f"unix:{self.folder}/nobody.sock"

    @property
    def inet(self) -> str:
        return f"inet:127.0.0.1:{self.inet_port}"


@pytest.fixture(scope="session")
def sockets(common_ground: Path) -> Sockets:
    folder = common_ground / "sockets"
    folder.mkdir()
    folder.chmod(0o755)
    return Sockets(folder)


@pytest.fixture(scope="session")
def running_postfix(common_ground: Path, sockets: Sockets) -> Iterator[Postfix]:
    require_postfix()
    services = {
        "unfiltered": [],
        "scanner": [sockets.scanner],
        "inet": [sockets.inet],
        "policy": [sockets.policy],
        "lab": [sockets.lab],
        "mtas": [sockets.mtas],
        "objects": [sockets.objects],
        "pymilter": [sockets.pymilter],
    }
    with Postfix(
        common_ground / "postfix", milters=[sockets.nobody], services=services
    ) as instance:
        yield instance


@pytest.fixture
def postfix(running_postfix: Postfix) -> Postfix:
    """The shared Postfix with an empty queue and an empty mailbox."""
    running_postfix.clear()
    return running_postfix


def serving(*options: str, listen: str, cwd: Path, workers: int = 2) -> Daemon:
    """A daemon which Postfix's user may talk to; use it in a `with`."""
    return Daemon(
        "--workers", str(workers), "--listen", listen, "--socket-mode", "666", *options, cwd=cwd
    )


@pytest.fixture
def lab(postfix: Postfix, sockets: Sockets, tmp_path: Path) -> tuple[str, Path]:
    """Where a daemon of one test listens, and its directory."""
    return sockets.lab, tmp_path
