"""The configurations that every backend is tested on, and how to draw the tensors of one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rmc_kernels import CellSpec, backends
from rmc_kernels.autograd import RelationalMemoryFunction
from rmc_kernels.backends import Call
from rmc_kernels.functional import memory_dtype
from rmc_kernels.verify import Case, draws

SONNET = CellSpec.sonnet(5, 3, 4, 2)

#: One spec for each thing that a variant or an argument changes; small and odd sizes on purpose.
SPECS: dict[str, CellSpec] = {
    "sonnet": SONNET,
    "memory-gate": replace(SONNET, gate_style="memory", forget_bias=0.25, input_bias=-0.75),
    "no-gate": replace(SONNET, gate_style=None),
    "blocks": replace(SONNET, num_blocks=2, attention_mlp_layers=3),
    "one-mlp-layer": replace(SONNET, attention_mlp_layers=1),
    "key-size": CellSpec.sonnet(7, 2, 6, 3, key_size=11, forget_bias=0.25, input_bias=-0.75),
    "matrix": CellSpec.sonnet(5, 3, 4, 2, input_rows=3),
    "matrix-blocks": CellSpec.sonnet(5, 3, 4, 2, num_blocks=2, input_rows=2, gate_style="memory"),
    "one-slot": CellSpec.sonnet(1, 1, 3),
    "odd": CellSpec.sonnet(3, 5, 3, 4),
    "textbook": CellSpec.textbook(5, 4, 6),
    "textbook-same-width": CellSpec.textbook(6, 3, 3, 2, mlp_layers=3),
    "l0sg": CellSpec.l0sg(3, 4, 5, 2),
    "l0sg-memory-gate": CellSpec.l0sg(2, 3, 4, 2, num_blocks=2, gate_style="memory", attention_mlp_layers=3),
    "l0sg-no-gate": CellSpec.l0sg(2, 3, 4, key_size=5, gate_style=None),
    "r2gen": CellSpec.r2gen(3, 8, 2),
    "r2gen-no-dropout": CellSpec.r2gen(1, 6, 3, dropout=0.0),
}
VARIANTS = ("sonnet", "textbook", "l0sg", "r2gen")

#: Optional tensors of a sequence.
OPTIONS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "lengths-resets": ("lengths", "resets"),
}


def served(backend: str, name: str, dtype: str = "float32", device: str = "cpu") -> bool:
    """Whether a backend of this machine serves the spec of that name."""
    found = backends.BACKENDS[backend]
    refusal = found.refuses(SPECS[name], getattr(torch, dtype), torch.device(device))
    return found.unavailable() is None and refusal is None


@dataclass
class DrawnCall:
    """The tensors of one unroll, by the names of `relational_memory`."""

    spec: CellSpec
    x: Tensor
    memory: Tensor
    params: dict[str, Tensor]
    options: dict[str, Tensor]

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `relational_memory`."""
        return {"x": self.x, "memory": self.memory, "params": self.params, "spec": self.spec, **self.options}

    def call(self) -> Call:
        """As a backend is given it."""
        params = tuple(self.params[name] for name in self.spec.parameter_names)
        return Call(self.x, self.memory, params, **self.options)

    def through_function(self, backend: str) -> Tensor:
        """The memories by the autograd function, which `relational_memory` leaves out for the reference."""
        call = self.call()
        memories: Tensor
        memories, _ = RelationalMemoryFunction.apply(  # type: ignore[no-untyped-call]
            self.spec, backend, False, *call.flat()
        )
        return memories

    def leaves(self) -> dict[str, Tensor]:
        """Every tensor that has a gradient, by name."""
        found = {"x": self.x, "memory": self.memory, **self.params}
        if "reset_memory" in self.options:
            found["reset_memory"] = self.options["reset_memory"]
        return found

    def to(self, dtype: torch.dtype) -> DrawnCall:
        """A copy in another dtype; memories stay float32 beside a half x."""
        wide = memory_dtype(dtype)

        def convert(name: str, value: Tensor) -> Tensor:
            if not value.is_floating_point():
                return value
            return value.detach().to(wide if name.endswith("memory") else dtype).requires_grad_(value.requires_grad)

        return DrawnCall(
            self.spec,
            convert("x", self.x),
            convert("memory", self.memory),
            {name: convert(name, value) for name, value in self.params.items()},
            {name: convert(name, value) for name, value in self.options.items()},
        )


def draw(
    spec: CellSpec,
    options: tuple[str, ...] = (),
    *,
    batch: int = 3,
    steps: int = 5,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    requires_grad: bool = False,
) -> DrawnCall:
    """Random tensors of one unroll, those of `rmc verify` where it has them; B and T may be 0.

    The first element is as long as the sequence and starts over on the way; of three or more the second is empty.
    """
    drawn = draws.draw(Case(spec, batch_size=max(batch, 1), steps=max(steps, 1)), seed).wide().call
    generator = torch.Generator().manual_seed(seed + 1)
    chosen: dict[str, Tensor] = {}
    if "lengths" in options:
        chosen["lengths"] = torch.randint(0, steps + 1, (batch,), generator=generator)
        chosen["lengths"][:1] = steps
        chosen["lengths"][1 : max(batch - 1, 1)][:1] = 0
    if "resets" in options:
        chosen["resets"] = torch.rand(batch, steps, generator=generator) < 0.3
        chosen["resets"][:1, steps // 2 :][:, :1] = True
        chosen["reset_memory"] = torch.randn(batch, *drawn.memory.shape[1:], generator=generator, dtype=torch.float64)
    if spec.dropout:
        shape = (batch, steps, spec.num_heads, spec.mem_slots, spec.total_rows)
        keep = 1 - spec.dropout
        chosen["dropout_mask"] = (torch.rand(shape, generator=generator) < keep).double() / keep
    params = dict(zip(spec.parameter_names, drawn.params, strict=True))
    case = DrawnCall(spec, drawn.x[:batch, :steps], drawn.memory[:batch], params, chosen).to(dtype)
    for leaf in case.leaves().values():
        leaf.requires_grad_(requires_grad)
    return case
