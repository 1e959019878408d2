"""Random small cells with infinities and NaN in their tensors, and how to compare what backends make of them."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import torch
from torch import Tensor

from rmc_kernels.backends.protocol import Call
from rmc_kernels.spec import GATE_STYLES, CellSpec

INF, NAN = float("inf"), float("nan")
VARIANTS = ("sonnet", "textbook", "l0sg", "r2gen")
#: On either side of the widths of vectors, which are 4, 8 and 16 numbers.
HEAD_SIZES = (1, 2, 3, 4, 5, 7, 8, 11, 16, 17)


def draw_spec(random: Random, variants: tuple[str, ...] = VARIANTS) -> CellSpec:
    """A cell of odd sizes, with any of the options of its variant."""
    variant, heads, head_size = random.choice(variants), random.choice((1, 1, 2, 3)), random.choice(HEAD_SIZES)
    slots, inputs = random.choice((1, 2, 3, 5, 33)), random.choice((1, 3, 5, 8, 9, 16))
    layers, key_size = random.choice((1, 2, 3)), random.choice((None, None, 1, 3, 5, 9))
    gate_style, blocks = random.choice(GATE_STYLES), random.choice((1, 1, 2))
    if variant == "textbook":
        return CellSpec.textbook(random.choice((inputs, heads * head_size)), slots, head_size, heads, mlp_layers=layers)
    if variant == "r2gen":
        return CellSpec.r2gen(slots, heads * head_size, heads)
    if variant == "l0sg":
        return CellSpec.l0sg(
            slots, head_size, inputs, heads, num_blocks=blocks, gate_style=gate_style, key_size=key_size,
            attention_mlp_layers=layers,
        )  # fmt: skip
    return CellSpec.sonnet(
        inputs, slots, head_size, heads, num_blocks=blocks, gate_style=gate_style, key_size=key_size,
        attention_mlp_layers=layers, input_rows=random.choice((None, None, 1, 2, 3)),
    )  # fmt: skip


def spoil(random: Random, call: Call, grad: Tensor, where: str, values: tuple[float, ...]) -> tuple[Call, Tensor]:
    """Copies with one to three numbers replaced, in `where`: "inputs" (x and memories), "parameters" or "gradient"."""
    given = {name: getattr(call, name) for name in ("x", "memory", "reset_memory")}
    inputs = {name: value.clone() for name, value in given.items() if value is not None}
    params, grad = tuple(param.clone() for param in call.params), grad.clone()
    targets = {"inputs": tuple(inputs.values()), "parameters": params, "gradient": (grad,)}[where]
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        target = random.choice(targets).view(-1)
        target[random.randrange(target.numel())] = random.choice(values)
    return replace(call, params=params, **inputs), grad


def with_lengths(call: Call) -> Call:
    """Of a call of four elements and at least three steps with resets: none, two, all, and fewer than none."""
    return replace(call, lengths=torch.tensor([0, 2, call.steps, -1]))


def spoil_padding(call: Call, value: float) -> Call:
    """`value` in everything that no step of a call of `with_lengths` reads."""
    x, memory, reset_memory, mask = (
        None if t is None else t.clone() for t in (call.x, call.memory, call.reset_memory, call.dropout_mask)
    )
    assert x is not None
    assert memory is not None
    assert reset_memory is not None
    for t in (x, memory, reset_memory, mask):
        if t is not None:
            t[[0, 3]] = value
    for t in (x, mask):
        if t is not None:
            t[1, 2:] = value
    return replace(call, x=x, memory=memory, reset_memory=reset_memory, dropout_mask=mask)


def kinds(value: Tensor) -> Tensor:
    """0 where a number is finite, 1 and 2 for the infinities, 3 for NaN."""
    infinite = torch.where(value == INF, 1, torch.where(value == -INF, 2, 0))
    return torch.where(value.isnan(), 3, infinite)
