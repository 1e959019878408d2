"""`rmc info`: versions, the machine, and for each device and dtype which backend serves and why each other does not."""

from __future__ import annotations

import json as json_module
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rmc_kernels import CellSpec, __version__, explain
from rmc_kernels.backends import extension

PACKAGES = ("torch", "triton", "numpy")
#: The cell that `explain` is asked about.
SMALL = CellSpec.sonnet(input_size=16, mem_slots=4, head_size=16, num_heads=2)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def facts() -> dict[str, Any]:
    """Versions, machine, GPUs, extension and backends, ready for JSON."""
    gpus = range(torch.cuda.device_count())
    return {
        "versions": {"rmc_kernels": __version__, "python": platform.python_version()}
        | {name: _version(name) for name in PACKAGES},
        "machine": {
            "system": platform.platform(),
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        "extension": _extension(),
        "gpus": [torch.cuda.get_device_name(number) for number in gpus],
        "backends": [_served(device, dtype) for device in ("cpu", *(["cuda"] if gpus else [])) for dtype in DTYPES],
    }


def info(json: bool = False) -> None:
    """Show versions, the machine, and which backend serves what and why."""
    found = facts()
    if json:
        print(json_module.dumps(found, indent=1))
        return
    from rich.console import Console  # optional, as is the whole command line; `facts` has other users
    from rich.table import Table

    console = Console()
    about = Table(title="rmc_kernels", show_header=False)
    for name, value in (found["versions"] | found["machine"]).items():
        about.add_row(name, "not installed" if value is None else str(value))
    about.add_row("extension", _extension_line(found["extension"]))
    about.add_row("GPUs", ", ".join(found["gpus"]) or "none")
    backends = Table("device", "dtype", "runs", "not used", title=f"Backends, for a small {SMALL.variant} cell")
    for row in found["backends"]:
        reasons = "\n".join(f"{name}: {reason}" for name, reason in row["not_used"].items())
        runs = row["runs"] + (f"\n({row['note']})" if row["note"] else "")
        backends.add_row(row["device"], row["dtype"], runs, reasons)
    console.print(about, backends)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name, as the system has it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _extension() -> dict[str, Any]:
    """What the compiled extension says about this machine, or why there is none."""
    native = extension.native
    if native is None:
        return {"built": False, "reason": extension.missing}
    return {"built": True, "features": native.cpu_features(), "isas": native.isas()}


def _extension_line(about: dict[str, Any]) -> str:
    if not about["built"]:
        return str(about["reason"])
    have = [name for name, present in about["features"].items() if present]
    return f"CPU has {', '.join(have) or 'no extensions'}; kernels for {', '.join(about['isas'])}"


def _served(device: str, dtype: torch.dtype) -> dict[str, Any]:
    found = explain(SMALL, torch.empty(0, device=device, dtype=dtype))
    name = str(dtype).removeprefix("torch.")
    return {
        "device": device, "dtype": name, "runs": found.backend, "note": found.note, "not_used": dict(found.reasons)
    }  # fmt: skip
