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
        seed: of the noise.

    Attributes:
        relu_inputs: one tensor per ReLU, in order.
    """

    def __init__(self, flips: Iterable[Place] = (), noise: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.relu_inputs: list[Tensor] = []
        self._flips = tuple(flips)
        self._noise = noise
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_function__(
        self, func: Callable[..., Any], types: Collection[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Intercept torch.relu and, with noise, the operators that round."""
        if func is torch.relu:
            return self._relu(*args)
        result = func(*args, **(kwargs or {}))
        if self._noise and func in ROUNDED:
            drawn = torch.randn(result.shape, generator=self._generator, dtype=result.dtype)
            result = result * (1 + self._noise * drawn.to(result.device))
        return result

    def _relu(self, value: Tensor) -> Tensor:
        positive = value.detach() > 0
        for number, place in self._flips:
            if number == len(self.relu_inputs):
                positive[place] ^= True
        self.relu_inputs.append(value.detach())
        return value * positive
