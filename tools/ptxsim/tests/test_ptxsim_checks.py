"""What `tools.ptxsim` reports: races, accesses out of bounds, deadlocks, endless loops; on hand-written PTX."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tools.ptxsim import (
    AccessError,
    Deadlock,
    DivergenceError,
    LimitExceeded,
    Program,
    Report,
    Schedule,
    Unsupported,
    launch,
)

WARPS = 2
THREADS = 64
SCHEDULES: tuple[Schedule, ...] = ("lockstep", "warp")
TEMPLATE = """.version 8.7
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(
 .param .u64 x, .param .u64 y
)
.reqntid 64
{
 .reg .b32 %r<20>; .reg .b64 %rd<20>; .reg .pred %p<9>;
 .loc 1 1 1 // k.py:1:1
 ld.param.b64 %rd1, [x]; ld.param.b64 %rd2, [y]; mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x;
 shl.b32 %r3, %r1, 2; mov.b32 %r4, global_smem; add.s32 %r4, %r4, %r3;
 mad.wide.u32 %rd1, %r1, 4, %rd1; mad.wide.u32 %rd2, %r1, 4, %rd2;
BODY
 ret;
}
"""
#: The word of the same thread in the other warp.
OTHER = " xor.b32 %r5, %r1, 32; shl.b32 %r5, %r5, 2; mov.b32 %r6, global_smem; add.s32 %r5, %r5, %r6;"


def run(
    body: str, programs: int = 1, schedule: Schedule = "lockstep", words: int = THREADS, **options: Any
) -> tuple[Report, list[int]]:
    """Run `body` on x = 0, 1, ... and y, [words] int32; its line k has the location "k.py:k". The report, and y."""
    lines = enumerate(body.strip().splitlines(), start=2)
    located = "\n".join(f" .loc 1 {k} 1 // k.py:{k}:1\n{line}" for k, line in lines)
    x, y = torch.arange(words, dtype=torch.int32), torch.zeros(words, dtype=torch.int32)
    program = Program(TEMPLATE.replace("BODY", located))
    report = launch(program, (programs, 1, 1), [x, y], warps=WARPS, shared=4 * THREADS, schedule=schedule, **options)
    return report, y.tolist()


def races(body: str, programs: int = 1, schedule: Schedule = "lockstep", **options: Any) -> list[str]:
    """Those of `run`."""
    return run(body, programs, schedule, **options)[0].races


EXCHANGE = f"""
st.shared.b32 [%r4], %r1;
bar.sync 0;
{OTHER} ld.shared.b32 %r7, [%r5]; st.global.b32 [%rd2], %r7;
"""


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_barrier_orders_warps(schedule: Schedule) -> None:
    report, y = run(EXCHANGE, schedule=schedule)
    assert not report.races
    assert y == [i ^ 32 for i in range(THREADS)]
    assert report.barriers == {0: 1 if schedule == "lockstep" else 2}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("seed", range(4))
def test_a_missing_barrier_is_a_race_in_every_order(schedule: Schedule, seed: int) -> None:
    found = races(EXCHANGE, schedule=schedule, seed=seed, without_barriers=[0])
    assert found
    for race in found:
        assert re.fullmatch("(read after write|write after read) at shared memory .*", race)
        assert "k.py:2:1" in race
        assert "k.py:4:1" in race


def test_races_are_not_looked_for_where_they_are_not_wanted() -> None:
    report, y = run(EXCHANGE, without_barriers=[0], races=False)
    assert not report.races
    assert y == [i ^ 32 for i in range(THREADS)]  # in lockstep


def test_seeds_change_the_order_of_warps() -> None:
    """The warp that comes first reads what the other one has not written yet."""
    found = {tuple(run(EXCHANGE, schedule="warp", seed=seed, without_barriers=[0])[1]) for seed in range(8)}
    assert len(found) == 2


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "body, kind",
    [
        (f"{OTHER} ld.shared.b32 %r7, [%r5];\nst.shared.b32 [%r4], %r1;", "(write after read|read after write)"),
        (f"st.shared.b32 [%r4], %r1;\n{OTHER} st.shared.b32 [%r5], %r1;", "write after write"),
        ("mov.b32 %r6, global_smem;\nst.shared.b32 [%r6], %r1;", "(one instruction|write after write)"),
    ],
)
def test_races_between_warps(body: str, kind: str, schedule: Schedule) -> None:
    found = races(body, schedule=schedule)
    assert found
    assert all(re.match(f"{kind} at shared memory", race) for race in found), found


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "body, kind",
    [
        ("add.s32 %r1, %r1, %r2;\nst.global.b32 [%rd2], %r1;", "write after write|one instruction"),
        ("ld.global.b32 %r7, [%rd1];\nst.global.b32 [%rd1], %r7;", "write after read"),
        ("setp.eq.b32 %p1, %r2, 0;\n@%p1 st.global.b32 [%rd2], 5;\nbar.sync 0;\n@!%p1 ld.global.b32 %r7, [%rd2];",
         "read after write"),
    ],
)  # fmt: skip
def test_races_between_programs_which_no_barrier_orders(body: str, kind: str, schedule: Schedule) -> None:
    assert not races(body, schedule=schedule)
    found = races(body, programs=2, schedule=schedule)
    assert any(re.match(f"({kind}) at argument [01] ", race) for race in found), found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warps_that_hold_the_same_value_may_store_it_to_one_place_and_read_it_back(schedule: Schedule) -> None:
    """A layout with replicated threads; a warp that did not store the value has to wait."""
    body = """
and.b32 %r7, %r1, 31; shl.b32 %r8, %r7, 2; mov.b32 %r9, global_smem; add.s32 %r8, %r8, %r9;
st.shared.b32 [%r8], %r7;
ld.shared.b32 %r10, [%r8];
"""
    assert not races(body, schedule=schedule)
    only_one = "setp.lt.u32 %p1, %r1, 32;\n" + body.strip().replace("st.shared", "@%p1 st.shared")
    assert races(only_one, schedule=schedule)


def test_what_is_allowed_is_noted_and_no_race() -> None:
    report, _ = run(EXCHANGE, without_barriers=[0], allow=["k.py:4"])
    assert not report.races
    assert len(report.allowed) == 1
    assert races(EXCHANGE, without_barriers=[0], allow=["k.py:40", "k.py:3"])


COPY = """
cp.async.ca.shared.global [%r4], [%rd1], 0x4;
cp.async.commit_group;
cp.async.wait_group 0;
ld.shared.b32 %r7, [%r4];
st.global.b32 [%rd2], %r7;
"""


def test_a_copy_is_there_when_it_was_waited_for() -> None:
    report, y = run(COPY)
    assert not report.races
    assert y == list(range(THREADS))


@pytest.mark.parametrize("change", [("wait_group 0", "wait_group 1"), ("%r4];", "%r5];")])
def test_a_copy_that_was_not_waited_for_is_a_race(change: tuple[str, str]) -> None:
    """Its own warp needs no barrier, another one does."""
    found = races(COPY.replace("ld.shared", f"{OTHER} ld.shared").replace(*change))
    assert any("read after write at shared memory" in race for race in found)


def test_memory_that_nobody_wrote_is_poison() -> None:
    _, y = run("ld.shared.b32 %r7, [%r4];\nst.global.b32 [%rd2], %r7;")
    assert set(y) == {-1}


@pytest.mark.parametrize(
    "body, message",
    [
        (
            "ld.global.b32 %r7, [%rd1+4];",
            "out of bounds: 4 bytes at argument 0 . 256 of 256 bytes, by program 0 thread 63",
        ),
        (
            "ld.global.b32 %r7, [%rd1+-4];",
            "out of bounds: 4 bytes at argument 0 . -4 of 256 bytes, by program 0 thread 0",
        ),
        ("ld.global.b32 %r7, [%rd1+2];", "misaligned: 4 bytes at argument 0 . 2 of"),
        ("st.shared.b32 [%r4+4], %r7;", "out of bounds: 4 bytes at shared memory . 256, by program 0 thread 63"),
        ("mov.b64 %rd3, 0;ld.global.b32 %r7, [%rd3];", "out of bounds"),
    ],
)
def test_accesses_have_to_be_in_bounds_and_aligned(body: str, message: str) -> None:
    with pytest.raises(AccessError, match=f"{message}.*k.py:2:1"):
        run(body)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_deadlock_says_who_waits_where(schedule: Schedule) -> None:
    body = "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra $L1;\nbar.sync 0;\n$L1:\n"
    with pytest.raises(Deadlock) as raised:
        run(body, schedule=schedule)
    assert "program 0, 64 threads" in str(raised.value)
    assert "32 wait at barrier 0, `bar.sync 0` (k.py:4:1)" in str(raised.value)
    assert "32 have ended" in str(raised.value)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_endless_loop_ends(schedule: Schedule) -> None:
    with pytest.raises(LimitExceeded, match=r"more than 1000 instructions.*k.py:3:1"):
        run("$L1:\nbra.uni $L1;", schedule=schedule, limit=1000)


@pytest.mark.parametrize(
    "statement",
    [
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%r5,%r6,%r7,%r8}, {%r5,%r6}, {%r7}, {%r5,%r6,%r7,%r8};",
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r4];",
        "shfl.sync.bfly.b32 %r5,%r1,1,31,-1;",
        "cp.async.commit_group;",
    ],
)
def test_a_warp_has_to_execute_some_instructions_together(statement: str) -> None:
    body = f"setp.lt.u32 %p1, %r1, 5;\n@%p1 bra $L1;\n{statement}\n$L1:\n"
    with pytest.raises(DivergenceError, match=r"k\.py:4:1"):
        run(body)


def test_barriers_of_some_threads_are_refused() -> None:
    with pytest.raises(Unsupported, match="some threads"):
        run("bar.sync 1, 32;")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_programs_have_memory_of_their_own(schedule: Schedule) -> None:
    body = """
mad.lo.s32 %r7, %r2, 100, %r1; st.shared.b32 [%r4], %r7; bar.sync 0;
ld.shared.b32 %r8, [%r4]; mul.wide.u32 %rd3, %r2, 256; add.s64 %rd2, %rd2, %rd3; st.global.b32 [%rd2], %r8;
"""
    report, y = run(body, programs=2, schedule=schedule, words=2 * THREADS)
    assert not report.races
    assert y == [*range(64), *range(100, 164)]
