"""`RelationalMemory` (a sequence, feels like nn.LSTM) and `RelationalMemoryCell` (one step, like nn.LSTMCell)."""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from rmc_kernels import errors
from rmc_kernels.functional import Lengths
from rmc_kernels.module import REQUIRED, MemoryModule
from rmc_kernels.spec import CellSpec, GateStyle

if TYPE_CHECKING:
    from typing_extensions import Self


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
        initial_memory: str = "identity",
        read_head: str = "concat",
        batch_first: bool = True,
        backend: str = "auto",
        recompute: str = "full",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__(
            input_size, mem_slots, head_size, num_heads, num_blocks=num_blocks, gate_style=gate_style,
            attention_mlp_layers=attention_mlp_layers, key_size=key_size, forget_bias=forget_bias,
            input_bias=input_bias, input_rows=input_rows, initial_memory=initial_memory, read_head=read_head,
            backend=backend, recompute=recompute, device=device, dtype=dtype, **unknown,
        )  # fmt: skip
        self.batch_first = errors.boolean("batch_first", batch_first)

    @classmethod
    def from_spec(
        cls,
        spec: CellSpec,
        *,
        initial_memory: str = "identity",
        read_head: str = "concat",
        batch_first: bool = True,
        backend: str = "auto",
        recompute: str = "full",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown: Any,
    ) -> Self:
        """A layer of any variant; arguments as in the constructor."""
        layer = super().from_spec(
            spec, initial_memory=initial_memory, read_head=read_head, backend=backend, recompute=recompute,
            device=device, dtype=dtype, **unknown,
        )  # fmt: skip
        layer.batch_first = errors.boolean("batch_first", batch_first)
        return layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's. A call that may take the short way does not pay for that, nor for `forward`."""
        bound = None if is_dynamo_compiling() else self._bound
        if bound is not None and bound.direct and len(args) == 2 and not kwargs and self.batch_first:
            x, memory = args
            found = bound.step(self, x, memory, True)
            if found is not None:
                return found
        return super().__call__(*args, **kwargs)

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
            memory: [B, N, D], the memory at each element's last step, float32 for half types. Without gradients the
                storage of either may be one that cannot be resized.
            attention: with `return_attention`, [B, T, num_blocks, H, N, S]: how much each slot looks at each of the
                `S` rows (slots, then input rows), before dropout; [T, B, ...] if not `batch_first`.

        Raises:
            TypeError, ValueError: before anything is computed, naming the argument, what it must be and what it got.
        """
        errors.boolean("return_attention", return_attention)
        if isinstance(x, PackedSequence):
            return self._forward_packed(x, memory, lengths, resets, return_attention)
        if memory is not None and lengths is None and resets is None and self.batch_first and not return_attention:
            found = self._inference(x, memory, sequence=True)
            if found is not None:
                return found
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

    _called = forward

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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's. A step that may take the short way does not pay for that, nor for `forward`: 2.5 us of 12."""
        bound = None if is_dynamo_compiling() else self._bound
        if bound is not None and bound.direct and len(args) == 2 and not kwargs:
            x, memory = args
            found = bound.step(self, x, memory, False)
            if found is not None:
                return found
        return super().__call__(*args, **kwargs)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            x: [B, I], or [B, n, I] in matrix mode; unbatched [I] or [n, I].
            memory: [B, N, D] (unbatched: [1, N, D]), or None for `initial_memory`.

        Returns:
            output: [B, output_size] (unbatched: [output_size]), in x's dtype (the autocast dtype under autocast).
            memory: [B, N, D], float32 for half types. Without gradients the storage of either may be one that cannot
                be resized.

        Raises:
            TypeError, ValueError: before anything is computed, naming the argument, what it must be and what it got.
        """
        found = None if memory is None else self._inference(x, memory, sequence=False)
        if found is not None:
            return found
        extra = self._leading_axes(x, "B")
        rows = x if extra else x[None]
        output, final, _ = self._unroll(rows[:, None], memory, None, None, attention=False)
        return output[:, 0] if extra else output[0, 0], final

    _called = forward


def _transposed_resets(resets: Tensor | None, x: Tensor) -> Tensor | None:
    """Resets [T, B] as [B, T], for x [B, T, ...]; their shape is checked in the order that the caller knows."""
    if resets is None:
        return None
    shape = (x.shape[1], x.shape[0])
    if errors.is_tensor("resets", resets, "a bool tensor [T, B]").shape != shape:
        raise ValueError(f"resets must be [T, B] = {list(shape)}, got {list(resets.shape)}")
    return resets.t()
