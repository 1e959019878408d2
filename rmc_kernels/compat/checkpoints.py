"""Files of named arrays: .npz, .safetensors, and TensorFlow checkpoints (where TensorFlow is installed)."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import numpy as np

from rmc_kernels.compat.mapping import Array

_FILE = "a file that ends in .npz or .safetensors"


def read(path: str | PathLike[str]) -> dict[str, Array]:
    """Every array in a file, by name.

    Args:
        path: a .npz or .safetensors file; anything else is taken for a TensorFlow checkpoint: a directory (its latest
            checkpoint) or a checkpoint's prefix such as `run/model.ckpt-1000`.

    Raises:
        FileNotFoundError: nothing is there.
        ImportError: the package that reads this format is missing; the message names it.
    """
    path = Path(path)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as found:
            return dict(found)
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return load_file(path)
    return _read_tensorflow(path)


def write(arrays: Mapping[str, Array], path: str | PathLike[str]) -> None:
    """Write named arrays to a .npz or .safetensors file, replacing it.

    Raises:
        ValueError: another suffix.
        ImportError: safetensors is missing.
    """
    path = Path(path)
    if path.suffix == ".npz":
        np.savez(path, **arrays)  # type: ignore[arg-type]
    elif path.suffix == ".safetensors":
        from safetensors.numpy import save_file

        save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, path)
    else:
        raise ValueError(f"path must be {_FILE}, got {str(path)!r}")


def _read_tensorflow(path: Path) -> dict[str, Array]:
    if not path.is_dir() and not Path(f"{path}.index").exists():
        raise FileNotFoundError(f"path must be {_FILE}, or a TensorFlow checkpoint; no checkpoint is at {str(path)!r}")
    try:
        from tensorflow.train import load_checkpoint
    except ImportError as error:
        raise ImportError(
            "reading a TensorFlow checkpoint needs tensorflow; where it is installed, `python -m "
            "rmc_kernels.compat.convert CHECKPOINT OUT.safetensors` makes a file that needs none"
        ) from error
    reader = load_checkpoint(str(path))
    return {name: np.asarray(reader.get_tensor(name)) for name in reader.get_variable_to_shape_map()}
