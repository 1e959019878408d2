"""`python -m rmc_kernels.benchmarks.gpu`."""

from rmc_kernels.benchmarks.gpu.command import main

if __name__ == "__main__":
    raise SystemExit(main())
