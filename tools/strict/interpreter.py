"""A strict interpreter: Triton's own, with what a GPU would punish reported and what it computes wrongly put right.

    with strict(seed=0) as report:
        kernel[grid](...)
    assert not report.hazards

Refused at once: an access outside the tensors of the launch, a product with a dimension below 16, an integer that
overflows, and arithmetic on bfloat16, which the stock interpreter does on bit patterns. Recorded: an element read or
written again by the same program with no barrier since it was written (or written with none since it was read), and an
element that two programs touch, one of them writing. Programs run in random order; masked loads without `other` give
NaN; so does memory of `torch.empty`. Products decode bfloat16 and round to TF32 where asked to; bfloat16 is rounded
to, not cut off.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl
from triton.runtime import interpreter

Addresses = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float32]
LEAST_DIMENSION = 16
_MAY_OVERFLOW = (np.add, np.subtract, np.multiply)
_NARROW = (np.int8, np.int16, np.int32, np.uint8, np.uint16, np.uint32)


class Hazard(NamedTuple):
    """Two accesses of one element that nothing orders: what, in which argument of the kernel, and where it was seen."""

    kind: str
    argument: str
    line: str


class Traffic(NamedTuple):
    """Accesses of one argument of a kernel; `kind` is "load" or "store"."""

    kernel: str
    argument: str
    kind: str


@dataclass
class Report:
    """What happened under `strict`.

    Attributes:
        hazards: how many elements each concerns.
        traffic: bytes of each; an element counts as often as an operation names it.
        barriers: how often each line's barrier was reached; lines are "file:number".
        launches: kernel names, in order.
    """

    hazards: Counter[Hazard] = field(default_factory=Counter)
    traffic: Counter[Traffic] = field(default_factory=Counter)
    barriers: Counter[str] = field(default_factory=Counter)
    launches: list[str] = field(default_factory=list)


@contextmanager
def strict(seed: int = 0, without_barrier: str | None = None) -> Iterator[Report]:
    """Make the interpreter strict.

    Args:
        seed: of the order of programs.
        without_barrier: a line, "file:number", whose barrier does nothing, as if it were not in the source.
    """
    machine = _Machine(seed, without_barrier)
    deterministic = torch.are_deterministic_algorithms_enabled()
    with ExitStack() as stack:
        for owner, name, replacement in machine.replacements():
            stack.enter_context(patch.object(owner, name, replacement))
        stack.enter_context(np.errstate(all="ignore"))
        torch.use_deterministic_algorithms(True, warn_only=True)  # it is what fills torch.empty with NaN
        stack.callback(torch.use_deterministic_algorithms, deterministic)
        yield machine.report


class _Region:
    """One tensor of a launch and who touched each of its elements last: program and barrier epoch, -1 for nobody."""

    def __init__(self, argument: str, tensor: torch.Tensor) -> None:
        if not tensor.is_contiguous():
            raise ValueError(f"{argument}: kernels take contiguous tensors, got strides {tensor.stride()}")
        self.argument = argument
        self.size = tensor.element_size()
        self.start = tensor.data_ptr()
        self.stop = self.start + tensor.numel() * self.size
        self.writer, self.written, self.reader, self.read = np.full((4, tensor.numel()), -1, np.int32)


class _Machine:
    """The state of the interpreter during a launch, and the functions that replace its own."""

    def __init__(self, seed: int, without_barrier: str | None) -> None:
        self.report = Report()
        self._without_barrier = without_barrier
        self._random = np.random.default_rng(seed)
        self._regions: list[_Region] = []
        self._order: npt.NDArray[np.int64] = np.zeros(1, np.int64)
        self._grid = (1, 1, 1)
        self._program = 0
        self._epoch = 0
        self._inside = False
        self._np_dtypes: dict[str, Any] = {}
        self._block_types: dict[tuple[Any, ...], dict[str, Any]] = {}

    def replacements(self) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
        """(owner, name, replacement) of everything that is replaced."""
        builder = interpreter.InterpreterBuilder
        for name in (
            "create_masked_load", "create_masked_store", "create_barrier", "set_grid_dim", "set_grid_idx",
            "create_dot", "binary_op", "unary_op", "cast_impl",
        ):  # fmt: skip
            yield builder, name, self._bound(getattr(self, f"_{name}"), getattr(builder, name))
        executor = interpreter.GridExecutor
        yield executor, "_init_args_hst", self._bound(self._launch, executor._init_args_hst)
        yield interpreter, "_patch_lang", self._bound(self._patch_language, interpreter._patch_lang)
        yield interpreter, "_get_np_dtype", self._bound(self._np_dtype, interpreter._get_np_dtype)
        yield tl.block_type, "__init__", self._block_type(tl.block_type.__init__)
        # Triton's own check of overflows is a dozen operators for each sum; ours is in `_binary_op`.
        yield interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(sanitize_overflow=False)

    @staticmethod
    def _bound(method: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: method(original, *args, **kwargs)

    # -- types, which the stock interpreter makes anew for each operator, a third of its time ------------------------

    def _np_dtype(self, original: Callable[..., Any], kind: Any) -> Any:
        if kind.name not in self._np_dtypes:
            self._np_dtypes[kind.name] = original(kind)
        return self._np_dtypes[kind.name]

    def _block_type(self, original: Callable[..., None]) -> Callable[..., None]:
        def initialise(made: Any, element_ty: Any, shape: Sequence[Any]) -> None:
            key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
            if key not in self._block_types:
                original(made, element_ty, shape)
                self._block_types[key] = dict(vars(made))
            vars(made).update(self._block_types[key])

        return initialise

    # -- launches ----------------------------------------------------------------------------------------------------

    def _patch_language(self, original: Callable[..., Any], fn: object) -> Any:
        """Patch triton.language once a launch: stock does it for every call of a device function, most of its time."""
        if self._inside:
            return None
        scope = original(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        restore = scope.restore

        def leave() -> None:
            self._inside = False
            restore()

        self._inside = True
        scope.restore = leave
        return scope

    def _launch(self, original: Callable[..., Any], executor: Any, args: Sequence[Any], kwargs: Any) -> Any:
        host_args, host_kwargs = original(executor, args, kwargs)
        named = [*zip(executor.arg_names, host_args, strict=False), *host_kwargs.items()]
        self._regions = [_Region(name, value) for name, value in named if isinstance(value, torch.Tensor)]
        self.report.launches.append(executor.fn.__name__)
        return host_args, host_kwargs

    def _set_grid_dim(self, original: Callable[..., Any], builder: Any, *grid: int) -> None:
        self._grid = (grid[0], grid[1], grid[2])
        self._order = self._random.permutation(int(np.prod(grid)))
        original(builder, *grid)

    def _set_grid_idx(self, original: Callable[..., Any], builder: Any, *index: int) -> None:
        self._program = int(self._order[np.ravel_multi_index(index, self._grid)])
        self._epoch += 1
        original(builder, *(int(i) for i in np.unravel_index(self._program, self._grid)))

    def _create_barrier(self, original: Callable[..., Any], builder: Any, *rest: Any) -> None:
        line = _line()
        self.report.barriers[line] += 1
        if line != self._without_barrier:
            self._epoch += 1

    # -- memory ------------------------------------------------------------------------------------------------------

    def _create_masked_load(
        self, original: Callable[..., Any], builder: Any, pointers: Any, mask: Any, other: Any, *rest: Any
    ) -> Any:
        self._touch(pointers, mask, writes=False)
        if other is None and not mask.data.all():
            kind = pointers.get_element_ty()
            poison: float = 0x7FC0 if kind == tl.bfloat16 else np.nan if kind.is_floating() else 0x5A
            data = np.full(pointers.data.shape, poison, interpreter._get_np_dtype(kind))
            other = interpreter.TensorHandle(data, kind)
        return original(builder, pointers, mask, other, *rest)

    def _create_masked_store(
        self, original: Callable[..., Any], builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        self._touch(pointers, mask, writes=True)
        return original(builder, pointers, value, mask, *rest)

    def _touch(self, pointers: Any, mask: Any, *, writes: bool) -> None:
        addresses: Addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        if not addresses.size:
            return
        low, high = int(addresses.min()), int(addresses.max())
        region = next((r for r in self._regions if r.start <= low and high + r.size <= r.stop), None)
        if region is None:
            raise IndexError(f"{'store' if writes else 'load'} outside the tensors of the launch at {_line()}")
        kind = "store" if writes else "load"
        self.report.traffic[Traffic(self.report.launches[-1], region.argument, kind)] += addresses.size * region.size
        at = ((addresses - np.uint64(region.start)) // np.uint64(region.size)).astype(np.int64)
        me, now = self._program, self._epoch
        writer, reader = region.writer[at], region.reader[at]
        self._note("race with a write", region, (writer >= 0) & (writer != me))
        written_now = (writer == me) & (region.written[at] == now)
        if writes:
            self._note("race with a read", region, (reader >= 0) & (reader != me))
            self._note("write after write", region, written_now)
            self._note("write after read", region, (reader == me) & (region.read[at] == now))
            if np.unique(at).size != at.size:
                self._note("one store twice", region, np.ones(1, bool))
            region.writer[at], region.written[at] = me, now
        else:
            self._note("read after write", region, written_now)
            region.reader[at], region.read[at] = me, now

    def _note(self, kind: str, region: _Region, elements: npt.NDArray[np.bool_]) -> None:
        if elements.any():
            self.report.hazards[Hazard(kind, region.argument, _line())] += int(elements.sum())

    # -- arithmetic --------------------------------------------------------------------------------------------------

    def _create_dot(
        self, original: Callable[..., Any], builder: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any
    ) -> Any:
        dimensions = (*a.data.shape[-2:], b.data.shape[-1])
        if min(dimensions) < LEAST_DIMENSION:
            raise ValueError(f"a product of {dimensions} has a dimension below {LEAST_DIMENSION} at {_line()}")
        left, right = _float32(a), _float32(b)
        if a.dtype.scalar == tl.float32 and "tf32" in str(precision).lower():
            left, right = round_to_tf32(left), round_to_tf32(right)
        return interpreter.TensorHandle(product(left, right, d.data), d.dtype.scalar)

    def _cast_impl(self, original: Callable[..., Any], builder: Any, value: Any, target: Any) -> Any:
        """Round float32 to the nearest bfloat16, ties to even; the stock interpreter cuts bits off."""
        if value.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return interpreter.TensorHandle(round_to_bfloat16(value.data), target.scalar)
        return original(builder, value, target)

    def _binary_op(self, original: Callable[..., Any], builder: Any, left: Any, right: Any, op: Any) -> Any:
        _refuse_bfloat16(left, right)
        result = original(builder, left, right, op)
        if op in _MAY_OVERFLOW and result.data.dtype in _NARROW:
            wide = op(left.data, right.data, dtype=np.int64)
            if np.not_equal(wide, result.data).any():
                raise OverflowError(f"{op.__name__} of {result.dtype} overflows at {_line()}")
        return result

    def _unary_op(self, original: Callable[..., Any], builder: Any, value: Any, op: Any) -> Any:
        _refuse_bfloat16(value)
        return original(builder, value, op)


def product(left: Floats, right: Floats, start: Floats) -> Floats:
    """`start` + `left` @ `right` as matrix instructions do it: 16 of k exactly, then one float32 sum.

    numpy's own float32 product gives a row other bits at another place of the left side where OpenBLAS runs its kernels
    for AMD's Zen, so that a sequence in chunks differed from the whole.
    """
    depth = left.shape[-1] // LEAST_DIMENSION
    parts = np.matmul(
        left.astype(np.float64).reshape(-1, depth, LEAST_DIMENSION).swapaxes(0, 1),
        right.astype(np.float64).reshape(depth, LEAST_DIMENSION, -1),
    )
    total = start.astype(np.float32)
    for part in parts.astype(np.float32):
        total = total + part
    return total


def round_to_tf32(x: Floats) -> Floats:
    """To 10 bits of mantissa, to nearest, ties away from zero, as the hardware's conversion does."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded: Floats = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return rounded


def round_to_bfloat16(x: Floats) -> npt.NDArray[np.uint16]:
    """Bit patterns of the nearest bfloat16, ties to even."""
    rounded: npt.NDArray[np.uint16]
    rounded = torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.uint16).numpy()
    return rounded


def _float32(handle: Any) -> Floats:
    """The values of a tensor; the interpreter holds bfloat16 as bit patterns."""
    if handle.dtype.scalar == tl.bfloat16:
        wide: Floats = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return wide
    return np.asarray(handle.data, np.float32)


def _refuse_bfloat16(*handles: Any) -> None:
    if any(handle.dtype.scalar == tl.bfloat16 for handle in handles):
        raise TypeError(f"arithmetic on bfloat16 at {_line()}: convert to float32 first")


def _line() -> str:
    """The line of the kernel's source that is being run, "file:number"."""
    frame = inspect.currentframe()
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and "/triton/language/" not in name and "/triton/runtime/" not in name:
            return f"{name.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
