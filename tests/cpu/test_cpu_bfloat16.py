"""bfloat16 in the C++ backend, on every instruction set that multiplies bf16 numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rmc_kernels.backends import BACKENDS, cpu
from rmc_kernels.backends.cpu import BFLOAT16_ISAS, CpuBackend
from rmc_kernels.backends.protocol import Call
from rmc_kernels.verify import Case, check_case
from tests.cpu_cases import INF, SPECS, everything, make, same_bits

each_isa = pytest.mark.parametrize("isa", BFLOAT16_ISAS)
NAMES = ("sonnet_odd", "sonnet_matrix_blocks", "textbook_projected", "l0sg")


def make_half(name: str, batch: int, steps: int, options: str = "") -> tuple[Call, Tensor]:
    """As `make`, with x, the parameters and the mask in bfloat16."""
    call, grad = make(SPECS[name], batch, steps, options)
    mask = None if call.dropout_mask is None else call.dropout_mask.bfloat16()
    return replace(call, x=call.x.bfloat16(), params=tuple(p.bfloat16() for p in call.params), dropout_mask=mask), grad


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@each_isa
@pytest.mark.parametrize(("name", "recompute"), zip(NAMES, ("full", "none", "full", "none"), strict=True))
def test_parity(name: str, recompute: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "cpu", CpuBackend(isa))
    case = Case(SPECS[name], "bfloat16", batch_size=5, steps=5, lengths=True, resets=True, recompute=recompute)
    result = check_case(case, "cpu")
    assert result.status == "right", (result.reason, result.misses)


@each_isa
@pytest.mark.parametrize("name", NAMES)
def test_bits_depend_on_neither_batch_nor_threads(name: str, isa: str, two_threads: None) -> None:
    call, grad = make_half(name, 23, 6, "lr")
    whole = everything(CpuBackend(isa), SPECS[name], call, grad)
    torch.set_num_threads(1)
    same_bits(whole, everything(CpuBackend(isa), SPECS[name], call, grad))
    assert call.lengths is not None
    assert call.resets is not None
    assert call.reset_memory is not None
    for part in (slice(0, 1), slice(3, 20)):
        some = replace(
            call, x=call.x[part], memory=call.memory[part], lengths=call.lengths[part], resets=call.resets[part],
            reset_memory=call.reset_memory[part],
        )  # fmt: skip
        alone = everything(CpuBackend(isa), SPECS[name], some, grad[part])
        for key in ("memories", "grad of x", "grad of memory", "grad of reset_memory"):
            assert torch.equal(alone[key], whole[key][part]), key


@each_isa
@pytest.mark.parametrize("value", [1e37, INF, -INF, float("nan")])
def test_extreme_input_stays_in_its_element(value: float, isa: str) -> None:
    spec = SPECS["textbook_projected"]  # without norms, so that finite results come of it
    call, grad = make_half("textbook_projected", 5, 3)
    grad[2] = 0
    clean = everything(CpuBackend(isa), spec, call, grad)
    x = call.x.clone()
    x[2, 1, 4] = value
    plain, got = (everything(CpuBackend(i), spec, replace(call, x=x), grad) for i in ("generic", isa))
    for name, want in plain.items():
        assert torch.equal(got[name].isfinite(), want.isfinite()), name
    others = [0, 1, 3, 4]
    for name in ("memories", "grad of x", "grad of memory"):
        assert torch.equal(got[name][others], clean[name][others]), name


@each_isa
@pytest.mark.parametrize("value", [INF, -INF, float("nan")])
def test_extreme_weight(value: float, isa: str) -> None:
    spec = SPECS["sonnet"]
    call, _ = make_half("sonnet", 5, 3)
    params = list(call.params)
    index = list(spec.parameter_names).index("memory_gate.weight")
    params[index] = params[index].clone()
    params[index][3, 5] = value
    call = replace(call, params=tuple(params))
    plain, got = (CpuBackend(i).forward(spec, call, False)[0] for i in ("generic", isa))
    torch.testing.assert_close(got, plain, rtol=0.05, atol=0.05, equal_nan=True)
    assert got.isfinite().all() == (abs(value) == INF)  # a gate that is open or closed


@pytest.mark.skipif("avx512bf16" not in BFLOAT16_ISAS, reason="needs AVX512-BF16")
def test_float32_of_avx512bf16_is_that_of_avx512() -> None:
    call, grad = make(SPECS["sonnet"], 9, 3)
    plain, other = (everything(CpuBackend(isa), SPECS["sonnet"], call, grad) for isa in ("avx512", "avx512bf16"))
    same_bits(plain, other)


@pytest.mark.parametrize(
    "isas, fp16, expected",
    [
        (("generic", "avx2", "avx512", "avx512bf16", "amx"), True, "amx"),
        (("generic", "avx2", "avx512", "avx512bf16"), True, ""),  # slower than float32 there
        (("generic", "avx2", "avx512", "avx512bf16"), False, "avx512bf16"),
        (("generic", "avx2", "avx512"), False, ""),
    ],
)
def test_choice_of_the_instruction_set(isas: tuple[str, ...], fp16: bool, expected: str) -> None:
    assert cpu.bfloat16_isa(isas, {"avx512_fp16": fp16}) == expected


@each_isa
def test_forced_instruction_set(isa: str) -> None:
    assert cpu.kernels(torch.bfloat16, isa) == (("bfloat16", isa),) * 2
    assert cpu.kernels(torch.bfloat16, "generic") == (("float32", "generic"),) * 2
    assert cpu.kernels(torch.float16, isa) == (("float32", isa),) * 2
