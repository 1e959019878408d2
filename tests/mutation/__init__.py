"""Mutation: what the tests would not notice. `make mutate`; docs/mutation.md has the results.

    python -m tests.mutation reference            # PyTorch definition against vectors and the C++ kernels
    python -m tests.mutation triton --every 4     # device functions in the strict interpreter; every fourth mutant
    python -m tests.mutation barriers             # each bar.sync of compiled kernels left out under the simulator

Prints a line for each survivor and the kill rate; `--json FILE` writes all. A mutant is run in a forked process on a
copy of the package, so that none sees another.
"""
