"""What the layer and the cell share: parameters, initial memory, read head, choice of backend."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.utils.parametrize import is_parametrized

from rmc_kernels import backends, errors, initial
from rmc_kernels.direct import direct
from rmc_kernels.functional import (
    RECOMPUTE,
    Lengths,
    Options,
    attention_dropout,
    compute_dtype,
    is_input,
    lengths_tensor,
    memory_dtype,
    not_input,
    relational_memory,
    with_attention,
)
from rmc_kernels.leaf import LeafModule
from rmc_kernels.read_heads import ReadHead
from rmc_kernels.spec import CellSpec, GateStyle

if TYPE_CHECKING:
    from typing_extensions import Self

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

#: What C++ does in its place, which another `forward` of that class would not be.
_READ = ReadHead.forward


class _Weights(nn.Module):
    """A node of the parameter tree: holds parameters and nodes, computes nothing."""

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={tuple(value.shape)}" for name, value in self.named_parameters(recurse=False))


class MemoryModule(LeafModule):
    """What the layer and the cell share: parameters, initial memory, read head, choice of backend."""

    spec: CellSpec
    _bound: backends.BoundLayer | None = None
    #: The `forward` that `__call__` may leave out.
    _called: Callable[..., Any]

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
        backend: str = "auto",
        recompute: str = "full",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        _refuse(type(self), unknown)
        _require(type(self), input_size=input_size, mem_slots=mem_slots, head_size=head_size)
        spec = CellSpec.sonnet(
            input_size, mem_slots, head_size, num_heads, num_blocks, forget_bias, input_bias, gate_style,
            attention_mlp_layers, key_size, input_rows,
        )  # fmt: skip
        if spec.num_heads == 1 and spec.head_size <= 4 and spec.mem_slots >= 8 * spec.head_size:
            warnings.warn(
                f"{type(self).__name__} has mem_slots={spec.mem_slots} slots of head_size={spec.head_size} units; "
                "these are not the hidden_size and num_layers of nn.LSTM",
                stacklevel=2 if type(self).__init__ is MemoryModule.__init__ else 3,
            )
        self._setup(spec, initial_memory, read_head, backend, recompute, device, dtype)

    @classmethod
    def from_spec(
        cls,
        spec: CellSpec,
        *,
        initial_memory: str = "identity",
        read_head: str = "concat",
        backend: str = "auto",
        recompute: str = "full",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown: Any,
    ) -> Self:
        """A layer or cell of any variant; arguments as in the constructor."""
        _refuse(cls, unknown)
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._setup(spec, initial_memory, read_head, backend, recompute, device, dtype)
        return made

    def _setup(
        self,
        spec: CellSpec,
        initial_memory: str,
        read_head: str,
        backend: str,
        recompute: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        if not isinstance(spec, CellSpec):
            raise TypeError(f"spec must be a CellSpec, got {errors.describe(spec)}")
        errors.one_of("initial_memory", initial_memory, initial.MEMORY_MODES)
        errors.one_of("backend", backend, backends.CHOICES)
        errors.one_of("recompute", recompute, RECOMPUTE)
        if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating-point torch.dtype or None, got {errors.describe(dtype)}")
        self.spec, self.backend, self.recompute = spec, backend, recompute
        self.initial_memory_mode = initial_memory
        self._owners: dict[tuple[str, ...], dict[str, str]] = {}  # path of a module -> leaf -> name of the parameter
        for name, shape in spec.parameter_shapes.items():
            *path, leaf = name.split(".")
            self._owners.setdefault(tuple(path), {})[leaf] = name
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

    def reset_parameters(self) -> None:
        """Draw every parameter again, as at construction; a learned memory starts as the identity."""
        with torch.no_grad():
            for name, value in self._parameters_by_name().items():
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
        path, leaves = next(iter(self._owners.items()))
        like: Tensor = getattr(self._owner(path), next(iter(leaves)))
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
    def frozen_weights(self) -> Iterator[None]:
        """Let a backend keep its packed copy of the weights for all calls inside the block (inference, acting).

        A change to a parameter inside the block raises RuntimeError at the next call that would use that copy, where
        torch's version counter sees it. Not seen are a fused optimizer, a write through `.data`, and any write to
        parameters that were made under `torch.inference_mode`: leave the block before training on. Calls under
        autocast, by the reference and of parametrized weights read the parameters as they are.
        """
        try:
            with backends.frozen_weights(list(self._parameters_by_name().values())):
                yield
        finally:
            self._bound = None  # it holds what was packed

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

    def _parameters_by_name(self) -> dict[str, Tensor]:
        """The parameters by the spec's names, looked up at every call: a module below may be replaced or tied."""
        found: dict[str, Tensor] = {}
        compiling = torch.compiler.is_compiling()
        for path, leaves in self._owners.items():
            owner = self._owner(path)
            held = {} if compiling else owner._parameters
            for leaf, name in leaves.items():
                value = held.get(leaf)  # nn.Module.__getattr__ takes 1 us
                found[name] = weight(owner, leaf) if value is None else value
        return found

    def _owner(self, path: tuple[str, ...]) -> nn.Module:
        node: Any = self
        for part in path:
            node = node._modules[part]
        return node  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_bound"}

    def _inference(self, x: Tensor, memory: Tensor, sequence: bool) -> tuple[Tensor, Tensor] | None:
        """Output and final memory by the bound layer; None where the ordinary way is to be taken."""
        bound = None if is_dynamo_compiling() else self._bound
        if bound is None:
            return None
        found = bound.step(self, x, memory, sequence)
        if found is None:
            self._bound = None  # it keeps parameters alive that may have been replaced
            return None
        memories, final = found
        return memories if bound.flat else self._read(memories, x.dtype), final

    def _read(self, memories: Tensor, dtype: torch.dtype) -> Tensor:
        output: Tensor = self.read_head(memories)
        return output.to(dtype)

    def _bind(self, x: Tensor, memory: Tensor, params: dict[str, Tensor]) -> None:
        """Bind the parameters that served a call, where the next one may take the short way."""
        if self._bound is not None or not backends.is_inference():
            return
        if x.device.type != "cpu" or self.backend == "reference":
            return
        chosen = backends.choose(self.backend, self.spec, x.dtype, x.device)
        if not isinstance(chosen, backends.CpuBackend):
            return
        if self.training and self.spec.dropout:
            return
        found: dict[tuple[int, str], backends.Place] = {}  # by dictionary and key, since paths have parts in common

        def rely_on(dictionary: dict[str, Any], key: str, value: object) -> None:
            found[id(dictionary), key] = (dictionary, key, value)

        rely_on(backends.BACKENDS, "cpu", chosen)
        for name in ("spec", "backend", *["training"] * bool(self.spec.dropout)):
            rely_on(vars(self), name, getattr(self, name))
        for path, leaves in self._owners.items():
            node: Any = self
            for part in path:
                rely_on(vars(node), "_modules", node._modules)
                rely_on(node._modules, part, node._modules[part])
                node = node._modules[part]
            if not leaves.keys() <= node._parameters.keys():
                return
            rely_on(vars(node), "_parameters", node._parameters)
            for leaf, name in leaves.items():
                rely_on(node._parameters, leaf, params[name])
        head: Any = self._modules["read_head"]
        rely_on(self._modules, "read_head", head)
        own = type(self)
        types: list[tuple[object, type]] = []
        attributes: list[backends.Attribute] = []
        concat = type(head) is ReadHead and head.kind == "concat" and ReadHead.forward is _READ
        read = direct(head) if concat else None
        if read:  # C++ does it
            rely_on(vars(head), "kind", head.kind)
            types.append((head, ReadHead))
            attributes += [(ReadHead, "forward", _READ), *read.attributes]
        called = direct(self) if read and own.forward is own._called else None
        if called:
            types.append((self, own))
            attributes.append((own, "forward", own._called))
        both = [part for part in (read, called) if part]
        around = backends.Surroundings(
            owner=self,
            places=(*found.values(), *(place for part in both for place in part.places)),
            types=tuple(types),
            attributes=tuple(attributes),
            empty=tuple({id(hooks): hooks for part in both for hooks in part.empty}.values()),
            flat=read is not None,
            direct=called is not None,
        )
        self._bound = backends.bind(chosen, self.spec, [params[name] for name in self.spec.parameter_names], around)

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
        batch, steps = x.shape[:2]
        lengths = None if lengths is None else lengths_tensor(lengths, steps)
        spec = self.spec
        start = self._initial_memory(batch) if memory is None or resets is not None else None
        mask = attention_dropout(x, spec, spec.dropout) if self.training and spec.dropout else None
        reset_memory = start if resets is not None else None
        options = Options(lengths, resets, reset_memory, mask)
        first = start if memory is None else memory
        assert first is not None
        weights, params = None, self._parameters_by_name()
        if attention:
            memories, final, weights = with_attention(x, first, params, spec, options)
        else:
            memories, final = relational_memory(
                x, first, params, spec, **options._asdict(), backend=self.backend, recompute=self.recompute
            )
            if not torch.compiler.is_compiling():
                self._bind(x, first, params)
        output = self._read(memories, compute_dtype(x))
        if lengths is not None:
            past = torch.arange(steps, device=x.device) >= lengths.to(x.device, non_blocking=True)[:, None]
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


def _refuse(cls: type, unknown: dict[str, Any]) -> None:
    """Raises TypeError for arguments that there are not, with what to do instead of nn.LSTM's."""
    if unknown:
        found = [f"{name!r}" + (f" ({_INSTEAD[name]})" if name in _INSTEAD else "") for name in unknown]
        raise TypeError(f"{cls.__name__} has no argument {'; nor '.join(found)}")


def _require(cls: type, **given: Any) -> None:
    """Raises TypeError for arguments that were left out: a newcomer's `(input_size, hidden_size)` lacks head_size."""
    missing = [name for name, value in given.items() if value is REQUIRED]
    if missing:
        raise TypeError(
            f"{cls.__name__} requires {', '.join(missing)}: {_INSTEAD['hidden_size']}, in place of the hidden_size "
            f"of nn.LSTM; write {cls.__name__}(input_size, mem_slots=4, head_size=16, num_heads=2)"
        )
