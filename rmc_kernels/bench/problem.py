"""The tensors of a case: the same ones are checked for parity and timed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rmc_kernels.bench.cases import Case
from rmc_kernels.spec import CellSpec

#: Biases of the hidden MLP layers are +- this many standard deviations of what they are added to.
CLEAR_OF_ZERO = 4.0


@dataclass(frozen=True)
class Problem:
    """One draw of a case.

    Attributes:
        spec: the cell.
        x: [B, T, I].
        memory: [B, N, D] before the first step; float32 where x is a half type.
        params: name -> tensor, in the order of the spec.
        grad: gradient of the output, [B, T, N * D].
    """

    spec: CellSpec
    x: Tensor
    memory: Tensor
    params: dict[str, Tensor]
    grad: Tensor

    def double(self) -> Problem:
        """The same, already rounded, values in float64."""
        params = {name: value.double() for name, value in self.params.items()}
        return replace(
            self, x=self.x.double(), memory=self.memory.double(), params=params, grad=self.grad.double()
        )  # fmt: skip


def draw(case: Case, seed: int = 0, device: str = "cpu") -> Problem:
    """The tensors of `case` from `seed`.

    Every bias and norm is drawn too, so that no term of a gradient vanishes. The hidden MLP layers' biases keep their
    ReLUs clear of 0: no input is within rounding of it, where a gradient is discontinuous and right code may differ.
    """
    spec, generator = case.spec, torch.Generator().manual_seed(seed)
    dtype: torch.dtype = getattr(torch, case.dtype)
    hidden = {f"mlp.{layer}.bias" for layer in range(spec.attention_mlp_layers - 1)}

    def normal(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return (mean + scale * torch.randn(shape, generator=generator)).to(device, dtype)

    def parameter(name: str, shape: tuple[int, ...]) -> Tensor:
        if name in hidden:
            return CLEAR_OF_ZERO * normal(*shape).sign()
        if name.endswith("norm.weight"):
            return normal(*shape, scale=0.1, mean=1.0)
        return normal(*shape, scale=shape[-1] ** -0.5 if name.endswith("weight") else 0.1)

    batch, steps, slots, width = case.batch_size, case.steps, case.mem_slots, case.mem_size
    return Problem(
        spec=spec,
        x=normal(batch, steps, case.input_size),
        memory=normal(batch, slots, width, dtype=torch.float32),
        params={name: parameter(name, shape) for name, shape in spec.parameter_shapes.items()},
        grad=normal(batch, steps, slots * width),
    )
