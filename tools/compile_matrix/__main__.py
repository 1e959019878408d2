"""`make matrix`: every Triton kernel compiled with every tile of the table for every target, without a GPU.

    python -m tools.compile_matrix [--target sm_90 ...] [--kernel forward ...] [--sample] [--page]

Compiles what `matrix.csv` does not have of these sources and this triton, adds it there, and writes
compile-matrix.md from all of it; `--sample` takes only what CI compiles anew, `--page` nothing. Exit code 1 where
a tile does not compile, does not fit the target's shared memory, or spills registers in an inner loop.
"""

from __future__ import annotations

import argparse

import triton

from tools.compile_matrix import traffic
from tools.compile_matrix.matrix import KERNELS, jobs, load, run, sample
from tools.compile_matrix.page import PAGE, page
from tools.offline import TARGETS


def main() -> int:
    """Compile, print what is found, write the page; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this; may be repeated")
    parser.add_argument("--kernel", action="append", choices=tuple(KERNELS), help="only this; may be repeated")
    parser.add_argument("--sample", action="store_true", help="only what CI compiles anew")
    parser.add_argument("--page", action="store_true", help="compile nothing")
    chosen = parser.parse_args()
    todo = [
        job
        for job in (sample if chosen.sample else jobs)(triton.__version__)
        if job.target in (chosen.target or TARGETS) and job.kernel in (chosen.kernel or KERNELS)
    ]
    fine = chosen.page or run(todo)
    PAGE.write_text(page(load(), traffic.load()))
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
