"""Where figures come from: the machine and the versions that a result is worth nothing without."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import rmc_kernels
from rmc_kernels.bench import ceilings, contention


def describe(device: str) -> dict[str, Any]:
    """The machine, its load and the versions, as plain data."""
    features = ceilings.features()
    return {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "features": sorted(name for name, present in features.items() if present),
        "system": f"{platform.system()} {platform.machine()}",
        "load": contention.load_average(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "rmc_kernels": rmc_kernels.__version__,
    }


def _processor() -> str:
    """The processor's name, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
