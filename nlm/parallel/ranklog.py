"""What each rank says, in a file of its own: RUN/ranks/rank-00003.log.

There stands every line that Python prints, warnings and tracebacks too, with the time (UTC) and the host. Rank 0, which
speaks, says its lines on the console as well; of the others the console gets no more than why they end. What native
code prints comes without a time, and rank 0's goes to the console only; after a crash in native code the stacks of all
threads are in the file (faulthandler). A line is one write to the system: what a rank said before it was killed is
there. Without a launcher there is one process and its console, and no file.
"""

import faulthandler
import io
import logging
import os
import socket
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path
from threading import RLock
from typing import TextIO


class RankFile:
    """Only ever appended to: a rank that is started again goes on in the file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.host = socket.gethostname()

    def line(self, text: str) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        os.write(self.fd, f"{now} {self.host}: {text}\n".encode(errors="backslashreplace"))


class Lines(io.TextIOBase):
    """A stream whose lines go to the rank's file and, as they come, to its console, where it has one.

    It is no terminal, whatever the console is: a progress bar would fill the file.
    """

    def __init__(self, file: RankFile, console: TextIO | None) -> None:
        self._file, self._console = file, console
        self._begun = ""
        self._lock = RLock()  # a signal's handler may print as well

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._console.fileno() if self._console else self._file.fd

    def write(self, text: str) -> int:
        if self._console:
            self._console.write(text)
        with self._lock:
            *lines, rest = (self._begun + text).split("\n")
            self._begun = rest.rpartition("\r")[2]  # of a line that is written over, what stands there at last
            for line in lines:
                self._file.line(line.rpartition("\r")[2])
        return len(text)

    def flush(self) -> None:
        if self._console:
            self._console.flush()


_file: RankFile | None = None
_console: TextIO | None = None
"""Of a rank that does not speak."""


def keep_lines(run: Path) -> None:
    """From now to its end, what this process says goes to its file in `run`, if a launcher started it."""
    global _file, _console
    rank, ranks = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if not rank.isdecimal():
        return
    path = run / "ranks" / f"rank-{int(rank):05}.log"
    again = path.exists()
    _file = RankFile(path)
    _file.line(f"--- rank {rank} of {ranks} starts{' again' if again else ''}, as process {os.getpid()}")
    before = sys.stdout, sys.stderr
    if int(rank) == 0:
        streams = tuple(Lines(_file, stream) for stream in before)
    else:
        for stream in before:
            stream.flush()
        _console = os.fdopen(os.dup(2), "w")
        for fd in 1, 2:
            os.dup2(_file.fd, fd)  # what native code says, too
        streams = tuple(Lines(_file, None) for _ in before)
    sys.stdout, sys.stderr = streams
    for handler in _handlers():  # torch's were made when it was imported
        if handler.stream in before:
            handler.setStream(streams[before.index(handler.stream)])  # type: ignore[arg-type]
    faulthandler.enable(file=_file.fd)


def _handlers() -> set[logging.StreamHandler[TextIO]]:
    loggers = [logging.getLogger(), *map(logging.getLogger, logging.root.manager.loggerDict)]
    return {handler for logger in loggers for handler in logger.handlers if isinstance(handler, logging.StreamHandler)}


def keep_traceback() -> None:
    """That of the exception at hand, in the file; the console gets the short story."""
    if _file is not None:
        for line in traceback.format_exc().splitlines():
            _file.line(line)


def complain(text: str) -> None:
    """Why this process ends: on the console, whichever rank it is."""
    lines = "".join(f"nlm: {line}\n" for line in text.splitlines())
    for stream in (sys.stderr, _console):
        if stream is not None:
            stream.write(lines)
            stream.flush()
