"""What test processes share because they run on one machine: ports, and what is made only once."""

import errno
import fcntl
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Below the ports that Linux gives to outgoing connections (32768 and up, unless told otherwise):
#: none of those can take a port between its choice here and its use by a daemon.
_PORTS = range(20_000, 30_000)

#: What keeps our ports ours as long as this process lives.
_claims: list[socket.socket] = []


def free_port() -> int:
    """A loopback port on which nobody listens, and which no other test process is given.

    The claim is an abstract UNIX socket with the port in its name: the kernel lets one process
    have it, and takes it away when that one ends, however it ends.
    """
    for port in random.sample(_PORTS, len(_PORTS)):
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0sharded-milter-tests-port-{port}")
            with socket.socket() as probe:
                # Connections that are over and not yet forgotten do not keep a daemon from it.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))
        except OSError as error:
            claim.close()
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            _claims.append(claim)
            return port
    raise RuntimeError("every port is taken")


@contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Inside the `with` no other process is in a `with` on the same file, which stays."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
