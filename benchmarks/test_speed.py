"""The quick suite on pytest-benchmark, for a developer's look: `pytest benchmarks/test_speed.py -k "B16 and rmc"`.

Wall time of one contestant after the other, without ceilings or parity: figures to publish come from `rmc bench`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from rmc_kernels.bench.case_run import taking_part
from rmc_kernels.bench.cases import SUITES, Case
from rmc_kernels.bench.contestants import RIVALS, line_up, timed
from rmc_kernels.bench.problem import draw


def _identifier(name: str) -> str:
    """The name as words that `-k` takes."""
    return name.replace("=", "").replace(",", "").replace(" ", "-")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The number of threads is put back after each test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("contestant", ["rmc", *RIVALS])
@pytest.mark.parametrize("case", SUITES["quick"].cases, ids=lambda case: _identifier(case.name))
def test_speed(benchmark: BenchmarkFixture, case: Case, contestant: str) -> None:
    if contestant == "rmc":
        names, _ = taking_part("all", [case], "cpu")
        chosen = line_up(case, [], names[:1])[-1]
    else:
        chosen = line_up(case, [contestant], [])[-1]
    torch.set_num_threads(chosen.threads)
    benchmark.extra_info["steps"] = case.steps
    benchmark(timed(chosen.bind(draw(case)), case.mode))
