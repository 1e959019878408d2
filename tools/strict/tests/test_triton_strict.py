"""The strict interpreter itself: everything that it claims to report, in a kernel that does it."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
    pytest.skip("runs under TRITON_INTERPRET=1, which `make test` sets", allow_module_level=True)

import triton
import triton.language as tl

from tools.strict import Report, round_to_bfloat16, round_to_tf32, strict


@pytest.fixture
def strict_interpreter() -> None:
    """The tests here bring their own."""


@triton.jit
def copy(x, out, shift: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i + shift))


@triton.jit
def exchange(x, out, MODE: tl.constexpr, BARRIER: tl.constexpr):
    i = tl.arange(0, 16)
    if MODE == "read after write":
        tl.store(x + i, i * 1.0)
        if BARRIER:
            tl.debug_barrier()
        tl.store(out + i, tl.load(x + 15 - i))
    if MODE == "write after read":
        y = tl.load(x + i)
        if BARRIER:
            tl.debug_barrier()
        tl.store(x + 15 - i, y)
    if MODE == "write after write":
        tl.store(x + i, i * 1.0)
        if BARRIER:
            tl.debug_barrier()
        tl.store(x + 15 - i, i * 1.0)


@triton.jit
def meet(x, out, WRITES: tl.constexpr):
    i = tl.arange(0, 16)
    if tl.program_id(0) == 0:
        tl.store(x + i, i * 1.0)
    elif WRITES:
        tl.store(x + i, i * 2.0)
    else:
        tl.store(out + i, tl.load(x + i))


@triton.jit
def twice(out):
    tl.store(out + tl.arange(0, 16) // 2, tl.arange(0, 16) * 1.0)


@triton.jit
def masked(x, out, COUNT: tl.constexpr):
    i = tl.arange(0, 16)
    tl.store(out + i, tl.load(x + i, mask=i < COUNT))


@triton.jit
def multiply(a, b, out, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision=PRECISION))


@triton.jit
def double(x, out):
    i = tl.arange(0, 16)
    y = tl.load(x + i)
    tl.store(out + i, y + y)


@triton.jit
def order(count, out):
    turn = tl.load(count)
    tl.store(out + tl.program_id(0), turn)
    tl.store(count, turn + 1)


def _kinds(report: Report) -> set[str]:
    return {hazard.kind for hazard in report.hazards}


def test_bytes_are_counted_by_argument_without_what_is_masked() -> None:
    x, out = torch.zeros(16), torch.zeros(16)
    with strict() as report:
        masked[(2,)](x, out, 5)
    assert report.traffic == {("masked", "x", "load"): 2 * 5 * 4, ("masked", "out", "store"): 2 * 16 * 4}


@pytest.mark.parametrize("shift", [1, -1, 16])
def test_an_access_outside_is_refused(shift: int) -> None:
    with (
        strict(),
        pytest.raises(Exception, match=r"load outside the tensors of the launch at test_triton_strict.py:\d+"),
    ):
        copy[(1,)](torch.ones(16), torch.ones(16), shift, 16)
    with strict(), pytest.raises(Exception, match="store outside"):
        copy[(1,)](torch.ones(16), torch.ones(15), 0, 16)


@pytest.mark.parametrize("mode", ["read after write", "write after read", "write after write"])
def test_what_no_barrier_orders_is_reported(mode: str) -> None:
    with strict() as report:
        exchange[(1,)](torch.ones(16), torch.ones(16), mode, False)
    assert mode in _kinds(report)
    (line,) = {hazard.line.split(":")[0] for hazard in report.hazards}
    assert line == "test_triton_strict.py"
    with strict() as report:
        exchange[(1,)](torch.ones(16), torch.ones(16), mode, True)
    assert not report.hazards
    (barrier,) = report.barriers
    with strict(without_barrier=barrier) as report:
        exchange[(1,)](torch.ones(16), torch.ones(16), mode, True)
    assert mode in _kinds(report)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("writes", [False, True])
def test_two_programs_on_one_element_are_reported(writes: bool, seed: int) -> None:
    with strict(seed) as report:
        meet[(2,)](torch.ones(16), torch.ones(16), writes)
    assert _kinds(report) & {"race with a write", "race with a read"}


def test_one_store_to_an_address_twice_is_reported() -> None:
    with strict() as report:
        twice[(1,)](torch.ones(16))
    assert _kinds(report) == {"one store twice"}


def test_a_clean_kernel_is_clean_and_counted() -> None:
    out = torch.zeros(16)
    with strict() as report:
        copy[(1,)](torch.arange(17.0), out, 1, 16)
    assert report.launches == ["copy"]
    assert not report.hazards
    assert torch.equal(out, torch.arange(1.0, 17.0))


def test_a_masked_load_without_other_is_nan() -> None:
    out = torch.zeros(16)
    with strict():
        masked[(1,)](torch.ones(16), out, 5)
    assert torch.equal(out.isnan(), torch.arange(16) >= 5)


def test_fresh_memory_is_nan() -> None:
    with strict():
        assert torch.empty(8).isnan().all()
        assert torch.ones(1).new_empty(8).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_programs_run_in_another_order() -> None:
    turns = []
    for seed in range(2):
        out = torch.zeros(8, dtype=torch.int32)
        with strict(seed) as report:
            order[(8,)](torch.zeros(1, dtype=torch.int32), out)
        assert report.hazards
        turns.append(out.tolist())
    assert sorted(turns[0]) == sorted(turns[1]) == list(range(8))
    assert turns[0] != turns[1]


def test_a_small_product_is_refused() -> None:
    with strict(), pytest.raises(Exception, match=r"a product of \(8, 8, 8\) has a dimension below 16"):
        multiply[(1,)](torch.ones(8, 8), torch.ones(8, 8), torch.ones(8, 8), 8, "ieee")


def test_products_of_bfloat16_are_decoded() -> None:
    a, b, out = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16(), torch.zeros(16, 16)
    with strict():
        multiply[(1,)](a, b, out, 16, "ieee")
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_tf32_rounds_its_operands() -> None:
    a, b, out = torch.full((16, 16), 1 + 2.0**-11), torch.eye(16), torch.zeros(16, 16)
    for precision, expected in (("ieee", 1 + 2.0**-11), ("tf32", 1 + 2.0**-10)):
        with strict():
            multiply[(1,)](a, b, out, 16, precision)
        assert torch.equal(out, torch.full((16, 16), expected))
    x = torch.tensor([1.0, -3.5, 1 + 2.0**-12]).numpy()
    assert round_to_tf32(x).tolist() == [1.0, -3.5, 1.0]


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    x = torch.cat([torch.randn(1000), torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, torch.inf, torch.nan])])
    assert torch.equal(torch.from_numpy(round_to_bfloat16(x.numpy())).view(torch.bfloat16).isnan(), x.isnan())
    assert round_to_bfloat16(torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8]).numpy()).tolist() == [0x3F80, 0x3F82]


def test_arithmetic_on_bfloat16_is_refused() -> None:
    with strict(), pytest.raises(Exception, match="arithmetic on bfloat16"):
        double[(1,)](torch.ones(16).bfloat16(), torch.ones(16).bfloat16())
