"""Match parts with YARA-X rules, the bundled ones and the operator's; each has a severity.

Rules decide everything. The marks of a part are variables in rules. The bundled rules run first and
separately, so that a slow rule of the operator cannot hide their findings. An operator's rule
replaces the bundled one of the same name, so that its action can be changed.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from sharded_milter.errors import ConfigError

from .parts import Mark, Part

BUNDLED = Path(__file__).with_name("rules")
SUFFIXES = (".yar", ".yara")

# The variables that every rule may use, with default values of their types.
VARIABLES: Mapping[str, str | int | bool] = {
    "filename": "",
    "content_type": "",
    "archive_depth": 0,
    **{mark.value: False for mark in Mark},
}

_PLACE = re.compile(r"^ *--> (.*):(\d+):\d+$", re.M)
_LABEL = re.compile(r"^ *\|? *\^+ (.+)$", re.M)


class ScannerUnavailable(ConfigError, ImportError):
    """YARA-X is not installed; the message says how to install it."""


class RuleError(ConfigError, ValueError):
    """A rule file that cannot be used; the message has the file, the line and the error."""


class Severity(IntEnum):
    """The action of a rule, `meta: action = "..."`, in ascending order."""

    TAG = 1
    QUARANTINE = 2
    REJECT = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that matched, and its severity."""

    rule: str
    severity: Severity


class Rules:
    """The bundled rules and, if a folder is given, the operator's; compiled once."""

    def __init__(self, folder: Path | None = None) -> None:
        """Compile all rules; raise RuleError or ScannerUnavailable."""
        self._bundled = _RuleSet(BUNDLED)
        self._operators = _RuleSet(folder) if folder else None

    def match(self, part: Part, seconds: int) -> list[Finding]:
        """Return the findings; rules that exceed `seconds` give a finding too."""
        found: list[Finding] = []
        try:
            found = self._bundled.match(part, seconds)
            if self._operators is None:
                return found
            theirs = self._operators.match(part, seconds)
        except TimeoutError:
            return found + self.timed_out()
        replaced = self._operators.severities
        return [finding for finding in found if finding.rule not in replaced] + theirs

    def timed_out(self) -> list[Finding]:
        """Return the findings of the bundled rules for data that was not matched in time."""
        return self._bundled.match(Part("", "", b"", marks=frozenset({Mark.TIMED_OUT})), seconds=1)


class _RuleSet:
    """The rules of one folder, compiled together, so that they may refer to each other."""

    def __init__(self, folder: Path) -> None:
        yara = _yara()
        compiler = _compiler(yara, folder)
        for path, text in _sources(folder):
            try:
                compiler.add_source(text, origin=str(path))
            except yara.CompileError as error:
                raise RuleError(_one_line(str(error), path)) from error
        compiled = compiler.build()
        self.severities = {rule.identifier: _severity(rule) for rule in compiled}
        self._failures = (yara.TimeoutError, yara.ScanError)
        self._scanner = yara.Scanner(compiled)

    def match(self, part: Part, seconds: int) -> list[Finding]:
        """Return the findings; raise TimeoutError if the rules exceed `seconds`."""
        scanner = self._scanner
        scanner.set_timeout(seconds)
        scanner.set_global("filename", part.name)
        scanner.set_global("content_type", part.content_type)
        scanner.set_global("archive_depth", part.depth)
        for mark in Mark:
            scanner.set_global(mark.value, mark in part.marks)
        try:
            matching = scanner.scan(part.data).matching_rules
        except self._failures as error:
            raise TimeoutError(f"the rules exceeded {seconds} s: {error}") from error
        return [Finding(rule.identifier, self.severities[rule.identifier]) for rule in matching]


def _yara() -> Any:
    try:
        import yara_x
    except ImportError as error:
        raise ScannerUnavailable(
            "the content scanner needs YARA-X: pip install 'sharded-milter[scanner]'"
        ) from error
    return yara_x


def _compiler(yara: Any, folder: Path) -> Any:
    compiler = yara.Compiler()
    compiler.add_include_dir(str(folder))
    actions = "|".join(severity.name.lower() for severity in Severity)
    compiler.allowed_metadata(
        "action", yara.MetaType.STRING, required=False, regexp=f"^({actions})$", error=True
    )
    for name, value in VARIABLES.items():
        compiler.define_global(name, value)
    return compiler


def _severity(rule: Any) -> Severity:
    actions = [Severity[str(value).upper()] for name, value in rule.metadata if name == "action"]
    return max(actions, default=Severity.TAG)


def _sources(folder: Path) -> Iterator[tuple[Path, str]]:
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    except OSError as error:
        raise RuleError(f"{folder}: the rules folder cannot be read: {error.strerror}") from error
    for path in paths:
        yield path, _read(path)


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RuleError(f"{path}: the rule file cannot be read: {error.strerror}") from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RuleError(f"{path}:{line}: the rule file is not UTF-8") from error


def _one_line(report: str, path: Path) -> str:
    """Return file, line, title and first label of YARA-X's multi-line error on one line."""
    title = report.partition("\n")[0]
    place = _PLACE.search(report)
    where = f"{place[1]}:{place[2]}" if place else str(path)
    label = _LABEL.search(report)
    return f"{where}: {title}" + (f": {label[1]}" if label else "")
