"""The backward pass of the Triton backend in the strict interpreter: every gradient, and what its launches promise."""

from __future__ import annotations

import math
import os
import re
import weakref
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rmc_kernels import CellSpec, RelationalMemory, backends
from rmc_kernels.backends import Backend, Call
from rmc_kernels.verify import Case, baseline, check_case
from tests.cases import SPECS, DrawnCall, draw
from tests.not_finite import draw_spec, kinds, spoil, spoil_padding, with_lengths

if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
    pytest.skip("runs under TRITON_INTERPRET=1, which `make test` sets", allow_module_level=True)

from rmc_kernels.backends.triton import device, gradients, launch, tiles
from tools.strict import Report, strict

TRITON = backends.BACKENDS["triton"]
SERVED = [name for name, spec in SPECS.items() if spec.variant != "l0sg"]
#: Cells whose sizes need several blocks of every loop at the tiles of small cells.
WIDE = {
    "wide-heads": CellSpec.sonnet(9, 2, 70, 1),
    "wide-keys": CellSpec.sonnet(3, 3, 12, 2, key_size=75),
    "five-mlp-layers": replace(SPECS["sonnet"], attention_mlp_layers=5),
    "three-matrix-blocks": replace(SPECS["matrix-blocks"], num_blocks=3),
    "wide-r2gen": CellSpec.r2gen(3, 66, 2, dropout=0.0),
}
#: Small cells that between them reach every barrier.
REACHING = (CellSpec.sonnet(1, 1, 3, num_blocks=2, attention_mlp_layers=4), CellSpec.textbook(1, 1, 3))


@pytest.fixture
def strict_interpreter() -> None:
    """Tests that ask for it bring their own: nested ones would see each other."""


def run_call(
    spec: CellSpec, call: Call, grad: Tensor | None = None, save: bool = False, backend: Backend = TRITON
) -> tuple[Tensor, dict[str, Tensor]]:
    """The memories, and every gradient of their product with `grad` (drawn where it is None), by name."""
    memories, activations, _ = backend.forward(spec, call, save)
    size = backend.activation_size(spec, call.batch_size, call.steps, call.x.dtype) if save else 0
    assert activations.numel() == size
    if grad is None:
        grad = torch.randn(memories.shape, generator=torch.Generator().manual_seed(1))
    names = ("x", "memory", "reset_memory", *spec.parameter_names)
    needs = [True, True, call.reset_memory is not None, *[True] * len(call.params)]
    found = backend.backward(spec, call, memories, activations, grad, needs)
    return memories, {name: g for name, g in zip(names, found, strict=True) if g is not None}


def run(case: DrawnCall, save: bool = False, grad: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """`run_call` of a case."""
    return run_call(case.spec, case.call(), grad, save)


# -- parity ------------------------------------------------------------------------------------------------------------


def _sampled(name: str, dtype: str, options: bool) -> list[pytest.MarkDecorator]:
    """One case in `make test`; `make interpret` has all."""
    return [] if (name, dtype, options) == ("sonnet", "float32", True) else [pytest.mark.slow]


PARITY = [
    pytest.param(name, dtype, options, id=f"{name}-{dtype}-{'options' if options else 'plain'}", marks=marks)
    for name in [*SERVED, *WIDE]
    for dtype in ("float32", "bfloat16", "float16")
    for options in (False, True)
    for marks in [_sampled(name, dtype, options)]
]


@pytest.mark.parametrize("name, dtype, options", PARITY)
def test_parity(name: str, dtype: str, options: bool) -> None:
    """By the criterion of `rmc verify`, on draws of a whole tile each, and so on fewer of them.

    With options that is lengths (NaN behind them), resets, dropout and activations that were kept.
    """
    spec = (SPECS | WIDE)[name]
    case = Case(
        spec, dtype, 16, 3, lengths=options, resets=options, dropout_mask=options and not spec.input_rows_live,
        recompute="none" if options else "full",
    )  # fmt: skip
    with patch.object(baseline, "FEWEST_DRAWS", dict.fromkeys(baseline.FEWEST_DRAWS, 4)), strict() as report:
        result = check_case(case, "triton")
    assert result.status == "right", (result.reason, result.misses)
    assert not report.hazards


@pytest.mark.slow
@pytest.mark.parametrize(
    "entry", tiles.BACKWARD, ids=lambda entry: f"{'float32' if entry.wide else 'half'}-{entry.tile.rows}"
)
def test_parity_with_every_tile(entry: tiles.Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter itself takes that of most rows; here heads, columns and inner dimensions need several blocks."""
    (tile, *_) = [
        other.tile for other in tiles.TABLE if other.wide == entry.wide and other.tile.rows == entry.tile.rows
    ]
    monkeypatch.setattr(tiles, "choose", lambda *args: tile.fitted(80))
    case = Case(
        CellSpec.sonnet(9, 3, 40, 2), "float32" if entry.wide else "bfloat16", 17, 1, lengths=True, resets=True
    )  # fmt: skip
    with patch.object(baseline, "FEWEST_DRAWS", dict.fromkeys(baseline.FEWEST_DRAWS, 3)), strict() as report:
        result = check_case(case, "triton")
    assert result.status == "right", (result.reason, result.misses)
    assert not report.hazards


@pytest.mark.parametrize("name", ["sonnet", pytest.param("matrix-blocks", marks=pytest.mark.slow)])
def test_kept_activations_are_the_recomputed_ones(name: str) -> None:
    case = draw(SPECS[name], ("lengths", "resets"), batch=3, steps=3, dtype=torch.float32)
    with strict() as report:
        kept, again = run(case, save=True), run(case)
    assert not report.hazards
    assert torch.equal(kept[0], again[0])
    for key in ("x", "memory", "reset_memory"):
        assert torch.equal(kept[1][key], again[1][key]), key
    for key, value in kept[1].items():
        torch.testing.assert_close(value, again[1][key], msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sonnet", "textbook"])
def test_what_is_not_finite_stays_in_its_batch_element(name: str) -> None:
    case = draw(SPECS[name], batch=4, steps=2, dtype=torch.float32)
    others = [0, 2, 3]
    grad = torch.ones(4, 2, case.spec.mem_slots, case.spec.mem_size)
    with strict():
        clean = run(case, grad=grad)[1]
        grad[1, 1, 0, 0] = math.inf
        found = [run(case, grad=grad)[1]]
        grad[1, 1, 0, 0] = 1.0
        case.memory[1, 0, 0] = math.nan
        found.append(run(case, grad=grad)[1])
    for gradients_found in found:
        for key in ("x", "memory"):
            assert torch.equal(gradients_found[key][others], clean[key][others])
            assert not gradients_found[key][1].isfinite().any()
        assert not gradients_found["blocks.0.qkv.weight"].isfinite().any()


SLOWER = [
    pytest.param(name, value, marks=pytest.mark.slow)
    for name in ("r2gen", "sonnet", "matrix-blocks", "no-gate")
    for value in (math.nan, math.inf)
]


@pytest.mark.parametrize("name, value", [("r2gen", math.nan), *SLOWER[1:]])
def test_what_stands_in_the_padding_never_matters(name: str, value: float) -> None:
    """Of x and a dropout mask past the length; and of both memories where an element never runs."""
    case = draw(SPECS[name], ("lengths", "resets"), batch=4, steps=3, dtype=torch.float32)
    call = with_lengths(case.call())
    with strict():
        memories, clean = run_call(case.spec, call)
        for save in (False, True):
            spoiled, found = run_call(case.spec, spoil_padding(call, value), save=save)
            assert torch.equal(spoiled[[1, 2]], memories[[1, 2]])
            assert (kinds(spoiled[[0, 3]]) == kinds(torch.tensor(value))).all()
            for key, grad in clean.items():
                torch.testing.assert_close(found[key], grad, msg=key)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities
@pytest.mark.parametrize("seed", range(8))
def test_infinities_travel_as_in_eager(seed: int) -> None:
    random = Random(seed)
    spec = draw_spec(random, ("sonnet", "textbook", "r2gen"))
    options = random.choice(((), ("lengths", "resets")))
    call = draw(spec, options, batch=3, steps=2, dtype=torch.float32, seed=seed).call()
    grad = torch.ones(3, 2, spec.mem_slots, spec.mem_size)
    call, grad = spoil(random, call, grad, "inputs", (math.inf, -math.inf))
    memories, want = run_call(spec, call, grad, backend=backends.BACKENDS["reference"])
    for save in (False, True):
        found, got = run_call(spec, call, grad, save)
        assert torch.equal(kinds(found), kinds(memories))
        for key, value in want.items():
            assert torch.equal(got[key].isfinite(), value.isfinite()), key


# -- launches, chunks, memory ------------------------------------------------------------------------------------------


def _launched(report: Report) -> Counter[str]:
    return Counter(report.launches)


@pytest.mark.parametrize(
    "steps, chunks",
    [(1, 1), pytest.param(6, 1, marks=pytest.mark.slow), pytest.param(6, 3, marks=pytest.mark.slow)],
)
def test_a_chunk_is_one_launch_to_recompute_and_one_to_walk_back(
    steps: int, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = draw(SPECS["sonnet"], ("lengths", "resets"), batch=2, steps=steps, dtype=torch.float32)
    with strict() as report:
        whole = run(case)[1]
    assert _launched(report)["backward"] == _launched(report)["recompute"] == 1
    if chunks > 1:
        monkeypatch.setattr(gradients, "WORKSPACE_BYTES", _workspace(case.spec, steps // chunks, *_tiles(case)))
        with strict() as report:
            found = run(case)[1]
        assert _launched(report)["backward"] == _launched(report)["recompute"] == chunks
        for name in ("x", "memory", "reset_memory"):
            assert torch.equal(found[name], whole[name]), name
        for name, value in whole.items():
            torch.testing.assert_close(found[name], value, msg=name)
    others = sum(count for name, count in _launched(report).items() if name not in ("backward", "recompute"))
    assert others <= 9, "the forward pass; the input's side, for it, for its recomputation and on the way back"


def _tiles(case: DrawnCall) -> tuple[int, int]:
    """Programs of a call, and rows of all of them."""
    rows = launch.tile_of(case.spec, case.call()).rows
    programs = -(-case.x.shape[0] // (rows // tiles.padded_rows(case.spec)))
    return programs, programs * rows


def _workspace(spec: CellSpec, steps: int, programs: int, rows: int, save: bool = False, itemsize: int = 4) -> int:
    """Bytes that grow with the steps of a chunk, as docs/triton-backend.md has them; one block."""
    width, features, gates = spec.mem_size, spec.qkv_size, 2 * spec.gate_size
    layers, projection = spec.attention_mlp_layers, spec.has_output_projection
    relus = layers - 1 + spec.mlp_ends_in_relu
    in_tile = tiles.input_rows_in_tile(spec)
    kept = itemsize * (features + relus * width + projection * width) + 4 * ((2 + in_tile) * width + gates + 7)
    work = itemsize * (2 * width + features + layers * width + projection * width)
    work += itemsize * (width + gates) if gates else 0
    sums = 4 * (2 * features + 4 * width)
    return steps * (rows * (work + (0 if save else kept)) + sums * programs)


def _address(value: Any) -> int:
    """Where a tensor's or a storage's memory is; 0 for anything else."""
    storage = value.untyped_storage() if isinstance(value, Tensor) else value
    return int(storage.data_ptr()) if isinstance(storage, torch.UntypedStorage) else 0


class _Peak(TorchDispatchMode):
    """The most bytes that tensors made inside hold at one time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {_address(leaf) for leaf in tree_leaves((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _address(leaf) not in known | self._known:
                storage = leaf.untyped_storage()
                self._known.add(storage.data_ptr())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage.data_ptr(), storage.nbytes())
        return result

    def _free(self, pointer: int, size: int) -> None:
        self._known.discard(pointer)
        self.now -= size


@pytest.mark.slow
@pytest.mark.parametrize("save", [False, True])
def test_peak_memory_is_the_formula_of_the_docs(save: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = CellSpec.sonnet(5, 4, 16, 2)
    case = draw(spec, batch=16, steps=4, dtype=torch.float32)
    call, steps, (programs, rows) = case.call(), case.x.shape[1], _tiles(case)
    workspace = _workspace(spec, 2, programs, rows, save)
    monkeypatch.setattr(gradients, "WORKSPACE_BYTES", workspace)
    with strict():
        memories, activations, _ = TRITON.forward(spec, call, save)
        grad = torch.ones_like(memories)
        with _Peak() as peak:
            TRITON.backward(spec, call, memories, activations, grad, [True, True, False, *[True] * len(call.params)])
    width, features, gates = spec.mem_size, spec.qkv_size, 2 * spec.gate_size
    parameters = 4 * spec.parameter_count
    fixed = 4 * rows * (3 * width + features + 2 * width)
    inputs = 4 * 16 * steps * (2 * features + 2 * gates + width)
    formula = workspace + fixed + inputs + 2 * parameters
    assert 0.8 * formula < peak.peak < 1.2 * formula
    kept = _workspace(spec, steps, 1, 64) - _workspace(spec, steps, 1, 64, save=True)
    assert activations.numel() == (kept if save else 0)


# -- the same bits -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_run_and_every_order_of_programs_has_the_same_bits() -> None:
    case = draw(SPECS["sonnet"], ("lengths", "resets"), batch=17, steps=1, dtype=torch.float32)
    found = []
    for seed in range(2):
        with strict(seed):
            found.append(run(case)[1])
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


# -- barriers ----------------------------------------------------------------------------------------------------------


def _barriers() -> list[str]:
    """The line of every barrier in the device functions but `forward.py`."""
    folder = Path(device.__file__).parent
    return [
        f"{path.name}:{number}"
        for path in sorted(folder.glob("*.py"))
        if path.name != "forward.py"
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if re.match(r"\s*tl\.debug_barrier\(\)", line)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("line", _barriers())
def test_every_barrier_is_missed(line: str) -> None:
    save = line.startswith("forward_kept")
    for spec in REACHING:
        with strict(without_barrier=line) as report:
            run(draw(spec, batch=1, steps=2, dtype=torch.float32), save=save)
        if report.barriers[line]:
            break
    assert report.barriers[line], "no case reaches this barrier"
    assert any(hazard.kind == "read after write" for hazard in report.hazards), report.hazards


# -- training ----------------------------------------------------------------------------------------------------------


def _losses(backend: str, steps: int) -> list[float]:
    """Of a tiny layer that learns to give the sum of a sequence."""
    torch.manual_seed(0)
    layer = RelationalMemory(3, 2, 4, attention_mlp_layers=1, backend=backend)
    readout = torch.nn.Linear(layer.output_size, 1)
    optimizer = torch.optim.Adam([*layer.parameters(), *readout.parameters()], lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x = torch.randn(8, 2, 3, generator=generator)
        output, _ = layer(x)
        loss = (readout(output[:, -1])[:, 0] - x.sum((1, 2))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


@pytest.mark.slow
def test_training_follows_the_reference() -> None:
    with strict() as report:
        losses = _losses("triton", 50)
    assert not report.hazards
    assert _launched(report)["backward"] == 50
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(_losses("reference", 50)), rtol=1e-3, atol=1e-4)
    assert sum(losses[-10:]) < sum(losses[:10]) / 2
