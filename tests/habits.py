"""What the tests of users' habits share: a small layer of each variant, and its gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rmc_kernels import CellSpec, RelationalMemory

SPECS = {
    "sonnet": CellSpec.sonnet(8, 3, 4, 2),
    "textbook": CellSpec.textbook(8, 3, 4, 2),
    "l0sg": CellSpec.l0sg(3, 4, 8, 2),
    "r2gen": CellSpec.r2gen(3, 8, 2, dropout=0.0),
}
EVERY_VARIANT = pytest.mark.parametrize("variant", list(SPECS))
#: For tests of seconds: the others run with the slow ones.
EVERY_VARIANT_DEAR = pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[] if name == "sonnet" else pytest.mark.slow) for name in SPECS]
)
EVERY_BACKEND = pytest.mark.parametrize("backend", ["cpu", "reference"])
BATCH, STEPS, INPUTS = 4, 6, 8


def layer(variant: str, backend: str, **options: Any) -> RelationalMemory:
    """A layer with the same weights at every call."""
    torch.manual_seed(0)
    made = RelationalMemory.from_spec(SPECS[variant], backend=backend, **options)
    with torch.no_grad():
        for value in made.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return made


def inputs(*shape: int, seed: int = 1) -> Tensor:
    """A fixed input, [BATCH, STEPS, INPUTS] unless said otherwise."""
    return torch.randn(shape or (BATCH, STEPS, INPUTS), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of every parameter by name, and none left behind."""
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    assert len(found) == len(list(model.parameters()))
    return found


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal to float32 rounding."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def close_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Every gradient equal to float32 rounding."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5, msg=partial("{}: {}".format, name))
