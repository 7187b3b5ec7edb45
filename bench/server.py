"""A real server for a bench, on a UNIX socket in a directory of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass
class Server:
    """The running master."""

    path: str
    process: subprocess.Popen[bytes]
    log: Path

    def rss(self) -> int:
        """Bytes of the master's memory that are resident."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def descriptors(self) -> int:
        return psutil.Process(self.process.pid).num_fds()

    def workers(self) -> list[int]:
        """The pids of the worker processes."""
        children = psutil.Process(self.process.pid).children()
        return [child.pid for child in children if child.status() != psutil.STATUS_ZOMBIE]


@contextmanager
def serving(source: str, *options: str) -> Iterator[Server]:
    """Serves the milter `milter` of a module with this source."""
    with tempfile.TemporaryDirectory() as folder:
        milter, path, log = Path(folder, "bench_milter.py"), f"{folder}/s", Path(folder, "log")
        milter.write_text(source)
        reader, writer = os.pipe()
        arguments = ["--listen", f"unix:{path}", "--ready-fd", str(writer), *options]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "sharded_milter", *arguments, f"{milter}:milter"],
                pass_fds=(writer,),
                stdout=output,
                stderr=output,
                cwd=folder,
            )
        os.close(writer)
        try:
            if os.read(reader, 1) != b"\n":
                raise SystemExit(log.read_text())
            yield Server(path, process, log)
        finally:
            os.close(reader)
            process.send_signal(signal.SIGINT)
            process.wait(30)
