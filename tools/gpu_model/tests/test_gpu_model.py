"""The model of gpu-model.md on counts small enough to do by hand, and the page on what is committed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1" or find_spec("triton") is None or torch.cuda.is_available():
    pytest.skip("for a process without a GPU that does not interpret", allow_module_level=True)

from rmc_kernels.backends.triton.activations import training_plan
from rmc_kernels.backends.triton.kept import MARKS
from rmc_kernels.bench.contestants import bind_eager
from rmc_kernels.bench.problem import draw
from tests.bench_cases import SMALL_TRAINING, CountOps
from tools.gpu_model import machines, model
from tools.gpu_model.counting import Counts, Key, count, load, sectors, wavefronts
from tools.gpu_model.machines import GPUS, H100
from tools.gpu_model.operations import Operation, operations
from tools.gpu_model.page import PAGE, page
from tools.gpu_model.replay import Scoreboard
from tools.ptxsim.parse import parse

#: Round numbers: one warp to a scheduler, everything a power of ten or two.
GPU = replace(
    H100, name="round", processors=10, clock=1e9, fp32=2, simple=2, special=8, matrix=10, shared=128, l2_port=32,
    arithmetic_latency=4, special_latency=20, matrix_latency=30, shuffle_latency=25, shared_latency=30,
    l2_latency=200, barrier_latency=20, shared_memory=100 << 10, l2_rate=1e12, memory_rate=1e11, tensor_rate=1e13,
    float_rate=1e12,
)  # fmt: skip
COUNTS = Counts(
    "", warps=4, registers=128, shared=1000,
    executed={"matrix": 100, "fp32": 200, "simple": 50, "barrier": 5, "free": 9}, wavefronts=300, sectors=400,
    in_order={"round": 4000.0}, reordered={"round": 1000.0},
)  # fmt: skip


def _cycles(operations: Sequence[Operation], *, warps: int = 4, reorder: bool = False) -> float:
    return Scoreboard(GPU, warps, {}, reorder).run(operations, range(len(operations)))


LOAD = Operation("load", ("a",), (), 4)
ADD = Operation("fp32", ("b",), ("a",))
OTHER = Operation("fp32", ("c",), ("d",))
BARRIER = Operation("barrier", (), ())


# -- replay ------------------------------------------------------------------------------------------------------------


def test_what_waits_for_a_load_starts_after_it() -> None:
    """4 warps, a sector each: 4 cycles of the L2 port, 200 until it is there; then the addition is issued in one."""
    assert _cycles([LOAD, ADD]) == 4 + 200 + 1


def test_a_chain_takes_the_latency_of_each() -> None:
    chain = [Operation("fp32", (str(i + 1),), (str(i),)) for i in range(10)]
    assert _cycles(chain) == 9 * 4 + 1
    assert _cycles([Operation("matrix", (str(i + 1),), (str(i),)) for i in range(3)]) == 2 * 30 + 1


def test_what_is_independent_takes_its_pipe() -> None:
    alike = [Operation("fp32", (str(i),), ()) for i in range(10)]
    assert _cycles(alike) == 9 * 2 + 1
    assert _cycles(alike, warps=8) == 9 * 2 * 2 + 2
    assert _cycles([Operation("matrix", (str(i),), ()) for i in range(10)]) == 9 * 10 + 1


def test_only_the_reordered_replay_passes_over_what_waits() -> None:
    """A second load goes out at once, or when the addition before it has started."""
    second = replace_registers(LOAD, "x")
    assert _cycles([LOAD, ADD, second, replace_registers(ADD, "x")], reorder=True) == 8 + 200
    assert _cycles([LOAD, ADD, second, replace_registers(ADD, "x")]) == (204 + 1) + 4 + 200 + 1


def replace_registers(operation: Operation, suffix: str) -> Operation:
    """The same on other registers."""
    return operation._replace(
        writes=tuple(name + suffix for name in operation.writes), reads=tuple(name + suffix for name in operation.reads)
    )


@pytest.mark.parametrize("reorder", [False, True])
def test_nothing_passes_a_barrier(reorder: bool) -> None:
    """The load is begun before it; what comes after it is not."""
    assert _cycles([OTHER, BARRIER, OTHER], reorder=reorder) == 1 + 20 + 1
    assert _cycles([BARRIER] * 10, reorder=reorder) == 200


@pytest.mark.parametrize("reorder", [False, True])
def test_a_wait_lasts_until_a_group_of_copies_is_there(reorder: bool) -> None:
    copy, commit = Operation("copy", (), (), 16), Operation("commit", (), ())
    wait_all, wait_one = Operation("wait", (), (), 0), Operation("wait", (), (), 1)
    read = Operation("shared", ("a",), (), 16)
    assert _cycles([copy, commit, wait_all, read], reorder=reorder) == pytest.approx(4 + 200 + 1, abs=1)
    two = [copy, commit, copy, commit]
    first, both = (_cycles([*two, wait, read], reorder=reorder) for wait in (wait_one, wait_all))
    assert both - first == 4


def test_instructions_are_known_by_their_unit() -> None:
    kernel = parse("""
.visible .entry k(.param .u64 k_p) {
 .reg .b32 %r<9>; .reg .b64 %rd<3>; .reg .pred %p<2>;
 ld.param.b64 %rd1, [k_p];
 @%p1 ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];
 st.shared.b32 [%r1], %r2;
 fma.rn.f32 %r5, %r1, %r2, %r3;
 add.s32 %r6, %r1, 4;
 ex2.approx.f32 %r7, %r5;
 cp.async.wait_group 1;
 bar.sync 0;
 ret;
}
""")
    found = operations(kernel)
    assert [operation.unit for operation in found] == [
        "free", "load", "shared", "fp32", "simple", "special", "wait", "barrier", "free",
    ]  # fmt: skip
    assert found[1] == Operation("load", ("%r1", "%r2", "%r3", "%r4"), ("%p1", "%rd1"), 16)
    assert found[2] == Operation("shared", (), ("%r1", "%r2"), 4)
    assert found[6].size == 1


def test_sectors_and_wavefronts_are_those_of_each_warp() -> None:
    lanes, warp = np.arange(64), np.arange(64) // 32
    assert sectors(4 * lanes, warp) == [4, 4]
    assert sectors(0 * lanes, warp) == [1, 1]
    assert sectors(32 * lanes, warp) == [32, 32]
    assert wavefronts(4 * lanes, 4, warp) == [1, 1]
    assert wavefronts(0 * lanes, 4, warp) == [1, 1]
    assert wavefronts(128 * lanes, 4, warp) == [32, 32]
    assert wavefronts(16 * lanes, 16, warp) == [4, 4]


# -- model -------------------------------------------------------------------------------------------------------------


def test_units_are_busy_for_what_they_execute() -> None:
    assert model.pipes(COUNTS, GPU) == {
        "tensor cores": 1000,  # 100 of 10 cycles, one warp to a scheduler
        "FP32 ALU": 400,
        "other ALU": 100,
        "exponentials": 0,
        "issue": 355,
        "shared memory": 300,
        "L2 port": 400,  # sectors of 32 bytes at 32 bytes a clock
    }
    assert model.pipes(replace(COUNTS, warps=8), GPU)["tensor cores"] == 2000
    assert model.chain(COUNTS, GPU) == 2000


def test_programs_fit_by_registers_shared_memory_and_warps() -> None:
    assert model.resident(COUNTS, GPU) == 65536 // (128 * 128) == 4
    assert model.resident(replace(COUNTS, registers=225), GPU) == 65536 // (232 * 128) == 2
    assert model.resident(replace(COUNTS, shared=49 << 10), GPU) == 2
    assert model.resident(replace(COUNTS, registers=8, shared=0), GPU) == 64 // 4
    assert model.resident(replace(COUNTS, registers=255, warps=16), GPU) == 1


@pytest.mark.parametrize(
    "batch, programs, together, rounds, microseconds, bound",
    [
        (2, 1, 1, 1, 2.0, "barriers, latency"),  # 2000 cycles at 1 GHz
        (20, 10, 1, 1, 2.0, "barriers, latency"),
        (60, 30, 3, 1, 3.0, "tensor cores"),  # 3 times 1000 cycles
        (61, 31, 4, 1, 4.0, "tensor cores"),
        (82, 41, 4, 2, 8.0, "tensor cores"),  # 5 to a multiprocessor, of which 4 fit
    ],
)
def test_a_step_takes_the_longest_of_its_parts(
    batch: int, programs: int, together: int, rounds: int, microseconds: float, bound: str
) -> None:
    """16 rows are 2 elements of 8 slots."""
    found = model.fused(model.Size(8, 64, batch), GPU, COUNTS, 16)
    assert (found.programs, found.together, found.rounds) == (programs, together, rounds)
    assert found.time.seconds == pytest.approx(microseconds * 1e-6)
    assert found.time.bound == bound


def test_traffic_of_all_programs_counts() -> None:
    """40 programs of 400 sectors of 32 bytes at 1e11 bytes a second; then memory at 1e9."""
    size = model.Size(8, 64, 80)
    slow = replace(GPU, l2_rate=1e11)
    assert model.fused(size, slow, COUNTS, 16).time == model.Estimate(40 * 400 * 32 / 1e11, "L2")
    row = 2 * (3 * 64 + 2 * 64) + 4 * 8 * 64  # q, k, v and gates of the input in bfloat16, the memory in float32
    assert model.least_bytes(size) == 80 * row
    assert model.fused(size, replace(GPU, memory_rate=1e9), COUNTS, 16).time == model.Estimate(80 * row / 1e9, "memory")


def test_other_schedules_wait_and_work() -> None:
    """What is small waits, what is large works."""
    key = Key("bfloat16", 64, 16)
    blocks = model.column_blocks(key)
    assert blocks == 3 + 2 + 3 * 1 + 4  # q k v, gates, two layers and the update, heads, in blocks of 64 columns
    found = model.others(model.Size(8, 64, 1), GPU, {key: COUNTS})
    phase = 2e-6 / blocks
    assert found["phases in a graph"].seconds == pytest.approx(5 * (machines.GRAPH_NODE + phase), rel=0.05)
    assert found["cooperative"].seconds == pytest.approx(5 * (machines.GRID_BARRIER + phase), rel=0.05)
    assert found["eager in a graph"].seconds == pytest.approx(19 * 2.3e-6, rel=0.05)
    assert found["cuDNN LSTM"].seconds == pytest.approx(2 * 2.3e-6, rel=0.05)
    assert {estimate.bound for estimate in found.values()} == {"synchronisation"}
    size = model.Size(8, 64, 10**6)
    flops = size.spec.flops_per_step(10**6, part="recurrent")
    slow = model.others(size, replace(GPU, tensor_rate=1e10), {key: COUNTS})["phases in a graph"]
    assert slow.bound == "products"
    assert slow.seconds == pytest.approx(flops / 5e9, rel=1e-3)


def test_training_is_the_sum_of_its_passes() -> None:
    """2 programs of 16 rows; recomputed 4 to a multiprocessor, of which there are 10, in a chain of 2000 cycles."""
    size = model.Size(8, 64, 4)
    found = model.training(size, GPU, dict.fromkeys(model.KEYS, COUNTS))
    assert found.forward == found.walk == pytest.approx(2e-6)
    assert found.recomputation == pytest.approx(2 / 40 * 4000e-9)  # 4 programs' products take longer than a chain
    # activations: q, k, v, a hidden layer; two wide rows, gates, seven marks. Work: eight rows, q, k, v, gates.
    kept = 2 * (3 * 64 + 64) + 4 * (2 * 64 + 2 * 64 + 7) + 2 * (4 * 64 + 3 * 64 + 64 + 2 * 64)
    assert model.kept_bytes(size) == kept
    assert found.products == pytest.approx(2 * 32 * kept / 1e11)
    assert found.rivals["eager in a graph"] == pytest.approx(74 * 2.3e-6)
    assert found.seconds == pytest.approx(found.forward + found.recomputation + found.walk + found.products)


def test_rows_kept_are_those_of_the_backend() -> None:
    """The bytes of a row and step by the plan that the kernels are given."""
    size = model.Size(8, 64, 4)
    plan = training_plan(size.spec, size.tile(H100), "ieee")
    work = 2 * plan.work_width
    assert model.kept_bytes(size) == work + 2 * plan.kind_width + 4 * (plan.wide_width + MARKS * plan.num_blocks)


def test_the_eager_loop_has_so_many_kernels_backwards() -> None:
    counted = []
    for steps in (3, 5):
        bound = bind_eager(draw(replace(SMALL_TRAINING, steps=steps)))
        output = bound.forward()
        with CountOps() as count:
            torch.autograd.grad(output, list(bound.leaves.values()), bound.grad)
        counted.append(count.kernels)
    assert counted[1] - counted[0] == 2 * model.EAGER_BACKWARD_KERNELS


# -- what is committed -------------------------------------------------------------------------------------------------


def test_everything_is_counted() -> None:
    assert set(load()) == set(model.KEYS)


def test_the_page_is_that_of_the_counts() -> None:
    assert PAGE.read_text() == page(load()), "`make model` writes it"


def test_products_counted_are_those_of_the_cell() -> None:
    """mma.m16n8k16 by the cell's FLOPs, attention apart, which works on the tile's 16 rows at once."""
    for key, found in load().items():
        if key.dtype == "bfloat16" and key.kernel == "forward":
            spec, per_mma = key.spec, 2 * 16 * 8 * 16
            rows = spec.qkv_size + 2 * spec.gate_size + spec.mem_size * spec.attention_mlp_layers
            projections = 2 * key.rows * rows * spec.mem_size / per_mma / found.warps
            attention = 2 * 2 * key.rows**2 * spec.mem_size / per_mma / found.warps
            assert projections <= found.executed["matrix"] <= projections + 4 * attention, str(key)


def test_replays_enclose_what_no_schedule_can_change() -> None:
    for key, found in load().items():
        for gpu in GPUS:
            assert found.reordered[gpu.name] <= found.in_order[gpu.name], str(key)
            assert found.reordered[gpu.name] >= max(model.pipes(found, gpu).values()), str(key)
            assert found.reordered[gpu.name] >= found.executed["barrier"] * gpu.barrier_latency, str(key)


@pytest.mark.slow
def test_a_step_is_counted_as_it_was() -> None:
    """Products, barriers and traffic of the smallest; ALU instructions may differ by a release of Triton."""
    key = Key("bfloat16", 64, 16)
    before, now = load()[key], count(key)
    for unit in ("matrix", "barrier", "copy", "store"):
        assert now.executed[unit] == before.executed[unit], f"{unit}: `make model` counts anew"
    assert now.sectors == before.sectors
    assert now.in_order[H100.name] == pytest.approx(before.in_order[H100.name], rel=0.1)
