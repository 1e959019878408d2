"""The definition: what one step of the cell computes, and what a sequence of them is, in plain PyTorch.

Every backend is held to this file. It favours reading over speed: no hoisting, one step after the other. Any dtype and
device; differentiable twice; works under `torch.func` and `torch.compile(fullgraph=True)`.

Symbols: `B` batch, `T` steps, `n` input rows, `N` slots, `S = N + n`, `H` heads, `K` key size, `V` head size,
`D = H * V`. Shapes below are of one step. With half types, matrix products run in that type while LayerNorm, the gates
and the memory are float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from rmc_kernels.spec import LAYER_NORM_EPS, CellSpec

Params = Mapping[str, Tensor]


def step(
    x: Tensor, memory: Tensor, params: Params, spec: CellSpec, *, dropout_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One step of the cell.

    Args:
        x: [B, I], or [B, n, I] in matrix mode.
        memory: [B, N, D]; float32 where x is a half type.
        params: every parameter in `spec.parameter_shapes` by name, of x's dtype.
        spec: the cell.
        dropout_mask: [B, H, N, S] factors of the attention weights, or None; one-block cells other than l0sg only.

    Returns:
        The new memory [B, N, D] in the dtype of `memory`, and the attention weights of the memory rows
        [num_blocks, B, H, N, S], before dropout.
    """
    slots = spec.mem_slots
    u = _input_rows(x, params, spec)
    rows = torch.cat([memory.to(u.dtype), u], dim=1)  # memory rows first, input rows last
    weights = []
    for b in range(spec.num_blocks):
        name = f"blocks.{spec.block_index(b)}"
        queries = spec.total_rows if spec.input_rows_live else slots
        attended, block_weights = _attention(rows, queries, params, spec, name, dropout_mask)
        rows = rows[:, :queries] + attended if spec.has_attention_residual else attended
        if spec.has_attention_norm:
            rows = _layer_norm(rows, params, f"{name}.attention_norm", spec)
        rows = rows + _mlp(rows, params, spec)
        if spec.has_mlp_norm:
            rows = _layer_norm(rows, params, f"{name}.mlp_norm", spec)
        weights.append(block_weights[:, :, :slots])
    return _gate(rows[:, :slots], u, memory, params, spec), torch.stack(weights)


def unroll(
    x: Tensor,
    memory: Tensor,
    params: Params,
    spec: CellSpec,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_memory: Tensor | None = None,
    dropout_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The steps of a sequence, one after the other.

    Args:
        x: [B, T, I], or [B, T, n, I] in matrix mode.
        memory: [B, N, D] before the first step; float32 where x is a half type.
        params: every parameter in `spec.parameter_shapes` by name, of x's dtype.
        spec: the cell.
        lengths: [B] integers, clamped to [0, T]; from step `lengths[b]` on the memory of element b is frozen.
        resets: [B, T] bool; before such a step the element's memory is replaced by its `reset_memory`, unless the
            step is past its length.
        reset_memory: [B, N, D], in the dtype of `memory`; needed with `resets`.
        dropout_mask: [B, T, H, N, S] factors of the attention weights, or None.

    Returns:
        The memories after each step [B, T, N, D], and the attention weights [B, T, num_blocks, H, N, S], zero past
        the length.
    """
    batch, steps = x.shape[:2]
    memories, attention = [], []
    if lengths is not None:  # what stands in the padding must not matter, not even a NaN
        running = torch.arange(steps, device=x.device) < lengths[:, None]
        x = torch.where(running.view(batch, steps, *([1] * (x.dim() - 2))), x, 0)
        if dropout_mask is not None:
            dropout_mask = torch.where(running[..., None, None, None], dropout_mask, 0)
    for t in range(steps):
        alive = None if lengths is None else running[:, t, None, None]
        if resets is not None:
            assert reset_memory is not None
            reset = resets[:, t, None, None]
            memory = torch.where(reset if alive is None else reset & alive, reset_memory, memory)
        mask = None if dropout_mask is None else dropout_mask[:, t]
        # A copy, since matrix products may round differently for other strides and alignments: a sequence in chunks
        # must equal the sequence at once bit for bit.
        x_t = x[:, t].clone(memory_format=torch.contiguous_format)
        # Where a step does not run it reads zeros: its gradient is 0, but 0 times a NaN would reach the parameters.
        carried = memory if alive is None else torch.where(alive, memory, 0)
        stepped, weights = step(x_t, carried, params, spec, dropout_mask=mask)
        memory = stepped if alive is None else torch.where(alive, stepped, memory)
        memories.append(memory)
        weights = weights.transpose(0, 1)
        attention.append(weights if alive is None else torch.where(alive[..., None, None], weights, 0))
    if not memories:
        shape = (spec.num_blocks, spec.num_heads, spec.mem_slots, spec.total_rows)
        return memory[:, None][:, :0], x.new_empty(batch, 0, *shape)
    return torch.stack(memories, dim=1), torch.stack(attention, dim=1)


def _input_rows(x: Tensor, params: Params, spec: CellSpec) -> Tensor:
    """U = x W_x + b_x, [B, n, D]: one row for a vector input, the same Linear for each row of a matrix input."""
    rows = x if spec.input_rows is not None else x[:, None]
    return _linear(rows, params, "input_projection") if spec.has_input_projection else rows


def _attention(
    rows: Tensor, queries: int, params: Params, spec: CellSpec, name: str, dropout_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Multi-head attention of the first `queries` rows over all: [B, queries, D], weights [B, H, queries, S].

    One LayerNorm covers all heads and q, k, v together, where the variant has one.
    """
    qkv = _linear(rows, params, f"{name}.qkv")
    if spec.has_qkv_norm:
        qkv = _layer_norm(qkv, params, f"{name}.qkv_norm", spec)
    key, value = spec.key_width, spec.head_size
    heads = qkv.view(*qkv.shape[:2], spec.num_heads, 2 * key + value).transpose(1, 2)
    q, k, v = torch.split(heads, [key, key, value], dim=-1)
    weights = torch.softmax((q[:, :, :queries] * key**-0.5) @ k.transpose(-1, -2), dim=-1)
    dropped = weights if dropout_mask is None else weights * dropout_mask
    attended = (dropped @ v).transpose(1, 2).flatten(2)  # concatenated heads
    return _linear(attended, params, f"{name}.output") if spec.has_output_projection else attended, weights


def _mlp(rows: Tensor, params: Params, spec: CellSpec) -> Tensor:
    """L Linears D -> D with ReLU between them, and after the last where the variant says so."""
    last = spec.attention_mlp_layers - 1
    for layer in range(spec.attention_mlp_layers):
        rows = _linear(rows, params, f"mlp.{spec.mlp_index(layer)}")
        if layer < last or spec.mlp_ends_in_relu:
            rows = torch.relu(rows)
    return rows


def _gate(candidate: Tensor, u: Tensor, memory: Tensor, params: Params, spec: CellSpec) -> Tensor:
    """M' = i * tanh(C) + f * M; the memory in the carry term is not passed through tanh."""
    candidate = candidate.to(memory.dtype)
    if spec.gate_style is None:
        return candidate
    from_input = _linear(u.flatten(1), params, "input_gate")[:, None]
    from_memory = _linear(torch.tanh(memory).to(u.dtype), params, "memory_gate")
    gates = (from_input + from_memory).to(memory.dtype)
    input_gate, forget_gate = torch.split(gates, spec.gate_size, dim=-1)  # the input gate comes first
    if spec.trains_gate_biases:
        input_bias, forget_bias = params["input_bias"].to(memory.dtype), params["forget_bias"].to(memory.dtype)
    else:
        input_bias, forget_bias = spec.input_bias, spec.forget_bias  # type: ignore[assignment]
    i = torch.sigmoid(input_gate + input_bias)
    f = torch.sigmoid(forget_gate + forget_bias)
    return i * torch.tanh(candidate) + f * memory


def _linear(rows: Tensor, params: Params, name: str) -> Tensor:
    return F.linear(rows, params[f"{name}.weight"], params[f"{name}.bias"])


def _layer_norm(rows: Tensor, params: Params, name: str, spec: CellSpec) -> Tensor:
    """Over the features of each row, or over rows and features jointly (l0sg); biased variance; float32 at least."""
    shape = rows.shape[-2:] if spec.joint_norm else rows.shape[-1:]
    wide = torch.promote_types(rows.dtype, torch.float32)
    weight, bias = params[f"{name}.weight"].to(wide), params[f"{name}.bias"].to(wide)
    return F.layer_norm(rows.to(wide), shape, weight, bias, LAYER_NORM_EPS).to(rows.dtype)
