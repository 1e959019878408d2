"""The day there is a GPU: `make gpu` (`python -m rmc_kernels.bench.gpu STAGE`), with torch and triton alone.

    verify    parity of every variant, option and dtype
    runtime   the same bits every time, CUDA graphs, streams, devices, nothing that waits
    forward   time and memory beside eager PyTorch, torch.compile, eager in CUDA graphs and cuDNN's LSTM
    training  likewise with the backward pass

    device (what of CUDA's run time the stages use) -> isolated_process -> stages -> workload (how much) -> report

A stage goes on past whatever fails, and ends with exit code 1 then. Each leaves its part of one JSON and Markdown
report. tests/bench/test_gpu_command.py runs the command in the PTX simulator.
"""
