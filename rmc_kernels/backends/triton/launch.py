"""From the tensors of a call to the launches: projections of the input side, then one launch for all steps."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton.runtime.driver import driver
from triton.runtime.interpreter import InterpretedFunction

from rmc_kernels.backends.protocol import Call
from rmc_kernels.backends.triton import tiles
from rmc_kernels.backends.triton.device.forward import forward
from rmc_kernels.backends.triton.device.project import project
from rmc_kernels.backends.triton.parameters import Linear, Parameters
from rmc_kernels.backends.triton.plan import Blocks, Plan
from rmc_kernels.spec import LAYER_NORM_EPS, CellSpec

#: Whether the kernels run in Triton's interpreter, on CPU tensors.
INTERPRETED = isinstance(forward, InterpretedFunction)
#: Most bytes of float32 copies made at a time when the input rows' projections are normalised.
NORM_BYTES = 64 << 20
#: Compute capability, times 10, from which on NVIDIA's tensor cores take bfloat16 and TF32.
LEAST_CAPABILITY = 80


def no_device() -> str | None:
    """Why Triton drives no device here, or None."""
    try:
        device_type()
    except Exception as error:  # of its driver, which compiles C and loads it: a compiler's or a loader's too
        return f"Triton has no device: {error}"
    return None


def unfit_device() -> str | None:
    """Why the kernels are not for the current device, or None."""
    if INTERPRETED:
        return None
    target = driver.active.get_current_target()
    if target.backend not in ("cuda", "hip"):
        return f"the kernels are for NVIDIA and AMD devices, Triton drives {target.backend}"
    if target.backend == "cuda" and target.arch < LEAST_CAPABILITY:
        return f"the kernels are for sm_{LEAST_CAPABILITY} and newer, the device is sm_{target.arch}"
    return None


def device_type() -> str:
    """The type of the torch device that Triton launches on.

    Raises:
        RuntimeError: there is none.
    """
    if INTERPRETED:
        return "cpu"
    device: torch.device = driver.active.get_active_torch_device()
    return device.type


def precision(dtype: torch.dtype) -> str:
    """How float32 products are computed: as torch's setting for its own matrix products says."""
    if dtype is not torch.float32 or torch.version.hip is not None:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    setting = getattr(matmul, "fp32_precision", None)  # torch < 2.9 has the older flag only
    allowed = matmul.allow_tf32 if setting is None else setting == "tf32"  # the older one raises where both were set
    return "tf32" if allowed else "ieee"


def _target() -> str:
    """The architecture of Triton's device, as `tiles` names it."""
    if INTERPRETED:
        return ""
    arch = driver.active.get_current_target().arch
    return arch if isinstance(arch, str) else f"sm_{arch}"


def _processors() -> int:
    """How many programs Triton's device runs side by side at least; the interpreter runs one after the other."""
    if INTERPRETED:
        return 1
    device = driver.active.get_current_device()
    properties = driver.active.utils.get_device_properties(device)
    return int(properties["multiprocessor_count"])


def unroll(spec: CellSpec, call: Call) -> Tensor:
    """The memories [B, T, N, D] of a call."""
    batch, steps = call.batch_size, call.steps
    memories = call.memory.new_empty(batch, steps, spec.mem_slots, spec.mem_size)
    if memories.numel():
        with device_of(call.device):
            params = Parameters.of(spec, call)
            _forward(spec, call, params, input_side(spec, call.x, params), memories)
    return memories


@dataclass(frozen=True)
class InputSide:
    """What of all steps does not depend on the memory.

    Attributes:
        rows: u [B * T * n, D] where input rows are in the tile; the input row's normalised queries, keys and values
            [B * T, F] otherwise.
        gates: [B * T, G], the input's gate terms; None without gates.
    """

    rows: Tensor
    gates: Tensor | None


def input_side(spec: CellSpec, x: Tensor, params: Parameters) -> InputSide:
    """The `InputSide` of x [B, T, ...]."""
    count = x.shape[0] * x.shape[1]
    u = x.reshape(count * spec.rows, spec.input_size)
    if params.input_projection is not None:
        u = project_rows(u, params.input_projection)
    gates = None
    if params.input_gate is not None:
        gates = project_rows(u.view(count, spec.rows * spec.mem_size), params.input_gate)
    if tiles.input_rows_in_tile(spec):
        return InputSide(u.contiguous(), gates)
    rows = project_rows(u, params.qkv)
    if params.qkv_norm is not None:
        weight, bias = params.qkv_norm.weight[0].float(), params.qkv_norm.bias[0].float()
        for part in rows.split(max(1, NORM_BYTES // (4 * spec.qkv_size))):
            part.copy_(F.layer_norm(part.float(), weight.shape, weight, bias, LAYER_NORM_EPS))
    return InputSide(rows, gates)


def project_rows(rows: Tensor, linear: Linear) -> Tensor:
    """`rows @ weight.T + bias`, [count, out], in the dtype of the rows [count, in]."""
    rows = rows.contiguous()
    (count, inner), outputs = rows.shape, linear.weight.shape[-2]
    out = rows.new_empty(count, outputs)
    tile = tiles.PROJECTION
    blocks = Blocks(tile.rows, tile.columns, tile.inner, tile.stages, precision(rows.dtype))
    project[(triton.cdiv(count, tile.rows), triton.cdiv(outputs, tile.columns))](
        rows, linear.weight, linear.bias, out, count, inner, IN=inner, OUT=outputs, blocks=blocks,
        **compiler_options(tile),
    )  # fmt: skip
    return out


def _forward(spec: CellSpec, call: Call, params: Parameters, side: InputSide, memories: Tensor) -> None:
    tile = tile_of(spec, call)
    plan = plan_of(spec, tile, precision(call.x.dtype))
    count = programs(call, plan)

    def scratch(dtype: torch.dtype, *width: int) -> Tensor:
        return call.x.new_empty((count * tile.rows, *width), dtype=dtype)

    kind, wide = call.x.dtype, torch.float32
    forward[(count,)](
        memories, call.memory.contiguous(), side.rows, side.gates,
        *options(call), *weights(params),
        scratch(wide, plan.D) if plan.inputs_in_tile else None,
        scratch(kind, plan.F), scratch(wide), scratch(wide, plan.D), scratch(kind, 2, plan.D),
        scratch(wide, plan.D), scratch(wide, plan.G) if plan.G else None,
        call.batch_size, call.steps, *bounds(spec, plan),
        spec.input_bias, spec.forget_bias,
        plan=plan, **compiler_options(tile),
    )  # fmt: skip


def plan_of(spec: CellSpec, tile: tiles.Tile, precision: str) -> Plan:
    """The plan of the forward kernel."""
    return Plan(
        N=spec.mem_slots,
        n=spec.rows,
        D=spec.mem_size,
        K=spec.key_width,
        V=spec.head_size,
        heads=spec.num_heads,
        G=2 * spec.gate_size,
        layers=spec.attention_mlp_layers,
        residual=spec.has_attention_residual,
        ends_in_relu=spec.mlp_ends_in_relu,
        inputs_in_tile=tiles.input_rows_in_tile(spec),
        padded=tiles.padded_rows(spec),
        blocks=Blocks(tile.rows, tile.columns, tile.inner, tile.stages, precision),
        key_columns=tile.head_columns(spec.key_width),
        value_columns=tile.head_columns(spec.head_size),
    )


def tile_of(spec: CellSpec, call: Call) -> tiles.Tile:
    """The tile of a call on Triton's device."""
    return tiles.choose(spec, call.x.dtype, _target(), call.batch_size, _processors())


def compiler_options(tile: tiles.Tile) -> dict[str, Any]:
    """Triton's options for a kernel that runs in this tile.

    No product is fused into the addition after it: lanes that hold the same value would differ in its last bit. All
    registers that a thread can have are asked for, since ptxas left to itself may spill so that more programs share a
    processor: the kernel that keeps activations (16 rows, D = 8, sm_90) got 128 and spilled 9 words, two of them in an
    inner loop, where 226 hold it all. AMD's compiler has no such option.
    """
    fixed = {"num_warps": tile.warps, "enable_fp_fusion": False}
    return fixed | {"maxnreg": tile.registers} if _target().startswith("sm_") else fixed


def backward_tile_of(spec: CellSpec, call: Call) -> tiles.Tile:
    """That of its backward kernel; it has as many rows."""
    return tiles.backward(spec, call.x.dtype, _target(), tile_of(spec, call).rows)


def options(call: Call) -> tuple[Tensor | None, ...]:
    """lengths, resets, reset_memory and mask as the kernels take them."""
    return (
        _contiguous(call.lengths), _bytes(call.resets), _contiguous(call.reset_memory), _contiguous(call.dropout_mask)
    )  # fmt: skip


def weights(params: Parameters) -> tuple[Tensor | None, ...]:
    """The parameters of the recurrence in the kernels' order."""
    return pairs(
        params.qkv, params.qkv_norm, params.heads, params.attention_norm, params.mlp, params.mlp_norm,
        params.memory_gate,
    )  # fmt: skip


def bounds(spec: CellSpec, plan: Plan) -> tuple[int, ...]:
    """The run-time bounds of loops in the kernels' order."""
    return (
        spec.num_blocks, spec.attention_mlp_layers, plan.D, plan.F, plan.G, spec.num_heads, spec.key_width,
        spec.head_size,
    )  # fmt: skip


def programs(call: Call, plan: Plan) -> int:
    """How many programs a call's batch elements take."""
    return int(triton.cdiv(call.batch_size, plan.blocks.rows // plan.padded))


def pairs(*linears: Linear | None) -> tuple[Tensor | None, ...]:
    """Weight and bias of each."""
    return tuple(t for linear in linears for t in ((None, None) if linear is None else (linear.weight, linear.bias)))


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _bytes(flags: Tensor | None) -> Tensor | None:
    return None if flags is None else flags.contiguous().view(torch.uint8)


def device_of(device: torch.device) -> AbstractContextManager[object]:
    """Makes the tensors' device the current one: Triton asks about that, and launches on its current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
