"""The compiled extension `rmc_kernels._C`, or why there is none and what to do about it."""

from __future__ import annotations

import sysconfig
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

#: Builds the extension in a checkout. From its cache, pip would take a wheel without the extension again. setup.py
#: cannot import this, and says the same.
REBUILD = "pip install --no-cache-dir --force-reinstall --no-deps ."
#: What the CPU backend calls; an extension of another version of the package may lack some.
NEEDED = ("Cell", "TensorCell", "Tensors", "cpu_features", "frozen_step", "isas")


def load() -> tuple[Any, str | None]:
    """The extension and None; or None and why there is none, with the cure."""
    try:
        # Of `from rmc_kernels import _C`, Python would say that it is most likely a circular import.
        import rmc_kernels._C as found
    except ImportError as error:
        reason = _why_not(error)
    else:
        lacking = [name for name in NEEDED if not hasattr(found, name)]
        if not lacking:
            return found, None
        reason = f"the C++ extension {found.__file__} is of another version: it lacks {', '.join(lacking)}"
    return None, f"{reason}; to build it, install a C++17 compiler and run `{REBUILD}` in a checkout of rmc_kernels"


def _why_not(error: ImportError) -> str:
    name = "rmc_kernels._C"
    if not isinstance(error, ModuleNotFoundError) or error.name != name:
        return f"the C++ extension {error.path or name} cannot be loaded ({error})"
    ours = {f"_C{suffix}" for suffix in EXTENSION_SUFFIXES}
    folder = Path(__file__).resolve().parent.parent
    others = [path for path in sorted(folder.glob("_C.*")) if path.suffix in (".so", ".pyd") and path.name not in ours]
    if others:
        tag = sysconfig.get_config_var("SOABI")
        return f"the C++ extension was not built for this Python ({tag}): there is only {', '.join(map(str, others))}"
    return "the C++ extension was not built"


#: The extension, or None; and why it is None.
native, missing = load()
