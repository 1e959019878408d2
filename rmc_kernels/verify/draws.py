"""The tensors of a case, drawn from a seed, and one way to run each: a backend, plain eager PyTorch, float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from rmc_kernels.autograd import RelationalMemoryFunction
from rmc_kernels.backends import REFERENCE, Call
from rmc_kernels.backends.reference import unroll
from rmc_kernels.functional import relational_memory
from rmc_kernels.spec import CellSpec
from rmc_kernels.verify.cases import Case

Runner = Callable[[Call], tuple[Tensor, Tensor]]
MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


@dataclass(frozen=True)
class Draw:
    """The tensors of one draw of a case.

    Attributes:
        case: what was drawn.
        call: inputs and parameters.
        grad_memories: gradient of the memories, [B, T, N, D].
        grad_final: gradient of the final memory, [B, N, D].
    """

    case: Case
    call: Call
    grad_memories: Tensor
    grad_final: Tensor

    def wide(self) -> Draw:
        """The same, already rounded, values in float64."""
        call = self.call
        call = replace(
            call,
            x=call.x.double(),
            memory=call.memory.double(),
            params=tuple(value.double() for value in call.params),
            reset_memory=None if call.reset_memory is None else call.reset_memory.double(),
            dropout_mask=None if call.dropout_mask is None else call.dropout_mask.double(),
        )
        return Draw(self.case, call, self.grad_memories.double(), self.grad_final.double())


def draw(case: Case, seed: int, device: str = "cpu") -> Draw:
    """The tensors of `case` from `seed`: the same values on every device.

    Biases, norms and trained gate biases are drawn as well, so that no gradient vanishes by symmetry.
    """
    spec, dtype = case.spec, case.torch_dtype
    generator = torch.Generator().manual_seed(seed)
    batch, steps = case.batch_size, case.steps
    shape = (batch, spec.mem_slots, spec.mem_size)

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return mean + scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    def placed(value: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        value = value.to(device, dtype)
        return _strided(value) if case.strided else value

    def chance(probability: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < probability

    def parameter(name: str, shape: tuple[int, ...]) -> Tensor:
        if name in ("forget_bias", "input_bias"):
            return normal(scale=0.3, mean=getattr(spec, name))
        if name.endswith("norm.weight"):
            return normal(*shape, scale=0.3, mean=1.0)
        return normal(*shape, scale=shape[-1] ** -0.5 if name.endswith("weight") else 0.3)

    x = normal(batch, steps, *spec.input_shape, scale=case.magnitude)
    lengths = resets = reset_memory = mask = None
    if case.lengths:
        lengths = torch.randint(0, steps + 1, (batch,), generator=generator)
        x[torch.arange(steps) >= lengths[:, None]] = torch.nan
        lengths = lengths.to(device)
    if case.resets:
        resets = placed(chance(0.3, batch, steps), torch.bool)
        reset_memory = placed(normal(*shape, scale=case.magnitude))
    if case.dropout_mask:
        mask = chance(0.8, batch, steps, spec.num_heads, spec.mem_slots, spec.total_rows) / 0.8
        mask = placed(mask, dtype)
    call = Call(
        placed(x, dtype),
        placed(normal(*shape, scale=case.magnitude)),
        tuple(placed(parameter(name, shape), dtype) for name, shape in spec.parameter_shapes.items()),
        lengths,
        resets,
        reset_memory,
        mask,
    )
    return Draw(case, call, placed(normal(batch, steps, *shape[1:])), placed(normal(*shape)))


def evaluate(drawn: Draw, run: Runner) -> dict[str, Tensor]:
    """Every tensor that is compared: memories, final memory, and the gradients asked for, by name.

    Raises:
        TypeError: an output is not of the memory's dtype.
    """
    call, inputs, parameters = drawn.call, drawn.case.input_gradients, drawn.case.parameter_gradients
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, value: MaybeTensor, needed: bool) -> MaybeTensor:
        if value is None or not needed:
            return value
        leaves[f"gradient of {name}"] = value = value.detach().requires_grad_()
        return value

    names = drawn.case.spec.parameter_names
    memories, final = run(
        replace(
            call,
            x=leaf("x", call.x, inputs),
            memory=leaf("memory", call.memory, inputs),
            reset_memory=leaf("reset_memory", call.reset_memory, inputs),
            params=tuple(leaf(name, value, parameters) for name, value in zip(names, call.params, strict=True)),
        )
    )
    for name, value in (("memories", memories), ("final memory", final)):
        if value.dtype != call.memory.dtype:
            raise TypeError(f"{name} should have the dtype of the memory, {call.memory.dtype}, got {value.dtype}")
    outputs = {"memories": memories.detach(), "final memory": final.detach()}
    if not leaves:
        return outputs
    found = torch.autograd.grad((memories, final), list(leaves.values()), (drawn.grad_memories, drawn.grad_final))
    return outputs | dict(zip(leaves, found, strict=True))


def by_eager(spec: CellSpec) -> Runner:
    """Plain PyTorch by the definition, in the dtype of the call: the yardstick, and in float64 the truth."""

    def run(call: Call) -> tuple[Tensor, Tensor]:
        memories = unroll(spec, call)[0]
        return memories, memories[:, -1]

    return run


def by_backend(name: str, case: Case) -> Runner:
    """Through the public function.

    The reference, which that runs as plain PyTorch, goes through the autograd function that fused backends use, so that
    this machinery is verified.
    """
    spec = case.spec

    def reference(call: Call) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = RelationalMemoryFunction.apply(  # type: ignore[no-untyped-call]
            spec, name, case.recompute == "none", *call.flat()
        )
        return found

    def fused(call: Call) -> tuple[Tensor, Tensor]:
        return relational_memory(
            call.x, call.memory, dict(zip(spec.parameter_names, call.params, strict=True)), spec,
            lengths=call.lengths, resets=call.resets, reset_memory=call.reset_memory, dropout_mask=call.dropout_mask,
            backend=name, recompute=case.recompute,
        )  # fmt: skip

    return reference if name == REFERENCE.name else fused


def _strided(value: Tensor) -> Tensor:
    """The same values, the axes reversed in memory and every second element a gap (of NaN where there are NaNs)."""
    gap = torch.nan if value.is_floating_point() else 0
    storage = value.new_full((*reversed(value.shape), 2), gap)
    return storage[..., 0].permute(tuple(reversed(range(value.dim())))).copy_(value)
