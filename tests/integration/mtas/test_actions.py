"""Each action of an Accept, applied to a mail by both MTAs: the bytes that are delivered."""

import pytest

from .conftest import Mta
from .letters import BODY, asking, delivered

pytestmark = pytest.mark.integration

TWO = "X-Four: two"
ALL_GONE = {"X-Four: one": None, TWO: None, "x-four:three": None, "X-Four: four": None}


def accept(*actions: str) -> str:
    return f"Accept({', '.join(actions)})"


@pytest.mark.parametrize(
    ("action", "field"),
    [
        ("AddHeader('X-Added', 'yes')", "X-Added: yes"),
        ("AddHeader('X-Added', 'one\\n\\ttwo\\r\\n three')", "X-Added: one\n\ttwo\n three"),
        ("AddHeader('X-Added', 'gr\\u00fcn \\udcff')", "X-Added: gr\xfcn \udcff"),
        ("AddHeader('X-Added', ' a  blank ')", "X-Added:  a  blank "),
        ("AddHeader('X-Four', 'five')", "X-Four: five"),
        ("AddHeader('Received', 'from me')", "Received: from me"),
        ("ChangeHeader('X-Absent', 1, 'is added')", "X-Absent: is added"),
        ("ChangeHeader('X-Four', 5, 'is added')", "X-Four: is added"),
        ("ChangeHeader('X-Four', 99, 'is added')", "X-Four: is added"),
    ],
)
def test_an_added_field_is_the_last_one(mta: Mta, action: str, field: str) -> None:
    expression = accept(action)
    delivery = mta.deliver(asking(expression))
    assert delivery.message == delivered(expression, added=[field])


@pytest.mark.parametrize(
    ("actions", "fields"),
    [
        (["InsertHeader(0, 'X-Top', 'yes')"], ["X-Top: yes"]),
        (["InsertHeader(0, 'X-Four', 'zero')"], ["X-Four: zero"]),
        (["InsertHeader(0, 'X-Top', 'a\\n\\tb')"], ["X-Top: a\n\tb"]),
        (
            ["InsertHeader(0, 'X-Low', '1')", "InsertHeader(0, 'X-High', '2')"],
            ["X-High: 2", "X-Low: 1"],
        ),
    ],
)
def test_a_field_inserted_at_0_is_above_all_others(
    mta: Mta, actions: list[str], fields: list[str]
) -> None:
    expression = accept(*actions)
    delivery = mta.deliver(asking(expression))
    assert delivery.message == delivered(expression, top=fields)
    assert delivery.raw.startswith("\n".join([*fields, "Received: "]).encode())


@pytest.mark.parametrize(
    ("action", "changed"),
    [
        ("ChangeHeader('Subject', 1, 'changed')", {"Subject: original": "Subject: changed"}),
        ("ChangeHeader('X-Four', 2, 'changed')", {TWO: "X-Four: changed"}),
        ("ChangeHeader('X-Four', 4, 'a\\n b')", {"X-Four: four": "X-Four: a\n b"}),
        ("ChangeHeader('X-Four', 1, '\\udcff\\u00fc')", {"X-Four: one": "X-Four: \udcff\xfc"}),
        (
            "ChangeHeader('X-Folded', 1, 'now flat')",
            {"X-Folded: first\n\tsecond\n third": "X-Folded: now flat"},
        ),
    ],
)
def test_a_changed_field_stays_in_its_place(
    mta: Mta, action: str, changed: dict[str, str | None]
) -> None:
    expression = accept(action)
    assert mta.deliver(asking(expression)).message == delivered(expression, changed)


@pytest.mark.parametrize(
    ("name", "replaced"), [("subject", "subject: changed"), ("SUBJECT", "SUBJECT: changed")]
)
def test_another_spelling_of_a_changed_field_is_postfix_s_alone(
    mta: Mta, name: str, replaced: str
) -> None:
    expression = accept(f"ChangeHeader('{name}', 1, 'changed')")
    field = replaced if mta.name == "postfix" else "Subject: changed"
    wanted = delivered(expression, {"Subject: original": field})
    assert mta.deliver(asking(expression)).message == wanted


@pytest.mark.parametrize(
    ("indexes", "gone"),
    [
        ([1], {"X-Four: one": None}),
        ([4], {"X-Four: four": None}),
        ([1, 3], {"X-Four: one": None, "x-four:three": None}),
        ([3, 1], {"X-Four: one": None, "x-four:three": None}),
        ([1, 2, 3, 4], ALL_GONE),
        ([5], {}),
        ([2, 2], {TWO: None}),
    ],
)
def test_the_fields_that_the_milter_saw_are_deleted(
    mta: Mta, indexes: list[int], gone: dict[str, str | None]
) -> None:
    expression = accept(*(f"DeleteHeader('X-Four', {index})" for index in indexes))
    assert mta.deliver(asking(expression)).message == delivered(expression, gone)


def test_a_deleted_field_that_is_not_there_changes_nothing(mta: Mta) -> None:
    expression = accept("DeleteHeader('X-Absent')")
    assert mta.deliver(asking(expression)).message == delivered(expression)


@pytest.mark.parametrize(
    ("actions", "replaced", "added"),
    [
        (
            ["DeleteHeader('X-Four', 1)", "ChangeHeader('X-Four', 2, '2')"],
            {"X-Four: one": None, TWO: "X-Four: 2"},
            [],
        ),
        (
            ["AddHeader('X-Four', '5')", "DeleteHeader('X-Four', 1)"],
            {"X-Four: one": None},
            ["X-Four: 5"],
        ),
        (
            ["DeleteHeader('X-Four', 1)", "ChangeHeader('X-Four', 5, '5')"],
            {"X-Four: one": None},
            ["X-Four: 5"],
        ),
        (
            ["ChangeHeader('X-Four', 2, '2')", "ChangeHeader('X-Four', 7, '5')"],
            {TWO: "X-Four: 2"},
            ["X-Four: 5"],
        ),
        (
            ["ChangeHeader('X-Four', 7, '5')", "ChangeHeader('X-Four', 1, '1')"],
            {"X-Four: one": "X-Four: 1"},
            ["X-Four: 5"],
        ),
        (
            [
                "AddHeader('X-Four', '5')",
                "DeleteHeader('X-Four', 1)",
                "ChangeHeader('X-Four', 2, '2')",
                "DeleteHeader('X-Four', 3)",
                "AddHeader('X-Four', '6')",
                "ChangeHeader('X-Four', 4, '4')",
            ],
            {
                "X-Four: one": None,
                TWO: "X-Four: 2",
                "x-four:three": None,
                "X-Four: four": "X-Four: 4",
            },
            ["X-Four: 5", "X-Four: 6"],
        ),
        (
            [
                "AddHeader('X-Four', 'new')",
                *(f"DeleteHeader('X-Four', {index})" for index in (1, 2, 3, 4)),
            ],
            ALL_GONE,
            ["X-Four: new"],
        ),
    ],
)
def test_actions_on_one_name_mean_the_fields_that_the_milter_saw(
    mta: Mta, actions: list[str], replaced: dict[str, str | None], added: list[str]
) -> None:
    expression = accept(*actions)
    assert mta.deliver(asking(expression)).message == delivered(expression, replaced, added)


@pytest.mark.parametrize(
    ("literal", "body"),
    [
        ("b'short\\r\\n'", b"short\n"),
        ("b''", b""),
        ("b'\\r\\n.\\r\\n..\\r\\n\\xff\\x80\\r\\n'", b"\n.\n..\n\xff\x80\n"),
        ("b'no end'", b"no end\n"),
        ("b'From me\\r\\n'", b"From me\n"),
        ("LARGE", (b"\xe9" * 62 + b"\n") * 3200),
        ("LARGE[1:]", ((b"\xe9" * 62 + b"\n") * 3200)[1:]),
        ("b'x' * 65535 + b'\\r\\n'", b"x" * 65535 + b"\n"),
    ],
)
def test_a_replaced_body_is_delivered_byte_for_byte(mta: Mta, literal: str, body: bytes) -> None:
    expression = accept(f"ReplaceBody({literal})")
    assert mta.deliver(asking(expression)).message == delivered(expression, body=body)


def test_all_of_them_at_once(mta: Mta) -> None:
    expression = accept(
        "ReplaceBody(LARGE)",
        "AddHeader('X-Four', '5')",
        "ChangeSender('new@example.net')",
        "InsertHeader(0, 'X-Top', 'yes')",
        "DeleteRecipient('gone@example.com')",
        "DeleteHeader('X-Four', 2)",
        "ChangeHeader('Subject', 1, 'changed')",
        "AddRecipient('added@example.com')",
    )
    delivery = mta.deliver(asking(expression), recipients=["kept@example.com", "gone@example.com"])
    assert delivery.sender == "new@example.net"
    assert sorted(delivery.recipients) == ["added@example.com", "kept@example.com"]
    assert delivery.message == delivered(
        expression,
        {TWO: None, "Subject: original": "Subject: changed"},
        ["X-Four: 5"],
        top=["X-Top: yes"],
        body=(b"\xe9" * 62 + b"\n") * 3200,
    )


def test_a_quarantined_mail_is_held_with_its_changes(mta: Mta) -> None:
    expression = accept(
        "Quarantine('looks 100 % odd')", "AddHeader('X-Added', 'yes')", "DeleteHeader('X-Four', 2)"
    )
    answer = mta.send(asking(expression))
    assert answer.code == 250, f"{answer}\n{mta.log()}"
    [held] = mta.wait_held(1)
    assert held.message == delivered(expression, {TWO: None}, ["X-Added: yes"], body=BODY)
    assert mta.wait_delivered(0) == []


def test_a_discarded_mail_is_accepted_and_gone(mta: Mta) -> None:
    answer = mta.send(asking("Discard()"))
    assert (answer.stage, answer.code) == ("eom", 250), f"{answer}\n{mta.log()}"
    assert mta.wait_delivered(0) == []
    assert mta.wait_held(0) == []
