"""Compares one Triton kernel with the reference, as a program for backends/triton/trust.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import torch

from rmc_kernels.spec import CellSpec
from rmc_kernels.verify.cases import Case
from rmc_kernels.verify.check import check_case


def fault(spec: str, dtype: str, gradients: str, device: str, precision: str) -> str:
    """What is wrong with a kernel, "" for nothing; the arguments are those of `backends.triton.trust.Kernel`.

    Raises:
        RuntimeError: the kernel does not run here, or there is no yardstick for it.
    """
    if precision == "tf32":
        torch.backends.cuda.matmul.allow_tf32 = True
    for case in _cases(CellSpec.from_json(spec), dtype, gradients):
        result = check_case(case, "triton", device=device)
        if result.status == "not served":
            raise RuntimeError(f"nothing was compared: {result.reason}")
        if result.status == "miss":
            past = [f"{name}: {compared}" for name, compared in result.misses.items()]
            return f"it differs from the reference by more than rounding: {result.reason or past[0]}"
    return ""


def _cases(spec: CellSpec, dtype: str, gradients: str) -> Iterator[Case]:
    """A small call without options, and one with all that the cell takes: Triton compiles them apart."""
    for options in (False, True):
        yield Case(
            spec, dtype, batch_size=3, steps=3, lengths=options, resets=options,
            dropout_mask=options and not spec.input_rows_live, gradients="all" if gradients else "none",
            recompute=gradients or "full",
        )  # fmt: skip


if __name__ == "__main__":
    print(json.dumps({"fault": fault(**json.loads(sys.argv[1]))}))
