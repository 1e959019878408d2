"""`RelationalMemory` (a sequence, feels like nn.LSTM) and `RelationalMemoryCell` (one step, like nn.LSTMCell)."""

from __future__ import annotations

import warnings
from numbers import Integral
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from typing_extensions import Self, Unpack

from rmc_kernels import errors
from rmc_kernels.frozen import step_resets
from rmc_kernels.functional import Lengths
from rmc_kernels.module import REQUIRED, MemoryModule, Options, refuse, required
from rmc_kernels.spec import CellSpec, GateStyle


class RelationalMemory(MemoryModule):
    """The Relational Memory Core over a sequence (Santoro et al. 2018, arXiv:1806.01822; Sonnet 1.36).

    `N = mem_slots` slots of `D = num_heads * head_size` units attend to each other and to the input at every step.

    Args:
        input_size: features `I` of the input.
        mem_slots: memory slots `N`.
        head_size: units of one head.
        num_heads: heads `H`. Default: 1.
        num_blocks: attention blocks per step. Default: 1.
        gate_style: "unit" (a gate per unit), "memory" (a gate per slot) or None. Default: "unit".
        attention_mlp_layers: layers of the MLP. Default: 2.
        key_size: key size of one head; None takes head_size.
        forget_bias, input_bias: constants added to the gates. Defaults: 1.0, 0.0.
        input_rows: rows `n` of a matrix input; None for vector input.
        initial_memory: "identity" (the paper's), "zeros", "normal" (N(0, 1/D), drawn once a call) or "learned".
        read_head: "concat" (the paper's), "mean", "weighted" or "attention"; see `ReadHead`.
        batch_first: whether x, output and resets are [B, T, ...] (default) or [T, B, ...].
        backend: "auto", "triton", "cpu" or "reference"; see `explain`.
        recompute: "full" (default) or "none"; see `relational_memory`.
        device, dtype: of the parameters.

    Other variants of the cell: `RelationalMemory.from_spec(CellSpec.l0sg(...))` and so on.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it got.
    """

    def __init__(
        self,
        input_size: int = REQUIRED,
        mem_slots: int = REQUIRED,
        head_size: int = REQUIRED,
        num_heads: int = 1,
        *,
        num_blocks: int = 1,
        gate_style: GateStyle | None = "unit",
        attention_mlp_layers: int = 2,
        key_size: int | None = None,
        forget_bias: float = 1.0,
        input_bias: float = 0.0,
        input_rows: int | None = None,
        batch_first: bool = True,
        **options: Unpack[Options],
    ) -> None:
        spec = _sonnet(
            type(self), options, input_size, mem_slots, head_size, num_heads, num_blocks, forget_bias, input_bias,
            gate_style, attention_mlp_layers, key_size, input_rows,
        )  # fmt: skip
        super().__init__(spec, **options)
        self.batch_first = errors.boolean("batch_first", batch_first)

    @classmethod
    def from_spec(cls, spec: CellSpec, *, batch_first: bool = True, **options: Unpack[Options]) -> Self:
        """A layer of any variant; options as in the constructor."""
        layer = super().from_spec(spec, **options)
        layer.batch_first = errors.boolean("batch_first", batch_first)
        return layer

    def forward(
        self,
        x: Tensor | PackedSequence,
        memory: Tensor | None = None,
        *,
        lengths: Lengths | None = None,
        resets: Tensor | None = None,
        return_attention: bool = False,
    ) -> Any:
        """Run the sequence.

        Args:
            x: [B, T, I], or [B, T, n, I] in matrix mode; unbatched [T, I] or [T, n, I]; T first if not `batch_first`.
                A PackedSequence gives a PackedSequence back and brings its own lengths.
            memory: [B, N, D] (unbatched: [1, N, D]), or None for `initial_memory`.
            lengths: [B] integers from 0 to T: a tensor, a list or an array. Past its length an element's output is 0
                and its memory frozen.
            resets: bool [B, T] ([T, B] if not `batch_first`; unbatched [T]); before such a step the element's memory
                is replaced by `initial_memory`.
            return_attention: also return the attention weights; runs on the reference whatever the backend.

        Returns:
            output: [B, T, output_size], laid out as x, in x's dtype (the autocast dtype under autocast).
            memory: [B, N, D], the memory at each element's last step, float32 for half types.
            attention: with `return_attention`, [B, T, num_blocks, H, N, S]: how much each slot looks at each of the
                `S` rows (slots, then input rows), before dropout; [T, B, ...] if not `batch_first`.

        Raises:
            TypeError, ValueError: before anything is computed, naming the argument, what it must be and what it got.
        """
        errors.boolean("return_attention", return_attention)
        if isinstance(x, PackedSequence):
            return self._forward_packed(x, memory, lengths, resets, return_attention)
        extra = self._leading_axes(x, "B, T" if self.batch_first else "T, B")
        if extra == 1:
            return self._forward_unbatched(x, memory, lengths, resets, return_attention)
        if not self.batch_first:
            x = x.transpose(0, 1)
            resets = _transposed_resets(resets, x)
        output, final, weights = self._unroll(x, memory, lengths, resets, return_attention)
        if not self.batch_first:
            output = output.transpose(0, 1)
            weights = None if weights is None else weights.transpose(0, 1)
        return (output, final) if weights is None else (output, final, weights)

    def extra_repr(self) -> str:
        """The cell's sizes and the options that differ from the defaults."""
        return super().extra_repr() + ("" if self.batch_first else ", batch_first=False")

    def _forward_unbatched(
        self, x: Tensor, memory: Tensor | None, lengths: Lengths | None, resets: Tensor | None, attention: bool
    ) -> Any:
        if isinstance(lengths, Tensor) and lengths.dim() == 0:
            lengths = lengths[None]
        elif isinstance(lengths, Integral):
            lengths = [lengths]
        if resets is not None:
            if errors.is_tensor("resets", resets, "a bool tensor [T]").shape != x.shape[:1]:
                raise ValueError(f"resets must be [T] = {list(x.shape[:1])}, got {list(resets.shape)}")
            resets = resets[None]
        output, final, weights = self._unroll(x[None], memory, lengths, resets, attention)
        return (output[0], final) if weights is None else (output[0], final, weights[0])

    def _forward_packed(
        self,
        x: PackedSequence,
        memory: Tensor | None,
        lengths: Lengths | None,
        resets: Tensor | None,
        attention: bool,
    ) -> Any:
        if lengths is not None:
            raise ValueError("lengths must be None where x is a PackedSequence, which brings its own")
        if x.data.shape[1:] != self.spec.input_shape:
            sizes, got = list(self.spec.input_shape), list(x.data.shape[1:])
            raise ValueError(f"x must be a PackedSequence of rows {sizes}, got rows {got}")
        padded, own = pad_packed_sequence(x, batch_first=True)
        resets = resets if self.batch_first else _transposed_resets(resets, padded)
        output, final, weights = self._unroll(padded, memory, own, resets, attention)
        if x.sorted_indices is not None:
            output = output.index_select(0, x.sorted_indices)
            own = own.index_select(0, x.sorted_indices.cpu())
        data = pack_padded_sequence(output, own, batch_first=True).data
        packed = PackedSequence(data, x.batch_sizes, x.sorted_indices, x.unsorted_indices)
        if weights is None:
            return packed, final
        return packed, final, weights if self.batch_first else weights.transpose(0, 1)


class RelationalMemoryCell(MemoryModule):
    """One step of the Relational Memory Core: `output, memory = cell(x, memory)`.

    Takes the arguments of `RelationalMemory` but `batch_first`, and has the same parameters, so that the weights of
    one load into the other.
    """

    def __init__(
        self,
        input_size: int = REQUIRED,
        mem_slots: int = REQUIRED,
        head_size: int = REQUIRED,
        num_heads: int = 1,
        *,
        num_blocks: int = 1,
        gate_style: GateStyle | None = "unit",
        attention_mlp_layers: int = 2,
        key_size: int | None = None,
        forget_bias: float = 1.0,
        input_bias: float = 0.0,
        input_rows: int | None = None,
        **options: Unpack[Options],
    ) -> None:
        spec = _sonnet(
            type(self), options, input_size, mem_slots, head_size, num_heads, num_blocks, forget_bias, input_bias,
            gate_style, attention_mlp_layers, key_size, input_rows,
        )  # fmt: skip
        super().__init__(spec, **options)

    def forward(
        self, x: Tensor, memory: Tensor | None = None, *, resets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            x: [B, I], or [B, n, I] in matrix mode; unbatched [I] or [n, I].
            memory: [B, N, D] (unbatched: [1, N, D]), or None for `initial_memory`.
            resets: bool [B] (unbatched: []), or None; where it is true, the element's memory is replaced by
                `initial_memory` before the step.

        Returns:
            output: [B, output_size] (unbatched: [output_size]), in x's dtype (the autocast dtype under autocast).
            memory: [B, N, D], float32 for half types.

        Raises:
            TypeError, ValueError: before anything is computed, naming the argument, what it must be and what it got.
        """
        extra = self._leading_axes(x, "B")
        rows = x if extra else x[None]
        if resets is not None:
            resets = step_resets(resets, x.shape[:extra]).reshape(len(rows), 1)
        output, final, _ = self._unroll(rows.unsqueeze(1), memory, None, resets, attention=False)
        output = output.squeeze(1)  # not output[:, 0], whose backward pass fills a tensor with zeros first
        return output if extra else output[0], final


def _sonnet(
    cls: type,
    options: Options,
    input_size: int,
    mem_slots: int,
    head_size: int,
    *sizes: Any,
) -> CellSpec:
    """The published cell, after a look at what a newcomer from nn.LSTM gets wrong."""
    refuse(cls, [name for name in options if name not in Options.__annotations__])
    required(cls, input_size=input_size, mem_slots=mem_slots, head_size=head_size)
    spec = CellSpec.sonnet(input_size, mem_slots, head_size, *sizes)
    if spec.num_heads == 1 and spec.head_size <= 4 and spec.mem_slots >= 8 * spec.head_size:
        warnings.warn(
            f"{cls.__name__} has mem_slots={spec.mem_slots} slots of head_size={spec.head_size} units; "
            "these are not the hidden_size and num_layers of nn.LSTM",
            stacklevel=3,
        )
    return spec


def _transposed_resets(resets: Tensor | None, x: Tensor) -> Tensor | None:
    """Resets [T, B] as [B, T], for x [B, T, ...]; their shape is checked in the order that the caller knows."""
    if resets is None:
        return None
    shape = (x.shape[1], x.shape[0])
    if errors.is_tensor("resets", resets, "a bool tensor [T, B]").shape != shape:
        raise ValueError(f"resets must be [T, B] = {list(shape)}, got {list(resets.shape)}")
    return resets.t()
