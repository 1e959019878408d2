"""Compiled Triton kernels in the simulator of `tools.ptxsim`.

simulated           launches on CPU tensors: compiled for a GPU, run by the simulator
simulate            every cell, pass, dtype and target; kept in simulate.csv (`make simulate`)
simulated_device    a GPU for `rmc_kernels.bench.gpu` where there is none
"""
