"""The Triton backend in the strict interpreter: parity of every cell, option and dtype, and what a launch promises."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rmc_kernels import CellSpec, backends, explain
from rmc_kernels.backends.reference import unroll
from rmc_kernels.verify import criterion
from tests.cases import SPECS, DrawnCall, draw

if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
    pytest.skip("runs under TRITON_INTERPRET=1, which `make test` sets", allow_module_level=True)

import triton
import triton.language as tl

from rmc_kernels.backends.triton import device, launch, tiles
from rmc_kernels.backends.triton.device.tile import sigmoid, tanh
from tools.strict import strict

TRITON = backends.BACKENDS["triton"]
SERVED = [name for name, spec in SPECS.items() if spec.variant != "l0sg"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Cells whose sizes need several blocks of every loop at the tiles of small cells.
WIDE = {
    "wide-heads": CellSpec.sonnet(9, 2, 70, 1),
    "wide-keys": CellSpec.sonnet(3, 3, 12, 2, key_size=75),
    "five-mlp-layers": replace(SPECS["sonnet"], attention_mlp_layers=5),
    "three-matrix-blocks": replace(SPECS["matrix-blocks"], num_blocks=3),
    "held": replace(SPECS["sonnet"], forget_bias=math.inf, input_bias=-math.inf),
}


def run(case: DrawnCall) -> Tensor:
    return TRITON.forward(case.spec, case.call(), False)[0]


@pytest.fixture
def strict_interpreter() -> None:
    """Tests that ask for it bring their own: nested ones would see each other."""


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("options", [(), ("lengths", "resets")], ids=["plain", "lengths-resets"])
@pytest.mark.parametrize("name", [*SERVED, *WIDE])
def test_parity(name: str, options: tuple[str, ...], dtype: torch.dtype) -> None:
    """48 steps of batch elements at least: as many errors as `rmc verify` pools."""
    case = draw((SPECS | WIDE)[name], options, batch=17, steps=3, dtype=dtype)
    if not case.spec.input_rows_live and "dropout_mask" not in case.options and options:
        case.options["dropout_mask"] = _mask(case)
    with strict(seed=len(name)) as report:
        memories = run(case)
    assert not report.hazards
    exact, eager = unroll(case.spec, case.to(torch.float64).call())[0], unroll(case.spec, case.call())[0]
    found = criterion(memories, eager, exact)
    assert found.ok, str(found)


def _tiles() -> list[Any]:
    """Every tile of the table, as fitted to D = 80, and the dtype it is for; `make test` has one of them."""
    found = dict.fromkeys((entry.tile.fitted(80), entry.wide) for entry in tiles.TABLE)
    return [
        pytest.param(
            tile,
            torch.float32 if wide else torch.bfloat16,
            id=f"{'float32' if wide else 'half'}-{tile.rows}-{tile.columns}-{tile.inner}-{tile.head}",
            marks=[] if wide and tile.rows == tiles.MOST_ROWS else [pytest.mark.slow],
        )
        for tile, wide in found
    ]


@pytest.mark.parametrize("tile, dtype", _tiles())
def test_parity_with_every_tile(tile: tiles.Tile, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter itself takes that of most rows; here heads, columns and inner dimensions need several blocks."""
    monkeypatch.setattr(tiles, "choose", lambda *args: tile)
    case = draw(CellSpec.sonnet(9, 3, 40, 2), ("lengths", "resets"), batch=17, steps=3, dtype=dtype)
    with strict() as report:
        memories = run(case)
    assert not report.hazards
    exact, eager = unroll(case.spec, case.to(torch.float64).call())[0], unroll(case.spec, case.call())[0]
    found = criterion(memories, eager, exact)
    assert found.ok, str(found)


def _mask(case: DrawnCall) -> Tensor:
    batch, steps = case.x.shape[:2]
    shape = (batch, steps, case.spec.num_heads, case.spec.mem_slots, case.spec.total_rows)
    return (torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.8).to(case.x.dtype) / 0.8


def test_the_memory_is_held_bit_for_bit() -> None:
    case = draw(WIDE["held"], dtype=torch.float32, steps=2)
    with strict():
        assert torch.equal(run(case), case.memory[:, None].expand(-1, 2, -1, -1))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["sonnet", "matrix-blocks", "textbook", "r2gen"])
def test_what_is_not_finite_stays_in_its_batch_element(name: str, value: float) -> None:
    case = draw(SPECS[name], batch=5, steps=3, dtype=torch.float32)
    with strict():
        clean = run(case)
        case.memory[1, 0, 0] = value
        memories = run(case)
    others = [0, 2, 3, 4]
    assert torch.equal(memories[others], clean[others])
    expected = unroll(case.spec, case.call())[0]
    assert torch.equal(memories[1].isfinite(), expected[1].isfinite())


@pytest.mark.parametrize("dtype, huge, large", [(torch.float32, 1e25, 1e15), (torch.float16, 1e4, 1e2)])
@pytest.mark.parametrize("name", ["sonnet", "textbook", "r2gen", "matrix"])
def test_a_value_that_overflows_stays_in_its_batch_element(
    name: str, dtype: torch.dtype, huge: float, large: float
) -> None:
    """Of one row, whose query and key are numbers: the rows that look at it are lost, and no others."""
    case = draw(SPECS[name], batch=5, steps=1, dtype=dtype)
    by_head = case.params["blocks.0.qkv.weight"].unflatten(0, (case.spec.num_heads, -1))
    values = 2 * case.spec.key_width
    by_head[:, :values] = 0
    by_head[:, values:, 0] *= large
    case.x[..., 0] /= large
    for key, value in case.params.items():
        if key.startswith("input_projection"):
            value[0] = 0
    case.memory[:, :, 0] /= large
    case.memory[1, 0, 0] = huge
    with strict():
        memories = run(case)
    expected = unroll(case.spec, case.call())[0]
    assert expected[[0, 2, 3, 4]].isfinite().all()
    assert not expected[1].isfinite().any(), "the case shows nothing"
    assert torch.equal(memories.isfinite(), expected.isfinite())


@triton.jit  # type: ignore[untyped-decorator]
def _functions(x: Any, of_tanh: Any, of_sigmoid: Any, SIZE: tl.constexpr) -> None:
    at = tl.arange(0, SIZE)
    tl.store(of_tanh + at, tanh(tl.load(x + at)))
    tl.store(of_sigmoid + at, sigmoid(tl.load(x + at)))


@pytest.mark.parametrize("low, high, most", [(1e-30, 0.35, 0.6), (0.35, 0.9749, 0.8), (0.975, 100.0, 0.8)])
def test_tanh_and_sigmoid(low: float, high: float, most: float) -> None:
    """Relative errors in units of 2^-23, of tanh in the mean square too."""
    x = torch.linspace(low, high, 2**13)
    x = torch.cat([x, -x])
    of_tanh, of_sigmoid = torch.empty_like(x), torch.empty_like(x)
    _functions[(1,)](x, of_tanh, of_sigmoid, 2**14)
    for y, exact, bound in ((of_tanh, x.double().tanh(), most), (of_sigmoid, x.double().sigmoid(), 2.5)):
        assert ((y.double() - exact).abs() <= bound * 2**-23 * exact.abs() + 2**-126).all()
    exact = x.double().tanh()
    assert ((of_tanh.double() - exact) / exact).square().mean().sqrt() <= 0.25 * 2**-23
    assert torch.equal(of_tanh, -of_tanh.roll(2**13))


def test_tanh_and_sigmoid_at_the_edges() -> None:
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf])
    of_tanh, of_sigmoid = torch.empty_like(x), torch.empty_like(x)
    _functions[(1,)](x, of_tanh, of_sigmoid, 4)
    assert of_tanh.tolist() == [0.0, 0.0, 1.0, -1.0]
    assert of_sigmoid.tolist() == [0.5, 0.5, 1.0, 0.0]


@pytest.mark.parametrize("name", ["sonnet", "blocks", "matrix"])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_norm_that_is_not_finite_is_seen(name: str, part: str) -> None:
    """In the values of a head, which no score depends on."""
    case = draw(SPECS[name], batch=3, steps=2, dtype=torch.float32)
    last = f"blocks.{case.spec.num_blocks - 1}.qkv_norm.{part}"
    case.params[last].data[-1] = math.nan
    with strict():
        memories = run(case)
    expected = unroll(case.spec, case.call())[0]
    assert expected.isnan().all()
    assert memories.isnan().all()


@pytest.mark.parametrize("name", ["sonnet", "matrix-blocks"])
def test_what_rounds_to_infinity_stays_in_its_batch_element(name: str) -> None:
    """A value that float16 cannot hold, of a norm whose numbers float32 can."""
    case = draw(SPECS[name], batch=8, steps=1, dtype=torch.float16)
    for block in range(case.spec.num_blocks):
        case.params[f"blocks.{block}.qkv_norm.weight"].data[-1] = 4e4
        case.params[f"blocks.{block}.qkv_norm.bias"].data[-1] = 0
    with strict():
        memories = run(case)
    expected = unroll(case.spec, case.call())[0]
    lost, expected_lost = (~t.isfinite().all(-1) for t in (memories, expected))
    assert 0 < expected_lost.flatten(1).all(1).sum() < 8, "the case shows nothing"
    assert torch.equal(lost, expected_lost)


@pytest.mark.parametrize("name", ["sonnet", "blocks", "textbook"])
def test_one_launch_takes_all_steps(name: str) -> None:
    found = []
    for steps in (1, 7):
        with strict() as report:
            run(draw(SPECS[name], steps=steps, dtype=torch.float32))
        found.append(report.launches)
    assert found[0] == found[1]
    assert found[0].count("forward") == 1
    assert len(found[0]) <= 4, "the input's projection, keys and values, and gate terms, each of all steps"


@pytest.fixture
def _tf32_as_it_was() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("_tf32_as_it_was")
def test_tf32_is_used_where_torch_says_so() -> None:
    case = draw(SPECS["sonnet"], batch=9, dtype=torch.float32)
    exact = unroll(case.spec, case.to(torch.float64).call())[0]
    errors = []
    for allowed in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        with strict():
            errors.append(float((run(case) - exact).abs().max()))
    assert errors[0] < 1e-6
    assert 1e-5 < errors[1] < 1e-2
    assert launch.precision(torch.bfloat16) == "ieee"


# -- barriers ----------------------------------------------------------------------------------------------------------


def _barriers() -> list[str]:
    """The line of every barrier of the forward kernel; `test_triton_backward.py` has all others."""
    path = Path(device.__file__).parent / "forward.py"
    return [
        f"{path.name}:{number}"
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if re.match(r"\s*tl\.debug_barrier\(\)", line)
    ]


@pytest.mark.parametrize("line", _barriers())
def test_every_barrier_is_missed(line: str) -> None:
    deep = replace(SPECS["blocks"], attention_mlp_layers=4)
    for spec in (deep, SPECS["textbook"]):
        with strict(without_barrier=line) as report:
            run(draw(spec, batch=2, steps=2, dtype=torch.float32))
        if report.barriers[line]:
            break
    assert report.barriers[line], "no case reaches this barrier"
    assert any(hazard.kind == "read after write" for hazard in report.hazards), report.hazards


# -- the protocol ------------------------------------------------------------------------------------------------------


def test_auto_leaves_the_interpreter_alone() -> None:
    found = explain(SPECS["sonnet"], torch.zeros(1))
    assert found.backend != "triton"
    assert "only interprets" in found.reasons["triton"]


@pytest.mark.parametrize(
    "spec, dtype, reason",
    [
        (SPECS["l0sg"], torch.float32, "jointly"),
        (CellSpec.sonnet(3, tiles.MOST_ROWS + 1, 4), torch.float32, "attended rows"),
        (SPECS["sonnet"], torch.float64, "x must be float32, bfloat16 or float16"),
    ],
)
def test_what_is_refused(spec: CellSpec, dtype: torch.dtype, reason: str) -> None:
    assert reason in str(TRITON.refuses(spec, dtype, torch.device("cpu")))


def _strided(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


@pytest.mark.parametrize("change", [_strided, lambda t: t[..., None].expand(*t.shape, 2)[..., 0]])
def test_any_strides(change: Callable[[Tensor], Tensor]) -> None:
    case = draw(SPECS["r2gen"], ("lengths", "resets"), dtype=torch.float32)
    with strict():
        expected = run(case)
        options = {name: change(value) if value.dim() > 1 else value for name, value in case.options.items()}
        params = {name: change(value) for name, value in case.params.items()}
        assert torch.equal(run(DrawnCall(case.spec, change(case.x), change(case.memory), params, options)), expected)
