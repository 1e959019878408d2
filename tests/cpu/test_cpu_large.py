"""The C++ backend at sizes that people train at, past the thresholds of its memory and its threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from rmc_kernels.spec import CellSpec
from rmc_kernels.verify import Case, criterion
from rmc_kernels.verify.draws import by_backend, by_eager, draw, evaluate
from tests.cpu_cases import same_bits

pytest.importorskip("rmc_kernels._C")

#: (heads, slots, D, B, T, threads): packed weights, gradient accumulators or both are more than a thread keeps.
SIZES = [
    (4, 8, 256, 256, 16, 2),
    (8, 8, 512, 48, 16, 2),
    (8, 3, 768, 96, 8, 2),
    (8, 4, 2048, 1, 4, 1),
    (8, 4, 2048, 64, 2, 2),
]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def case_of(size: tuple[int, ...], mlp_layers: int) -> Case:
    heads, slots, width, batch, steps, _ = size
    spec = CellSpec.sonnet(64, slots, width // heads, heads, attention_mlp_layers=mlp_layers)
    return Case(spec, batch_size=batch, steps=steps)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_large_cells_are_right(size: tuple[int, ...], threads: Callable[[int], None]) -> None:
    """Without a ReLU: of millions of its inputs some are within rounding of 0, and their gradients another's."""
    case = case_of(size, mlp_layers=1)
    drawn = draw(case, seed=0)
    threads(size[-1])
    found = evaluate(drawn, by_backend("cpu", case))
    eager, exact = (evaluate(d, by_eager(case.spec)) for d in (drawn, drawn.wide()))
    for name, value in found.items():
        compared = criterion(value, eager[name], exact[name])
        assert compared.ok, f"{name}: {compared}"


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_threads_give_large_cells_the_same_bits(size: tuple[int, ...], threads: Callable[[int], None]) -> None:
    case = case_of(size, mlp_layers=2)
    drawn = draw(case, seed=0)
    threads(1)
    found = evaluate(drawn, by_backend("cpu", case))
    threads(2)
    same_bits(found, evaluate(drawn, by_backend("cpu", case)))
    eager, exact = (by_eager(case.spec)(d.call)[0] for d in (drawn, drawn.wide()))
    compared = criterion(found["memories"], eager, exact)
    assert compared.ok, compared
