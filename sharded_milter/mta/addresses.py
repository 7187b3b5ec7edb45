"""Addresses: the operator's spellings of the sockets on which the service listens.

| spelling                                    | whose                        |
|---------------------------------------------|------------------------------|
| `inet:8890@127.0.0.1`, `inet6:8890@::1`     | Sendmail, libmilter          |
| `inet:127.0.0.1:8890`, `inet:[::1]:8890`    | Postfix                      |
| `unix:/path`, `local:/path`, `/path`        | both, and bare               |
| `tcp:8890:interface=127.0.0.1`, `tcp6:8890` | Twisted                      |
"""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass

from sharded_milter.errors import UsageError

_PORT = r"(?P<port>[0-9]+)"
_SENDMAIL = re.compile(rf"(?P<kind>inet6?):{_PORT}(?:@(?P<host>[^@\[\]]+|\[[^@\[\]]+\]))?")
_POSTFIX = re.compile(rf"(?P<kind>inet6?):(?P<host>[^:@\[\]]+|\[[^@\[\]]+\]):{_PORT}")
_TWISTED = re.compile(rf"(?P<kind>tcp6?):(?:port=)?{_PORT}(?::interface=(?P<host>[^@\[\]]+))?")
_UNIX = re.compile(r"(?:(?:unix|local):)?(?P<path>/.+)")

# The addresses at which local clients reach a server that listens on all addresses.
_REACHED_AT = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True)
class ListenAddress:
    """A parsed `--listen`: a path, or host and port. `spec` is the operator's spelling."""

    spec: str
    path: str = ""
    host: str = ""
    port: int = 0
    family: int = socket.AF_INET

    def for_postfix(self, port: int) -> str:
        """Return the socket as main.cf spells it; `port` is the one that is bound."""
        if self.path:
            return f"unix:{self.path}"
        host = _REACHED_AT.get(self.host, self.host)
        return f"inet:[{host}]:{port}" if ":" in host else f"inet:{host}:{port}"


def parse_listen(spec: str) -> ListenAddress:
    """Parse `spec`. Raise UsageError if it is none of the spellings above."""
    if match := _UNIX.fullmatch(spec):
        return ListenAddress(spec, path=match["path"])
    for pattern in (_SENDMAIL, _POSTFIX, _TWISTED):
        if match := pattern.fullmatch(spec):
            found = match.groupdict()
            host = (found["host"] or "").strip("[]").replace("\\:", ":")
            v6 = ":" in host or found["kind"].endswith("6")
            if not host and v6:
                host = "::"
            port = int(found["port"])
            if port > 0xFFFF:
                raise UsageError(f"{spec!r}: port {port} is above 65535")
            family = socket.AF_INET6 if v6 else socket.AF_INET
            return ListenAddress(spec, host=host, port=port, family=family)
    raise UsageError(f"{spec!r} is neither inet:PORT@HOST nor inet:HOST:PORT nor unix:/PATH")
