"""Runs the PTX that Triton compiles on the CPU: what a GPU is given, without one.

    report = launch(Program(ptx), (programs, 1, 1), [x, y, n], warps=4, schedule="warp", seed=1)   # CPU tensors
    assert not report.races

`tools.simulate.simulated` hands it what Triton launches.

Right numbers, and what a GPU would punish: accesses out of bounds or misaligned, data races between warps and between
programs, reads of shared memory that nobody wrote (NaN), warp instructions that a part of a warp executes, deadlocks,
endless loops. An instruction that it does not know is refused with its text and source line, before anything runs.

    parse          PTX text -> Kernel
    translator     one basic block -> Python on numpy arrays, an element a thread
    instructions, thread_instructions            what each opcode becomes
    arithmetic, tensor_cores                     what numpy does not compute
    program        a kernel as blocks, each compiled when first run
    races, memory  bytes, bounds, and who touched what
    unit, machine  threads, warps, barriers, schedules
    launch         torch tensors in and out

It shows nothing about speed, and nothing about SASS, which ptxas makes of PTX. Fences are no-ops and missing: kernels
that talk to other programs, atomics, TMA and wgmma are refused. Approximate instructions are computed exactly.
"""

from tools.ptxsim.errors import (
    AccessError,
    Deadlock,
    DivergenceError,
    LimitExceeded,
    SimulationError,
    Unsupported,
)
from tools.ptxsim.launch import launch
from tools.ptxsim.machine import Report, Schedule
from tools.ptxsim.program import Program

__all__ = [
    "AccessError",
    "Deadlock",
    "DivergenceError",
    "LimitExceeded",
    "Program",
    "Report",
    "Schedule",
    "SimulationError",
    "Unsupported",
    "launch",
]
