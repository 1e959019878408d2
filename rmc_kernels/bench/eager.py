"""The yardstick: the sonnet cell as a good eager PyTorch loop. FROZEN: it is never made slower or faster again.

Every speed-up that this project states is against this file, so a change here would change the meaning of figures
already published. It is what an expert writes without writing a kernel: whatever does not depend on the memory (the
input projection, the input rows' keys and values, the gate term with every bias folded in) is computed for all steps in
large GEMMs first; a step uses fused ops and works in place where autograd allows. Variants were timed against each
other before the freeze: scaled_dot_product_attention beat batched matrix products and softmax (by up to 20 % at B=1),
while [B*N, D] in place of [B, N, D] memories, concatenating only k and v, and `_addmm_activation` were within noise.

It serves what the published cell is mostly used as: one block, two MLP layers, unit gates, one input row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from rmc_kernels.spec import LAYER_NORM_EPS, CellSpec

Params = Mapping[str, Tensor]
Step = Callable[[Tensor, Tensor, Tensor, Params, CellSpec], Tensor]

#: Operations that one more step dispatches, without and with views: a test holds the loop to them.
KERNELS_PER_STEP = 19
OPS_PER_STEP = 37


def unroll(x: Tensor, memory: Tensor, params: Params, spec: CellSpec, step: Step | None = None) -> Tensor:
    """The memories [B, T, N, D] after each step.

    Args:
        x: [B, T, I].
        memory: [B, N, D] before the first step, in x's dtype.
        params: name -> tensor, as in `spec.parameter_shapes`.
        spec: a sonnet cell that `serves` accepts.
        step: what runs one step; `eager_step` if None.
    """
    step = eager_step if step is None else step
    rows, gates = hoist(x, params, spec)
    memories = []
    for row, gate in zip(rows.unsqueeze(2).unbind(1), gates.unsqueeze(2).unbind(1), strict=True):
        memory = step(memory, row, gate, params, spec)
        memories.append(memory)
    return torch.stack(memories, dim=1)


def hoist(x: Tensor, params: Params, spec: CellSpec) -> tuple[Tensor, Tensor]:
    """The input rows' normalised q, k, v [B, T, F], and their gate term with all gate biases [B, T, 2D]."""
    u = F.linear(x, params["input_projection.weight"], params["input_projection.bias"])
    rows = _norm(F.linear(u, params["blocks.0.qkv.weight"], params["blocks.0.qkv.bias"]), params, "qkv_norm")
    constant = x.new_tensor([spec.input_bias, spec.forget_bias]).repeat_interleave(spec.mem_size)
    bias = params["input_gate.bias"] + params["memory_gate.bias"] + constant
    return rows, F.linear(u, params["input_gate.weight"], bias)


def eager_step(memory: Tensor, row: Tensor, gate: Tensor, params: Params, spec: CellSpec) -> Tensor:
    """The memory [B, N, D] after one step; `row` [B, 1, F] and `gate` [B, 1, 2D] are this step's part of `hoist`."""
    slots, key, value = spec.mem_slots, spec.key_width, spec.head_size
    qkv = _norm(F.linear(memory, params["blocks.0.qkv.weight"], params["blocks.0.qkv.bias"]), params, "qkv_norm")
    heads = torch.cat([qkv, row], dim=1).view(-1, slots + 1, spec.num_heads, 2 * key + value).transpose(1, 2)
    q, k, v = torch.split_with_sizes(heads, [key, key, value], dim=-1)
    attended = F.scaled_dot_product_attention(q[:, :, :slots], k, v).transpose(1, 2).flatten(2)
    rows = _norm(memory + attended, params, "attention_norm")
    hidden = F.linear(rows, params["mlp.0.weight"], params["mlp.0.bias"]).relu_()
    rows = _norm(rows + F.linear(hidden, params["mlp.1.weight"], params["mlp.1.bias"]), params, "mlp_norm")
    gates = F.linear(torch.tanh(memory), params["memory_gate.weight"]).add_(gate).sigmoid_()
    input_gate, forget_gate = gates.chunk(2, dim=-1)
    return torch.addcmul(forget_gate * memory, input_gate, rows.tanh_())


def serves(spec: CellSpec) -> bool:
    """Whether this loop computes `spec`."""
    published_form = spec.num_blocks == 1 and spec.attention_mlp_layers == 2 and spec.input_rows is None
    return published_form and spec.variant == "sonnet" and spec.gate_style == "unit"


def compiled_step() -> Step:
    """`eager_step` through torch.compile, one graph for one size; the loop over time stays in Python."""
    step: Step = torch.compile(eager_step, fullgraph=True, dynamic=False)
    return step


def _norm(rows: Tensor, params: Params, name: str) -> Tensor:
    weight, bias = params[f"blocks.0.{name}.weight"], params[f"blocks.0.{name}.bias"]
    return F.layer_norm(rows, rows.shape[-1:], weight, bias, LAYER_NORM_EPS)
