"""A hand inside a run of the definition: records its ReLU inputs, flips some of them, imitates rounding."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

#: The index of a ReLU within a run, and of one element of its input.
Place = tuple[int, tuple[int, ...]]

ROUNDED = {F.linear, F.layer_norm, torch.softmax, torch.tanh, torch.sigmoid, torch.Tensor.__matmul__}


class Probe(TorchFunctionMode):
    """Acts on what runs while it is active.

    Args:
        flips: ReLU inputs to take to be on the other side of 0: one that is as near to 0 as rounding passes where it
            would not, or the other way round.
        noise: relative standard deviation of noise on every operator's result, to see what rounding does; 0 for none.
        backwards: whether the backward pass rounds, too: the same noise is on the gradient of every result, and the
            gradient of a softmax is computed from its rounded result.
        seed: of the noise.

    Attributes:
        relu_inputs: one tensor per ReLU, in order.
    """

    def __init__(self, flips: Iterable[Place] = (), noise: float = 0.0, seed: int = 0, backwards: bool = False) -> None:
        super().__init__()
        self.relu_inputs: list[Tensor] = []
        self._flips = tuple(flips)
        self._noise = noise
        self._backwards = backwards
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_function__(
        self, func: Callable[..., Any], types: Collection[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Intercept torch.relu and, with noise, the operators that round."""
        if func is torch.relu:
            return self._relu(*args)
        result = func(*args, **(kwargs or {}))
        if self._backwards and func is torch.softmax:
            return _SoftmaxOf.apply(args[0], self._rounded(result.detach()))  # type: ignore[no-untyped-call]
        if self._noise and func in ROUNDED:
            result = self._rounded(result)
            if self._backwards and result.requires_grad:
                result.register_hook(self._rounded)
        return result

    def _rounded(self, value: Tensor) -> Tensor:
        drawn = torch.randn(value.shape, generator=self._generator, dtype=value.dtype)
        return value * (1 + self._noise * drawn.to(value.device))

    def _relu(self, value: Tensor) -> Tensor:
        positive = value.detach() > 0
        for number, place in self._flips:
            if number == len(self.relu_inputs):
                positive[place] ^= True
        self.relu_inputs.append(value.detach())
        return value * positive


class _SoftmaxOf(torch.autograd.Function):
    """A rounded softmax over the last axis: its sum is not 1, which is most of its gradient beside a weight near 1."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, rounded: Tensor) -> Tensor:
        ctx.save_for_backward(rounded)
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rounded,) = ctx.saved_tensors
        return rounded * (grad - (rounded * grad).sum(-1, keepdim=True)), None
