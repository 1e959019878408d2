"""L0SG/relational-rnn-pytorch: its `RelationalMemory` as a drop-in, and its state_dicts (TextGAN's too) in and out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rmc_kernels import errors
from rmc_kernels.compat import mapping
from rmc_kernels.compat.mapping import LEAVES, Array, Entry, Layer
from rmc_kernels.compat.port import Port, weights
from rmc_kernels.spec import CellSpec, GateStyle

_GATES = tuple(f"{name}.{leaf}" for name in ("input_gate_projector", "memory_gate_projector") for leaf in LEAVES)


class RelationalMemory(Port):
    """L0SG's `relational_rnn_general.RelationalMemory`, on the fused backends.

    Same constructor, methods, shapes and state_dict as L0SG/relational-rnn-pytorch; a checkpoint of the original loads
    with `strict=True`, an optimizer's too, since parameters have the original's order.

    Kept from the original, as users' numbers depend on them:
        * `forward` detaches the memory it is given: no gradient reaches an earlier call, or a trained initial memory.
        * `attention_mlp` holds one Linear `attention_mlp_layers` times, with a ReLU behind each; the state_dict lists
          it as often.
        * LayerNorms run over all slots and features jointly, and blocks share all weights.
        * `forget_bias` and `input_bias` are trained scalars; with `gate_style=None` they and two gate projections of
          no rows are there, unused.
        * with `return_all_outputs` outputs come time first, [T * B, N * D].
        * `initial_state` ignores `trainable`.

    Not kept: the original raises under autograd on current PyTorch (an in-place product on a view), this does not;
    `initial_state` is made on the parameters' device; the intermediate methods (`multihead_attention`, `create_gates`,
    `attend_over_memory`) do not exist, one kernel runs the sequence.

    Args:
        mem_slots: memory slots `N`.
        head_size: units of one head.
        input_size: features `I` of the input.
        num_heads: heads. Default: 1.
        num_blocks: attention blocks per step. Default: 1.
        forget_bias, input_bias: initial values of the trained gate biases. Defaults: 1.0, 0.0.
        gate_style: "unit", "memory" or None. Default: "unit".
        attention_mlp_layers: how often the MLP layer is applied. Default: 2.
        key_size: key size of one head; None or 0 takes head_size.
        return_all_outputs: return the output of every step, not only of the last. Default: False.
        backend: "auto", "triton", "cpu" or "reference"; see `explain`.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes.
    """

    def __init__(
        self,
        mem_slots: int,
        head_size: int,
        input_size: int,
        num_heads: int = 1,
        num_blocks: int = 1,
        forget_bias: float = 1.0,
        input_bias: float = 0.0,
        gate_style: GateStyle | None = "unit",
        attention_mlp_layers: int = 2,
        key_size: int | None = None,
        return_all_outputs: bool = False,
        *,
        backend: str = "auto",
    ) -> None:
        spec = CellSpec.l0sg(
            mem_slots, head_size, input_size, num_heads, num_blocks, forget_bias, input_bias, gate_style,
            attention_mlp_layers, key_size or None, return_all_outputs,
        )  # fmt: skip
        super().__init__(spec, backend)
        self.mem_slots, self.head_size, self.input_size = spec.mem_slots, spec.head_size, spec.input_size
        self.num_heads, self.num_blocks, self.gate_style = spec.num_heads, spec.num_blocks, spec.gate_style
        self.attention_mlp_layers, self.key_size = spec.attention_mlp_layers, spec.key_width
        self.mem_size = width = spec.mem_size
        self.return_all_outputs = return_all_outputs
        rows, gates = spec.total_rows, 2 * spec.gate_size
        self.qkv_projector = nn.Linear(width, spec.qkv_size)
        self.qkv_layernorm = nn.LayerNorm([rows, spec.qkv_size])
        self.attention_mlp = nn.ModuleList([nn.Linear(width, width)] * spec.attention_mlp_layers)
        self.attended_memory_layernorm = nn.LayerNorm([rows, width])
        self.attended_memory_layernorm2 = nn.LayerNorm([rows, width])
        self.input_projector = nn.Linear(spec.input_size, width)
        with warnings.catch_warnings():  # without gates the two projections have no rows, which nn.Linear remarks on
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            self.input_gate_projector = nn.Linear(width, gates)
            self.memory_gate_projector = nn.Linear(width, gates)
        self.forget_bias = nn.Parameter(torch.tensor(spec.forget_bias))
        self.input_bias = nn.Parameter(torch.tensor(spec.input_bias))

    def forward(self, inputs: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Run the sequence from a detached copy of `memory`.

        Args:
            inputs: [B, T, I], T >= 1; what follows the time axis is flattened to I. Dtype of the parameters.
            memory: [B, N, D], usually `initial_state` or what the last call returned.

        Returns:
            The last step's output [B, N * D], or with `return_all_outputs` all, time first: [T * B, N * D].
            The memory [B, N, D], float32 for half types.

        Raises:
            TypeError, ValueError: naming the argument, what it got and what it takes.
        """
        outputs, final = self._sequence(inputs, self.repackage_hidden(memory))
        return outputs.transpose(0, 1).flatten(0, 1) if self.return_all_outputs else outputs[:, -1], final

    def forward_step(
        self, inputs: Tensor, memory: Tensor, treat_input_as_matrix: bool = False
    ) -> tuple[Tensor, Tensor]:
        """One step; unlike `forward`, gradients reach `memory`.

        Args:
            inputs: [B, I]; what follows the batch axis is flattened to I.
            memory: [B, N, D].
            treat_input_as_matrix: takes inputs [B, 1, I]; more rows than one fit the port's LayerNorms no more here
                than there.

        Returns:
            The output [B, N * D] and the memory [B, N, D].
        """
        errors.is_tensor("inputs", inputs, f"a tensor [B, {self.input_size}]")
        if treat_input_as_matrix and (inputs.dim() < 3 or inputs.shape[1] != 1):
            raise ValueError(f"inputs takes one row a step, [B, 1, {self.input_size}]; got {tuple(inputs.shape)}")
        row = self._rows("inputs", inputs, axes=1)
        outputs, final = self._run(row[:, None], memory)
        return outputs[:, 0], final

    def initial_state(self, batch_size: int, trainable: bool = False) -> Tensor:
        """The identity, padded or cut to D columns: [B, N, D]. `trainable` has no effect, as in the original."""
        return self._identity(batch_size)

    def repackage_hidden(self, h: Any) -> Any:
        """The tensor, or the tuple of tensors, without its history."""
        if isinstance(h, (tuple, list)):
            return tuple(self.repackage_hidden(part) for part in h)
        return errors.is_tensor("memory", h, "a tensor").detach()

    @property
    def state_size(self) -> list[int]:
        """`[N, D]`."""
        return [self.mem_slots, self.mem_size]

    @property
    def output_size(self) -> int:
        """`N * D`."""
        return self.mem_slots * self.mem_size

    def _sequence(self, inputs: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [B, T, N * D] and the last memory."""
        x = self._rows("inputs", inputs, axes=2)
        if not x.shape[1]:
            raise ValueError(f"inputs takes at least one step, got {tuple(inputs.shape)}")
        return self._run(x, memory)

    def _weights(self) -> dict[str, Tensor]:
        owners = {
            "input_projection": self.input_projector,
            "blocks.0.qkv": self.qkv_projector,
            "blocks.0.qkv_norm": self.qkv_layernorm,
            "blocks.0.attention_norm": self.attended_memory_layernorm,
            "blocks.0.mlp_norm": self.attended_memory_layernorm2,
            "mlp.0": self.attention_mlp[0],
        }
        if self.gate_style is not None:
            owners |= {"input_gate": self.input_gate_projector, "memory_gate": self.memory_gate_projector}
        found = weights(owners)
        if self.gate_style is not None:
            found |= {"forget_bias": self.forget_bias, "input_bias": self.input_bias}
        return found


def load_variables(layer: Layer, variables: Mapping[str, Array | Tensor]) -> None:
    """Copy the port's state_dict into a layer of the l0sg variant, in place.

    Args:
        layer: the layer or cell; its dtype and device stay.
        variables: state_dict key -> array or tensor. The port lists its one MLP layer `L` times
            (`attention_mlp.0` ... `attention_mlp.{L-1}`); the aliases may be left out, and so may the gate's variables
            where there is no gate.

    Raises:
        TypeError, ValueError: wrong layer, missing or unknown names, wrong shapes; nothing is written then.
    """
    spec = mapping.check_layer(layer, "l0sg")
    ignored = {f"attention_mlp.{i}.{leaf}" for i in range(1, spec.attention_mlp_layers) for leaf in LEAVES}
    if spec.gate_style is None:
        ignored |= {*_GATES, "forget_bias", "input_bias"}
    mapping.load(layer, _entries(spec), variables, ignored)


def export_variables(layer: Layer, gradients: bool = False) -> dict[str, Array]:
    """The layer's parameters (or gradients, zeros where there is none) under the port's keys, without MLP aliases."""
    return mapping.export(layer, _entries(mapping.check_layer(layer, "l0sg")), gradients)


def _entries(spec: CellSpec) -> list[Entry]:
    modules = {
        "qkv_projector": "blocks.0.qkv",
        "qkv_layernorm": "blocks.0.qkv_norm",
        "attention_mlp.0": "mlp.0",
        "attended_memory_layernorm": "blocks.0.attention_norm",
        "attended_memory_layernorm2": "blocks.0.mlp_norm",
        "input_projector": "input_projection",
    }
    if spec.gate_size:
        modules |= {"input_gate_projector": "input_gate", "memory_gate_projector": "memory_gate"}
    entries = [
        Entry(f"{theirs}.{leaf}", f"{ours}.{leaf}", mapping.whole)
        for theirs, ours in modules.items()
        for leaf in LEAVES
    ]
    biases = ("forget_bias", "input_bias") if spec.trains_gate_biases else ()
    return entries + [Entry(name, name, mapping.whole) for name in biases]
