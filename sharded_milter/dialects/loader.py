"""Load the milter that an operator names as `MODULE:NAME` or `FILE.py:NAME`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar

from sharded_milter.api.milter import Milter
from sharded_milter.dialects.functions.dialect import FunctionDialect
from sharded_milter.dialects.libmilter import classes
from sharded_milter.dialects.libmilter.context import Call
from sharded_milter.dialects.libmilter.dialect import ClassDialect
from sharded_milter.dialects.spec import split_spec
from sharded_milter.errors import MilterLoadError, StartError, UsageError
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.stages import Stage

_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
T = TypeVar("T")

# Folders with many packages: other files there do not belong to the milter.
_LIBRARIES = frozenset({"site-packages", "dist-packages"})

# Paths of this package and of the import system, which are left out of an author's traceback.
_FOREIGN_CODE = (_PACKAGE, "<frozen importlib", os.path.dirname(importlib.__file__) + os.sep)


class Dialect(Protocol):
    """A milter of any dialect, which answers jobs.

    `call` is the function through which it calls the author's code, with the callback's name, the
    function and its arguments. `sandbox` is True if the author has opted in to the sandbox.
    """

    manifest: Manifest
    call: Call
    sandbox: bool

    def answer(
        self,
        stage: Stage | None,
        connection: bytes,
        message: bytes | memoryview,
        session: int = 0,
    ) -> bytes | Awaitable[bytes]: ...


def load(spec: str) -> Dialect:
    """Import the module of `spec` and return the milter.

    The current directory is searched last, so that no file in it can replace a library. Raise
    UsageError for a malformed spec, and MilterLoadError, with the author's traceback if the
    author's code failed.
    """
    where, name = split_spec(spec)
    module = _run_author_code(spec, lambda: _module(where))
    try:
        found = getattr(module, name)
    except AttributeError:
        raise MilterLoadError(f"milter {spec}: {where} has no {name!r}") from None
    try:
        return _run_author_code(spec, lambda: as_dialect(found))
    except NotAMilter as error:
        raise MilterLoadError(f"milter {spec}: {name} {error}") from None


class NotAMilter(MilterLoadError):
    """The object is not a milter. The text says what it is, to be put after its name."""


def as_dialect(found: Any) -> Dialect:
    """Return the dialect for a milter.

    A milter is a `sharded_milter.Milter` with callbacks, a class derived from the embedded
    `Milter`, or a factory of such objects, or its class. Raise NotAMilter for other objects.
    """
    if isinstance(found, Milter):
        if not found.callbacks:
            raise NotAMilter("has no callback")
        return FunctionDialect(found)
    if isinstance(found, type) and issubclass(found, classes.Milter):
        factory = classes.MilterFactory()
        factory.milter = found
        return ClassDialect(factory)
    if callable(getattr(found, "build_milter", None)):
        return ClassDialect(found() if isinstance(found, type) else found)
    raise NotAMilter(
        f"is of type {type(found).__name__}, not a Milter, a subclass of it, or a factory"
    )


def code_digest(specs: Sequence[str]) -> bytes:
    """Return a digest of the code of the milters `specs`, which must be loaded.

    The code is their own files, or the file of a script, and all modules that were imported from
    the same folders or below. Workers with equal digests run the same code.
    """
    files = {file_of(spec) for spec in specs}
    folders = tuple(
        os.path.dirname(file) + os.sep
        for file in files
        if os.path.basename(os.path.dirname(file)) not in _LIBRARIES
    )
    for module in list(sys.modules.values()):
        with suppress(Exception):  # sys.modules may have any objects
            file = module.__file__
            if file and os.path.abspath(file).startswith(folders):
                files.add(os.path.abspath(file))
    digest = sha256()
    for file in sorted(files):
        digest.update(file.encode(errors="surrogateescape") + b"\0")
        with suppress(OSError), open(file, "rb") as code:
            digest.update(sha256(code.read()).digest())
    return digest.digest()


def file_of(spec: str) -> str:
    """Return the file of a milter, or of a script."""
    try:
        where, _ = split_spec(spec)
    except UsageError:  # a script's path
        where = spec
    return os.path.abspath(getattr(sys.modules.get(where), "__file__", None) or where)


def _module(where: str) -> ModuleType:
    if not where.endswith(".py"):
        _append_to_path(Path.cwd())
        return importlib.import_module(where)
    path = Path(where).resolve()
    if not path.is_file():
        raise MilterLoadError(f"milter file {where} does not exist")
    _append_to_path(path.parent)
    file_spec = importlib.util.spec_from_file_location(f"milter_file_{path.stem}", path)
    if file_spec is None or file_spec.loader is None:
        raise MilterLoadError(f"milter file {where} is not a Python file")
    module = importlib.util.module_from_spec(file_spec)
    sys.modules[module.__name__] = module  # dataclasses and pickle look a module up by its name
    file_spec.loader.exec_module(module)
    return module


def _append_to_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _run_author_code(spec: str, loading: Callable[[], T]) -> T:
    """Return the result of the author's code; raise MilterLoadError for any exception of it."""
    try:
        return loading()
    except MilterLoadError:
        raise
    except StartError as error:  # of the bundled scanner; its message needs no traceback
        raise MilterLoadError(str(error)) from None
    except ModuleNotFoundError as error:
        where = spec.rpartition(":")[0]
        if error.name is not None and (where == error.name or where.startswith(f"{error.name}.")):
            raise MilterLoadError(f"milter {spec}: there is no module {error.name!r}") from None
        raise _failed(spec, error) from error
    except (Exception, SystemExit) as error:
        raise _failed(spec, error) from error


def _failed(spec: str, error: BaseException) -> MilterLoadError:
    """Return the error with the author's frames, without those of this package and importlib."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_FOREIGN_CODE)]
    lines = traceback.format_list(own) + traceback.format_exception_only(error)
    summary = f"{type(error).__name__}: {error}".splitlines()[0]
    if own:
        summary += f" ({own[-1].filename}, line {own[-1].lineno})"
    return MilterLoadError(f"milter {spec} cannot be imported: {summary}", "".join(lines))
