"""`python -m rmc_kernels`: the command line."""

from rmc_kernels.cli import main

if __name__ == "__main__":
    main()
