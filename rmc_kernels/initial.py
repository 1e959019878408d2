"""Initial values: of the parameters, per variant, and of the memory, per mode."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rmc_kernels.spec import CellSpec

MEMORY_MODES = ("identity", "zeros", "normal", "learned")


def parameter_(name: str, value: Tensor, spec: CellSpec) -> None:
    """Fill one parameter in place.

    Norms start at gamma 1, beta 0. sonnet draws weights from a normal of sigma = 1/sqrt(fan_in) truncated at two
    sigma, biases 0 (Sonnet 1.36's Linear). The PyTorch variants draw both from U(-1/sqrt(fan_in), 1/sqrt(fan_in))
    (torch.nn.Linear), as their originals do.
    """
    if name in ("forget_bias", "input_bias"):
        nn.init.constant_(value, getattr(spec, name))
        return
    owner, leaf = name.rsplit(".", 1)
    if owner.endswith("norm"):
        nn.init.constant_(value, 1.0 if leaf == "weight" else 0.0)
        return
    bound = 1 / math.sqrt(spec.parameter_shapes[f"{owner}.weight"][1])
    if spec.variant != "sonnet":
        nn.init.uniform_(value, -bound, bound)
    elif leaf == "bias":
        nn.init.zeros_(value)
    else:
        nn.init.trunc_normal_(value, std=bound, a=-2 * bound, b=2 * bound)


def memory(mode: str, spec: CellSpec, batch_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A fresh initial memory [B, N, D].

    "identity": the identity [N, N], zero-padded on the right to D columns or cut to the first D (Sonnet's).
    "zeros". "normal": drawn from N(0, 1/D), so that a slot's expected squared norm is 1, as the identity's is.
    """
    shape = (batch_size, spec.mem_slots, spec.mem_size)
    if mode == "zeros":
        return torch.zeros(shape, device=device, dtype=dtype)
    if mode == "normal":
        return torch.randn(shape, device=device, dtype=dtype) / math.sqrt(spec.mem_size)
    identity = torch.eye(*shape[1:], device=device, dtype=dtype)
    return torch.zeros(shape, device=device, dtype=dtype).add_(identity)
