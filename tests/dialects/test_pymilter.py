"""The stand-in for pymilter's C half: the calls of a script, and its jobs."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest

from sharded_milter.dialects.pymilter.context import ContextObject, error
from sharded_milter.dialects.pymilter.dialect import PymilterDialect
from sharded_milter.dialects.pymilter.module import CONSTANTS, Registration
from sharded_milter.errors import MilterLoadError
from sharded_milter.protocol import commands, replies
from sharded_milter.protocol.negotiation import KNOWN_ACTIONS, KNOWN_PROTOCOL, SessionAffinity
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.stages import Actions, Protocol, Stage
from sharded_milter.protocol.wire import packets

CONTINUE, REJECT, ACCEPT, TEMPFAIL = 0, 1, 3, 4
NOREPLY, SKIP, ALL_OPTS = 7, 8, 10

ALL = 0x1FF
OFFER = commands.Negotiate(6, ALL, 0x1FFFFF)
CLIENT = commands.Connect("client.example.test", "4", 25, "192.0.2.1")
MESSAGE: list[Packet] = [
    commands.Mail("<a@example.org>", ("SIZE=1",)),
    commands.Rcpt("<b@example.com>"),
    commands.Data(),
    commands.Header("Subject", " hello"),
    commands.Eoh(),
    commands.Body(b"body\r\n"),
    commands.Eom(),
]

C = CONSTANTS


# The module


@pytest.fixture
def script() -> Registration:
    return Registration()


@pytest.fixture
def module(script: Registration) -> Any:
    return script.module()


def test_the_module_has_the_names_of_the_c_half(module: Any) -> None:
    names = {name for name in vars(module) if not name.startswith("__")}
    functions = {name for name in names if callable(getattr(module, name))}
    stages = "connect helo envfrom envrcpt header eoh body eom abort close"
    assert functions == {
        *[
            "error",
            "getdiag",
            "getversion",
            "main",
            "opensocket",
            "register",
            "set_exception_policy",
        ],
        *["set_flags", "setbacklog", "setconn", "setdbg", "settimeout", "stop"],
        *(f"set_{stage}_callback" for stage in stages.split()),
    }
    assert len(names - functions) == 52
    assert (C["P_NR_HDR"], C["P_NOUNKNOWN"], C["P_HDR_LEADSPC"]) == (0x80, 0x100, 0x100000)
    assert (C["CHGBODY"], C["MODBODY"], C["SETSYMLIST"]) == (2, 2, 0x100)
    assert issubclass(module.error, Exception)
    assert str(module.error) == "<class 'milter.error'>"


WRONG: list[tuple[str, tuple[Any, ...], type[Exception], str]] = [
    ("set_flags", (2**31,), OverflowError, "signed integer is greater than maximum"),
    ("set_flags", (-(2**31) - 1,), OverflowError, "signed integer is less than minimum"),
    ("set_flags", ("1",), TypeError, "'str' object cannot be interpreted as an integer"),
    ("set_exception_policy", (2,), error, "invalid exception policy"),
    ("setbacklog", (0,), error, "cannot set backlog"),
    ("setconn", ("",), error, "cannot set connection"),
    ("setconn", (None,), TypeError, r"setconn\(\) argument 1 must be str, not None"),
    ("set_helo_callback", (1,), TypeError, "callback parameter must be callable"),
    (
        "set_helo_callback",
        (),
        TypeError,
        r"set_helo_callback\(\) takes exactly 1 argument \(0 given\)",
    ),
    ("register", (), TypeError, r"register\(\) missing required argument 'name' \(pos 1\)"),
    ("register", (None,), TypeError, r"register\(\) argument 1 must be str, not None"),
    ("register", ("x", 1), TypeError, "name parameter must be callable"),
    ("register", ("x", None, 1), TypeError, "unknown parameter must be callable"),
    ("register", ("x", None, None, 1), TypeError, "data parameter must be callable"),
    ("opensocket", (True,), error, "cannot opensocket"),
    ("main", (1,), TypeError, r"main\(\) takes exactly 0 arguments \(1 given\)"),
    ("main", (), error, r"register\(\) was not called"),
    ("stop", (1,), TypeError, r"stop\(\) takes exactly 0 arguments \(1 given\)"),
    ("getversion", (1,), TypeError, r"getversion\(\) takes exactly 0 arguments"),
]


@pytest.mark.parametrize(("name", "arguments", "kind", "why"), WRONG)
def test_a_wrong_call_is_refused_as_by_c(
    name: str, arguments: Any, kind: type[Exception], why: str, module: Any
) -> None:
    with pytest.raises(kind, match=rf"^{why}"):
        getattr(module, name)(*arguments)


def test_a_keyword_that_does_not_exist(module: Any) -> None:
    with pytest.raises(TypeError, match=r"^'foo' is an invalid keyword argument for register\(\)"):
        module.register("x", foo=1)


def test_settings_are_kept_or_of_no_use(script: Registration, module: Any) -> None:
    module.set_flags(17)
    module.set_exception_policy(ACCEPT)
    module.settimeout(5)
    module.setbacklog(5)
    module.setdbg(5)
    assert (script.flags, script.policy) == (17, ACCEPT)
    assert module.getversion() == (1, 0, 1)
    assert module.getdiag() == (0, 0)


def test_a_callback_is_set_and_the_one_before_returned(script: Registration, module: Any) -> None:
    assert module.set_helo_callback(len) is None
    assert script.callbacks == {ord("H"): len}
    assert module.set_helo_callback(None) is len
    module.register("x", data=len, negotiate=None)
    assert (script.name, script.callbacks) == ("x", {ord("T"): len})


@pytest.mark.parametrize(
    ("conn", "socket"),
    [
        ("unix:/run/s", "unix:/run/s"),
        ("local:/run/s", "unix:/run/s"),
        ("/run/s", "unix:/run/s"),
        ("inet:8890@127.0.0.1", "inet:8890@127.0.0.1"),
        ("inet6:8890", "inet6:8890"),
        ("inet:smtp@localhost", "inet:25@localhost"),
        ("fd:3", "fd:3"),
    ],
)
def test_a_socket_is_spelled_for_the_master(
    conn: str, socket: str, script: Registration, module: Any
) -> None:
    module.setconn(conn)
    module.opensocket(True)
    module.setconn("unix:/another")  # the first one stays
    module.opensocket(True)
    assert script.socket == socket


@pytest.mark.parametrize("conn", ["pigeon:coo", "inet:no-such-service@h", "unix:"])
def test_a_socket_that_is_none(conn: str, module: Any) -> None:
    module.setconn(conn)
    with pytest.raises(error, match=r"^cannot opensocket$"):
        module.opensocket(True)


def test_main_serves_once(script: Registration, module: Any) -> None:
    served: list[str] = []

    def loop() -> None:
        served.append("loop")
        with pytest.raises(error, match=r"^milter module in use$"):
            module.main()
        module.stop()

    script.loop, script.halt = loop, lambda: served.append("halt")
    module.register("x")
    module.main()
    module.main()
    assert served == ["loop", "halt"]


def test_main_needs_somebody_who_serves(module: Any) -> None:
    module.register("x")
    module.stop()
    with pytest.raises(MilterLoadError, match="before the program has set a loop"):
        module.main()


# Jobs


class Play:
    """A script's callbacks, which record their arguments and return scripted values."""

    def __init__(self, script: Registration, **answers: Any) -> None:
        self.script = script
        self.module: Any = script.module()
        self.seen: list[tuple[Any, ...]] = []
        self.answers = answers
        self.acts: dict[str, Callable[[Any], Any]] = {}  # what a callback does
        self.opts: Callable[[list[Any]], None] = lambda opts: None
        self.session = 0

    def register(self, *without: str, negotiates: bool = True) -> Play:
        for name in [
            "connect",
            "helo",
            "envfrom",
            "envrcpt",
            "header",
            "eoh",
            "body",
            "eom",
            "abort",
            "close",
        ]:
            if name not in without:
                getattr(self.module, f"set_{name}_callback")(self._callback(name))
        self.module.register(
            "a test",
            unknown=None if "unknown" in without else self._callback("unknown"),
            data=None if "data" in without else self._callback("data"),
            negotiate=self._negotiate if negotiates else None,
        )
        return self

    def _callback(self, name: str) -> Callable[..., Any]:
        def callback(context: Any, *arguments: Any) -> Any:
            self.seen.append((name, *arguments))
            if name in self.acts:
                self.acts[name](context)
            answer = self.answers.get(name, CONTINUE)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return callback

    def _negotiate(self, context: Any, opts: list[Any]) -> Any:
        self.seen.append(("negotiate", *opts))
        if "negotiate" in self.acts:
            self.acts["negotiate"](context)
        opts[1] = 0
        self.opts(opts)
        answer = self.answers.get("negotiate", CONTINUE)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def load(self) -> PymilterDialect:
        self.dialect = PymilterDialect(self.script)
        self.seen.clear()
        return self.dialect

    def ask(
        self, *message: Packet, offer: commands.Negotiate = OFFER, client: Packet = CLIENT
    ) -> list[Packet]:
        """Return the answer to the last command of a new connection."""
        manifest = self.dialect.manifest
        agreed = commands.Negotiate(
            6,
            manifest.actions & (offer.actions or 0xF),
            manifest.protocol & (offer.protocol or 0x3F),
        )
        connection = b"".join(packet.encode() for packet in (offer, agreed, client))
        self.session += 1
        stage = Stage(message[-1].letter) if message else Stage.CONNECT
        content = b"".join(packet.encode() for packet in message)
        answer = self.dialect.answer(stage, connection, content, self.session)
        assert isinstance(answer, bytes)
        return [replies.parse_reply(answer[start - 5 : end]) for _, start, end in packets(answer)]

    def leave(self) -> None:
        self.dialect.answer(None, b"", b"", self.session)


@pytest.fixture
def play(script: Registration) -> Play:
    return Play(script)


def test_the_manifest_is_what_the_script_negotiates(play: Play) -> None:
    def opts(opts: list[Any]) -> None:
        assert opts[0] == ALL
        opts[1] = C["P_NR_MAIL"] | C["P_NODATA"] | C["P_RCPT_REJ"]

    play.opts = opts
    play.acts["negotiate"] = lambda context: context.setsymlist(5, "{auth_type},i j")
    play.register()
    manifest = PymilterDialect(play.script).manifest
    assert play.seen == [("negotiate", ALL, 0x1FFFFF, 0, 0), ("close",)]
    assert play.module.getdiag() == (1, 1)
    assert (manifest.name, manifest.affinity) == ("a test", SessionAffinity.REQUIRED)
    assert manifest.actions == ALL & ~C["SETSYMLIST"]
    content = Protocol.NR_HEADER | Protocol.NR_EOH | Protocol.NR_BODY | Protocol.HDR_LEADSPC
    assert manifest.protocol == content | Protocol.NR_MAIL | Protocol.NO_DATA | Protocol.RCPT_REJ
    assert manifest.macros == ((Stage.EOM, ("{auth_type}", "i", "j")),)


@pytest.mark.parametrize("negotiates", [True, False])
def test_without_negotiating_it_is_the_callbacks_that_count(play: Play, negotiates: bool) -> None:
    play.answers["negotiate"] = ALL_OPTS
    play.module.set_flags(C["ADDHDRS"])
    manifest = play.register("body", "data", "close", negotiates=negotiates).load().manifest
    assert manifest.actions == (ALL & ~C["SETSYMLIST"] if negotiates else Actions.ADDHDRS)
    assert manifest.protocol & Protocol.NO_BODY
    assert manifest.protocol & Protocol.NO_DATA
    assert not manifest.protocol & Protocol.NO_EOH
    assert play.ask(*MESSAGE) == [replies.Continue()]
    play.leave()


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (REJECT, "InvalidVerdict: negotiate returned 1"),
        (None, "error: The negotiate callback must return int"),
        (ZeroDivisionError("x"), "ZeroDivisionError: x"),
    ],
)
def test_a_script_that_does_not_negotiate_is_not_loaded(play: Play, answer: Any, why: str) -> None:
    play.answers["negotiate"] = answer
    with pytest.raises(MilterLoadError, match=rf"^negotiate.. has failed: {why}") as caught:
        play.register().load()
    assert "Traceback" in caught.value.details
    assert play.seen[-1] == ("close",)


def test_a_failing_negotiation_may_be_the_policys(play: Play, capfd: Any) -> None:
    play.module.set_exception_policy(CONTINUE)
    play.answers["negotiate"] = ZeroDivisionError("x")
    assert play.register().load().manifest.actions == ALL & ~C["SETSYMLIST"]
    assert "ZeroDivisionError: x" in capfd.readouterr().err


@pytest.mark.parametrize("opts", [(512, 0), (-1, 0), (0, 0x10000000)])
def test_more_than_is_offered_is_not_loaded(play: Play, opts: tuple[int, int]) -> None:
    play.opts = lambda found: found.__setitem__(slice(2), opts)
    with pytest.raises(MilterLoadError, match="negotiate requests actions"):
        play.register().load()


def test_a_connection_that_the_script_refuses_is_refused(play: Play, capfd: Any) -> None:
    play.register().load()
    play.answers["negotiate"] = REJECT
    assert play.ask() == [replies.TempFail()]
    assert play.ask(*MESSAGE[:1]) == [replies.TempFail()]
    assert "negotiate returned 1" in capfd.readouterr().err
    play.leave()
    assert [name for name, *_ in play.seen] == ["negotiate", "negotiate", "close"]


def test_what_a_connection_suppresses_is_not_called(play: Play) -> None:
    play.register().load()
    play.opts = lambda opts: opts.__setitem__(1, C["P_NOBODY"])
    play.ask(*MESSAGE)
    assert [name for name, *_ in play.seen] == [
        "negotiate", "connect", "envfrom", "envrcpt", "data", "header", "eoh", "eom",
    ]  # fmt: skip


def test_an_old_mtas_offer_is_what_libmilter_makes_of_it(play: Play) -> None:
    play.register().load()
    play.ask(offer=commands.Negotiate(2, 0, 0))
    assert play.seen[0] == ("negotiate", 15, 0xFF0BF, 0, 0)


def test_arguments(play: Play) -> None:
    play.register().load()
    play.ask(commands.Helo("caf\udce9"), *MESSAGE)
    play.ask(commands.Unknown("FROB"))
    assert play.seen == [
        ("negotiate", KNOWN_ACTIONS, KNOWN_PROTOCOL, 0, 0),
        ("connect", "client.example.test", 2, ("192.0.2.1", 25)),
        ("helo", "caf\udce9"),
        ("envfrom", b"<a@example.org>", b"SIZE=1"),
        ("envrcpt", b"<b@example.com>"),
        ("data",),
        ("header", "Subject", b"hello"),
        ("eoh",),
        ("body", b"body\r\n"),
        ("eom",),
        ("negotiate", KNOWN_ACTIONS, KNOWN_PROTOCOL, 0, 0),
        ("connect", "client.example.test", 2, ("192.0.2.1", 25)),
        ("unknown", "FROB"),
    ]


@pytest.mark.parametrize(
    ("family", "address", "shown"),
    [
        ("6", "IPv6:2001:DB8::1", (socket.AF_INET6, ("2001:db8::1", 25, 0, 0))),
        ("L", "/run/s", (socket.AF_UNIX, "/run/s")),
        ("U", "", (0, None)),
        ("4", "unknown", (0, None)),
    ],
)
def test_clients(play: Play, family: str, address: str, shown: Any) -> None:
    play.register().load()
    client = commands.Connect("h", family, 0 if family == "U" else 25, address)
    play.ask(client=client)
    assert play.seen[1] == ("connect", "h", *shown)


# Verdicts

APOLOGY = replies.ReplyCode("451 4.3.0 pymilter: untrapped exception in a test")


@pytest.mark.parametrize(
    ("answer", "sent"),
    [
        (CONTINUE, replies.Continue()),
        (True, replies.Reject()),
        (2**32 + REJECT, replies.Reject()),
        (ACCEPT, replies.Accept()),
        (SKIP, replies.Continue()),
        (NOREPLY, APOLOGY),
        (42, APOLOGY),
        (-1, APOLOGY),
        (None, APOLOGY),
        (1.0, APOLOGY),
        (ZeroDivisionError("x"), APOLOGY),
    ],
)
def test_answers(play: Play, answer: Any, sent: Packet) -> None:
    play.answers["envfrom"] = answer
    play.register().load()
    assert play.ask(*MESSAGE[:1]) == [sent]


@pytest.mark.parametrize(
    ("policy", "stage", "sent"),
    [
        (TEMPFAIL, "envfrom", APOLOGY),
        (
            REJECT,
            "envfrom",
            replies.ReplyCode("554 5.3.0 pymilter: untrapped exception in a test"),
        ),
        (ACCEPT, "envfrom", replies.Accept()),
        (CONTINUE, "envfrom", replies.Continue()),
        (ACCEPT, "unknown", replies.Continue()),
    ],
)
def test_exception_policies(play: Play, policy: int, stage: str, sent: Packet) -> None:
    play.module.set_exception_policy(policy)
    play.answers[stage] = ZeroDivisionError("x")
    play.register().load()
    command = MESSAGE[0] if stage == "envfrom" else commands.Unknown("FROB")
    assert play.ask(command) == [sent]


def test_no_reply_may_be_none(play: Play) -> None:
    play.opts = lambda opts: opts.__setitem__(1, C["P_NR_MAIL"])
    play.answers["envfrom"] = NOREPLY
    play.register().load()
    assert play.ask(*MESSAGE) == [replies.Continue()]


@pytest.mark.parametrize("stage", ["envfrom", "envrcpt", "data", "header", "body"])
def test_an_exception_where_no_reply_is_due_is_the_messages(play: Play, stage: str) -> None:
    play.opts = lambda opts: opts.__setitem__(1, C["P_NR_MAIL"] | C["P_NR_RCPT"] | C["P_NR_DATA"])
    play.answers.update(dict.fromkeys(("envfrom", "envrcpt", "data"), NOREPLY))
    play.answers[stage] = ZeroDivisionError("x")
    play.register().load()
    assert play.ask(*MESSAGE) == [APOLOGY]


def test_a_refused_recipient_leaves_the_message_open(play: Play) -> None:
    play.answers["envrcpt"] = ZeroDivisionError("x")
    play.register().load()
    assert play.ask(*MESSAGE[:2]) == [APOLOGY]
    play.answers["envrcpt"] = CONTINUE
    play.leave()
    assert play.seen[-2:] == [("abort",), ("close",)]


def test_what_abort_and_close_return_or_raise_is_only_logged(play: Play, capfd: Any) -> None:
    play.answers.update(abort=None, close=ZeroDivisionError("at the end"))
    play.register()
    play.load()
    play.ask(*MESSAGE[:1])
    play.leave()
    assert play.seen[-2:] == [("abort",), ("close",)]
    logged = capfd.readouterr().err
    assert "The abort callback must return int" in logged
    assert "ZeroDivisionError: at the end" in logged


def test_connections_that_are_left_are_closed(play: Play) -> None:
    dialect = play.register().load()
    play.ask(*MESSAGE[:1])
    play.ask()
    dialect.close()
    dialect.close()
    assert [name for name, *_ in play.seen[-3:]] == ["abort", "close", "close"]
    assert play.module.getdiag() == (3, 3)


# The context


@pytest.fixture
def at_eom(play: Play) -> Callable[[Callable[[Any], Any]], list[Packet]]:
    """Return the packets that this call sends at end of message."""
    play.register().load()

    def at_eom(act: Callable[[Any], Any]) -> list[Packet]:
        play.acts["eom"] = act
        return play.ask(*MESSAGE)

    return at_eom


DONE: list[tuple[str, tuple[Any, ...], Packet]] = [
    ("addheader", ("X", "v"), replies.AddHeader("X", " v")),
    ("addheader", ("X", "\udce9", -7), replies.AddHeader("X", " \udce9")),
    ("addheader", ("X", "v", 2), replies.InsertHeader(2, "X", " v")),
    ("chgheader", ("X", 1, "v"), replies.ChangeHeader(1, "X", " v")),
    ("chgheader", ("X", 1, None), replies.ChangeHeader(1, "X", "")),
    ("addrcpt", ("a@b",), replies.AddRecipient("a@b")),
    ("addrcpt", ("a@b", None), replies.AddRecipient("a@b")),
    ("addrcpt", ("a@b", "N=1"), replies.AddRecipientPar("a@b", ("N=1",))),
    ("delrcpt", ("a@b",), replies.DeleteRecipient("a@b")),
    ("chgfrom", ("a@b", "P=1"), replies.ChangeSender("a@b", ("P=1",))),
    ("replacebody", ("\udce9",), replies.ReplaceBody(b"\xe9")),
    ("replacebody", (b"\xff\0",), replies.ReplaceBody(b"\xff\0")),
    ("quarantine", ("two\r\nlines",), replies.Quarantine("two lines")),
]


@pytest.mark.parametrize(("method", "arguments", "packet"), DONE)
def test_changes(method: str, arguments: Any, packet: Packet, at_eom: Any) -> None:
    def act(context: Any) -> None:
        assert getattr(context, method)(*arguments) is None

    assert at_eom(act) == [packet, replies.Continue()]


REFUSED: list[tuple[str, tuple[Any, ...], type[Exception], str]] = [
    ("addheader", ("", "v"), error, "cannot add header"),
    ("addheader", ("X", None), TypeError, r"addheader\(\) argument 2 must be str, not None"),
    ("addheader", ("X", "a\0b"), ValueError, "embedded null character"),
    ("addheader", ("X", "\ud800"), UnicodeEncodeError, "'utf-8' codec can't encode"),
    ("addheader", ("X", "v", 0.5), TypeError, "'float' object cannot be interpreted"),
    ("addheader", ("X",), TypeError, r"addheader\(\) takes at least 2 arguments \(1 given\)"),
    ("addheader", (1, 2, 3, 4), TypeError, r"addheader\(\) takes at most 3 arguments \(4 given\)"),
    ("chgheader", ("X", -1, "v"), error, "cannot change header"),
    ("chgheader", ("X", 1, b"v"), TypeError, r"chgheader\(\) argument 3 must be str or None, not"),
    ("addrcpt", ("",), error, "cannot add recipient"),
    ("addrcpt", ("a", ["N"]), TypeError, r"addrcpt\(\) argument 2 must be str or None, not list"),
    ("delrcpt", ("",), error, "cannot delete recipient"),
    ("chgfrom", ("",), error, "cannot change sender"),
    ("replacebody", (None,), TypeError, "a bytes-like object is required, not 'NoneType'"),
    ("replacebody", (bytearray(),), TypeError, "argument 1 must be read-only bytes-like object"),
    ("replacebody", (), TypeError, r"function takes exactly 1 argument \(0 given\)"),
    ("quarantine", ("",), error, "cannot quarantine message"),
    ("setreply", ("550", ""), error, "cannot set reply"),
    ("setreply", ("250", "2.0.0", "x"), error, "cannot set reply"),
    ("setreply", ("550", "five", "x"), error, "cannot set reply"),
    ("setreply", ("550", "5.7.1", None), TypeError, r"setreply\(\) argument 3 must be str"),
    ("setreply", ("550",), TypeError, r"setreply\(\) takes at least 2 arguments \(1 given\)"),
    ("setsymlist", (7, "i"), error, "cannot set macro list"),
    ("progress", (1,), TypeError, r"progress\(\) takes exactly 0 arguments \(1 given\)"),
]


@pytest.mark.parametrize(("method", "arguments", "kind", "why"), REFUSED)
def test_wrong_calls_of_the_context(
    method: str, arguments: Any, kind: type[Exception], why: str, at_eom: Any
) -> None:
    def act(context: Any) -> None:
        with pytest.raises(kind, match=rf"^{why}"):
            getattr(context, method)(*arguments)

    assert at_eom(act) == [replies.Continue()]


def test_changes_are_for_the_end_of_the_message(play: Play) -> None:
    def act(context: Any) -> None:
        with pytest.raises(error, match=r"^cannot add header$"):
            context.addheader("X", "v")
        context.progress()

    play.acts["envfrom"] = act
    play.register().load()
    assert play.ask(*MESSAGE[:1]) == [replies.Continue()]


def test_what_was_not_negotiated_is_refused(play: Play) -> None:
    def act(context: Any) -> None:
        context.addheader("X", "v")
        with pytest.raises(error, match=r"^cannot change sender$"):
            context.chgfrom("a@b")

    play.opts = lambda opts: opts.__setitem__(0, C["ADDHDRS"])
    play.acts["eom"] = act
    play.register().load()
    assert play.ask(*MESSAGE) == [replies.AddHeader("X", " v"), replies.Continue()]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("550", "5.7.1", "text"), "550 5.7.1 text"),
        (("550", "5.7.1", ""), "550 5.7.1 "),
        (("550", "5.7.1"), "550 5.7.1"),
        (("550", None, "text"), "550 text"),
        (("550", None, "2 of them"), "550 5.0.0 2 of them"),
        (("550", "4.7.1", "text"), "550 5.7.1 text"),
        (("550", None, "one", "two"), "550-5.0.0 one\r\n550 5.0.0 two"),
        (("550", "5.7.1", "100% \udce9"), "550 5.7.1 100%% \udce9"),
    ],
)
def test_words_of_a_refusal(play: Play, arguments: Any, text: str) -> None:
    play.acts["envfrom"] = lambda context: context.setreply(*arguments)
    play.answers["envfrom"] = REJECT
    play.register().load()
    assert play.ask(*MESSAGE[:1]) == [replies.ReplyCode(text)]


def test_words_of_another_class_wait(play: Play) -> None:
    play.acts["envfrom"] = lambda context: context.setreply("550", "5.7.1", "kept")
    play.answers.update(envfrom=CONTINUE, envrcpt=TEMPFAIL, data=REJECT)
    play.register().load()
    assert play.ask(*MESSAGE[:2]) == [replies.TempFail()]
    assert play.ask(*MESSAGE[:3]) == [replies.ReplyCode("550 5.7.1 kept")]


def test_macros_and_private_data(play: Play) -> None:
    kept: list[Any] = []

    def act(context: Any) -> None:
        assert repr(type(context)) == "<class 'milter.Context'>"
        assert (context.getpriv(), context.setpriv("mine"), context.getpriv()) == (
            None,
            None,
            "mine",
        )
        assert context.setpriv("other") == "mine"
        kept.extend(context.getsymval(name) for name in ("i", "{i}", "{8bit}", "none"))

    play.acts["envfrom"] = act
    play.register().load()
    play.ask(commands.Macro("M", (("i", "Q1"), ("{8bit}", "\udce9"))), MESSAGE[0])
    assert kept == ["Q1", "Q1", "\udce9", None]


def test_a_context_is_of_no_use_afterwards(play: Play) -> None:
    kept: list[ContextObject] = []

    def act(context: Any) -> None:
        kept.append(context)
        assert context.getsymval("i") is None

    play.acts["close"] = act
    play.register().load()
    play.ask()
    play.leave()
    calls: list[Callable[[Any], Any]] = [
        lambda context: context.getsymval("i"),
        lambda context: context.setreply("550", None, "x"),
        lambda context: context.setsymlist(1, "i"),
        lambda context: context.addheader("X", "v"),
        lambda context: context.progress(),
    ]
    for call in calls:
        with pytest.raises(error, match=r"^bad context$"):
            call(kept[-1])
