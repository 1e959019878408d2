"""One step, frozen and as an ordinary call: models, inputs, and whether both gave the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rmc_kernels import RelationalMemory, RelationalMemoryCell
from rmc_kernels.backends import cpu
from rmc_kernels.frozen import FrozenCell
from rmc_kernels.functional import memory_dtype
from tests.cases import SPECS, served

Made = tuple[Tensor, Tensor]
Model = RelationalMemory | RelationalMemoryCell
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(not served(name, "sonnet"), reason=f"no {name} backend"))
    for name in ("cpu", "reference")
] + ["auto"]
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
NEEDS_CPU = pytest.mark.skipif(not served("cpu", "sonnet"), reason="no C++ extension")
NATIVE = pytest.mark.skipif(
    not served("cpu", "sonnet") or cpu._TENSORS is None, reason="torch before 2.10 does not tell C how tensors lie"
)


class Mine(Tensor):
    """Behaves as torch's."""


def same(ours: Made, theirs: Made) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.equal(one, other)
        assert not one.requires_grad


def pair(name: str = "sonnet", **options: Any) -> tuple[RelationalMemory, RelationalMemoryCell]:
    """A layer and a cell with the same weights, which no initial value has left at 0 or 1."""
    layer = RelationalMemory.from_spec(SPECS[name], **options).eval()
    cell = RelationalMemoryCell.from_spec(SPECS[name], **options).eval()
    with torch.no_grad():
        for value in layer.parameters():
            value.add_(0.1 * torch.randn_like(value))
    cell.load_state_dict(layer.state_dict())
    return layer, cell


def tensors(model: Model, batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, memory and resets of a step; with more than two elements some start over and some do not."""
    g, spec = torch.Generator().manual_seed(seed), model.spec
    dtype = model.get_parameter(spec.parameter_names[0]).dtype
    x = torch.randn(batch, *spec.input_shape, generator=g).to(dtype)
    memory = torch.randn(batch, spec.mem_slots, spec.mem_size, generator=g).to(memory_dtype(dtype))
    return x, memory, torch.arange(batch) % 3 == 1


def ordinary(model: Model, x: Tensor, memory: Tensor | None, resets: Tensor | None) -> Made:
    """The step as an ordinary call without gradients."""
    with torch.no_grad():
        if isinstance(model, RelationalMemoryCell):
            output, following = model(x, memory, resets=resets)
            return output, following
        output, following = model(x[:, None], memory, resets=None if resets is None else resets[:, None])
        return output[:, 0], following


def steps_alike(layer: RelationalMemory, cell: RelationalMemoryCell, batch: int, native: bool = False) -> None:
    """Every combination of given and missing memory and resets, by the layer, the cell and both frozen."""
    x, memory, resets = tensors(layer, batch)
    for carried in (memory, None):
        for starts in (None, resets):
            made = []
            for model in (layer, cell):
                torch.manual_seed(5)  # "normal" draws the initial memory
                want = ordinary(model, x, carried, starts)
                with model.frozen_weights() as frozen:
                    assert not native or not takes_the_ordinary_way(frozen)
                    for _ in range(2):
                        torch.manual_seed(5)
                        found = frozen.step(x, carried, resets=starts)
                        same(found, want)
                    assert not batch or found[0].untyped_storage().data_ptr() != found[1].untyped_storage().data_ptr()
                made.append(found)
            same(*made)


def takes_the_ordinary_way(frozen: FrozenCell) -> bool:
    return getattr(frozen._step, "__func__", None) is FrozenCell._ordinary
