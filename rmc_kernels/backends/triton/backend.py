"""The Triton backend as the protocol has it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from rmc_kernels.backends.protocol import Call, Unrolled, last_memory
from rmc_kernels.backends.triton import tiles
from rmc_kernels.spec import CellSpec

#: The oldest Triton that the kernels have been compiled with.
LEAST_TRITON = "3.6"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Offsets within parameters are 32-bit; those that grow with batch size or length are 64-bit.
MOST_PARAMETERS = 2**31 - 1


@lru_cache
def _is_too_old(version: str) -> bool:
    return TorchVersion(version) < LEAST_TRITON


class TritonBackend:
    """All steps forward in one launch; backwards in one launch for each chunk of them.

    Serves tensors on the device of Triton's active driver: a GPU, or under TRITON_INTERPRET=1 the CPU.
    """

    name = "triton"

    def note(self, spec: CellSpec, dtype: torch.dtype, device: torch.device) -> str:
        """Whether the kernels have been compared with the reference on this machine."""
        from rmc_kernels.backends.triton import trust

        return trust.checked(spec.as_json, dtype, device)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator] # Dynamo calls it while it traces
    def unavailable(self) -> str | None:
        """Why Triton cannot be used, or None."""
        if sys.modules.get("triton") is None and find_spec("triton") is None:  # the search takes 13 us
            return "triton is not installed"
        import triton

        if _is_too_old(triton.__version__):
            return f"triton must be {LEAST_TRITON} or newer, got {triton.__version__}"
        from rmc_kernels.backends.triton import launch

        return launch.no_device()

    def refuses(self, spec: CellSpec, dtype: torch.dtype, device: torch.device) -> str | None:
        """See `Backend.refuses`."""
        missing: str | None = self.unavailable()
        if missing is not None:
            return missing
        from rmc_kernels.backends.triton import launch

        served = launch.device_type()
        if device.type != served:
            return f"x must be on {served}, which Triton drives here, got {device}"
        with launch.device_of(device):
            unfit = launch.unfit_device()
        if unfit is not None:
            return unfit
        if dtype not in DTYPES:
            return f"x must be float32, bfloat16 or float16, got {dtype}"
        if spec.joint_norm:
            return "the l0sg variant normalises over rows and features jointly, which these kernels do not"
        rows = tiles.live_rows(spec)
        if rows > tiles.MOST_ROWS:
            return f"attended rows per batch element must be at most {tiles.MOST_ROWS}, those of a tile, got {rows}"
        if spec.parameter_count > MOST_PARAMETERS:
            return f"parameters must be at most {MOST_PARAMETERS}, got {spec.parameter_count}"
        return None

    def passed_over(self, device: torch.device) -> str | None:
        """On the CPU, Triton is an interpreter or a simulator: for tests."""
        return "on the CPU Triton only interprets, for tests" if device.type == "cpu" else None

    def fault(
        self, spec: CellSpec, dtype: torch.dtype, device: torch.device, gradients: str, *, check: bool
    ) -> str | None:
        """See `trust`."""
        from rmc_kernels.backends.triton import trust

        if not trust.enabled:
            return None
        found: str | None = trust.fault(spec.as_json, dtype, gradients, device, check, torch.compiler.is_compiling())
        return found

    def activation_size(self, spec: CellSpec, batch_size: int, steps: int, dtype: torch.dtype) -> int:
        """See `Backend.activation_size`: linear in steps, and in batch elements up to a tile."""
        from rmc_kernels.backends.triton.activations import activation_size

        return activation_size(spec, batch_size, steps, dtype)

    def forward(self, spec: CellSpec, call: Call, save: bool) -> Unrolled:
        """See `Backend.forward`."""
        from rmc_kernels.backends.triton import activations, launch

        with torch.no_grad():
            if save:
                memories, kept = activations.unroll_kept(spec, call)
            else:
                memories, kept = launch.unroll(spec, call), call.x.new_empty(0, dtype=torch.uint8)
            return Unrolled(memories, kept, last_memory(memories))

    def backward(
        self, spec: CellSpec, call: Call, memories: Tensor, activations: Tensor, grad: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """See `Backend.backward`."""
        from rmc_kernels.backends.triton.gradients import gradients

        with torch.no_grad():
            return gradients(spec, call, memories, activations, grad, needs)
