"""What the layer and the cell share: parameters, initial memory, read head, choice of backend."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from typing_extensions import Self, Unpack

from rmc_kernels import backends, errors, initial
from rmc_kernels.backends.reference import unroll
from rmc_kernels.frozen import FrozenCell
from rmc_kernels.functional import (
    RECOMPUTE,
    Lengths,
    attention_dropout,
    is_input,
    memory_dtype,
    not_input,
    prepare,
    run,
)
from rmc_kernels.leaf import LeafModule
from rmc_kernels.read_heads import ReadHead
from rmc_kernels.spec import CellSpec

#: Arguments of nn.LSTM and its like that an RMC does not have, with what to do instead.
_INSTEAD = {
    "num_layers": "stack several layers: the output of one is the input of the next; num_blocks attends repeatedly "
    "within one step",
    "bidirectional": "run a second layer over the sequence reversed in time and concatenate the outputs",
    "hidden_size": "the memory has mem_slots slots of num_heads * head_size units",
    "proj_size": "put a Linear behind the layer, or choose another read_head",
    "dropout": "put nn.Dropout around the layer; attention dropout belongs to CellSpec.r2gen",
    "bias": "every Linear of the cell has a bias",
    "nonlinearity": "the cell's nonlinearities are part of its definition",
    "batch_first": "a cell takes one step, [B, I]",
}


class _Required:
    """The default of an argument that must be given: left to Python, its message would come before ours."""

    def __repr__(self) -> str:
        return "<required>"


REQUIRED: Any = _Required()


class _Weights(nn.Module):
    """A node of the parameter tree: holds parameters and nodes, computes nothing."""

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={tuple(value.shape)}" for name, value in self.named_parameters(recurse=False))


class Options(TypedDict, total=False):
    """What a layer and a cell take besides the spec; see `RelationalMemory`."""

    initial_memory: str
    read_head: str
    backend: str
    recompute: str
    device: torch.device | str | None
    dtype: torch.dtype | None


class MemoryModule(LeafModule):
    """What the layer and the cell share: parameters, initial memory, read head, choice of backend."""

    spec: CellSpec

    def __init__(
        self,
        spec: CellSpec,
        *,
        initial_memory: str = "identity",
        read_head: str = "concat",
        backend: str = "auto",
        recompute: str = "full",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        refuse(type(self), unknown)
        if not isinstance(spec, CellSpec):
            raise TypeError(f"spec must be a CellSpec, got {errors.describe(spec)}")
        errors.one_of("initial_memory", initial_memory, initial.MEMORY_MODES)
        errors.one_of("backend", backend, backends.CHOICES)
        errors.one_of("recompute", recompute, RECOMPUTE)
        if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating-point torch.dtype or None, got {errors.describe(dtype)}")
        self.spec, self.backend, self.recompute = spec, backend, recompute
        self.initial_memory_mode = initial_memory
        self._owners: dict[tuple[str, ...], list[str]] = {}  # path of a module -> its parameters, in the spec's order
        for name, shape in spec.parameter_shapes.items():
            *path, leaf = name.split(".")
            self._owners.setdefault(tuple(path), []).append(leaf)
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, _Weights())
                owner = owner.get_submodule(part)
            owner.register_parameter(leaf, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        shape = (spec.mem_slots, spec.mem_size)
        learned = torch.empty(shape, device=device, dtype=dtype) if initial_memory == "learned" else None
        self.learned_memory = None if learned is None else nn.Parameter(learned)
        self.read_head = ReadHead(read_head, *shape, device=device, dtype=dtype)
        self.reset_parameters()

    @classmethod
    def from_spec(cls, spec: CellSpec, **options: Unpack[Options]) -> Self:
        """A layer or cell of any variant; options as in the constructor."""
        made = cls.__new__(cls)
        MemoryModule.__init__(made, spec, **options)
        return made

    def reset_parameters(self) -> None:
        """Draw every parameter again, as at construction; a learned memory starts as the identity."""
        with torch.no_grad():
            for name, value in zip(self.spec.parameter_names, self._ordered_parameters(), strict=True):
                initial.parameter_(name, value, self.spec)
            if self.learned_memory is not None:
                learned = self.learned_memory
                learned.copy_(initial.memory("identity", self.spec, 1, learned.device, learned.dtype)[0])
        self.read_head.reset_parameters()

    def initial_memory(self, batch_size: int) -> Tensor:
        """The memory a sequence starts from and a reset loads: [batch_size, N, D], float32 for half-type parameters.

        "learned" gives the learned memory, with gradient; "normal" draws anew at every call.
        """
        return self._initial_memory(errors.positive_int("batch_size", batch_size, minimum=0))

    def _initial_memory(self, batch_size: int) -> Tensor:
        """As `initial_memory`; under compile the batch size is symbolic."""
        path, (leaf, *_) = next(iter(self._owners.items()))
        like: Tensor = getattr(self._owner(path), leaf)
        dtype = memory_dtype(like.dtype)
        if self.learned_memory is not None:
            return self.learned_memory.to(dtype).expand(batch_size, -1, -1)
        return initial.memory(self.initial_memory_mode, self.spec, batch_size, like.device, dtype)

    @property
    def input_size(self) -> int:
        """Features `I` of the input."""
        return self.spec.input_size

    @property
    def hidden_size(self) -> int:
        """Units of one element's memory, `N * D`: what nn.LSTM calls so. `output_size` is that of the output."""
        return self.spec.mem_slots * self.spec.mem_size

    @property
    def output_size(self) -> int:
        """Features of one step's output: `hidden_size`, or `D` with another read head than "concat"."""
        return self.read_head.output_size

    def flatten_parameters(self) -> None:
        """Does nothing: nn.LSTM's call, for code that makes it. Backends pack weights themselves."""

    @contextmanager
    def frozen_weights(self) -> Iterator[FrozenCell]:
        """Pack the weights once, for a loop that acts.

            with layer.frozen_weights() as frozen:
                output, memory = frozen.step(x_t, memory, resets=done)

        A call of the layer inside the block uses the packed weights too, and is otherwise an ordinary call. Parameters
        must not change meanwhile: torch's version counter tells writes apart, but not those of a fused optimizer,
        through `.data`, or to parameters that were made under `torch.inference_mode`. Calls under autocast, by the
        reference and of parametrized weights read the parameters as they are.

        Raises:
            RuntimeError: a parameter was changed inside the block: when the block is left, unless another exception
                leaves it, or at the next call of the layer.
        """
        with torch.no_grad():
            params = self._ordered_parameters()
        with backends.frozen_weights(params, watched=tuple(self.parameters())) as block:
            frozen = FrozenCell(
                self.spec, params, block, self.backend,
                initial_memory=self._initial_memory, redraws=self.initial_memory_mode == "normal",
                read_head=self.read_head,
            )  # fmt: skip
            try:
                yield frozen
            finally:
                frozen.close()
            block.check()

    def extra_repr(self) -> str:
        """The cell's sizes and the options that differ from the defaults."""
        spec = self.spec
        shown = [f"{spec.variant!r}"] + [f"{name}={getattr(spec, name)}" for name in ("input_size", "mem_slots")]
        shown += [f"head_size={spec.head_size}", f"num_heads={spec.num_heads}"]
        default = {"num_blocks": 1, "gate_style": "unit", "attention_mlp_layers": 2, "input_rows": None}
        shown += [f"{name}={getattr(spec, name)!r}" for name, value in default.items() if getattr(spec, name) != value]
        if spec.key_width != spec.head_size:
            shown.append(f"key_size={spec.key_size}")
        if self.recompute != RECOMPUTE[0]:
            shown.append(f"recompute={self.recompute!r}")
        return ", ".join([*shown, f"initial_memory={self.initial_memory_mode!r}", f"backend={self.backend!r}"])

    def _ordered_parameters(self) -> tuple[Tensor, ...]:
        """The parameters in the spec's order, looked up at every call: a module below may be replaced or tied."""
        found: list[Tensor] = []
        compiling = torch.compiler.is_compiling()
        for path, leaves in self._owners.items():
            owner: Any = self
            for part in path:
                owner = owner._modules[part]
            held = {} if compiling else owner._parameters
            for leaf in leaves:
                value = held.get(leaf)  # nn.Module.__getattr__ takes 1 us
                found.append(weight(owner, leaf) if value is None else value)
        return tuple(found)

    def _owner(self, path: tuple[str, ...]) -> nn.Module:
        node: Any = self
        for part in path:
            node = node._modules[part]
        return node  # type: ignore[no-any-return]

    def _leading_axes(self, x: Tensor, axes: str) -> int:
        """How many axes stand before one step's input: all of `axes`, or one fewer where x is unbatched."""
        sizes = self.spec.input_shape
        if not is_input(x):
            raise not_input(x, self._input_layout(axes))
        extra, most = x.dim() - len(sizes), axes.count(",") + 1
        if extra not in (most - 1, most) or x.shape[extra:] != sizes:
            raise ValueError(f"x must be {self._input_layout(axes)}, got {list(x.shape)}")
        return extra

    def _input_layout(self, axes: str) -> str:
        """The shapes of a batched and an unbatched x."""
        sizes = ", ".join(map(str, self.spec.input_shape))
        without = ", ".join(axis for axis in axes.split(", ") if axis != "B")
        return f"[{axes}, {sizes}] or [{without + ', ' if without else ''}{sizes}]"

    def _unroll(
        self, x: Tensor, memory: Tensor | None, lengths: Lengths | None, resets: Tensor | None, attention: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Output [B, T, ...], final memory, attention; x is [B, T, ...], its shape checked."""
        spec, params = self.spec, self._ordered_parameters()
        start = self._initial_memory(x.shape[0]) if memory is None or resets is not None else None
        first = start if memory is None else memory
        assert first is not None
        call, context = prepare(spec, x, first, params, lengths, resets, None if resets is None else start)
        if self.training and spec.dropout:
            call = replace(call, dropout_mask=attention_dropout(call.x, spec, spec.dropout))
        weights = None
        with context:
            if attention:
                memories, weights = unroll(spec, call)
                final = backends.last_memory(memories) if call.steps else call.memory
            else:
                memories, final = run(spec, call, self.backend, self.recompute)
        output: Tensor = self.read_head(memories)
        if output.dtype is not call.x.dtype:
            output = output.to(call.x.dtype)
        if call.lengths is not None:
            past = torch.arange(call.steps, device=call.device) >= call.lengths[:, None]
            output = output.masked_fill(past[..., None], 0)
        return output, final, weights


def weight(owner: nn.Module, leaf: str) -> Tensor:
    """A weight of a module whose own forward is never called.

    Pruning and the older norms of torch.nn.utils recompute it in a hook before that forward, so their hooks run here.
    """
    if leaf not in owner._parameters and not is_parametrized(owner, leaf):
        for hook in owner._forward_pre_hooks.values():
            hook(owner, ())
    value: Tensor = getattr(owner, leaf)
    return value


def refuse(cls: type, unknown: Iterable[str]) -> None:
    """Raises TypeError for arguments that there are not, with what to do instead of nn.LSTM's."""
    found = [f"{name!r}" + (f" ({_INSTEAD[name]})" if name in _INSTEAD else "") for name in unknown]
    if found:
        raise TypeError(f"{cls.__name__} has no argument {'; nor '.join(found)}")


def required(cls: type, **given: Any) -> None:
    """Raises TypeError for arguments that were left out: a newcomer's `(input_size, hidden_size)` lacks head_size."""
    missing = [name for name, value in given.items() if value is REQUIRED]
    if missing:
        raise TypeError(
            f"{cls.__name__} requires {', '.join(missing)}: {_INSTEAD['hidden_size']}, in place of the hidden_size "
            f"of nn.LSTM; write {cls.__name__}(input_size, mem_slots=4, head_size=16, num_heads=2)"
        )
