"""Real milters from PyPI, unmodified: where they come from, and what each wants to be started.

None of them becomes a daemon or needs the network here. What they do around runmilter():

- dkimpy-milter reads its configuration and keys, writes a pid file if told to, changes user and
  group to `UserID` and sets its umask when it runs as root, then calls runmilter(), with nothing
  after it. Its configuration is a global that the callbacks read.
- pyspf-milter does the same, but always writes a pid file and refuses to start where there is one;
  it leaves the file behind. Its SPF checks ask py3dns, which `no_network` stands in for.
- no-ppap-milter sets a handler for SIGTERM, which plain pymilter never runs: libmilter takes the
  signal itself, and runmilter() returns. It logs its end afterwards, and keeps each mail in a
  temporary file.

Not here, because they cannot run: oletools' mraptor_milter imports StringIO, which ended with
Python 2; dspam-milter adds bytes to str at the first body; pyquarantine 2.1 wants a pymilter that
was never published, and a syslog socket.
"""

import hashlib
import re
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..machine import one_at_a_time

#: What the environment is made of. pymilter is compiled: a C compiler, Python's headers and
#: Debian's libmilter-dev are needed; dknewkey calls Debian's openssl.
REQUIREMENTS = (
    "pymilter==1.0.5",
    "dkimpy-milter==1.2.3",
    "dkimpy==1.1.8",
    "spf-engine==3.1.0",
    "pyspf==2.0.14",
    "no-ppap-milter==0.2.5",
    "authres==1.2.0",
    "py3dns==4.0.2",
    "PyNaCl==1.6.2",
)
INSTALL_TIMEOUT = 600.0

DOMAIN = "example.org"
SELECTOR = "throwaway"
AUTHSERV_ID = "mx.example.test"

_NO_NETWORK = Path(__file__).with_name("no_network")


@dataclass(frozen=True)
class Environment:
    """A virtual environment with pymilter and the milters, and the packages of this one."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def program(self, name: str) -> Path:
        return self.folder / "bin" / name

    def run(self, *arguments: str | Path, cwd: Path, stdin: bytes = b"") -> bytes:
        done = subprocess.run(
            [self.python, *arguments], cwd=cwd, input=stdin, capture_output=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"{arguments} ended with {done.returncode}:\n{done.stderr.decode()}")
        return done.stdout


class CannotInstall(Exception):
    """Why there is no environment, with pip's words."""


def install(cache: Path) -> Environment:
    """The environment, made at the first call; later ones find it in the same cache."""
    recipe = "\n".join([sys.version, sys.prefix, *REQUIREMENTS])
    folder = cache / hashlib.sha256(recipe.encode()).hexdigest()[:16]
    environment = Environment(folder)
    complete = folder / "complete"
    with one_at_a_time(cache / "lock"):
        if not complete.exists():
            _call(sys.executable, "-m", "venv", "--clear", str(folder))
            _call(str(environment.python), "-m", "pip", "install", "-q", *REQUIREMENTS)
            _add_our_packages(folder)
            complete.touch()
    return environment


def _add_our_packages(folder: Path) -> None:
    """The daemon runs its workers with its own interpreter, so that one needs both worlds."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    ours = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    lines = [f"import site; site.addsitedir({path!r})\n" for path in sorted(ours)]
    packages = folder / "lib" / version / "site-packages"
    (packages / "zz_packages_of_the_tests.pth").write_text("".join(lines))


def _call(*command: str) -> None:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=INSTALL_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotInstall(str(error)) from error
    if done.returncode != 0:
        said = done.stdout.decode("utf-8", "replace")
        raise CannotInstall(f"{' '.join(command)} ended with {done.returncode}:\n{said}")


@dataclass(frozen=True)
class Script:
    """A script with its arguments, as its own documentation would have it started."""

    program: Path
    arguments: Sequence[str]
    listen: str
    env: Mapping[str, str] = field(default_factory=dict)


def everything(record: Path, listen: str, plan: str = "{}") -> Script:
    """Our own script that tries every method everywhere."""
    program = Path(__file__).with_name("everything.py")
    return Script(program, [listen, str(record), plan], listen)


def dkimpy_milter(environment: Environment, folder: Path, listen: str) -> Script:
    """Signs mail from `DOMAIN` with an RSA and an Ed25519 key that are made here."""
    for kind in ("rsa", "ed25519"):
        program = environment.program("dknewkey")
        environment.run(program, f"{folder}/{kind}", "--ktype", kind, cwd=folder)
    config = folder / "dkimpy-milter.conf"
    settings = {
        "Syslog": "no",
        "UMask": "0",
        "UserID": "root",
        "Socket": listen,
        "Mode": "s",
        "AuthservID": AUTHSERV_ID,
        "Domain": DOMAIN,
        "Selector": SELECTOR,
        "KeyFile": f"{folder}/rsa.key",
        "SelectorEd25519": f"{SELECTOR}-ed25519",
        "KeyFileEd25519": f"{folder}/ed25519.key",
        "Canonicalization": "relaxed/simple",
        "PidFile": f"{folder}/dkimpy-milter.pid",
    }
    config.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    return Script(environment.program("dkimpy-milter"), [str(config)], listen)


#: Reads messages from standard input, each in a line of hexadecimal digits; prints what each of
#: their signatures is worth, a line for each message.
_VERIFY = """
import sys, dkim
folder, selector = sys.argv[1:]
keys = {
    f"{selector}._domainkey.example.org.": open(f"{folder}/rsa.dns", "rb").read(),
    f"{selector}-ed25519._domainkey.example.org.": open(f"{folder}/ed25519.dns", "rb").read(),
}
for line in sys.stdin:
    message = bytes.fromhex(line)
    count = message.count(b"\\r\\nDKIM-Signature:") + message.startswith(b"DKIM-Signature:")
    found = []
    for index in range(count):
        verifier = dkim.DKIM(message)
        good = verifier.verify(idx=index, dnsfunc=lambda name, timeout=5: keys[name.decode()])
        found.append(f"{verifier.signature_fields[b'a'].decode()} {good}")
    print(*found, sep=", ")
"""


def verified(environment: Environment, folder: Path, messages: Sequence[bytes]) -> list[str]:
    """Of each message: `algorithm True` for each signature that fits the keys in `folder`.

    That is how dkimpy sees it, in one interpreter for all messages: it is slow to import.
    """
    lines = [message.replace(b"\n", b"\r\n").hex() + "\n" for message in messages]
    stdin = "".join(lines).encode()
    said = environment.run("-c", _VERIFY, folder, SELECTOR, cwd=folder, stdin=stdin)
    return said.decode().splitlines()


#: Of a signature field: the second in which it was made, and what follows from that.
_DATED = re.compile(rb"\b(t=)\d+|\b(b=)[^;:]*(?=\n[^ \t])")


def undated(message: bytes) -> bytes:
    """The message with signatures that do not tell when they were made: comparable."""
    return _DATED.sub(lambda found: found[1] or found[2], message)


def pyspf_milter(environment: Environment, folder: Path, listen: str) -> Script:
    """Checks clients on the loopback addresses, which it skips by default."""
    config = folder / "pyspf-milter.conf"
    settings = {
        "debugLevel": "1",
        "TestOnly": "1",
        "HELO_reject": "False",
        "Mail_From_reject": "Fail",
        "PermError_reject": "False",
        "TempError_Defer": "True",
        "skip_addresses": "192.0.2.254/32",
        "InternalHosts": "192.0.2.254",
        "Authserv_Id": AUTHSERV_ID,
        "Socket": listen,
        "PidFile": f"{folder}/pyspf-milter.pid",
        "UserID": "root",
        "UMask": "0",
    }
    config.write_text("".join(f"{name} = {value}\n" for name, value in settings.items()))
    env = {"PYTHONPATH": str(_NO_NETWORK)}
    return Script(environment.program("pyspf-milter"), [str(config)], listen, env)


def no_ppap_milter(environment: Environment, folder: Path, listen: str) -> Script:
    """Refuses zip archives with a password."""
    return Script(environment.program("no-ppap-milter"), ["--socket-name", listen], listen)
