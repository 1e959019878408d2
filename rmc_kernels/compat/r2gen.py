"""R2Gen: its `RelationalMemory` as a drop-in, and its state_dicts in and out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from rmc_kernels import errors
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
    weights,
)
from rmc_kernels.functional import attention_dropout
from rmc_kernels.spec import CellSpec

if TYPE_CHECKING:
    from typing_extensions import Self


class MultiHeadedAttention(nn.Module):
    """R2Gen's attention: of `query` over `key` and `value`, with dropout on the weights.

    Args:
        h: heads.
        d_model: features; a multiple of h.
        dropout: probability of dropping an attention weight in training.

    Attributes:
        linears: the projections of query, key, value and output, which start as copies of one another.
        attn: the attention weights [B, h, Q, S] of the last call in eager mode, after dropout. They are not copied, nor
            pickled, and the sequence kernel leaves None.
    """

    def __init__(self, h: int, d_model: int, dropout: float = 0.1) -> None:
        super().__init__()
        if d_model % h:
            raise ValueError(f"d_model must be a multiple of h ({h}), got {d_model}")
        self.h, self.d_k = h, d_model // h
        projection = nn.Linear(d_model, d_model)
        self.linears = nn.ModuleList([copy.deepcopy(projection) for _ in range(4)])
        self.attn: Tensor | None = None
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Query [B, Q, D], key and value [B, S, D], mask [B, Q or 1, S], 0 where nothing is to be seen: [B, Q, D]."""
        q, k, v = (
            linear(rows).unflatten(-1, (self.h, self.d_k)).transpose(1, 2)
            for linear, rows in zip(self.linears, (query, key, value), strict=False)
        )
        scores = q @ k.transpose(-1, -2) / self.d_k**0.5
        if mask is not None:
            scores = scores.masked_fill(mask.unsqueeze(1) == 0, max(-1e9, torch.finfo(scores.dtype).min))
        weights = self.dropout(torch.softmax(scores, dim=-1))
        if not torch.compiler.is_compiling():  # an exported program has no place for it
            self.attn = weights
        output: Tensor = self.linears[-1]((weights @ v).transpose(1, 2).flatten(2))
        return output

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "attn": None}  # torch copies no tensor with a history


#: Its name in pickles of the first versions, where it held modules only.
_Attention = MultiHeadedAttention


class RelationalMemory(Port):
    """R2Gen's `modules.encoder_decoder.RelationalMemory`, on the fused backends.

    Same constructor, methods, shapes and state_dict as zhjohnchan/R2Gen and the repositories that copied it; a
    checkpoint loads with `strict=True`, an optimizer's too, since parameters have the original's order. A whole model
    that was saved by `torch.save(model)` loads once the import is changed.

    Kept from the original:
        * `forward` returns the outputs alone, [B, T, N * D]; the last of them is the memory to go on with, and a memory
          may come as [B, N * D] or [B, N, D]. Nothing is detached.
        * dropout of 0.1 on the attention weights while training, through the module `attn.dropout`.
        * the four projections `attn.linears` start as copies of one another; R2Gen itself draws them again
          (`xavier_uniform_` over every matrix of its model).

    Not kept: `init_memory` is made on the parameters' device; `attn.attn` holds attention weights only while the class
    runs step by step.

    While the modules are the constructor's, one kernel runs the sequence from their weights. Where one was replaced or
    wrapped (LoRA, another activation, another attention) or has a hook, or a subclass overrides `forward_step`, the
    class runs step by step, calls the modules, and warns once.

    Args:
        num_slots: memory slots `N`.
        d_model: features of the input and of a slot, `D`; a multiple of num_heads.
        num_heads: heads. Default: 1.
        backend: "auto", "triton", "cpu" or "reference"; see `explain`.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it got.

    Example:
        >>> rm = RelationalMemory(num_slots=3, d_model=16, num_heads=4).eval()
        >>> rm(torch.randn(2, 5, 16), rm.init_memory(2)).shape
        torch.Size([2, 5, 48])
    """

    num_slots: int
    d_model: int
    num_heads: int
    attn: MultiHeadedAttention

    def __init__(self, num_slots: int, d_model: int, num_heads: int = 1, *, backend: str = "auto") -> None:
        super().__init__(CellSpec.r2gen(num_slots, d_model, num_heads), backend)
        self.attn = MultiHeadedAttention(num_heads, d_model, self.spec.dropout)
        self.mlp = nn.Sequential(nn.Linear(d_model, d_model), nn.ReLU(), nn.Linear(d_model, d_model), nn.ReLU())
        self.W = nn.Linear(d_model, 2 * d_model)
        self.U = nn.Linear(d_model, 2 * d_model)

    def forward(self, inputs: Tensor, memory: Tensor) -> Tensor:
        """Run the sequence.

        Args:
            inputs: [B, T, D], in the dtype of the parameters.
            memory: [B, N * D] or [B, N, D].

        Returns:
            The memory after every step, [B, T, N * D].

        Raises:
            TypeError, ValueError: naming the argument, what it must be and what it got; quantised modules, and
                parameters of another shape than the constructor's.
        """
        if self._is_stock(self._METHODS):
            return self._run_steps(self._checked_rows("inputs", inputs, 2, self.spec.input_size), memory)
        outputs = []
        if self._overrides("forward_step"):  # which may take other inputs and memories
            memory = narrowed(memory, errors.is_tensor("inputs", inputs, "a tensor [B, T, ...]"))
            for t in range(inputs.shape[1]):
                memory = self.forward_step(inputs[:, t], memory)
                outputs.append(memory)
        else:
            inputs = self._checked_rows("inputs", inputs, 2, self.spec.input_size)
            memory = self._checked_memory(self._unflattened(memory), inputs)
            for t in range(inputs.shape[1]):
                memory = self._step_by_modules(inputs[:, t], memory)
                outputs.append(in_computed_dtype(memory.flatten(1), inputs))
        if not outputs:
            return inputs.new_empty(inputs.shape[0], 0, self.num_slots * self.d_model)
        return torch.stack(outputs, 1)

    def forward_step(self, input: Tensor, memory: Tensor) -> Tensor:
        """One step: input [B, D] and memory, [B, N * D] or [B, N, D], give the next memory, [B, N * D]."""
        row = self._checked_rows("input", input, 1, self.spec.input_size)
        if self._is_stock({}):
            return self._run_steps(row[:, None], memory)[:, 0]
        following = self._step_by_modules(row, self._checked_memory(self._unflattened(memory), row))
        return in_computed_dtype(following.flatten(1), row)

    _METHODS: ClassVar[Mapping[str, Callable[..., Any]]] = {"forward_step": forward_step}
    _FORWARDS = forwards(nn.Linear, nn.ReLU, nn.Dropout, nn.Sequential, MultiHeadedAttention)
    _CONTENTS = frozenset({"attn", "mlp", "W", "U"})

    def init_memory(self, batch_size: int) -> Tensor:
        """The identity, padded or cut to D columns: [B, N, D]."""
        return self._identity(batch_size)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See `Port`; in the first versions `attn` had no sizes of its own."""
        super().__setstate__(state)
        if type(self.attn) is MultiHeadedAttention:
            for name, value in (("h", self.num_heads), ("d_k", self.spec.head_size), ("attn", None)):
                self.attn.__dict__.setdefault(name, value)

    def _run_steps(self, x: Tensor, memory: Tensor) -> Tensor:
        """The memory after every step, [B, T, N * D], by a backend."""
        attention = self.attn
        if attention.attn is not None:
            attention.attn = None  # of an earlier call
        dropout = attention.dropout
        mask = attention_dropout(x, self.spec, dropout.p) if dropout.training and dropout.p else None
        return self._run_kernel(x, self._unflattened(memory), mask)[0]

    def _step_by_modules(self, x: Tensor, memory: Tensor) -> Tensor:
        """One step by the modules: x [B, D] and memory [B, N, D] give the next memory, in the dtype of `memory`."""
        slots = memory.to(x.dtype)  # the modules' dtype
        rows = torch.cat([slots, x[:, None]], 1)
        following = slots + self.attn(slots, rows, rows)
        following = (following + self.mlp(following)).to(memory.dtype)
        gates = torch.sigmoid(self.W(x[:, None]) + self.U(torch.tanh(slots)))
        input_gate, forget_gate = gates.split(self.d_model, dim=2)  # the input gate comes first
        carried: Tensor = input_gate * torch.tanh(following) + forget_gate * memory
        return carried

    def _unflattened(self, memory: Tensor) -> Tensor:
        """A memory as [B, N, D]."""
        memory = errors.is_tensor("memory", memory, "a tensor [B, N * D] or [B, N, D]")
        slots, width = self.spec.mem_slots, self.spec.mem_size
        return memory.unflatten(1, (slots, width)) if memory.shape[1:] == (slots * width,) else memory

    @classmethod
    def _spec_of(cls, core: nn.Module) -> CellSpec:
        """See `Port`."""
        dropout = _dropout(core)
        return CellSpec.r2gen(
            num_slots=attribute(core, "num_slots"),
            d_model=attribute(core, "d_model", lambda: attribute(core, "W").weight.shape[1]),
            num_heads=attribute(core, "num_heads", lambda: attribute(attribute(core, "attn"), "h")),
            dropout=dropout if dropout < 1 else 0.0,  # the module's own probability counts
        )

    @classmethod
    def _made_like(cls, core: nn.Module, backend: str) -> Self:
        """See `Port`."""
        spec = cls._spec_of(core)
        made = cls(spec.mem_slots, spec.mem_size, spec.num_heads, backend=backend)
        made.spec, made.attn.dropout.p = spec, _dropout(core)
        return made

    @classmethod
    def _original_sizes(cls, spec: CellSpec) -> dict[str, Any]:
        """See `Port`."""
        return {"num_slots": spec.mem_slots, "d_model": spec.mem_size, "num_heads": spec.num_heads}

    def _stock_parts(self) -> Sequence[Part]:
        """See `Port`."""
        return _PARTS

    def _changed_sizes(self) -> list[str]:
        """See `Port`."""
        spec, found = self.spec, []
        if (self.num_slots, self.d_model) != (spec.mem_slots, spec.mem_size):
            raise ValueError(
                f"(num_slots, d_model) must stay {(spec.mem_slots, spec.mem_size)}, as when the class was made, got "
                f"{(self.num_slots, self.d_model)}: make a new one, and load the state_dict of this one"
            )
        attention, mlp = children(self).get("attn"), children(self).get("mlp")
        if type(attention) is MultiHeadedAttention:
            if (attention.h, attention.d_k) != (spec.num_heads, spec.head_size):
                found.append(
                    f"attn has {attention.h} heads of {attention.d_k}, not {spec.num_heads} of {spec.head_size}"
                )
            linears = children(attention).get("linears")
            if type(linears) is nn.ModuleList and len(children(linears)) != 4:
                found.append(f"attn.linears holds {len(linears)} modules, not 4")
        if type(mlp) is nn.Sequential and len(children(mlp)) != 4:
            found.append(f"mlp holds {len(mlp)} modules, not 4")
        return found

    def _spec_parameters(self) -> dict[str, Tensor]:
        """See `Port`."""
        held: dict[str, Any] = children(self)
        linears: dict[str, Any] = children(children(held["attn"])["linears"])  # type: ignore[arg-type]
        mlp: dict[str, Any] = children(held["mlp"])
        found = weights(
            {
                "blocks.0.output": linears["3"],
                "mlp.0": mlp["0"],
                "mlp.1": mlp["2"],
                "input_gate": held["W"],
                "memory_gate": held["U"],
            }
        )
        projections = weights({which: linears[which] for which in "012"})
        heads = (self.spec.num_heads, self.spec.head_size)
        for leaf in LEAVES:  # the joint projection is head-major, and inside a head q, k, v
            parts = [projections[f"{which}.{leaf}"].unflatten(0, heads) for which in "012"]
            found[f"blocks.0.qkv.{leaf}"] = torch.stack(parts, 1).flatten(0, 2)
        return found


def _dropout(core: nn.Module) -> float:
    """The probability of attention dropout of a module of R2Gen's class; 0 where it has no nn.Dropout there."""
    dropout = getattr(attribute(core, "attn"), "dropout", None)
    return dropout.p if isinstance(dropout, nn.Dropout) else 0.0


_PARTS = (
    part("attn", MultiHeadedAttention),
    part("attn.linears", nn.ModuleList),
    *(part(f"attn.linears.{which}", nn.Linear, "blocks.0.output") for which in range(4)),
    part("attn.dropout", nn.Dropout),
    part("mlp", nn.Sequential),
    part("mlp.0", nn.Linear, "mlp.0"),
    part("mlp.1", nn.ReLU),
    part("mlp.2", nn.Linear, "mlp.1"),
    part("mlp.3", nn.ReLU),
    part("W", nn.Linear, "input_gate"),
    part("U", nn.Linear, "memory_gate"),
)


def from_module(original: nn.Module, *, backend: str = "auto") -> RelationalMemory:
    """A drop-in from a living module of R2Gen's class, or of a class derived from it.

    Both compute the same: they are compared on random inputs and memories, in float64 and evaluation mode. The original
    stays as it is, and the two share nothing. Dtypes, device, training mode, `requires_grad` and the probability of
    dropout are taken over.

    Args:
        original: a module with the attributes and modules of R2Gen's class.
        backend: "auto", "triton", "cpu" or "reference"; see `explain`.

    Raises:
        TypeError, ValueError: `original` lacks something, or computes something else; with the largest difference.

    Warns:
        RuntimeWarning: hooks, modules and parameters of the original that have no place here are left behind.
    """
    return conversion.convert(original, RelationalMemory, backend)


def load_variables(layer: Layer, variables: Mapping[str, Array | Tensor], *, prefix: str = "") -> None:
    """Copy R2Gen's state_dict into a layer of the r2gen variant, in place.

    Args:
        layer: the layer or cell; its dtype and device stay.
        variables: state_dict key (`attn.linears.0.weight`, ..., `mlp.0`, `mlp.2`, `W`, `U`) -> array or tensor.
        prefix: what stands before these keys in `variables`, such as "encoder_decoder.model.rm."; other keys are passed
            over.

    Raises:
        TypeError, ValueError: wrong layer, missing or unknown names, wrong shapes; nothing is written then.
    """
    mapping.load(layer, _entries(mapping.check_layer(layer, "r2gen")), variables, prefix=prefix)


def export_variables(layer: Layer, gradients: bool = False) -> dict[str, Array]:
    """The layer's parameters (or gradients, zeros where there is none) under R2Gen's keys and in its layout."""
    return mapping.export(layer, _entries(mapping.check_layer(layer, "r2gen")), gradients)


def _entries(spec: CellSpec) -> list[Entry]:
    entries = [
        Entry(f"attn.linears.{which}.{leaf}", f"blocks.0.qkv.{leaf}", partial(_projection, spec=spec, which=which))
        for which in range(3)
        for leaf in LEAVES
    ]
    modules = {"attn.linears.3": "blocks.0.output", "mlp.0": "mlp.0", "mlp.2": "mlp.1", "W": "input_gate"}
    modules["U"] = "memory_gate"
    return entries + [
        Entry(f"{theirs}.{leaf}", f"{ours}.{leaf}", mapping.whole)
        for theirs, ours in modules.items()
        for leaf in LEAVES
    ]


def _projection(value: Tensor, spec: CellSpec, which: int) -> Tensor:
    """The rows of the joint projection that are R2Gen's q (0), k (1) or v (2): [H, V, ...], viewed head by head."""
    return value.view(spec.num_heads, 3, spec.head_size, *value.shape[1:])[:, which]
