"""What a GPU can do, and what launches cost: every parameter of the model stands here, and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: Where a parameter is from.
SOURCES = {
    "W": "NVIDIA's A100 and H100 architecture white papers",
    "G": "CUDA C++ Programming Guide, throughput of native arithmetic instructions and technical specifications",
    "L": "Luo et al., arXiv:2402.13499 and 2501.12084, microbenchmarks; rounded",
    "C": "chipsandcheese.com, Nvidia's H100: Funny L2, and Tons of Bandwidth (2023); rounded down",
    "A": "an assumption, no more",
}
#: Schedulers of a streaming multiprocessor, each with its own pipes. [W]
SCHEDULERS = 4
#: Registers, warps and programs that a multiprocessor holds. [G]
REGISTERS, WARPS, PROGRAMS = 65536, 64, 32
#: Bytes of shared memory of each program that the system keeps. [G]
SHARED_OF_SYSTEM = 1024
#: Bytes of a sector, the unit of L2 traffic. [G]
SECTOR = 32

#: From the end of a kernel in a CUDA graph to the start of the one that waits for it, in seconds. [A]
GRAPH_NODE = 1.3e-6
#: A barrier across all programs of a cooperative launch, through atomics in L2, in seconds. [A]
GRID_BARRIER = 1.5e-6
#: Least time of any kernel, from its start to its end, in seconds. [A]
SHORTEST_KERNEL = 1.0e-6
#: Share of the tensor cores' peak that a well-cut large product reaches. [A]
PRODUCT_EFFICIENCY = 0.5
#: Kernels that cuDNN's LSTM launches a step: a product, and everything else. [A]
LSTM_KERNELS = 2
#: How far the model may be off, as a factor, either way. [A]
UNCERTAINTY = 2.0


def _of(source: str, meaning: str) -> Any:
    return field(metadata={"source": source, "meaning": meaning})


@dataclass(frozen=True)
class Gpu:
    """One GPU: its name, and as `tiles` names it; then what it can do, each with its meaning and a key of `SOURCES`."""

    name: str
    target: str
    processors: int = _of("W", "streaming multiprocessors")
    clock: float = _of("A", "Hz, sustained: at or a little below the boost clock")
    fp32: float = _of("G", "cycles of a scheduler's pipe for a warp's float32 add, multiply or fma")
    simple: float = _of("G", "likewise for integers, comparisons, conversions")
    special: float = _of("G", "likewise for exponentials and reciprocals")
    matrix: float = _of(
        "W, L", "likewise for mma.m16n8k16: the peak; on Hopper the share of it that mma was seen to reach"
    )
    shared: float = _of("W", "bytes of shared memory a clock")
    l2_port: float = _of("A", "bytes a clock that a multiprocessor takes from L2")
    arithmetic_latency: float = _of("L", "cycles until a result may be used")
    special_latency: float = _of("L", "likewise")
    matrix_latency: float = _of("L", "likewise")
    shuffle_latency: float = _of("L", "likewise")
    shared_latency: float = _of("L", "likewise, beyond moving the bytes")
    l2_latency: float = _of("L", "likewise")
    barrier_latency: float = _of("A", "cycles from the last warp's arrival")
    shared_memory: int = _of("G", "bytes of a multiprocessor for programs")
    l2_rate: float = _of("C", "bytes a second, all together")
    memory_rate: float = _of("W", "bytes a second, all together")
    tensor_rate: float = _of("W", "dense bfloat16 FLOP/s")
    float_rate: float = _of("W", "float32 FLOP/s outside the tensor cores, at the clock above")


A100 = Gpu(
    "A100 SXM", "sm_80", processors=108, clock=1.41e9,
    fp32=2, simple=2, special=8, matrix=8, shared=128, l2_port=48,
    arithmetic_latency=4, special_latency=18, matrix_latency=33, shuffle_latency=24, shared_latency=29, l2_latency=260,
    barrier_latency=22, shared_memory=164 << 10, l2_rate=4.0e12, memory_rate=1.55e12, tensor_rate=312e12,
    float_rate=19.5e12,
)  # fmt: skip
H100 = Gpu(
    "H100 SXM", "sm_90", processors=132, clock=1.755e9,
    fp32=1, simple=2, special=8, matrix=6.4, shared=128, l2_port=56,
    arithmetic_latency=4, special_latency=18, matrix_latency=33, shuffle_latency=24, shared_latency=29, l2_latency=265,
    barrier_latency=24, shared_memory=228 << 10, l2_rate=5.5e12, memory_rate=3.35e12, tensor_rate=989e12,
    float_rate=59e12,
)  # fmt: skip
GPUS = (H100, A100)
