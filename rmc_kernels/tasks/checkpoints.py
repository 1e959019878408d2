"""Checkpoints: a file is whole, is read only if it is what was written, and runs no code when it is read.

A checkpoint is a file of `torch.save` with one line behind it: the SHA-256 of all that comes before. `torch.load` reads
such a file too, without looking at that line.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from rmc_kernels.tasks.files import replacing

#: Of what a checkpoint holds.
VERSION = 2
SEAL = b"\nrmc checkpoint, sha256 "
#: What a checkpoint of version 1 holds. It has no seal; its archive has a CRC-32 of each record.
VERSION_1 = frozenset(
    ("what", "vocabulary", "update", "examples", "tokens", "model", "optimizer", "source", "processes", "points")
)
CHUNK = 1 << 20


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Put tensors and plain values into `path`: whoever opens it, at any time, finds the old file or the new one.

    Raises:
        OSError: the disk is full or refuses the file. The old file is as it was.
    """
    with replacing(path) as file:
        try:
            torch.save({"version": VERSION, **state}, file)
        except RuntimeError as error:
            # torch closes its archive after a write that failed or was interrupted, which fails in turn.
            raise error.__context__ or error from None
        size = file.tell()
        file.write(_seal(file, size))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `write_checkpoint` put there, its tensors on the CPU. Checksums are compared before anything is unpickled.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no checkpoint, or a damaged one.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END) - len(_seal(file, 0))
        file.seek(max(0, size))
        seal = file.read()
        if not seal.startswith(SEAL):
            return _read_version_1(path, file)
        if seal != _seal(file, size):
            raise ValueError(
                f"{path} is damaged, its checksum is another: restore a copy, or train again (--overwrite)"
            )
        file.seek(0)
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    if state["version"] != VERSION:
        raise ValueError(f"{path} must be a checkpoint of version {VERSION} or 1, got version {state['version']}")
    return state


def _read_version_1(path: Path, file: IO[bytes]) -> dict[str, Any]:
    state, cause = None, None
    try:
        with zipfile.ZipFile(file) as archive:
            # torch reads nothing where these attributes tell of a folder.
            has_no_folders = not any(record.external_attr for record in archive.infolist())
            if has_no_folders and archive.testzip() is None:
                file.seek(0)
                state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        cause = error
    if not isinstance(state, dict) or state.get("version") != 1 or not state.keys() >= VERSION_1:
        raise ValueError(f"{path} must be a checkpoint of `rmc train`, got another file or a damaged one") from cause
    return state


def _seal(file: IO[bytes], size: int) -> bytes:
    """The line behind the first `size` bytes of a file."""
    file.seek(0)
    digest = hashlib.sha256()
    while size and (chunk := file.read(min(size, CHUNK))):
        digest.update(chunk)
        size -= len(chunk)
    return SEAL + digest.hexdigest().encode() + b"\n"
