"""`python -m rmc_kernels.bench.gpu`."""

from rmc_kernels.bench.gpu.command import main

if __name__ == "__main__":
    raise SystemExit(main())
