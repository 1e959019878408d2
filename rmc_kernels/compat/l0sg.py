"""L0SG/relational-rnn-pytorch: its `RelationalMemory` as a drop-in, and its state_dicts (TextGAN's too) in and out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from rmc_kernels import errors
from rmc_kernels.backends.plain import PLAIN_TYPES
from rmc_kernels.compat import conversion, mapping
from rmc_kernels.compat.mapping import LEAVES, Array, Entry, Layer
from rmc_kernels.compat.port import (
    Part,
    Port,
    attribute,
    children,
    forwards,
    in_computed_dtype,
    narrowed,
    part,
    refuse_quantized,
    unusual_parameter,
    weights,
    widened,
)
from rmc_kernels.spec import CellSpec, GateStyle

if TYPE_CHECKING:
    from typing_extensions import Self

_GATES = {"input_gate_projector": "input_gate", "memory_gate_projector": "memory_gate"}
_BIASES = ("forget_bias", "input_bias")
_UNGATED = (
    part("input_projector", nn.Linear, "input_projection"),
    part("qkv_projector", nn.Linear, "blocks.0.qkv"),
    part("qkv_layernorm", nn.LayerNorm, "blocks.0.qkv_norm"),
    part("attended_memory_layernorm", nn.LayerNorm, "blocks.0.attention_norm"),
    part("attention_mlp", nn.ModuleList),
    part("attention_mlp.0", nn.Linear, "mlp.0"),
    part("attended_memory_layernorm2", nn.LayerNorm, "blocks.0.mlp_norm"),
)
_GATED = _UNGATED + tuple(part(theirs, nn.Linear, ours) for theirs, ours in _GATES.items())


class RelationalMemory(Port):
    """L0SG's `relational_rnn_general.RelationalMemory`, on the fused backends.

    Same constructor, methods, shapes and state_dict as L0SG/relational-rnn-pytorch; a checkpoint of the original loads
    with `strict=True`, an optimizer's too, since parameters have the original's order. A whole model that was saved by
    `torch.save(model)` loads once the import is changed.

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
    `initial_state` is made on the parameters' device.

    While the modules are the constructor's, one kernel runs the sequence from their weights. Where one was replaced or
    wrapped (LoRA, another LayerNorm, several layers in `attention_mlp`) or has a hook, or a subclass overrides
    `forward_step`, `attend_over_memory`, `multihead_attention` or `create_gates`, the class runs these methods step by
    step, calls the modules, and warns once.

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
        TypeError, ValueError: naming the argument, what it must be and what it got.

    Example:
        >>> core = RelationalMemory(mem_slots=4, head_size=8, input_size=12, num_heads=2)
        >>> output, memory = core(torch.randn(3, 5, 12), core.initial_state(3))
        >>> output.shape, memory.shape
        (torch.Size([3, 64]), torch.Size([3, 4, 16]))
    """

    mem_slots: int
    head_size: int
    num_heads: int
    mem_size: int
    num_blocks: int
    gate_style: GateStyle | None
    key_size: int
    value_size: int
    qkv_size: int
    input_size: int
    attention_mlp: nn.ModuleList
    return_all_outputs: bool

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
        self.return_all_outputs = return_all_outputs
        width, rows = spec.mem_size, spec.total_rows
        self.qkv_projector = nn.Linear(width, spec.qkv_size)
        self.qkv_layernorm = nn.LayerNorm([rows, spec.qkv_size])
        self.attention_mlp = nn.ModuleList([nn.Linear(width, width)] * spec.attention_mlp_layers)
        self.attended_memory_layernorm = nn.LayerNorm([rows, width])
        self.attended_memory_layernorm2 = nn.LayerNorm([rows, width])
        self.input_projector = nn.Linear(spec.input_size, width)
        self.num_gates = 2 * self.calculate_gate_size()
        with warnings.catch_warnings():  # without gates the two projections have no rows, which nn.Linear remarks on
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            self.input_gate_projector = nn.Linear(width, self.num_gates)
            self.memory_gate_projector = nn.Linear(width, self.num_gates)
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
            TypeError, ValueError: naming the argument, what it must be and what it got; quantised modules, and
                parameters of another shape than the constructor's.
        """
        outputs, final = self._run_sequence(inputs, self.repackage_hidden(memory))
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
            raise ValueError(f"inputs must be one row a step, [B, 1, {self.input_size}]; got {tuple(inputs.shape)}")
        if self._is_stock(self._STEP_METHODS):
            x = self._checked_rows("inputs", inputs, 1, self.spec.input_size)
            outputs, final = self._run_kernel(x[:, None], memory)
            output = outputs[:, 0]
        else:
            x = self._checked_rows("inputs", inputs, 1, self._input_features())
            output, final = self._step_by_modules(
                x[:, None] if treat_input_as_matrix else x, self._checked_memory(memory, x)
            )
            output = in_computed_dtype(output, x)
        # An overriding forward_step goes on in the dtype of its modules, as in the original.
        return output, final.to(memory.dtype) if self._overrides("forward_step") else final

    def attend_over_memory(self, memory: Tensor) -> Tensor:
        """The rows of memory and input, [B, S, D], after `num_blocks` blocks of attention and MLP."""
        for _ in range(self.num_blocks):
            memory = self.attended_memory_layernorm(memory + self.multihead_attention(memory))
            rows = memory
            for linear in self.attention_mlp:
                rows = torch.relu(linear(rows))
            memory = self.attended_memory_layernorm2(memory + rows)
        return memory

    def multihead_attention(self, memory: Tensor) -> Tensor:
        """What each of the rows [B, S, D] takes from all of them: [B, S, D], heads concatenated."""
        qkv: Tensor = self.qkv_layernorm(self.qkv_projector(memory))
        heads = qkv.unflatten(-1, (self.num_heads, self.qkv_size)).transpose(1, 2)
        q, k, v = heads.split([self.key_size, self.key_size, self.value_size], dim=-1)
        weights = torch.softmax((q * self.key_size**-0.5) @ k.transpose(-1, -2), dim=-1)
        attended: Tensor = weights @ v
        return attended.transpose(1, 2).flatten(2)

    def create_gates(self, inputs: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Input gate and forget gate, [B, N, D] or [B, N, 1], from the projected input [B, 1, D] and the memory."""
        if inputs.dim() != 3 or inputs.shape[1] != 1:
            raise ValueError(f"inputs must be one projected row, [B, 1, {self.mem_size}]; got {tuple(inputs.shape)}")
        gates = self.memory_gate_projector(torch.tanh(memory)) + self.input_gate_projector(inputs.flatten(1))[:, None]
        input_gate, forget_gate = gates.split(gates.shape[2] // 2, dim=2)  # the input gate comes first
        return torch.sigmoid(input_gate + self.input_bias), torch.sigmoid(forget_gate + self.forget_bias)

    def calculate_gate_size(self) -> int:
        """Units of one gate: D, 1, or 0 without gates."""
        return {"unit": self.mem_size, "memory": 1, None: 0}[self.gate_style]

    #: Those that `forward_step` calls.
    _STEP_METHODS: ClassVar[Mapping[str, Callable[..., Any]]] = {
        "attend_over_memory": attend_over_memory,
        "multihead_attention": multihead_attention,
        "create_gates": create_gates,
    }
    _METHODS: ClassVar[Mapping[str, Callable[..., Any]]] = {"forward_step": forward_step, **_STEP_METHODS}

    _FORWARDS = forwards(nn.Linear, nn.LayerNorm)
    _CONTENTS = frozenset(each.path[0] for each in _GATED) | frozenset(_BIASES)

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

    def _run_sequence(self, inputs: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [B, T, N * D] and the last memory."""
        if self._is_stock(self._METHODS):
            x = _at_least_one_step(self._checked_rows("inputs", inputs, 2, self.spec.input_size))
            return self._run_kernel(x, memory)
        outputs = []
        if self._overrides("forward_step"):  # which may take other inputs and memories
            x = _at_least_one_step(errors.is_tensor("inputs", inputs, "a tensor [B, T, ...]"))
            memory = narrowed(memory, x)
            for t in range(x.shape[1]):
                output, memory = self.forward_step(x[:, t], memory)
                outputs.append(output)
            return torch.stack(outputs, 1), widened(memory)
        x = _at_least_one_step(self._checked_rows("inputs", inputs, 2, self._input_features()))
        memory = self._checked_memory(memory, x)
        for t in range(x.shape[1]):
            output, memory = self._step_by_modules(x[:, t], memory)
            outputs.append(output)
        return in_computed_dtype(torch.stack(outputs, 1), x), memory

    def _step_by_modules(self, inputs: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """One step by the methods: output [B, N * D] and memory [B, N, D] in the dtype of `memory`."""
        rows = self.input_projector(inputs)
        rows = rows if inputs.dim() == 3 else rows[:, None]
        slots = memory.to(torch.promote_types(rows.dtype, inputs.dtype))  # the modules' dtype
        following = self.attend_over_memory(torch.cat([slots, rows], 1))[:, : -rows.shape[1]].to(memory.dtype)
        if self.gate_style is not None:
            input_gate, forget_gate = self.create_gates(rows, slots)
            following = input_gate * torch.tanh(following) + forget_gate * memory
        return following.flatten(1), following

    def _input_features(self) -> int | None:
        """How many features the input projection takes; None where another module than a Linear does not say."""
        return getattr(self.input_projector, "in_features", None)

    @classmethod
    def _spec_of(cls, core: nn.Module) -> CellSpec:
        """See `Port`."""
        heads = attribute(core, "num_heads")

        def size(module: str, axis: int) -> int:
            """Of a module's weight."""
            return int(attribute(attribute(core, module), "weight").shape[axis])

        head_size = attribute(core, "head_size", lambda: size("qkv_projector", 1) // heads)
        return CellSpec.l0sg(
            mem_slots=attribute(core, "mem_slots", lambda: size("qkv_layernorm", 0) - 1),
            head_size=head_size,
            input_size=attribute(core, "input_size", lambda: size("input_projector", 1)),
            num_heads=heads,
            num_blocks=attribute(core, "num_blocks"),
            gate_style=attribute(core, "gate_style"),
            attention_mlp_layers=attribute(core, "attention_mlp_layers", lambda: len(attribute(core, "attention_mlp"))),
            key_size=attribute(core, "key_size", lambda: (size("qkv_projector", 0) // heads - head_size) // 2),
        )

    @classmethod
    def _made_like(cls, core: nn.Module, backend: str) -> Self:
        """See `Port`."""
        spec = cls._spec_of(core)
        return cls(
            spec.mem_slots, spec.head_size, spec.input_size, spec.num_heads, spec.num_blocks,
            gate_style=spec.gate_style, attention_mlp_layers=spec.attention_mlp_layers, key_size=spec.key_size,
            return_all_outputs=attribute(core, "return_all_outputs", lambda: False), backend=backend,
        )  # fmt: skip

    @classmethod
    def _original_sizes(cls, spec: CellSpec) -> dict[str, Any]:
        """See `Port`."""
        return {
            "mem_slots": spec.mem_slots, "head_size": spec.head_size, "num_heads": spec.num_heads,
            "mem_size": spec.mem_size, "mem_slots_plus_input": spec.total_rows, "num_blocks": spec.num_blocks,
            "gate_style": spec.gate_style, "attention_mlp_layers": spec.attention_mlp_layers,
            "key_size": spec.key_width, "value_size": spec.head_size,
            "qkv_size": 2 * spec.key_width + spec.head_size, "total_qkv_size": spec.qkv_size,
            "input_size": spec.input_size, "num_gates": 2 * spec.gate_size, "return_all_outputs": False,
        }  # fmt: skip

    def _stock_parts(self) -> Sequence[Part]:
        """See `Port`."""
        return _UNGATED if self.spec.gate_style is None else _GATED

    def _changed_sizes(self) -> list[str]:
        """See `Port`."""
        spec, found = self.spec, []
        if (self.mem_slots, self.mem_size) != (spec.mem_slots, spec.mem_size):
            raise ValueError(
                f"(mem_slots, mem_size) must stay {(spec.mem_slots, spec.mem_size)}, as when the class was made, got "
                f"{(self.mem_slots, self.mem_size)}: make a new one, and load the state_dict of this one"
            )
        ours = (spec.num_heads, spec.num_blocks, spec.gate_style, spec.key_size, spec.head_size)
        now = (self.num_heads, self.num_blocks, self.gate_style, self.key_size, self.value_size)
        if now != ours:
            found.append(f"(num_heads, num_blocks, gate_style, key_size, value_size) is {now}, not {ours}")
        if spec.gate_style is not None:
            for name in _BIASES:
                if type(self._parameters.get(name)) in PLAIN_TYPES:
                    continue
                if is_parametrized(self, name) or unusual_parameter(self, name):
                    found.append(f"{name} is not a parameter of its own")
        layers = children(self).get("attention_mlp")
        if type(layers) is not nn.ModuleList:
            return found
        held = children(layers)
        first = held.get("0")
        for index, layer in held.items():
            if layer is not first:
                refuse_quantized(layer, f"attention_mlp.{index}")
                found.append(f"attention_mlp.{index} is not attention_mlp.0")
        if len(held) != spec.attention_mlp_layers:
            found.append(f"attention_mlp holds {len(held)} modules, not {spec.attention_mlp_layers}")
        return found

    def _refuse_other_shapes(self) -> None:
        """See `Port`; the gate biases are scalars."""
        super()._refuse_other_shapes()
        for name in _BIASES:
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.shape:
                raise ValueError(f"{name} must be of shape (), got {tuple(value.shape)}")

    def _spec_parameters(self) -> dict[str, Tensor]:
        """See `Port`."""
        held: dict[str, Any] = children(self)
        owners = {
            "input_projection": held["input_projector"],
            "blocks.0.qkv": held["qkv_projector"],
            "blocks.0.qkv_norm": held["qkv_layernorm"],
            "blocks.0.attention_norm": held["attended_memory_layernorm"],
            "blocks.0.mlp_norm": held["attended_memory_layernorm2"],
            "mlp.0": children(held["attention_mlp"])["0"],
        }
        if self.spec.gate_style is None:
            return weights(owners)
        owners |= {"input_gate": held["input_gate_projector"], "memory_gate": held["memory_gate_projector"]}
        return weights(owners) | {name: getattr(self, name) for name in _BIASES}


def from_module(original: nn.Module, *, backend: str = "auto") -> RelationalMemory:
    """A drop-in from a living module of L0SG's class, or of a class derived from it.

    Both compute the same: they are compared on random inputs and memories, in float64 and evaluation mode. The original
    stays as it is, and the two share nothing. Dtypes, device, training mode and `requires_grad` are taken over.

    Args:
        original: a module with the attributes and modules of L0SG's class.
        backend: "auto", "triton", "cpu" or "reference"; see `explain`.

    Raises:
        TypeError, ValueError: `original` lacks something, or computes something else; with the largest difference.

    Warns:
        RuntimeWarning: hooks, modules and parameters of the original that have no place here are left behind.
    """
    return conversion.convert(original, RelationalMemory, backend)


def load_variables(layer: Layer, variables: Mapping[str, Array | Tensor], *, prefix: str = "") -> None:
    """Copy the port's state_dict into a layer of the l0sg variant, in place.

    Args:
        layer: the layer or cell; its dtype and device stay.
        variables: state_dict key -> array or tensor. The port lists its one MLP layer `L` times
            (`attention_mlp.0` ... `attention_mlp.{L-1}`); the aliases may be left out, and so may the gate's variables
            where there is no gate.
        prefix: what stands before these keys in `variables`, such as "encoder.core."; other keys are passed over.

    Raises:
        TypeError, ValueError: wrong layer, missing or unknown names, wrong shapes, aliases that differ; nothing is
            written then.
    """
    spec = mapping.check_layer(layer, "l0sg")
    unused = set() if spec.gate_size else {*_BIASES, *(f"{name}.{leaf}" for name in _GATES for leaf in LEAVES)}
    aliases = {
        f"attention_mlp.{i}.{leaf}": f"attention_mlp.0.{leaf}"
        for i in range(1, spec.attention_mlp_layers)
        for leaf in LEAVES
    }
    mapping.load(layer, _entries(spec), variables, prefix=prefix, unused=unused, aliases=aliases)


def export_variables(layer: Layer, gradients: bool = False) -> dict[str, Array]:
    """The layer's parameters (or gradients, zeros where there is none) under the port's keys, without MLP aliases."""
    return mapping.export(layer, _entries(mapping.check_layer(layer, "l0sg")), gradients)


def _at_least_one_step(inputs: Tensor) -> Tensor:
    if inputs.dim() < 2 or not inputs.shape[1]:
        raise ValueError(f"inputs must have at least one step, [B, T, ...], got {tuple(inputs.shape)}")
    return inputs


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
        modules |= _GATES
    entries = [
        Entry(f"{theirs}.{leaf}", f"{ours}.{leaf}", mapping.whole)
        for theirs, ours in modules.items()
        for leaf in LEAVES
    ]
    biases = _BIASES if spec.trains_gate_biases else ()
    return entries + [Entry(name, name, mapping.whole) for name in biases]
