"""Run by torchrun on two processes (tests/core/test_distributed.py): a training script, unwrapped and wrapped.

Writes results.json into the folder argv[1]: {"what|variant|backend": largest relative difference to the unwrapped run}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rmc_kernels import RelationalMemory
from rmc_kernels.compat import l0sg
from rmc_kernels.distributed import replicate_scalars
from tests.habits import SPECS

#: The wrappers see parameters and gradients, not the backend: one variant on the reference will do.
CASES = [*((variant, "cpu") for variant in (*SPECS, "compat l0sg")), ("l0sg", "reference")]
FULL = StateDictOptions(full_state_dict=True)


class Model(nn.Module):
    """The layer (or the drop-in, for "compat l0sg") and a readout; the same weights at every construction."""

    def __init__(self, variant: str, backend: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.core: nn.Module
        if variant == "compat l0sg":
            self.core = l0sg.RelationalMemory(3, 4, 8, 2, backend=backend)
        else:
            self.core = RelationalMemory.from_spec(SPECS[variant], backend=backend)
        self.readout = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.core, l0sg.RelationalMemory):
            last = self.core(x, self.core.initial_state(x.shape[0]))[0]
        else:
            last = self.core(x)[0][:, -1]
        return self.readout(last)  # type: ignore[no-any-return]


def train(model: nn.Module, x: Tensor, steps: int, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`steps` clipped updates; the gradients of the first, whole."""
    first: dict[str, Tensor] = {}
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        first = first or {name: whole(value.grad).clone() for name, value in model.named_parameters()}
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
    return first


def whole(value: Any) -> Tensor:
    """A sharded tensor in full."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def adam(model: nn.Module) -> torch.optim.Adam:
    """Adam whose epsilon hides no difference behind a sign."""
    return torch.optim.Adam(model.parameters(), 1e-2, eps=1e-3)


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of any tensor, relative to its largest element; infinite where names differ."""
    if ours.keys() != theirs.keys():
        return float("inf")
    errors = [(ours[name] - value).abs().max() / (value.abs().max() + 1e-6) for name, value in theirs.items()]
    return max(error.item() for error in errors)


def compare(variant: str, backend: str, folder: Path) -> dict[str, float]:
    """Every wrapper of one model against the same script on one process with the whole batch."""
    x = torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(1))
    half = x.chunk(2)[dist.get_rank()]
    mesh = init_device_mesh("cpu", (2,))
    single = Model(variant, backend)
    expected = train(single, x, 3, adam(single))
    final = {name: value.detach() for name, value in single.named_parameters()}

    ddp = DistributedDataParallel(Model(variant, backend))
    gradients = train(ddp, half, 3, adam(ddp))
    found = {"DDP, gradients": difference({name[7:]: value for name, value in gradients.items()}, expected)}
    found["DDP, after 3 updates"] = difference({n: v.detach() for n, v in ddp.module.named_parameters()}, final)

    def sharded(dtype: torch.dtype | None = None) -> nn.Module:
        model = Model(variant, backend)
        scalars, policy = replicate_scalars(model), MixedPrecisionPolicy(dtype, torch.float32)
        for module in (model.core, model):
            fully_shard(module, mesh=mesh, ignored_params=scalars, mp_policy=policy)
        return model

    model = sharded()
    optimizer = adam(model)
    found["FSDP2, gradients"] = difference(train(model, half, 3, optimizer), expected)
    found["FSDP2, after 3 updates"] = difference({n: whole(v.detach()) for n, v in model.named_parameters()}, final)

    mixed = sharded(torch.bfloat16)
    found["FSDP2 in bfloat16, gradients"] = difference(train(mixed, half, 1, adam(mixed)), expected)

    weights, moments = get_state_dict(model, optimizer)
    state_dict_saver.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    other = sharded()
    with torch.no_grad():
        for value in other.parameters():
            value.zero_()
    resumed = adam(other)
    weights, moments = get_state_dict(other, resumed)
    state_dict_loader.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=moments)
    train(other, half, 1, resumed)
    train(model, half, 1, optimizer)
    found["checkpoint, resumed"] = difference(
        {n: whole(v.detach()) for n, v in other.named_parameters()},
        {n: whole(v.detach()) for n, v in model.named_parameters()},
    )
    plain = Model(variant, backend)
    set_model_state_dict(plain, get_model_state_dict(model, options=FULL), options=FULL)
    found["checkpoint, into one process"] = difference(
        {n: v.detach() for n, v in plain.named_parameters()},
        {n: whole(v.detach()) for n, v in model.named_parameters()},
    )
    return found


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    folder = Path(sys.argv[1])
    for variant, backend in CASES:
        for name, error in compare(variant, backend, folder / f"{variant} {backend}").items():
            results[f"{name}|{variant}|{backend}"] = error
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
