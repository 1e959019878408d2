"""`make matrix`: the kernels that train compiled with every tile of the table for every target, without a GPU.

    python -m tests.training_matrix [--target sm_90 ...]

Prints what each uses; exit code 1 where one does not compile, does not fit the target's shared memory, or spills
registers in an inner loop.
"""

from __future__ import annotations

import argparse
from unittest.mock import patch

import torch
import triton

from rmc_kernels import CellSpec, backends
from rmc_kernels.backends.triton import tiles
from rmc_kernels.backends.triton.tiles import TABLE, Entry
from tests.assembly import Usage
from tests.cases import draw
from tests.compile_matrix import width
from tests.offline import TARGETS, offline

KERNELS = ("forward_kept", "recompute", "backward")


def compile_training(entry: Entry, target: str, kernel: str, spec: CellSpec | None = None) -> Usage:
    """What one of `KERNELS` uses with the entry's tile, with lengths and resets; a cell of 8 slots, 4 heads by default.

    Raises:
        Exception: whatever Triton raises where it does not compile or does not fit.
    """
    spec = spec or CellSpec.sonnet(16, 8, width(entry) // 4, 4)
    dtype = torch.float32 if entry.wide else torch.bfloat16
    call, backend = draw(spec, ("lengths", "resets"), batch=1, steps=1, dtype=dtype).call(), backends.BACKENDS["triton"]
    tile = entry.tile_on(target).fitted(spec.mem_size)
    with patch.object(tiles, "choose", return_value=tile), offline(target) as launches:
        memories, activations = backend.forward(spec, call, kernel == "forward_kept")
        if kernel != "forward_kept":
            needs = [True] * (3 + len(call.params))
            backend.backward(spec, call, memories, activations, torch.zeros_like(memories), needs)
    (launch,) = [launch for launch in launches if launch.name == kernel]
    return launch.usage()


def main() -> int:
    """Compile and print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this; may be repeated")
    targets, fine = parser.parse_args().target or TARGETS, True
    for entry in TABLE:
        for target in targets:
            for kernel in KERNELS:
                name = f"triton {triton.__version__}, {entry.tile_on(target)}, D = {width(entry)}, {target}, {kernel}"
                try:
                    found = compile_training(entry, target, kernel)
                except Exception as error:  # every tile is to be tried
                    print(f"{name}: {type(error).__name__}: {str(error)[-300:]}", flush=True)
                    fine = False
                else:
                    print(f"{name}: {found}", flush=True)
                    fine = fine and not found.inner
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
