"""64-bit offsets: the last program of a launch whose tensors have more than 2^31 elements, in the interpreter.

The tensors are sparse files: only what that program touches takes memory. It is given what the one program of a small
launch was given, at the far end of every tensor, and has to leave the same there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
    pytest.skip("runs under TRITON_INTERPRET=1, which `make test` sets", allow_module_level=True)

from triton.runtime import interpreter

from rmc_kernels import backends
from rmc_kernels.backends.triton import launch, tiles
from rmc_kernels.backends.triton.device.forward import forward
from rmc_kernels.backends.triton.device.project import project
from rmc_kernels.backends.triton.parameters import Linear
from tests.cases import SPECS, draw

#: Offsets of 32 bits end here.
END = 2**31
#: Arguments of the kernels that do not grow with the batch.
FIXED = ("weight", "bias", "gamma", "beta")
Kernel = Any


@pytest.fixture
def strict_interpreter() -> None:
    """It keeps a record of every element, which are too many here."""


class _Captured:
    """In place of a kernel: runs it and keeps the last launch's grid and arguments by name."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.grid: tuple[int, ...] = ()
        self.arguments: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            self.grid = grid
            self.arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            self.kernel[grid](*args, **kwargs)

        return run


def _run_last_program(
    captured: _Captured, times: int, monkeypatch: pytest.MonkeyPatch, folder: Path, **sizes: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Run the captured launch's only program as the last of `times`; name -> (far end of the argument, all of it).

    An access elsewhere than at the far ends is an error.

    Args:
        captured: a launch of one program along its first axis.
        times: how many programs the large launch has, and how many times as large its tensors are.
        monkeypatch: of the test.
        folder: for the sparse files.
        sizes: scalar arguments of the large launch.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    regions: list[tuple[int, int]] = []
    for name, small in captured.arguments.items():
        if isinstance(small, Tensor):
            end = small
            if not name.endswith(FIXED):
                large = torch.from_file(str(folder / name), shared=True, size=small.numel() * times, dtype=small.dtype)
                end = large[-small.numel() :].copy_(small.flatten())
                found[name] = end, large
                captured.arguments[name] = large
            regions.append((end.data_ptr(), end.data_ptr() + end.numel() * end.element_size()))

    def checked(original: Callable[..., Any], mask: int) -> Callable[..., Any]:
        def access(builder: Any, pointers: Any, *rest: Any) -> Any:
            at = pointers.data[np.broadcast_to(rest[mask].data, pointers.data.shape)]
            inside = any(bool(((start <= at) & (at < stop)).all()) for start, stop in regions)
            assert inside, "an access outside what this program has"
            return original(builder, pointers, *rest)

        return access

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    monkeypatch.setattr(builder, "set_grid_idx", lambda self, *_: setattr(self, "grid_idx", (times - 1, 0, 0)))
    monkeypatch.setattr(executor, "_restore_args_dev", lambda *args: None)  # it copies each tensor to itself
    for name, mask in (("create_masked_load", 0), ("create_masked_store", 1)):
        monkeypatch.setattr(builder, name, checked(getattr(builder, name), mask))
    captured.kernel[captured.grid](**captured.arguments | sizes)
    return found


@pytest.mark.parametrize("name", ["r2gen", "matrix-blocks"])
def test_the_forward_kernel_takes_tensors_past_32_bits(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = SPECS[name]
    tile = tiles.choose(spec, torch.float32, "", 1, 1)
    batch, steps = tile.rows // tiles.padded_rows(spec), 2
    case = draw(spec, ("lengths", "resets"), batch=batch, steps=steps, dtype=torch.float32)
    captured = _Captured(forward)
    monkeypatch.setattr(launch, "forward", captured)
    expected = backends.BACKENDS["triton"].forward(spec, case.call(), False)[0]
    assert captured.grid == (1,)
    captured.arguments["out"] = torch.full_like(expected, torch.nan)
    times = END // case.memory.numel() + 2
    found = _run_last_program(captured, times, monkeypatch, tmp_path, batch=batch * times)
    assert torch.equal(found["out"][0].view_as(expected), expected)
    large = {argument for argument, (_, whole) in found.items() if whole.numel() > END}
    assert large >= {"out", "memory", "reset_memory", "inputs", "z", "hidden", "candidate"}, large
    assert large >= ({"mask", "input_gates", "gates"} if spec.dropout else {"entered"}), large


def test_the_projection_takes_tensors_past_32_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = tiles.PROJECTION.rows
    captured = _Captured(project)
    monkeypatch.setattr(launch, "project", captured)
    linear = Linear(torch.randn(1, 16, 32), torch.randn(1, 16))
    expected = launch.project_rows(torch.randn(rows, 32), linear)
    captured.arguments["out"] = torch.full_like(expected, torch.nan)
    times = END // expected.numel() + 2
    found = _run_last_program(captured, times, monkeypatch, tmp_path, count=rows * times)
    assert torch.equal(found["out"][0].view_as(expected), expected)
    assert all(whole.numel() > END for _, whole in found.values())
