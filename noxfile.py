"""The checks that a change must pass, one session each. `nox -l` lists them, `.ci/run` runs them.

Pytest gets what stands behind `--`: `nox -s tests-3.12 -- tests/pool -x`.
"""

from __future__ import annotations

import configparser
import glob
import os
import re
import shlex
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory

import nox

PYTHONS = ("3.11", "3.12", "3.13")
FIRST = PYTHONS[0]
PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
SETUP = configparser.ConfigParser()
SETUP.read("setup.cfg")

# Of the measurements one is enough: they take longest.
OLDEST_TESTS = (
    *("-k", "not bench_and_tune or mistake or recommends"),
    *("tests/cli", "tests/ops", "tests/integration/test_verdicts.py"),
)

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "types", "docs", f"tests-{FIRST}"]
# A session without its interpreter is skipped with one line, also where CI is set.
nox.options.error_on_missing_interpreters = False


def works(program: str) -> bool:
    """Whether an interpreter starts: pyenv has shims also for versions that are not active."""
    try:
        subprocess.run([program, "-c", ""], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def find_interpreters() -> None:
    """Puts pyenv's own directories on PATH, before the shims that do not start."""
    for version in PYTHONS:
        name = f"python{version}"
        found = [name, *glob.glob(f"{PYENV}/versions/{version}.*/bin/{name}")]
        first = next(filter(works, found), name)
        if first != name:
            path = os.environ["PATH"].split(os.pathsep)
            shim = shutil.which(name)
            place = path.index(os.path.dirname(shim)) if shim else len(path)
            path.insert(place, os.path.dirname(first))
            os.environ["PATH"] = os.pathsep.join(path)


find_interpreters()


def requirements(text: str) -> list[str]:
    """The requirements in one option of setup.cfg."""
    return text.strip().splitlines()


def tools(*names: str) -> list[str]:
    """What setup.cfg requires of tools that need nothing else of ours."""
    extras = SETUP["options.extras_require"].values()
    wanted = [line for extra in extras for line in requirements(extra)]
    found = [line for line in wanted if line.partition(">=")[0] in names]
    assert len(found) == len(names), f"setup.cfg requires {found} of {names}"
    return found


def pytest(session: nox.Session, *arguments: str, **env: str) -> None:
    session.run("python", "-m", "pytest", *arguments, env=env)


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The whole suite, on every core."""
    session.install("-e", ".[scanner,test]")
    pytest(session, "-n", "auto", *session.posargs)


@nox.session
def oldest(session: nox.Session) -> None:
    """The tests that depend on our dependencies, with the oldest ones that setup.cfg allows."""
    session.log(" ".join(oldest_versions()))
    with NamedTemporaryFile("w", suffix=".txt") as bounds:
        bounds.write("\n".join(oldest_versions()))
        bounds.flush()
        session.install("-c", bounds.name, "-e", ".[scanner,test]")
    pytest(session, "-q", "-n", "auto", *(session.posargs or OLDEST_TESTS))


def oldest_versions() -> list[str]:
    """The lower bounds of what we need, as versions; each requirement must have one."""
    scanner = SETUP["options.extras_require"]["scanner"]
    needed = requirements(SETUP["options"]["install_requires"]) + requirements(scanner)
    bounds = [re.fullmatch(r"([\w.-]+)>=([\w.]+)(,!=[\w.]+)*", line) for line in needed]
    assert all(bounds), f"a lower bound is missing in {needed}"
    return [f"{bound[1]}=={bound[2]}" for bound in bounds if bound]


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff's rules and its format."""
    session.install(*tools("ruff"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types, strictly."""
    session.install("-e", ".[scanner,test]")
    session.run("mypy", "--strict", "sharded_milter", "tests")
    # By itself: it knows the tests' harness by another name. The peers' milters need their
    # libraries.
    session.run("mypy", "--strict", "--exclude", "bench/milters", "bench")


@nox.session
def docs(session: nox.Session) -> None:
    """What the documents say: examples run; options, files and links exist."""
    session.install("-e", ".[scanner,test]")
    pytest(session, "-q", "tests/test_documents.py", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """New random conversations and answers, for FUZZ_SECONDS each (60)."""
    session.install("-e", ".[scanner,test]")
    seconds = os.environ.get("FUZZ_SECONDS", "60")
    pytest(session, "-q", "-n", "auto", "tests/fuzz", *session.posargs, FUZZ_SECONDS=seconds)


@nox.session
def release(session: nox.Session) -> None:
    """Builds what is published in dist/ and tries it. It publishes and tags nothing."""
    version = SETUP["metadata"]["version"]
    dated = re.search(
        rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$",
        Path("CHANGELOG.md").read_text(),
        re.M,
    )
    if dated is None:
        session.error(f"CHANGELOG.md has no dated section for {version}")
    session.install(*tools("build", "twine"))
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", "dist", ".", silent=True)
    sdist, wheel = (Path(glob.glob(f"dist/*{end}")[0]) for end in (".tar.gz", ".whl"))
    session.run("twine", "check", "--strict", str(sdist), str(wheel))
    check_contents(session, sdist, wheel)
    run_demo(session, wheel.resolve())
    session.log(f"{wheel} and {sdist} are good: {dated[0][3:]}")
    session.log("Now, on the commit that is released:")
    session.log(f"    git tag -a v{version} -m 'sharded-milter {version}'")


def check_contents(session: nox.Session, sdist: Path, wheel: Path) -> None:
    """What packaging forgets easily is in both."""
    installed = zipfile.ZipFile(wheel).namelist()
    with tarfile.open(sdist) as archive:
        sources = archive.getnames()
    rules = "sharded_milter/scanner/rules/"
    for name in ("sharded_milter/py.typed", "sharded_milter/workers/child.py", rules):
        assert any(each.startswith(name) for each in installed), f"{name} is not in the wheel"
    for name in (rules, "workers/child.py"):
        assert any(f"/{name}" in each for each in sources), f"{name} is not in the sdist"
    session.log(f"wheel: {len(installed)} files, sdist: {len(sources)} files")


def run_demo(session: nox.Session, wheel: Path) -> None:
    """The README's first command with the wheel in place of the checkout, away from it."""
    line = re.search(
        r"^python3 -m venv .*'\.\[scanner\]'.* demo$", Path("README.md").read_text(), re.M
    )
    assert line is not None, "the README's demo is not where it was"
    command = line[0].replace("'.[scanner]'", shlex.quote(f"{wheel}[scanner]"))
    with TemporaryDirectory() as elsewhere, session.chdir(elsewhere):
        shell = ("bash", "-euo", "pipefail", "-c")
        session.run(*shell, command, env={"PIP_QUIET": "1"}, external=True)
