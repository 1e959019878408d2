"""What a cell is: sizes, the flags that tell the four variants apart, and every figure that follows from them.

A `CellSpec` is the single source of parameter names and shapes. The reference, each backend and the layers read it;
nothing else decides what a variant computes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple

from rmc_kernels import errors

Variant = Literal["sonnet", "textbook", "l0sg", "r2gen"]
GateStyle = Literal["unit", "memory"]
GATE_STYLES: tuple[GateStyle | None, ...] = ("unit", "memory", None)
LAYER_NORM_EPS = 1e-5


class _Row(NamedTuple):
    """All that tells a variant apart; the properties of `CellSpec` of these names say what each means.

    The others: `always_projects`, where the input is as wide as a slot, too; `takes_matrix`, `drops`: whether
    `input_rows` and `dropout` may be set; `preset`: fields that the constructor of that name sets; `fixed`: what
    fields must be, a text naming the size that they must equal.
    """

    always_projects: bool
    has_qkv_norm: bool
    has_attention_norm: bool
    has_mlp_norm: bool
    joint_norm: bool
    has_output_projection: bool
    has_attention_residual: bool
    mlp_ends_in_relu: bool
    tied: bool
    trains_gate_biases: bool
    takes_matrix: bool
    drops: bool
    preset: dict[str, Any]
    fixed: dict[str, Any]


_SIZES = {"num_blocks": 1, "key_size": "head_size"}
# fmt: off
_FLAGS: dict[Variant, _Row] = {
    #                always   norm of norm of   norm of joint  output     attention ends in tied   trained takes  drops
    #                projects qkv     attention MLP     norms  projection residual  ReLU           biases  matrix
    "sonnet":   _Row(True,    True,   True,     True,   False, False,     True,     False,  False, False,  True,  False,
                     {}, {}),
    "textbook": _Row(False,   False,  False,    True,   False, True,      False,    False,  False, False,  False, False,
                     {"forget_bias": 0.0, "gate_style": None}, {**_SIZES, "gate_style": None}),
    "l0sg":     _Row(True,    True,   True,     True,   True,  False,     True,     True,   True,  True,   False, False,
                     {}, {}),
    "r2gen":    _Row(False,   False,  False,    False,  False, True,      True,     True,   False, False,  False, True,
                     {"forget_bias": 0.0}, {**_SIZES, "input_size": "mem_size"}),
}
# fmt: on
VARIANTS: tuple[Variant, ...] = tuple(_FLAGS)


@dataclass(frozen=True)
class CellSpec:
    """One recurrent cell: `N` memory slots of width `D = num_heads * head_size` that attend to each other and an input.

    Build one with a preset (`sonnet`, `textbook`, `l0sg`, `r2gen`). Instances are immutable, hashable, and equal when
    they compute the same thing. Sizes are counts; biases are dimensionless.

    Attributes:
        variant: which published cell; fixes every flag below.
        input_size: features `I` of one input row.
        mem_slots: memory slots `N`.
        head_size: value size `V` of one head.
        num_heads: heads `H`.
        num_blocks: attention blocks per step.
        forget_bias, input_bias: constants added to the gate pre-activations (initial values where they are trained).
        gate_style: "unit" (a gate per unit), "memory" (a gate per slot) or None (no gates).
        attention_mlp_layers: layers `L` of the MLP.
        key_size: key size `K` of one head; None takes `head_size`.
        input_rows: rows `n` of a matrix input; None for vector input (one row).
        dropout: probability of dropping an attention weight in training.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it got.
    """

    variant: Variant
    input_size: int
    mem_slots: int
    head_size: int
    num_heads: int = 1
    num_blocks: int = 1
    forget_bias: float = 1.0
    input_bias: float = 0.0
    gate_style: GateStyle | None = "unit"
    attention_mlp_layers: int = 2
    key_size: int | None = None
    input_rows: int | None = None
    dropout: float = 0.0
    # Per instance; ClassVar is what keeps an annotation from becoming a dataclass field.
    _shapes: ClassVar[Mapping[str, tuple[int, ...]]]
    _json: ClassVar[str]

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        errors.one_of("variant", self.variant, VARIANTS)
        for name in ("input_size", "mem_slots", "head_size", "num_heads", "num_blocks", "attention_mlp_layers"):
            put(name, errors.positive_int(name, getattr(self, name)))
        put("key_size", self.head_size if self.key_size is None else errors.positive_int("key_size", self.key_size))
        if self.input_rows is not None:
            put("input_rows", errors.positive_int("input_rows", self.input_rows))
        for name in ("forget_bias", "input_bias", "dropout"):
            put(name, errors.real_number(name, getattr(self, name)))
        errors.one_of("gate_style", self.gate_style, GATE_STYLES)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be a probability in [0, 1), got {self.dropout}")
        flags = _FLAGS[self.variant]
        if self.input_rows is not None and not flags.takes_matrix:
            raise ValueError(f"input_rows must be None for the {self.variant} variant, got {self.input_rows}")
        for name, fixed in flags.fixed.items():
            value = getattr(self, fixed) if isinstance(fixed, str) else fixed
            if getattr(self, name) != value:
                raise ValueError(f"{name} must be {value} for the {self.variant} variant, got {getattr(self, name)}")
        if self.dropout and not flags.drops:
            raise ValueError(f"dropout must be 0 for the {self.variant} variant, got {self.dropout}; only r2gen drops")
        # Made here and not when first asked for, since a compiled graph reads them but cannot make them.
        put("_shapes", self._parameter_shapes())
        put("_json", json.dumps(asdict(self)))

    # -- presets ------------------------------------------------------------------------------------------------

    @classmethod
    def sonnet(
        cls,
        input_size: int,
        mem_slots: int,
        head_size: int,
        num_heads: int = 1,
        num_blocks: int = 1,
        forget_bias: float = 1.0,
        input_bias: float = 0.0,
        gate_style: GateStyle | None = "unit",
        attention_mlp_layers: int = 2,
        key_size: int | None = None,
        input_rows: int | None = None,
    ) -> CellSpec:
        """The Relational Memory Core as published (Sonnet 1.36 `relational_memory.py`; arXiv:1806.01822)."""
        return cls(
            "sonnet", input_size, mem_slots, head_size, num_heads, num_blocks, forget_bias, input_bias, gate_style,
            attention_mlp_layers, key_size, input_rows,
        )  # fmt: skip

    @classmethod
    def textbook(
        cls, input_size: int, mem_slots: int, head_size: int, num_heads: int = 1, mlp_layers: int = 2
    ) -> CellSpec:
        """The simplified form: `M' = MultiHead([M; x])`, `M_t = LayerNorm(M' + FF(M'))`; no gates."""
        return cls(
            "textbook", input_size, mem_slots, head_size, num_heads,
            attention_mlp_layers=mlp_layers, **_FLAGS["textbook"].preset,
        )  # fmt: skip

    @classmethod
    def l0sg(
        cls,
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
    ) -> CellSpec:
        """The cell of L0SG/relational-rnn-pytorch, in that constructor's argument order.

        `return_all_outputs` is taken so that the port's arguments pass unchanged; it chooses what the port's module
        returns and has no part in the cell.
        """
        errors.boolean("return_all_outputs", return_all_outputs)
        return cls(
            "l0sg", input_size, mem_slots, head_size, num_heads, num_blocks, forget_bias, input_bias, gate_style,
            attention_mlp_layers, key_size,
        )  # fmt: skip

    @classmethod
    def r2gen(cls, num_slots: int, d_model: int, num_heads: int = 1, dropout: float = 0.1) -> CellSpec:
        """The report-generation cell of R2Gen (EMNLP 2020): no norms, output projection, attention dropout."""
        num_slots = errors.positive_int("num_slots", num_slots)
        d_model = errors.positive_int("d_model", d_model)
        num_heads = errors.positive_int("num_heads", num_heads)
        if d_model % num_heads:
            raise ValueError(f"d_model must be a multiple of num_heads ({num_heads}), got {d_model}")
        head_size, preset = d_model // num_heads, _FLAGS["r2gen"].preset
        return cls("r2gen", d_model, num_slots, head_size, num_heads, dropout=dropout, **preset)

    # -- sizes (symbols of the paper and of docs/cell.md) -------------------------------------------------------

    @property
    def mem_size(self) -> int:
        """`D`: width of one slot."""
        return self.num_heads * self.head_size

    @property
    def rows(self) -> int:
        """`n`: input rows per step."""
        return self.input_rows or 1

    @property
    def total_rows(self) -> int:
        """`S = N + n`: rows that are attended to."""
        return self.mem_slots + self.rows

    @property
    def key_width(self) -> int:
        """`K`, the resolved key size of one head."""
        assert self.key_size is not None
        return self.key_size

    @property
    def qkv_size(self) -> int:
        """`F = H * (2K + V)`: width of the joint query/key/value projection."""
        return self.num_heads * (2 * self.key_width + self.head_size)

    @property
    def gate_size(self) -> int:
        """`G`: width of one gate; 0 without gates."""
        return {"unit": self.mem_size, "memory": 1, None: 0}[self.gate_style]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one step's input for one batch element: `(I,)`, or `(n, I)` in matrix mode."""
        return (self.input_size,) if self.input_rows is None else (self.input_rows, self.input_size)

    # -- flags: what the table says of the variant --------------------------------------------------------------

    @property
    def has_input_projection(self) -> bool:
        """Whether `u = x W_x + b_x`; otherwise the input row is x itself."""
        return _FLAGS[self.variant].always_projects or self.input_size != self.mem_size

    @property
    def has_qkv_norm(self) -> bool:
        """Whether the joint query/key/value projection is layer-normalised."""
        return _FLAGS[self.variant].has_qkv_norm

    @property
    def has_attention_norm(self) -> bool:
        """Whether a LayerNorm follows the attention residual."""
        return _FLAGS[self.variant].has_attention_norm

    @property
    def has_mlp_norm(self) -> bool:
        """Whether a LayerNorm follows the MLP residual."""
        return _FLAGS[self.variant].has_mlp_norm

    @property
    def joint_norm(self) -> bool:
        """Whether LayerNorms run over all rows and features together (l0sg) instead of row by row."""
        return _FLAGS[self.variant].joint_norm

    @property
    def has_output_projection(self) -> bool:
        """Whether the concatenated heads pass through `W_O`."""
        return _FLAGS[self.variant].has_output_projection

    @property
    def has_attention_residual(self) -> bool:
        """Whether the attention output is added to its input."""
        return _FLAGS[self.variant].has_attention_residual

    @property
    def mlp_ends_in_relu(self) -> bool:
        """Whether the last MLP layer, too, is followed by a ReLU."""
        return _FLAGS[self.variant].mlp_ends_in_relu

    @property
    def tied(self) -> bool:
        """Whether all blocks share weights and one MLP layer is reused `L` times."""
        return _FLAGS[self.variant].tied

    @property
    def trains_gate_biases(self) -> bool:
        """Whether `forget_bias` and `input_bias` are parameters."""
        return _FLAGS[self.variant].trains_gate_biases and self.gate_style is not None

    @property
    def input_rows_live(self) -> bool:
        """Whether the input rows' own attention output counts: with one block and row norms it does not."""
        return self.num_blocks > 1 or self.joint_norm

    def block_index(self, block: int) -> int:
        """Index of the weights that block number `block` uses."""
        return 0 if self.tied else block

    def mlp_index(self, layer: int) -> int:
        """Index of the weights that MLP layer number `layer` uses."""
        return 0 if self.tied else layer

    # -- parameters ---------------------------------------------------------------------------------------------

    @property
    def parameter_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every parameter, in the order every backend uses. Linear weights are [out, in].

        The rows of `qkv` are head-major, and inside a head contiguous `[q (K) | k (K) | v (V)]`; the rows of the gates
        are the input gate first, then the forget gate (Sonnet's layout, transposed).
        """
        return self._shapes

    def _parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        width, features, gates = self.mem_size, self.qkv_size, 2 * self.gate_size
        norm_rows = (self.total_rows,) if self.joint_norm else ()
        shapes: dict[str, tuple[int, ...]] = {}

        def linear(name: str, out: int, inputs: int) -> None:
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, inputs), (out,)

        def norm(name: str, size: int) -> None:
            shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (*norm_rows, size)

        if self.has_input_projection:
            linear("input_projection", width, self.input_size)
        for b in range(1 if self.tied else self.num_blocks):
            linear(f"blocks.{b}.qkv", features, width)
            if self.has_qkv_norm:
                norm(f"blocks.{b}.qkv_norm", features)
            if self.has_output_projection:
                linear(f"blocks.{b}.output", width, width)
            if self.has_attention_norm:
                norm(f"blocks.{b}.attention_norm", width)
            if self.has_mlp_norm:
                norm(f"blocks.{b}.mlp_norm", width)
        for layer in range(1 if self.tied else self.attention_mlp_layers):
            linear(f"mlp.{layer}", width, width)
        if gates:
            linear("input_gate", gates, self.rows * width)
            linear("memory_gate", gates, width)
        if self.trains_gate_biases:
            shapes["forget_bias"] = shapes["input_bias"] = ()
        return shapes

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of `parameter_shapes`, in order."""
        return tuple(self.parameter_shapes)

    @property
    def parameter_count(self) -> int:
        """Number of scalars in all parameters."""
        return sum(math.prod(shape) for shape in self.parameter_shapes.values())

    def hoistable(self) -> tuple[str, ...]:
        """What of a step does not depend on the memory and can be computed for all T in large GEMMs first.

        Returns:
            A subset of `input_projection` (u), `input_gate` (its gate term), `input_key_value` (block 0's keys and
            values of the input rows, normalised), `input_query` (their queries, which count only with several blocks)
            and `input_qkv_projection` (before the LayerNorm, where that LayerNorm is joint with the memory rows).
        """
        parts = ["input_projection"] if self.has_input_projection else []
        if self.gate_size:
            parts.append("input_gate")
        if self.joint_norm:
            return (*parts, "input_qkv_projection")
        return (*parts, "input_key_value", *(["input_query"] if self.input_rows_live else []))

    # -- work per step ------------------------------------------------------------------------------------------

    def flops_per_step(self, batch_size: int = 1, *, part: Literal["all", "recurrent", "hoisted"] = "all") -> int:
        """Floating-point operations of one forward step: the matrix products and attention, two per multiply-add.

        Args:
            batch_size: batch elements `B`.
            part: "hoisted" counts what `hoistable()` names, "recurrent" what is left, "all" both. Rows whose result
                is never used are not counted. The backward pass costs twice this, or three times with recomputation.
        """
        width, features, gates, n = self.mem_size, self.qkv_size, 2 * self.gate_size, self.rows
        key_value = features if self.input_rows_live else self.num_heads * (self.key_width + self.head_size)
        hoisted = n * key_value * width + gates * n * width
        hoisted += n * width * self.input_size if self.has_input_projection else 0
        live = self.total_rows if self.input_rows_live else self.mem_slots
        recurrent = self.mem_slots * gates * width
        for block in range(self.num_blocks):
            recurrent += (self.mem_slots if block == 0 else self.total_rows) * features * width
            recurrent += live * self.total_rows * self.num_heads * (self.key_width + self.head_size)
            recurrent += live * width * width * (self.attention_mlp_layers + self.has_output_projection)
        return 2 * batch_size * {"all": hoisted + recurrent, "recurrent": recurrent, "hoisted": hoisted}[part]

    def bytes_per_step(self, batch_size: int = 1, itemsize: int = 4) -> int:
        """Least bytes that one step alone has to move.

        Every parameter and the input are read once, the float32 (or wider) memory is read and written
        once. `itemsize` is that of the parameters and the input, in bytes.
        """
        memory = 2 * batch_size * self.mem_slots * self.mem_size * max(itemsize, 4)
        return memory + itemsize * (self.parameter_count + batch_size * self.rows * self.input_size)

    # -- as text (how a spec travels through registered operators and checkpoints) ------------------------------

    @property
    def as_json(self) -> str:
        """The spec as one line of JSON; `from_json` gives back an equal spec."""
        return self._json

    @staticmethod
    @lru_cache(maxsize=1024)
    def from_json(text: str) -> CellSpec:
        """The spec that `as_json` wrote."""
        return CellSpec(**json.loads(text))
