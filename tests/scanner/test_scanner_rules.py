"""The rules: findings of the bundled ones, and the operator's own."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scanner_samples import EICAR, GTUBE, OLE, windows_program

from sharded_milter.errors import ConfigError
from sharded_milter.scanner.parts import Mark, Part
from sharded_milter.scanner.rules import (
    Finding,
    RuleError,
    Rules,
    ScannerUnavailable,
    Severity,
)

TAG, QUARANTINE, REJECT = Severity.TAG, Severity.QUARANTINE, Severity.REJECT
BUNDLED = Rules()
SEVEN_ZIP = bytes.fromhex("377ABCAF271C0004")
RAR4 = bytes.fromhex("526172211A0700")
RAR5 = bytes.fromhex("526172211A070100")


def found(part: Part, rules: Rules = BUNDLED) -> list[Finding]:
    return rules.match(part, 10)


def names(data: bytes = b"", *, name: str = "", depth: int = 0) -> list[str]:
    return [finding.rule for finding in found(Part(name, "", data, depth))]


def folder(tmp_path: Path, **files: str) -> Path:
    for name, text in files.items():
        (tmp_path / f"{name}.yar").write_text(text)
    return tmp_path


# Ours


@pytest.mark.parametrize(
    ("rule", "severity", "part"),
    [
        ("eicar", REJECT, Part("", "", EICAR)),
        ("gtube", REJECT, Part("", "", GTUBE)),
        ("executable", QUARANTINE, Part("", "", windows_program())),
        ("double_extension", QUARANTINE, Part("a.pdf.exe", "", b"")),
        ("encrypted_archive", TAG, Part("", "", b"", marks=frozenset({Mark.ENCRYPTED}))),
        ("archive_bomb", QUARANTINE, Part("", "", b"", marks=frozenset({Mark.BOMB}))),
        ("archive_broken", TAG, Part("", "", b"", marks=frozenset({Mark.BROKEN}))),
        ("mime_bomb", QUARANTINE, Part("", "", b"", marks=frozenset({Mark.FLOODED}))),
        ("scan_timeout", QUARANTINE, Part("", "", b"", marks=frozenset({Mark.TIMED_OUT}))),
        ("office_macro", TAG, Part("word/vbaProject.bin", "", b"", depth=1)),
    ],
)
def test_a_bundled_rule_asks_for(rule: str, severity: Severity, part: Part) -> None:
    assert found(part) == [Finding(rule, severity)]


@pytest.mark.parametrize("data", [b"", b"before " + EICAR + b"\r\n", EICAR * 2])
def test_the_test_virus_is_found_anywhere(data: bytes) -> None:
    assert names(data) == (["eicar"] if data else [])


@pytest.mark.parametrize("data", [b"a " + GTUBE + b" b", GTUBE.decode().encode("utf-16")])
def test_the_test_spam_is_found_in_any_encoding(data: bytes) -> None:
    assert names(data) == ["gtube"]


@pytest.mark.parametrize(
    "data",
    [
        windows_program(),
        windows_program().replace(b"PE\0\0", b"NE\0\0"),
        b"\x7fELF" + bytes(60),
        bytes.fromhex("FEEDFACF") + bytes(60),
        bytes.fromhex("CFFAEDFE") + bytes(60),
        bytes.fromhex("CAFEBABE00000002") + bytes(60),
        bytes.fromhex("CAFEBABE00000041") + bytes(60),
        bytes.fromhex("4C0000000114020000000000C000000000000046") + bytes(60),
    ],
    ids=["pe", "ne", "elf", "mach-o", "mach-o swapped", "fat mach-o", "java", "shortcut"],
)
def test_programs_are_known_by_their_first_bytes(data: bytes) -> None:
    assert names(data, name="holiday.jpg") == ["executable"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"MZ",
        b"MZ is how this text starts" + bytes(100),
        b" " + windows_program(),
        b"an ELF is a person",
        b"#!/bin/sh\n",
        bytes.fromhex("CAFEBABE") + b"coffee in hex",
        EICAR[:-1],
        EICAR.lower(),
        GTUBE[1:],
        GTUBE.replace(b"*", b"+"),
    ],
)
def test_a_near_miss_is_clean(data: bytes) -> None:
    assert names(data, name="program.exe") == []


@pytest.mark.parametrize(
    "name",
    [
        "invoice.pdf.exe",
        "INVOICE.PDF.SCR",
        "a.jpg                    .com",
        "a.docx.js. ",
        "folder/in/archive/a.txt.vbs",
        "grüße.xlsx.hta",
        "invoice\u202efdp.exe",
    ],
)
def test_a_double_extension_is_found(name: str) -> None:
    assert names(name=name) == ["double_extension"]


@pytest.mark.parametrize(
    "name", ["", "a.exe", "a.tar.gz", "a.pdf", "a.exe.pdf", "v1.2.exe", "a.pdf.execute", "pdf.exe"]
)
def test_an_honest_name_is_clean(name: str) -> None:
    assert names(name=name) == []


@pytest.mark.parametrize(
    ("data", "hit"),
    [
        (SEVEN_ZIP + bytes(40) + bytes.fromhex("2406F10701"), True),
        (SEVEN_ZIP + bytes(40) + bytes.fromhex("2303010105"), False),
        (RAR4 + bytes.fromhex("CF9073800D00") + bytes(20), True),
        (RAR4 + bytes.fromhex("CF9073000D00000000000000") + b"\0\0\0\x74\x24\x80", True),
        (RAR4 + bytes.fromhex("CF9073000D00000000000000") + b"\0\0\0\x74\x20\x80", False),
        (RAR5 + bytes.fromhex("AABBCCDD2104"), True),
        (RAR5 + bytes.fromhex("AABBCCDD2101"), False),
    ],
    ids=["7z", "7z plain", "rar4 header", "rar4 file", "rar4 plain", "rar5", "rar5 plain"],
)
def test_archives_we_do_not_open_show_their_encryption(data: bytes, hit: bool) -> None:
    assert names(data) == (["encrypted_archive"] if hit else [])


@pytest.mark.parametrize(
    ("data", "name", "depth", "hit"),
    [
        (OLE + bytes(500) + "_VBA_PROJECT".encode("utf-16-le"), "a.doc", 0, True),
        (OLE + bytes(500) + b"\0Attribut\0e VB_Nam", "a.bin", 0, True),
        (OLE + bytes(500) + "WordDocument".encode("utf-16-le"), "a.doc", 0, False),
        ("_VBA_PROJECT".encode("utf-16-le"), "a.doc", 0, False),
        (b"", "word/VBAPROJECT.BIN", 1, True),
        (b"", "xl/macrosheets/sheet1.xml", 1, True),
        (b"", "vbaProject.bin", 0, False),
        (b"", "word/document.xml", 1, False),
    ],
)
def test_office_macros_are_found_in_both_kinds_of_documents(
    data: bytes, name: str, depth: int, hit: bool
) -> None:
    assert names(data, name=name, depth=depth) == (["office_macro"] if hit else [])


@given(st.binary(max_size=300), st.text(max_size=20), st.integers(0, 8))
def test_any_part_can_be_matched(data: bytes, name: str, depth: int) -> None:
    part = Part(name.encode("utf-8", "replace").decode(), "text/plain", data, depth)
    assert isinstance(found(part), list)


# The operator's


def test_an_operators_rule_is_matched_beside_ours(tmp_path: Path) -> None:
    text = 'rule cheese { meta: action = "reject" strings: $a = "cheese" condition: $a }'
    rules = Rules(folder(tmp_path, food=text))
    part = Part("a.pdf.exe", "", b"a cheese")
    assert found(part, rules) == [
        Finding("double_extension", QUARANTINE),
        Finding("cheese", REJECT),
    ]


@pytest.mark.parametrize(
    ("meta", "severity"),
    [
        ("", TAG),
        ('meta: author = "me"', TAG),
        ('meta: action = "tag"', TAG),
        ('meta: action = "quarantine"', QUARANTINE),
        ('meta: action = "reject"', REJECT),
        ('meta: action = "tag" action = "reject" action = "quarantine"', REJECT),
    ],
)
def test_meta_action_decides_and_none_is_tag(tmp_path: Path, meta: str, severity: Severity) -> None:
    rules = Rules(folder(tmp_path, a=f"rule a {{ {meta} condition: true }}"))
    assert found(Part("", "", b""), rules) == [Finding("a", severity)]


@pytest.mark.parametrize(
    "condition",
    [
        'filename == "grüße"',
        'content_type == "text/html"',
        "archive_depth == 2",
        "encrypted and broken and not bomb and not flooded and not timed_out",
    ],
)
def test_an_operators_rule_sees_what_the_walk_saw(tmp_path: Path, condition: str) -> None:
    rules = Rules(folder(tmp_path, a=f"rule a {{ condition: {condition} }}"))
    marked = frozenset({Mark.ENCRYPTED, Mark.BROKEN})
    assert Finding("a", TAG) in found(Part("grüße", "text/html", b"", 2, marked), rules)
    assert found(Part("", "", b""), rules) == []


def test_an_operators_rule_replaces_ours_of_the_same_name(tmp_path: Path) -> None:
    text = 'rule double_extension { meta: action = "tag" condition: filename == "b.pdf.exe" }'
    rules = Rules(folder(tmp_path, a=text))
    assert found(Part("a.pdf.exe", "", b""), rules) == []
    assert found(Part("b.pdf.exe", "", b""), rules) == [Finding("double_extension", TAG)]


def test_files_are_compiled_in_order_and_may_use_each_other(tmp_path: Path) -> None:
    one = "private rule helper { condition: filesize == 3 }"
    rules = Rules(folder(tmp_path, a_first=one, b_second="rule three { condition: helper }"))
    (tmp_path / "notes.txt").write_text("no rule")
    assert found(Part("", "", b"123"), rules) == [Finding("three", TAG)]


def test_a_file_may_include_another(tmp_path: Path) -> None:
    (tmp_path / "part.inc").write_text("rule included { condition: true }")
    rules = Rules(folder(tmp_path, a='include "part.inc"'))
    assert found(Part("", "", b""), rules) == [Finding("included", TAG)]


def test_an_empty_folder_adds_nothing(tmp_path: Path) -> None:
    assert found(Part("", "", EICAR), Rules(tmp_path)) == [Finding("eicar", REJECT)]


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("rule a { condition: true }\nrule b {\n  condition: nonsense\n}", 3, "nonsense"),
        ("\n\nrule a { condition: true", 3, "syntax error"),
        ("rule a { condition: true }\n\nrule a { condition: true }", 3, "duplicate rule `a`"),
        ('import "no_such_module"\nrule a { condition: true }', 1, "no_such_module"),
        ('\nrule a { meta: action = "delete" condition: true }', 2, "tag|quarantine|reject"),
        ("\nrule a { meta: action = 1 condition: true }", 2, "tag|quarantine|reject"),
        ('include "missing.yar"', 1, "missing.yar"),
        ("\nrule bomb { condition: true }", 2, "bomb"),
    ],
)
def test_a_broken_rule_is_named_in_one_line_with_file_and_line(
    tmp_path: Path, text: str, line: int, what: str
) -> None:
    with pytest.raises(RuleError) as raised:
        Rules(folder(tmp_path, good="rule g { condition: true }", wrong=text))
    message = str(raised.value)
    assert message.startswith(f"{tmp_path}/wrong.yar:{line}: ")
    assert what in message
    assert "\n" not in message


def test_a_file_that_is_no_text_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "latin.yara").write_bytes(b"// one\n// gr\xfc\xdfe\n")
    with pytest.raises(RuleError, match=r"latin\.yara:2: the rule file is not UTF-8"):
        Rules(tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.yar").mkdir()
    with pytest.raises(
        RuleError, match=r"folder\.yar: the rule file cannot be read: Is a directory"
    ):
        Rules(tmp_path)


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuleError, match="missing: the rules folder cannot be read: No such file"):
        Rules(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(RuleError, match="file: the rules folder cannot be read: Not a directory"):
        Rules(tmp_path / "file")


SLOW = """
rule slow { condition:
    for any i in (0..10000000000) : (for any j in (0..10000000000) : (i * j == -1))
}"""


def test_a_slow_rule_of_the_operators_is_a_finding_and_hides_nothing(tmp_path: Path) -> None:
    rules = Rules(folder(tmp_path, slow=SLOW))
    assert rules.match(Part("", "", EICAR), 1) == [
        Finding("eicar", REJECT),
        Finding("scan_timeout", QUARANTINE),
    ]


def test_without_yara_x_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yara_x", None)
    with pytest.raises(ScannerUnavailable) as raised:
        Rules()
    assert "pip install 'sharded-milter[scanner]'" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("error", [RuleError, ScannerUnavailable])
def test_the_errors_are_the_operators_configuration(error: type[ConfigError]) -> None:
    assert issubclass(error, ConfigError)
    assert error.exit_code == 78
    assert issubclass(error, ValueError | ImportError)


def test_no_bundled_file_holds_the_strings_it_looks_for() -> None:
    package = Path(sys.modules[Rules.__module__].__file__ or "").parent
    for path in [*package.rglob("*.py"), *package.rglob("*.yar"), *Path(__file__).parent.glob("*")]:
        if path.is_file():
            assert EICAR not in path.read_bytes(), path
            assert GTUBE not in path.read_bytes(), path
