"""Checkpoints: written so that a file is always whole, read without running code from it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rmc_kernels import errors

#: Of what a checkpoint holds; another one is refused.
VERSION = 1


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Put tensors and plain values into `path`: whoever opens it, at any time, finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.partial")
    with beside.open("wb") as file:
        torch.save({"version": VERSION, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `write_checkpoint` put there, its tensors on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of this version.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"checkpoint takes a file that `rmc train` wrote, got {path}: {error}") from error
    version = state.get("version") if isinstance(state, dict) else None
    if version != VERSION:
        raise ValueError(f"checkpoint takes a file of version {VERSION}, got {path} of {errors.describe(version)}")
    return state
