"""The backends, and which of them serves a call.

`auto` takes the first that can: triton, cpu, reference. A backend that was asked for by name and cannot serve the call
raises; it never silently becomes another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rmc_kernels import errors
from rmc_kernels.backends.cpu import CpuBackend, are_plain_float32
from rmc_kernels.backends.plain import active_transform, is_plain
from rmc_kernels.backends.protocol import HALF_TYPES, Backend, Call, Unrolled, last_memory
from rmc_kernels.backends.reference import ReferenceBackend
from rmc_kernels.backends.triton import TritonBackend
from rmc_kernels.backends.weights import FrozenWeights, frozen_weights
from rmc_kernels.spec import CellSpec

__all__ = [
    "BACKENDS", "CHOICES", "HALF_TYPES", "Backend", "Call", "CpuBackend", "Explanation", "FrozenWeights", "Unrolled",
    "are_plain_float32", "choose", "explain", "frozen_weights", "is_plain", "last_memory",
]  # fmt: skip

REFERENCE = ReferenceBackend()
#: Fused backends in order of preference, then the reference, which serves everything.
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (TritonBackend(), CpuBackend(), REFERENCE)}
CHOICES = ("auto", *BACKENDS)


@dataclass(frozen=True)
class Explanation:
    """Which backend serves a call, and why each other one does not.

    Attributes:
        backend: name of the backend that would run under `backend="auto"`.
        reasons: name of every other backend -> why it would not run.
        note: what to know of the one that runs; empty for nothing.
    """

    backend: str
    reasons: Mapping[str, str]
    note: str = ""

    def __str__(self) -> str:
        lines = [f"{self.backend}: runs" + (f"; {self.note}" if self.note else "")]
        return "\n".join(lines + [f"{name}: not used: {reason}" for name, reason in self.reasons.items()])


def explain(spec: CellSpec, x: Tensor) -> Explanation:
    """The backend that `backend="auto"` would run for `spec` and an input like `x`, and why each other one would not.

    Args:
        spec: the cell.
        x: an input; only its dtype and device are looked at, and whether a torch.func transform is active.

    Raises:
        TypeError: `spec` is not a CellSpec or `x` is not a floating-point tensor.
    """
    if not isinstance(spec, CellSpec):
        raise TypeError(f"spec must be a CellSpec, got {errors.describe(spec)}")
    if not errors.is_tensor("x", x, "a floating-point tensor").is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {errors.describe(x)}")
    chosen: str | None = None
    reasons: dict[str, str] = {}
    for name, backend in BACKENDS.items():
        reason = _why_not(backend, spec, x.dtype, x.device) or backend.passed_over(x.device)
        reason = reason or backend.fault(spec, x.dtype, x.device, "", check=False)
        reason = f"{chosen} is preferred" if chosen else reason
        if reason is None:
            chosen = name
        else:
            reasons[name] = reason
    assert chosen is not None  # the reference refuses nothing
    return Explanation(chosen, reasons, BACKENDS[chosen].note(spec, x.dtype, x.device))


def choose(name: str, spec: CellSpec, dtype: torch.dtype, device: torch.device, gradients: str = "") -> Backend:
    """The backend that serves `spec` under the name the caller gave; `gradients` is that of `Backend.fault`.

    Raises:
        ValueError: the name is unknown, or that backend cannot serve the call; the reason is in the message.
    """
    if isinstance(name, str) and name == "auto":
        for backend in BACKENDS.values():
            if backend.passed_over(device) is not None or _why_not(backend, spec, dtype, device) is not None:
                continue
            if backend.fault(spec, dtype, device, gradients, check=True) is None:
                return backend
        return REFERENCE
    errors.one_of("backend", name, CHOICES)
    reason = _why_not(BACKENDS[name], spec, dtype, device)
    if reason is not None:
        raise ValueError(f'backend "{name}" cannot serve this call: {reason}; backend="auto" chooses one that can')
    return BACKENDS[name]


def _why_not(backend: Backend, spec: CellSpec, dtype: torch.dtype, device: torch.device) -> str | None:
    if backend is REFERENCE:
        return None
    return backend.unavailable() or backend.refuses(spec, dtype, device) or active_transform()
