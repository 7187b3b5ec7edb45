"""Milters that others wrote, untouched: the same verdicts and the same bytes with every runner."""

import zipfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest

from ..mails import mail, stored, zipped
from ..postfix import Postfix
from . import scripts
from .conftest import Fate, Mail, Runner, Runners, fates
from .scripts import AUTHSERV_ID, Environment

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


def test_dkimpy_milter_signs(
    postfix: Postfix, runner: Runner, environment: Environment, listen: str, tmp_path: Path
) -> None:
    script = scripts.dkimpy_milter(environment, tmp_path, listen)
    with runner(script, tmp_path):
        found = fates(postfix, MAILS)
    for name, fate in found.items():
        assert (fate.code, fate.stage) == (250, "eom"), (name, fate)
        assert fate.message is not None
        assert scripts.verified(environment, tmp_path, fate.message) == [
            "ed25519-sha256 True",
            "rsa-sha256 True",
        ], name
        fields = scripts.undated(fate.message).split(b"\nFrom:")[0]
        assert fields.count(b"DKIM-Signature: v=1; a=") == 2, fields
        assert fields.count(b" t=;") == 2, fields
        assert fields.endswith(b"b="), fields
        # Nothing but the signatures, which stand on top, and the field that was forged.
        sent = stored(MAILS[name].raw)
        if name == "forged":
            sent = sent.replace(b"%s: %s\n" % tuple(part.encode() for part in FORGED), b"")
        assert fate.message.endswith(sent), (name, fate.message)


def test_pyspf_milter_checks_the_sender(
    postfix: Postfix, runner: Runner, environment: Environment, listen: str, tmp_path: Path
) -> None:
    script = scripts.pyspf_milter(environment, tmp_path, listen)
    with runner(script, tmp_path):
        found = fates(postfix, MAILS)
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


def test_no_ppap_milter_refuses_encrypted_archives(
    postfix: Postfix, runner: Runner, environment: Environment, listen: str, tmp_path: Path
) -> None:
    script = scripts.no_ppap_milter(environment, tmp_path, listen)
    # With its undecodable field the script raises where it has promised not to answer. libmilter
    # then ignores the rest of the message, end included: the client waits for Postfix's time-out.
    mails = {name: mail for name, mail in MAILS.items() if name != "8-bit header"}
    with runner(script, tmp_path):
        found = fates(postfix, mails)
    refused = found.pop("encrypted")
    assert (refused.stage, refused.code) == ("eom", 550)
    assert refused.text == "5.7.1 We do not accpet encrypted zip."
    for name, fate in found.items():
        assert fate.message == stored(MAILS[name].raw), name


#: Every milter, and the mails that plain pymilter cannot be sent with it.
MILTERS = {
    "dkimpy_milter": (),
    "pyspf_milter": (),
    "no_ppap_milter": ("8-bit header",),
}


@pytest.mark.parametrize("name", MILTERS)
def test_the_same_becomes_of_every_mail(
    name: str,
    postfix: Postfix,
    runners: Runners,
    environment: Environment,
    listen: str,
    tmp_path: Path,
) -> None:
    """The same answers and the same bytes, whoever runs the script; keys are the same, too."""
    script = getattr(scripts, name)(environment, tmp_path, listen)
    mails = {key: mail for key, mail in MAILS.items() if key not in MILTERS[name]}
    found = []
    for runner in (runners.plain, runners.sharded):
        with runner(script, tmp_path):
            found.append({key: undated(fate) for key, fate in fates(postfix, mails).items()})
        for left in tmp_path.glob("*.pid"):  # with which plain pymilter would not start again
            left.unlink()
    assert found[0] == found[1]


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
