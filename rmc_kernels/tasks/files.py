"""Files of a run: a file is whole or not there, and one process at a time trains a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # on Windows two trainings of one run are not kept apart
    fcntl = None  # type: ignore[assignment]

#: Of the record, the curve and the plot, which stand beside a checkpoint under its name.
SUFFIXES = (".json", ".csv", ".png")


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    r"""A file to write, which takes the place of `path` once it is complete.

    Whoever opens `path`, at any time, finds the old file or the new one. An error leaves the old one, and nothing else.

    Raises:
        OSError: naming `path`.

    Example:
        >>> with replacing(Path("curve.csv")) as file:
        ...     file.write(b"update,loss\n")
    """
    beside = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def claimed(checkpoint: Path) -> Iterator[None]:
    """Keep other processes from training the run of `checkpoint` meanwhile.

    Raises:
        FileExistsError: another process trains it.
        OSError: its folder cannot be made, or no file can be made in it.
    """
    lock = checkpoint.with_suffix(".lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        message = f"out must be a folder that can be written to, got {lock.parent} ({error.strerror})"
        raise OSError(message) from error
    with file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"{checkpoint} is being trained by another process: wait for its end, or choose another folder"
            raise FileExistsError(message) from error
        except OSError:
            pass  # a file system without locks, as some clusters have
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()


def left_by_a_run(checkpoint: Path) -> list[Path]:
    """The files that a run with this checkpoint has left."""
    return [path for path in (checkpoint, *map(checkpoint.with_suffix, SUFFIXES)) if path.exists()]


def text_of(name: str, content: bytes) -> str:
    """The text of a file with lines that end as Python's do; ValueError naming the file and the line if it is none."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, wrong = error.object[: error.start].count(b"\n") + 1, error.object[error.start]
        raise ValueError(
            f"{name}, line {line}: text must be UTF-8, got a byte 0x{wrong:02x} ({error.reason})"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
