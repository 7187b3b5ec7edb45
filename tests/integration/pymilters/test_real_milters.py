"""Milters that others wrote, untouched: the same verdicts and the same bytes with every runner."""

import zipfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest

from ..conftest import Sockets
from ..mails import mail, stored, zipped
from ..postfix import Postfix
from . import scripts
from .conftest import Fate, Mail, Runners, fates
from .scripts import AUTHSERV_ID, Environment, Script

pytestmark = pytest.mark.integration


def encrypted_zip() -> bytes:
    """An archive whose entry says that it is encrypted (bit 0 of its flags), in both places."""
    archive = bytearray(zipped("invoice.txt", b"secret"))
    [entry] = zipfile.ZipFile(BytesIO(bytes(archive))).infolist()
    archive[entry.header_offset + 6] |= 1
    archive[archive.index(b"PK\x01\x02") + 8] |= 1
    return bytes(archive)


FORGED = ("Authentication-Results", f"{AUTHSERV_ID}; spf=pass smtp.mailfrom=evil.example")

SPF_WHY = "Please see http://www.openspf.net/Why?s=mfrom;id=sender@{};ip=127.0.0.1;r=<UNKNOWN>"
SPF_FAIL = "5.7.23 Message rejected due to: SPF fail - not authorized. " + SPF_WHY.format(
    "fail.example"
)
SPF_TEMPERROR = (
    "4.7.24 Message deferred due to: SPF Temporary Error: DNS no working name servers discovered. "
    + SPF_WHY.format("silent.example")
)

#: Every script gets all of them.
MAILS = {
    "plain": Mail(mail()),
    "dots": Mail(mail(text=".\n..\n.dot\nlast line\n")),
    "long": Mail(mail(text="more than one chunk of lines like this one\n" * 4000)),
    "8-bit": Mail(mail().replace(b"Good morning", b"Gr\xfc\xdf Gott")),
    "8-bit header": Mail(mail().replace(b"Subject: hello", b"Subject: h\xe4ll\xf6")),
    "folded": Mail(mail().replace(b"Subject: hello", b"Subject: hello\r\n\tworld")),
    "forged": Mail(mail(fields=[FORGED])),
    "zip": Mail(mail(attachments=[("invoice.zip", zipped("invoice.txt", b"open"))])),
    "encrypted": Mail(mail(attachments=[("invoice.zip", encrypted_zip())])),
    "two recipients": Mail(mail(), recipients=("one@example.com", "two@example.com")),
    "spf pass": Mail(mail(), sender="sender@pass.example"),
    "spf fail": Mail(mail(), sender="sender@fail.example"),
    "spf softfail": Mail(mail(), sender="sender@softfail.example"),
    "spf permerror": Mail(mail(), sender="sender@broken.example"),
    "spf temperror": Mail(mail(), sender="sender@silent.example"),
    "null sender": Mail(mail(), sender=""),
}


#: Every milter, and the mails that plain pymilter cannot be sent with it: with its undecodable
#: field no-ppap-milter raises where it has promised not to answer. libmilter then ignores the rest
#: of the message, end included: the client waits for Postfix's time-out.
MILTERS = {
    "dkimpy_milter": (),
    "pyspf_milter": (),
    "no_ppap_milter": ("8-bit header",),
}
RUNNERS = ["plain", "sharded"]


class Runs:
    """Each milter runs once under each runner, with every mail; its tests look at what came of it.

    Both runners have the same script, so that what they make of a mail can be compared: keys too.
    """

    def __init__(
        self,
        folder: Path,
        runners: Runners,
        postfix: Postfix,
        environment: Environment,
        listen: str,
    ) -> None:
        self._folder = folder
        self._runners = runners
        self._postfix = postfix
        self._environment = environment
        self._listen = listen
        self._scripts: dict[str, Script] = {}
        self._fates: dict[tuple[str, str], dict[str, Fate]] = {}

    def folder(self, milter: str) -> Path:
        """Where its script is configured."""
        return self._folder / milter

    def fates(self, milter: str, runner: str) -> dict[str, Fate]:
        """What became of the mails, by their names."""
        if (milter, runner) not in self._fates:
            script = self._script(milter)
            mails = {name: mail for name, mail in MAILS.items() if name not in MILTERS[milter]}
            with getattr(self._runners, runner)(script, self.folder(milter)):
                self._fates[milter, runner] = fates(self._postfix, mails)
            for left in self.folder(milter).glob(
                "*.pid"
            ):  # which keeps plain pymilter from starting
                left.unlink()
        return dict(self._fates[milter, runner])

    def _script(self, milter: str) -> Script:
        if milter not in self._scripts:
            self.folder(milter).mkdir()
            configure = getattr(scripts, milter)
            self._scripts[milter] = configure(self._environment, self.folder(milter), self._listen)
        return self._scripts[milter]


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    runners: Runners,
    running_postfix: Postfix,
    environment: Environment,
    sockets: Sockets,
) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    return Runs(folder, runners, running_postfix, environment, sockets.pymilter)


@pytest.mark.parametrize("runner", RUNNERS)
def test_dkimpy_milter_signs(runs: Runs, runner: str, environment: Environment) -> None:
    found = runs.fates("dkimpy_milter", runner)
    folder = runs.folder("dkimpy_milter")
    signed = [fate.message for fate in found.values() if fate.message is not None]
    worth = dict(zip(found, scripts.verified(environment, folder, signed), strict=True))
    assert worth == dict.fromkeys(MAILS, "ed25519-sha256 True, rsa-sha256 True")
    for name, fate in found.items():
        assert (fate.code, fate.stage) == (250, "eom"), (name, fate)
        assert fate.message is not None
        fields = scripts.undated(fate.message).split(b"\nFrom:")[0]
        assert fields.count(b"DKIM-Signature: v=1; a=") == 2, fields
        assert fields.count(b" t=;") == 2, fields
        assert fields.endswith(b"b="), fields
        # Nothing but the signatures, which stand on top, and the field that was forged.
        sent = stored(MAILS[name].raw)
        if name == "forged":
            sent = sent.replace(b"%s: %s\n" % tuple(part.encode() for part in FORGED), b"")
        assert fate.message.endswith(sent), (name, fate.message)


@pytest.mark.parametrize("runner", RUNNERS)
def test_pyspf_milter_checks_the_sender(runs: Runs, runner: str) -> None:
    found = runs.fates("pyspf_milter", runner)
    refused = {name: found.pop(name) for name in ("spf fail", "spf temperror")}
    assert [(fate.stage, fate.code, fate.text) for fate in refused.values()] == [
        ("mail", 550, SPF_FAIL),
        ("mail", 450, SPF_TEMPERROR),
    ]
    for name, fate in found.items():
        result = name.removeprefix("spf ") if name.startswith("spf ") else "none"
        assert fate.message is not None, (name, fate)
        field = f"Authentication-Results: {AUTHSERV_ID}; spf={result} (".encode()
        assert fate.message.startswith(field), (name, fate.message)
        assert fate.message.endswith(stored(MAILS[name].raw)), (name, fate.message)


@pytest.mark.parametrize("runner", RUNNERS)
def test_no_ppap_milter_refuses_encrypted_archives(runs: Runs, runner: str) -> None:
    found = runs.fates("no_ppap_milter", runner)
    refused = found.pop("encrypted")
    assert (refused.stage, refused.code) == ("eom", 550)
    assert refused.text == "5.7.1 We do not accpet encrypted zip."
    for name, fate in found.items():
        assert fate.message == stored(MAILS[name].raw), name


@pytest.mark.parametrize("milter", MILTERS)
def test_the_same_becomes_of_every_mail(runs: Runs, milter: str) -> None:
    """The same answers and the same bytes, whoever runs the script; keys are the same, too."""
    plain, sharded = (
        {name: undated(fate) for name, fate in runs.fates(milter, runner).items()}
        for runner in RUNNERS
    )
    assert plain == sharded


def undated(fate: Fate) -> Fate:
    message = fate.message
    return fate if message is None else replace(fate, message=scripts.undated(message))


def test_what_hangs_plain_pymilter_is_answered(
    postfix: Postfix, runners: Runners, environment: Environment, listen: str, tmp_path: Path
) -> None:
    """The script raises at an undecodable field, where it has promised not to answer."""
    script = scripts.no_ppap_milter(environment, tmp_path, listen)
    with runners.sharded(script, tmp_path):
        [fate] = fates(postfix, {"": MAILS["8-bit header"]}).values()
    assert (fate.stage, fate.code) == ("eom", 451)
    assert fate.text.startswith("4.3.0 pymilter: untrapped exception in "), fate
