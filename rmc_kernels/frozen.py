"""`FrozenCell`: one step at a time with weights that are packed once, for loops that act."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn

import torch
from torch import Tensor, nn

from rmc_kernels import backends, errors
from rmc_kernels.functional import autocasts, is_input, not_input, prepare, run
from rmc_kernels.read_heads import ReadHead
from rmc_kernels.spec import CellSpec

#: A step: x, memory, resets -> output, memory.
_Step = Callable[[Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]


class FrozenCell:
    """The step of a layer or cell whose weights are frozen; made by its `frozen_weights()`, which see.

    For inference: results have no gradient, attention dropout is off, autocast has no effect, hooks of the layer do not
    fire, and parametrizations are not evaluated again. Parameters, read head (with its hooks) and backend are those
    that the layer had on entry. Threads may step at once.
    """

    def __init__(
        self,
        spec: CellSpec,
        params: tuple[Tensor, ...],
        block: backends.FrozenWeights,
        backend: str,
        *,
        initial_memory: Callable[[int], Tensor],
        redraws: bool,
        read_head: nn.Module,
    ) -> None:
        self._spec, self._params, self._backend = spec, params, backend
        self._initial_memory, self._read_head = initial_memory, read_head
        self._open = True  # what torch.compile guards: of a C function it does not see that another takes its place
        self._step: _Step = self._ordinary
        chosen = backends.choose(backend, spec, params[0].dtype, params[0].device)
        if not isinstance(chosen, backends.CpuBackend) or not backends.is_plain(*params):
            return
        with torch.no_grad():
            initial = None if redraws else initial_memory(1)[0].contiguous()
        if _only_concatenates(read_head):
            self._step = chosen.frozen_step(spec, block, initial, flat=True, ordinary=self._ordinary) or self._step
            return
        native = chosen.frozen_step(spec, block, initial, flat=False, ordinary=self._following)
        if native is not None:
            self._step = lambda x, memory, resets: self._read(x, *native(x, memory, resets))

    def step(self, x: Tensor, memory: Tensor | None = None, *, resets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            x: [B, I], or [B, n, I] in matrix mode; dtype and device of the parameters.
            memory: [B, N, D], float32 for half types; None for the initial memory.
            resets: bool [B], or None; where it is true, the element's memory is replaced by the initial one first.

        Returns:
            The output [B, output_size] in x's dtype, and the memory [B, N, D], each with memory of its own. On the CPU
            the storage of either may be one that cannot be resized.

        Raises:
            RuntimeError: the block of `frozen_weights()` was left.
            TypeError, ValueError: before anything is computed, naming the argument, what it must be and what it got.
        """
        if torch.compiler.is_compiling() and self._open:
            return self._ordinary(x, memory, resets)  # which torch.compile can trace
        return self._step(x, memory, resets)

    def close(self) -> None:
        """End of the block; a step that another thread is in goes on."""
        self._open, self._step = False, _closed

    def __reduce__(self) -> NoReturn:
        raise TypeError("a FrozenCell cannot be pickled or copied: it holds packed weights of one process")

    def _ordinary(self, x: Tensor, memory: Tensor | None, resets: Tensor | None) -> tuple[Tensor, Tensor]:
        """The step by way of the functions that the layer itself uses."""
        return self._read(x, *self._following(x, memory, resets))

    def _following(self, x: Tensor, memory: Tensor | None, resets: Tensor | None) -> tuple[Tensor, Tensor]:
        """The memory after the step, [B, N, D], twice: to be read, and to be carried."""
        spec = self._spec
        layout = f"[B, {', '.join(map(str, spec.input_shape))}]"
        if not is_input(x):
            raise not_input(x, layout)
        if x.dim() != 1 + len(spec.input_shape) or x.shape[1:] != spec.input_shape:
            raise ValueError(f"x must be {layout}, got {list(x.shape)}")
        if resets is not None:
            resets = step_resets(resets, x.shape[:1])[:, None]
        with torch.no_grad(), _without_autocast(x):
            start = self._initial_memory(x.shape[0]) if memory is None or resets is not None else None
            first = start if memory is None else memory
            assert first is not None
            given = None if resets is None else start
            call, _ = prepare(spec, x[:, None], first, self._params, None, resets, given)
            memories, final = run(spec, call, self._backend, "full")
            return memories[:, 0], final

    def _read(self, x: Tensor, memory: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        """The output read from the memory [B, N, D], and the memory to be carried."""
        with torch.no_grad(), _without_autocast(x):
            output: Tensor = self._read_head(memory[:, None])[:, 0]  # as the layer reads a sequence: the same bits
            return output.to(x.dtype), following


def _only_concatenates(read_head: nn.Module) -> bool:
    """Whether this is a stock read head that flattens the memory, without hooks."""
    hooks = (*read_head._forward_pre_hooks, *read_head._forward_hooks)
    is_stock = type(read_head) is ReadHead and read_head.kind == "concat"
    return is_stock and not hooks and "forward" not in vars(read_head)


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()


def step_resets(resets: object, shape: torch.Size) -> Tensor:
    """`resets` of one step if they are bools of that shape, [B] or [] where x is unbatched."""
    layout = f"{'[B] = ' if shape else ''}{list(shape)}"
    checked = errors.is_tensor("resets", resets, f"a bool tensor {layout}")
    if checked.shape != shape:
        raise ValueError(f"resets must be {layout}, got {list(checked.shape)}")
    return checked


def _closed(x: Tensor, memory: Tensor | None, resets: Tensor | None) -> NoReturn:
    raise RuntimeError("step must be called inside the block of frozen_weights()")
