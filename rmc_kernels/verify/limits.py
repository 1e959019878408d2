"""When a result is right: its error against float64, held to the error of plain eager PyTorch in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

#: An error may be this many times the eager error: in the root mean square, and at its largest.
RMS_FACTOR = 2.0
LARGEST_FACTOR = 4.0
#: Units in the last place of a tensor's largest value that are allowed where the eager error is exactly 0, only there.
ULPS = 4


@dataclass(frozen=True)
class Errors:
    """Error of one tensor against float64, or of the same tensor pooled over several draws.

    Attributes:
        elements: how many elements were compared.
        sum_squares: sum of squared errors; inf where an element is not finite.
        largest: largest absolute error; likewise.
        scale: largest absolute value of the exact tensor.
        eps: machine epsilon of the tensor's dtype.
    """

    elements: int
    sum_squares: float
    largest: float
    scale: float
    eps: float

    @classmethod
    def of(cls, actual: Tensor, exact: Tensor) -> Errors:
        """The errors of `actual`, any shape and floating dtype, against `exact`, of the same shape in float64.

        Raises:
            ValueError: the shapes differ.
        """
        if actual.shape != exact.shape:
            raise ValueError(f"takes a tensor of shape {tuple(exact.shape)}, got {tuple(actual.shape)}")
        eps = torch.finfo(actual.dtype).eps
        if not actual.numel():
            return cls(0, 0.0, 0.0, 0.0, eps)
        error = (actual.detach().double() - exact).abs().nan_to_num(nan=math.inf, posinf=math.inf)
        return cls(error.numel(), float(error.square().sum()), float(error.max()), float(exact.abs().max()), eps)

    @classmethod
    def pool(cls, parts: Iterable[Errors]) -> Errors:
        """The errors of all `parts` together; at least one."""
        parts = list(parts)
        return cls(
            sum(part.elements for part in parts),
            sum(part.sum_squares for part in parts),
            max(part.largest for part in parts),
            max(part.scale for part in parts),
            max(part.eps for part in parts),
        )

    def times(self, weight: float) -> Errors:
        """The errors of the tensor multiplied by `weight`."""
        largest, scale = self.largest * weight, self.scale * weight
        return Errors(self.elements, self.sum_squares * weight**2, largest, scale, self.eps)

    @property
    def rms(self) -> float:
        """Root mean square of the errors."""
        return math.sqrt(self.sum_squares / self.elements) if self.elements else 0.0


@dataclass(frozen=True)
class Comparison:
    """One tensor's errors beside those of the eager run, and the verdict.

    Attributes:
        errors: of the tensor in question.
        eager: of the eager run: the yardstick.
    """

    errors: Errors
    eager: Errors

    @property
    def rms_ratio(self) -> float:
        """RMS error over the eager one; at most `RMS_FACTOR` is right.

        Where the eager error is 0, over the allowance of a few ulps, scaled so that the same number is the limit.
        """
        return _ratio(self.errors.rms, self.eager.rms, self._allowance / RMS_FACTOR)

    @property
    def largest_ratio(self) -> float:
        """Largest error over the eager one; at most `LARGEST_FACTOR` is right."""
        return _ratio(self.errors.largest, self.eager.largest, self._allowance / LARGEST_FACTOR)

    @property
    def ok(self) -> bool:
        """Whether both ratios are within their limits."""
        return self.rms_ratio <= RMS_FACTOR and self.largest_ratio <= LARGEST_FACTOR

    @property
    def severity(self) -> float:
        """Share of the limit that is used, of the two ratios the worse; 1 is the limit."""
        return max(self.rms_ratio / RMS_FACTOR, self.largest_ratio / LARGEST_FACTOR)

    @property
    def _allowance(self) -> float:
        return ULPS * self.eager.eps * self.eager.scale

    def __str__(self) -> str:
        return (
            f"RMS {self.errors.rms:.2e} = {self.rms_ratio:.2f} x eager (limit {RMS_FACTOR:g}), "
            f"largest {self.errors.largest:.2e} = {self.largest_ratio:.2f} x eager (limit {LARGEST_FACTOR:g})"
        )


def criterion(actual: Tensor, eager: Tensor, exact: Tensor) -> Comparison:
    """Compare one tensor of a backend with the same tensor of an eager run; `.ok` is the verdict.

    A tensor of a few elements makes this a lottery: pool the `Errors` of several draws and build a `Comparison`.

    Args:
        actual: the result in question.
        eager: the same tensor by `reference.unroll` in the same dtype, from the same inputs.
        exact: the same tensor by `reference.unroll` in float64, from the same (rounded) inputs.

    Raises:
        ValueError: the shapes differ.
    """
    return Comparison(Errors.of(actual, exact), Errors.of(eager, exact))


def _ratio(error: float, eager: float, allowance: float) -> float:
    unit = eager or allowance
    return error / unit if unit else (math.inf if error else 0.0)
