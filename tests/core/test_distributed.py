"""DDP, FSDP2 and torch.distributed.checkpoint on two gloo processes, against one process with the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import nn

from rmc_kernels.distributed import replicate_scalars
from tests.core.distributed_script import CASES

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
EVERY_CASE = pytest.mark.parametrize(("variant", "backend"), CASES)


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """What the script found: relative differences by "what|variant|backend"."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.core.distributed_script", str(folder)], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, float] = json.loads((folder / "results.json").read_text())
    return found


def _at_most(bound: float, differences: dict[str, float], *keys: str) -> None:
    for key in keys:
        assert differences[key] <= bound, key


@pytest.mark.feature("DDP: gradients and updates of one process")
@EVERY_CASE
def test_ddp(variant: str, backend: str, differences: dict[str, float]) -> None:
    of = f"{variant}|{backend}"
    _at_most(1e-5, differences, f"DDP, gradients|{of}", f"DDP, after 3 updates|{of}")


@pytest.mark.feature("FSDP2: gradients and updates of one process, l0sg's scalars too")
@EVERY_CASE
def test_fsdp2(variant: str, backend: str, differences: dict[str, float]) -> None:
    of = f"{variant}|{backend}"
    _at_most(1e-5, differences, f"FSDP2, gradients|{of}", f"FSDP2, after 3 updates|{of}")


@pytest.mark.feature("FSDP2 with mixed precision (bfloat16)")
@EVERY_CASE
def test_fsdp2_in_bfloat16(variant: str, backend: str, differences: dict[str, float]) -> None:
    _at_most(0.05, differences, f"FSDP2 in bfloat16, gradients|{variant}|{backend}")  # 6 roundings of bfloat16


@pytest.mark.feature("torch.distributed.checkpoint: resume sharded, load into one process")
@EVERY_CASE
def test_checkpoints(variant: str, backend: str, differences: dict[str, float]) -> None:
    of = f"{variant}|{backend}"
    _at_most(0, differences, f"checkpoint, resumed|{of}", f"checkpoint, into one process|{of}")


def test_replicate_scalars_takes_a_module() -> None:
    with pytest.raises(TypeError, match="module must be an nn"):
        replicate_scalars(None)  # type: ignore[arg-type]
    assert replicate_scalars(nn.LSTM(2, 2)) == set()
