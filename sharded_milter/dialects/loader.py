"""Loading a milter: from the operator's `MODULE:NAME` or `FILE.py:NAME` to a dialect."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType
from typing import Protocol

from sharded_milter.api.milter import Milter
from sharded_milter.dialects.functions import FunctionDialect
from sharded_milter.errors import MilterLoadError, StartError, UsageError
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.stages import Stage

# Frames of this package and of the import system are left out of an author's traceback.
_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_NOT_HIS = (_PACKAGE, "<frozen importlib", os.path.dirname(importlib.__file__) + os.sep)


class Dialect(Protocol):
    """A milter that answers transcripts, whatever way it is written."""

    manifest: Manifest

    def answer(
        self, stage: Stage, connection: bytes, message: bytes | memoryview
    ) -> bytes | Awaitable[bytes]: ...


def split_spec(spec: str) -> tuple[str, str]:
    """The module or file, and the name in it; UsageError when `spec` is not of that form."""
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name.isidentifier():
        raise UsageError(f"milter {spec!r} is neither MODULE:NAME nor FILE.py:NAME")
    return where, name


def checked_spec(spec: str) -> str:
    """The spec itself; UsageError when it is malformed."""
    split_spec(spec)
    return spec


def load(spec: str) -> Dialect:
    """The milter that `spec` names; importing its module is its warm-up.

    A module is looked for in the current directory after everywhere else, so that no file there
    can stand in for a library. Raises UsageError for a malformed spec and MilterLoadError, with
    the author's traceback if it is his code that failed.
    """
    where, name = split_spec(spec)
    module = _guarded(spec, lambda: _module(where))
    try:
        found = getattr(module, name)
    except AttributeError:
        raise MilterLoadError(f"milter {spec}: {where} has no {name!r}") from None
    if not isinstance(found, Milter):
        raise MilterLoadError(f"milter {spec}: {name} is a {type(found).__name__}, not a Milter")
    if not found.callbacks:
        raise MilterLoadError(f"milter {spec}: {name} has no callback")
    return FunctionDialect(found)


def _module(where: str) -> ModuleType:
    if not where.endswith(".py"):
        _search_last(Path.cwd())
        return importlib.import_module(where)
    path = Path(where).resolve()
    if not path.is_file():
        raise MilterLoadError(f"milter file {where} does not exist")
    _search_last(path.parent)
    file_spec = importlib.util.spec_from_file_location(f"milter_file_{path.stem}", path)
    if file_spec is None or file_spec.loader is None:
        raise MilterLoadError(f"milter file {where} is not a Python file")
    module = importlib.util.module_from_spec(file_spec)
    sys.modules[module.__name__] = module  # dataclasses and pickle look a module up by its name
    file_spec.loader.exec_module(module)
    return module


def _search_last(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _guarded(spec: str, importing: Callable[[], ModuleType]) -> ModuleType:
    try:
        return importing()
    except MilterLoadError:
        raise
    except StartError as error:  # the bundled scanner's: its line says everything
        raise MilterLoadError(str(error)) from None
    except ModuleNotFoundError as error:
        where = spec.rpartition(":")[0]
        if error.name is not None and (where == error.name or where.startswith(f"{error.name}.")):
            raise MilterLoadError(f"milter {spec}: there is no module {error.name!r}") from None
        raise _failed(spec, error) from error
    except (Exception, SystemExit) as error:
        raise _failed(spec, error) from error


def _failed(spec: str, error: BaseException) -> MilterLoadError:
    """The author's own frames, without those of this package and of importlib."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_NOT_HIS)]
    lines = traceback.format_list(own) + traceback.format_exception_only(error)
    summary = f"{type(error).__name__}: {error}".splitlines()[0]
    if own:
        summary += f" ({own[-1].filename}, line {own[-1].lineno})"
    return MilterLoadError(f"milter {spec} cannot be imported: {summary}", "".join(lines))
