"""The backward pass of a call: launches that walk its steps in chunks, each followed by the products of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from rmc_kernels.backends.protocol import Call
from rmc_kernels.backends.triton import launch
from rmc_kernels.backends.triton.activations import Activations, kept_rows, training_plan, without_padding
from rmc_kernels.backends.triton.device.backward import backward
from rmc_kernels.backends.triton.device.recompute import recompute
from rmc_kernels.backends.triton.parameters import Linear, Parameters
from rmc_kernels.spec import LAYER_NORM_EPS, CellSpec

#: Most bytes of what grows with the steps of a chunk; a chunk has a step at least.
WORKSPACE_BYTES = 256 << 20
#: Most steps of a chunk: CUDA's limit to a grid's second dimension.
MOST_STEPS = 65535
#: Rows that a float32 product sums one after another, and how many such sums are made at a time. One product over all
#: rows of a chunk would add thousands in a row where the library does not split it: at 4096 rows 3 to 5 times the error
#: of an eager loop, which adds step by step; by 512 rows 1.2 to 1.3 (emulated, D = 256).
SUMMED_ROWS, SUMS_AT_ONCE = 512, 8


def gradients(
    spec: CellSpec, call: Call, memories: Tensor, activations: Tensor, grad: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """See `Backend.backward`."""
    names = ("x", "memory", "reset_memory", *spec.parameter_names)
    targets = (call.x, call.memory, call.reset_memory, *call.params)
    wanted = {name: t for name, t, need in zip(names, targets, needs, strict=True) if need and t is not None}
    if memories.numel():
        with launch.device_of(call.device):
            found = _Backward(spec, call, memories, activations, wanted).run(grad.contiguous())
    else:
        found = {name: target.new_zeros(target.shape) for name, target in wanted.items()}
    return [found[name].to(wanted[name].dtype) if name in wanted else None for name in names]


class Sums:
    """Gradients of the parameters that are wanted, summed over chunks in float32; [..] by name."""

    def __init__(self, shapes: dict[str, Tensor]) -> None:
        self.found = {name: t.new_zeros(t.shape, dtype=torch.float32) for name, t in shapes.items()}

    def linear(self, name: str, d: Tensor, left: Tensor) -> None:
        """Add those of a Linear from the gradient of what it put out, [rows, out], and what it took, [rows, in]."""
        weight = self.found.get(f"{name}.weight")
        if weight is not None and d.dtype is torch.float32:
            whole = d.shape[0] // SUMMED_ROWS * SUMMED_ROWS
            for part in range(0, whole, SUMMED_ROWS * SUMS_AT_ONCE):
                rows = slice(part, min(whole, part + SUMMED_ROWS * SUMS_AT_ONCE))
                d_groups, left_groups = (t[rows].unflatten(0, (-1, SUMMED_ROWS)) for t in (d, left))
                weight += torch.bmm(d_groups.mT, left_groups).sum(0)
            weight.addmm_(d[whole:].t(), left[whole:])
        elif weight is not None:
            weight += d.t() @ left
        self.add(f"{name}.bias", d)

    def add(self, name: str, rows: Tensor) -> None:
        """Add the sum of rows [rows, width]."""
        if name in self.found:
            self.found[name] += rows.sum(0, dtype=torch.float32)


@dataclass(frozen=True)
class Chunk:
    """Some steps' work: `start` and `count`, and what their launch leaves.

    Attributes:
        kind: [count * rows, kind width], see `TrainingPlan`.
        work: [count * rows, work width].
        sums: [count * programs, sums width].
    """

    start: int
    count: int
    kind: Tensor
    work: Tensor
    sums: Tensor


class _Backward:
    """The backward pass of one call."""

    def __init__(
        self, spec: CellSpec, call: Call, memories: Tensor, activations: Tensor, wanted: dict[str, Tensor]
    ) -> None:
        self.spec, self.call, self.memories = spec, without_padding(call), memories
        self.params = Parameters.of(spec, call)
        self.saved = activations.numel() > 0
        self.tile = launch.tile_of(spec, call)
        self.plan = training_plan(spec, self.tile, launch.precision(call.x.dtype))
        self.back_tile = launch.backward_tile_of(spec, call)
        self.back_plan = training_plan(spec, self.back_tile, launch.precision(call.x.dtype))
        self.programs = launch.programs(call, self.plan)
        self.rows = kept_rows(spec, call.batch_size) if self.saved else self.programs * self.tile.rows
        self.wanted = wanted
        self.sums = Sums({name: t for name, t in wanted.items() if name in spec.parameter_shapes})
        self.activations = activations

    def run(self, grad: Tensor) -> dict[str, Tensor]:
        """The gradients wanted, by name."""
        found = self._recurrence(grad)
        d_x = self._input_back(found.pop("inputs"), found.pop("gates", None))
        found |= self.sums.found
        return found if d_x is None else found | {"x": d_x.view(self.call.x.shape)}

    def _recurrence(self, grad: Tensor) -> dict[str, Tensor]:
        """Walk the steps: gradients of the memories and, as "inputs" and "gates", of `InputSide`."""
        call, plan = self.call, self.plan
        side = launch.input_side(self.spec, call.x, self.params)
        d_inputs = torch.zeros_like(side.rows)
        d_gates = None if side.gates is None else torch.empty_like(side.gates)
        carry = torch.zeros((2, self.rows, plan.D), device=grad.device)
        reset_carry = None if call.resets is None else torch.zeros_like(carry)
        for chunk in self._walk(grad, side, carry, reset_carry, d_inputs):
            self._weights(chunk)
            if d_gates is not None:
                steps = slice(chunk.start, chunk.start + chunk.count)
                of_chunk = self._per_element(chunk.work[:, plan.d_gates_at :]).unflatten(0, (chunk.count, -1))
                d_gates.view(call.batch_size, call.steps, plan.G)[:, steps] = of_chunk.transpose(0, 1)
        found = {"inputs": d_inputs} if d_gates is None else {"inputs": d_inputs, "gates": d_gates}
        for name, rows in (("memory", carry), ("reset_memory", reset_carry)):
            if name in self.wanted and rows is not None:
                found[name] = rows[0].view(-1, plan.padded, plan.D)[: call.batch_size, : plan.N].clone()
        return found

    # -- the launches -------------------------------------------------------------------------------------------

    def _empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return self.call.x.new_empty(shape, dtype=dtype)

    @property
    def chunk_steps(self) -> int:
        """Steps of a chunk: as even as the byte budget allows."""
        plan, item = self.plan, self.call.x.element_size()
        per_row = plan.work_width * item + (0 if self.saved else Activations.row_bytes(plan, item))
        per_step = self.rows * per_row + self.programs * plan.sums_width * 4
        chunks = triton.cdiv(self.call.steps, min(MOST_STEPS, max(1, WORKSPACE_BYTES // per_step)))
        return int(triton.cdiv(self.call.steps, chunks))

    def _walk(
        self, grad: Tensor, side: launch.InputSide, carry: Tensor, reset_carry: Tensor | None, d_inputs: Tensor
    ) -> Iterator[Chunk]:
        """Every chunk, the last one first, after its launch."""
        call, plan, steps = self.call, self.plan, self.chunk_steps
        if self.saved:
            kept = Activations.within(self.activations, plan, call.x.dtype, call.steps, self.rows)
        else:
            kept = Activations.empty(call.x, plan, steps, self.rows)
        work = self._empty(call.x.dtype, steps, self.rows, plan.work_width)
        work[:, self.programs * self.tile.rows :] = 0  # rows of kept activations that no program has
        sums = self._empty(torch.float32, steps, self.programs, plan.sums_width)
        scratch = self._empty(torch.float32, self.rows, plan.scratch_width)
        params, spec, memory = self.params, self.spec, call.memory.contiguous()
        norms = launch.pairs(params.qkv_norm, params.attention_norm, params.mlp_norm)
        transposed = [_transposed(linear) for linear in (params.qkv, params.heads, params.mlp, params.memory_gate)]
        for start in reversed(range(0, call.steps, steps)):
            count = min(steps, call.steps - start)
            if not self.saved:
                recompute[(self.programs, count)](
                    kept.kind, kept.wide, kept.marks, self.memories, memory, side.rows, side.gates,
                    *launch.options(call), *launch.weights(params), call.batch_size, call.steps, self.rows, start,
                    *launch.bounds(spec, plan), plan=plan, **launch.compiler_options(self.tile),
                )  # fmt: skip
            backward[(self.programs,)](
                grad, self.memories, memory, side.rows, side.gates, *launch.options(call), *norms, *transposed,
                kept.kind, kept.wide, kept.marks, work, sums, scratch, carry, reset_carry, d_inputs,
                call.batch_size, call.steps, self.rows, start, count, 0 if self.saved else start,
                *launch.bounds(spec, plan), spec.input_bias, spec.forget_bias, plan=self.back_plan,
                **launch.compiler_options(self.back_tile),
            )  # fmt: skip
            kind = kept.kind[start : start + count] if self.saved else kept.kind[:count]
            kind, done, totals = (t.flatten(0, 1) for t in (kind, work[:count], sums[:count]))
            yield Chunk(start, count, kind, done, totals)

    # -- the products -------------------------------------------------------------------------------------------

    def _weights(self, chunk: Chunk) -> None:
        """Add a chunk's share of every gradient of the recurrence."""
        plan, sums = self.plan, self.sums

        def field(buffer: Tensor, at: int, width: int) -> Tensor:
            return buffer[:, at : at + width]

        for block in range(plan.num_blocks):
            name, work = f"blocks.{block}", chunk.work[:, block * plan.block_work :]
            kind, totals = chunk.kind[:, block * plan.block_kind :], chunk.sums[:, block * plan.block_sums :]
            sums.linear(f"{name}.qkv", field(work, plan.d_qkv_at, plan.F), field(work, 0, plan.D))
            if plan.projection:
                d_heads = field(work, plan.d_heads_at, plan.D)
                sums.linear(f"{name}.output", d_heads, field(kind, plan.heads_at, plan.D))
            for layer in range(plan.layers):
                below = field(kind, plan.hidden_at + (layer - 1) * plan.D, plan.D)
                left = below if layer else field(work, plan.mixed_at, plan.D)
                sums.linear(f"mlp.{layer}", field(work, plan.d_mlp_at + layer * plan.D, plan.D), left)
            for norm, at, width in (
                ("qkv_norm", 0, plan.F),
                ("attention_norm", plan.attention_sums_at, plan.D),
                ("mlp_norm", plan.mlp_sums_at, plan.D),
            ):
                sums.add(f"{name}.{norm}.weight", field(totals, at, width))
                sums.add(f"{name}.{norm}.bias", field(totals, at + width, width))
        if plan.G:
            d_gates = field(chunk.work, plan.d_gates_at, plan.G)
            sums.linear("memory_gate", d_gates, field(chunk.work, plan.squashed_at, plan.D))

    def _per_element(self, rows: Tensor) -> Tensor:
        """[count * B, width] float32: rows [count * rows, width] summed over those of an element."""
        split: Tensor = rows.unflatten(0, (-1, self.rows // self.plan.padded, self.plan.padded))
        return split[:, : self.call.batch_size].sum(2, dtype=torch.float32).flatten(0, 1)

    def _input_back(self, d_inputs: Tensor, d_gates: Tensor | None) -> Tensor | None:
        """From the gradients of `InputSide` to those of its parameters and of x, which is given where it is wanted."""
        spec, params, sums = self.spec, self.params, self.sums
        count = self.call.batch_size * self.call.steps
        x = self.call.x.reshape(count * spec.rows, spec.input_size)
        u = x if params.input_projection is None else launch.project_rows(x, params.input_projection)
        if self.plan.inputs_in_tile:
            d_u = d_inputs
        else:
            self._norm_back(launch.project_rows(u, params.qkv), d_inputs)
            sums.linear("blocks.0.qkv", d_inputs, u)
            d_u = d_inputs @ params.qkv.weight[0]
        if d_gates is not None:
            assert params.input_gate is not None
            sums.linear("input_gate", d_gates, u.reshape(count, -1))
            d_u = d_u + (d_gates @ params.input_gate.weight[0]).view_as(d_u)
        if params.input_projection is not None:
            sums.linear("input_projection", d_u, x)
        if "x" not in self.wanted:
            return None
        return d_u if params.input_projection is None else d_u @ params.input_projection.weight[0]

    def _norm_back(self, rows: Tensor, d: Tensor) -> None:
        """The norm of the input row's queries, keys and values [count, F] backwards; `d` becomes that of its input."""
        norm, name = self.params.qkv_norm, "blocks.0.qkv_norm"
        if norm is None:
            return
        weight, bias = norm.weight[0].float(), norm.bias[0].float()
        some = max(1, launch.NORM_BYTES // (4 * self.spec.qkv_size))
        for part, d_part in zip(rows.split(some), d.split(some), strict=True):
            wide, shape = part.float(), weight.shape
            _, mean, rstd = torch.native_layer_norm(wide, shape, weight, bias, LAYER_NORM_EPS)
            d_wide, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
                d_part.float(), wide, shape, mean, rstd, weight, bias, (True, True, True)
            )
            d_part.copy_(d_wide)
            self.sums.add(f"{name}.weight", d_weight[None])
            self.sums.add(f"{name}.bias", d_bias[None])


def _transposed(linear: Linear | None) -> Tensor | None:
    """[count, in, out], contiguous."""
    return None if linear is None else linear.weight.transpose(1, 2).contiguous()
