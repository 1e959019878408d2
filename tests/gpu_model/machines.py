"""What a GPU can do, and what launches cost: every parameter of the model stands here, and nowhere else.

Sources, cited from memory (this was written offline), so look them up before quoting:
[W] NVIDIA's A100 and H100 architecture white papers.
[G] CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions" and "Technical Specifications".
[L] Luo et al., arXiv:2402.13499 and 2501.12084, microbenchmarks; rounded.
[C] chipsandcheese.com, "Nvidia's H100: Funny L2, and Tons of Bandwidth" (2023); rounded down.
[A] an assumption, no more.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: of the GPU.
        target: as `tiles` names it.
        processors: streaming multiprocessors. [W]
        clock: sustained, in Hz. [A], at or a little below the boost clock of [W].
        fp32, simple, special, matrix: cycles for which a warp instruction keeps its pipe of a scheduler busy: float32
            add, multiply, fma; integers, comparisons, conversions; exponentials and reciprocals; mma.m16n8k16. [G], the
            last from the peak of [W], for `mma` on Hopper at the share of it that [L] saw.
        shared: bytes of shared memory a clock, of a multiprocessor. [W]
        l2_port: bytes a clock that a multiprocessor takes from L2. [A]
        arithmetic_latency, special_latency, matrix_latency, shuffle_latency, shared_latency, l2_latency,
            barrier_latency: cycles until a result may be used. [L], the barrier's [A].
        shared_memory: bytes of a multiprocessor that programs may use. [G]
        l2_rate, memory_rate: bytes a second of all together. [C], [W].
        tensor_rate: dense bfloat16 FLOP/s. [W]
        float_rate: float32 FLOP/s outside the tensor cores, at `clock`. [W]
    """

    name: str
    target: str
    processors: int
    clock: float
    fp32: float
    simple: float
    special: float
    matrix: float
    shared: float
    l2_port: float
    arithmetic_latency: float
    special_latency: float
    matrix_latency: float
    shuffle_latency: float
    shared_latency: float
    l2_latency: float
    barrier_latency: float
    shared_memory: int
    l2_rate: float
    memory_rate: float
    tensor_rate: float
    float_rate: float


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
