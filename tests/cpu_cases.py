"""Cells and calls on which the C++ backend is tested, and how to compare what it gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rmc_kernels.backends.cpu import CpuBackend
from rmc_kernels.backends.protocol import Call
from rmc_kernels.backends.reference import ReferenceBackend
from rmc_kernels.spec import CellSpec

_C = pytest.importorskip("rmc_kernels._C")
REFERENCE = ReferenceBackend()
NOTHING = torch.empty(0, dtype=torch.uint8)
ISAS = [isa for isa in _C.isas() if isa != "avx512bf16"]  # whose float32 kernels are those of avx512
sonnet = CellSpec.sonnet
INF = float("inf")

SPECS = {
    "sonnet": sonnet(10, 4, 16, 2),
    "sonnet_odd": sonnet(7, 5, 3, 4),
    "sonnet_memory_gate": sonnet(9, 3, 8, 2, gate_style="memory"),
    "sonnet_no_gate": sonnet(9, 3, 8, 2, gate_style=None),
    "sonnet_blocks": sonnet(9, 3, 8, 2, num_blocks=3, attention_mlp_layers=3),
    "sonnet_key_size": sonnet(9, 4, 16, 2, key_size=5),
    "sonnet_matrix": sonnet(6, 3, 8, 2, input_rows=3),
    "sonnet_matrix_blocks": sonnet(6, 3, 7, 2, input_rows=2, num_blocks=2, gate_style="memory"),
    "sonnet_mlp1": sonnet(16, 4, 32, 4, attention_mlp_layers=1),
    "sonnet_mlp5": sonnet(16, 4, 32, 4, attention_mlp_layers=5),
    "sonnet_one_slot": sonnet(5, 1, 16, 1),
    "sonnet_many_slots": sonnet(5, 35, 5, 2, key_size=70),
    "sonnet_held": sonnet(9, 3, 8, 2, forget_bias=INF, input_bias=-INF),
    "textbook": CellSpec.textbook(24, 4, 12, 2),
    "textbook_projected": CellSpec.textbook(10, 3, 5, 2, mlp_layers=3),
    "r2gen": CellSpec.r2gen(3, 24, 2),
    "r2gen_many_slots": CellSpec.r2gen(32, 24, 4),
    "l0sg": CellSpec.l0sg(3, 8, 9, 2),
    "l0sg_odd": CellSpec.l0sg(2, 3, 9, 3, num_blocks=2, gate_style="memory", attention_mlp_layers=3),
    "l0sg_no_gate": CellSpec.l0sg(2, 16, 9, 2, gate_style=None, key_size=4),
}


def make(
    spec: CellSpec, batch: int, steps: int, options: str = "", dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Call, Tensor]:
    """A call with random tensors and a gradient; options: l(engths), r(esets)."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    params = []
    for name, shape in spec.parameter_shapes.items():
        scale = shape[-1] ** -0.5 if len(shape) == 2 and "norm" not in name else 0.2
        params.append((draw(*shape) * scale + ("norm.weight" in name)).to(dtype))
    x, memory = draw(batch, steps, *spec.input_shape), draw(batch, spec.mem_slots, spec.mem_size)
    given: dict[str, Tensor] = {}
    if "l" in options:
        given["lengths"] = torch.randint(-1, steps + 3, (batch,), generator=g)
    if "r" in options:
        given["resets"] = torch.rand(batch, steps, generator=g) < 0.3
        given["reset_memory"] = draw(batch, spec.mem_slots, spec.mem_size).to(dtype)
    if spec.variant == "r2gen":
        shape = (batch, steps, spec.num_heads, spec.mem_slots, spec.total_rows)
        given["dropout_mask"] = ((torch.rand(shape, generator=g) < 0.9) / 0.9).to(dtype)
    grad = draw(batch, steps, spec.mem_slots, spec.mem_size).to(dtype)
    return Call(x.to(dtype), memory.to(dtype), tuple(params), **given), grad


def everything(
    backend: CpuBackend | ReferenceBackend, spec: CellSpec, call: Call, grad: Tensor, save: bool = False
) -> dict[str, Tensor]:
    """Memories and all gradients, by name."""
    needs = [True, True, call.reset_memory is not None] + [True] * len(call.params)
    memories, activations, _ = backend.forward(spec, call, save)
    grads = backend.backward(spec, call, memories, activations, grad, needs)
    names = ("x", "memory", "reset_memory", *spec.parameter_names)
    return {"memories": memories} | {f"grad of {n}": g for n, g in zip(names, grads, strict=True) if g is not None}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor], only: tuple[str, ...] = ()) -> None:
    for name in only or a:
        assert torch.equal(a[name].nan_to_num(7, INF, -INF), b[name].nan_to_num(7, INF, -INF)), name
        assert torch.equal(a[name].isnan(), b[name].isnan()), name
