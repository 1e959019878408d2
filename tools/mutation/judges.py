"""What a mutant has to survive: a small part of what the tests check, so that whatever dies here dies there.

`verdict` says what became of it. A judge goes from what finds most in the shortest time to what is dear. Here are that
of the reference and what all share; `triton_judges.py` and `cpp_judges.py` have the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from rmc_kernels import CellSpec, backends
from rmc_kernels.backends.reference import unroll
from tests import golden
from tests.cases import SPECS, VARIANTS, DrawnCall, draw
from tools.mutation.mutant import SURVIVED

#: Largest error of float32 in units of the largest value; honest float32 is within a hundredth of it.
TOLERANCE = 1e-5
#: Of bfloat16, and of float64.
TOLERANCE_HALF = 0.1
_TOLERANCE_64 = 1e-11
#: Of the cases that have any.
OPTIONS = ("lengths", "resets")
#: Cells whose sizes need several blocks of every loop, and many layers.
WIDE = {
    "wide-heads": CellSpec.sonnet(9, 2, 70, 1),
    "wide-keys": CellSpec.sonnet(3, 3, 12, 2, key_size=75),
    "five-layers": replace(SPECS["sonnet"], attention_mlp_layers=5),
}


class Killed(Exception):
    """The mutant was found out; the message says by what."""


def verdict(judge: Callable[[], None]) -> str:
    """`SURVIVED`, or "killed: " by what, or "raised: " which error; asserts of a test count as its findings."""
    try:
        judge()
    except (Killed, AssertionError) as found:
        return f"killed: {' '.join(str(found).split())}"
    except Exception as error:
        return f"raised: {type(error).__name__}: {error}"
    return SURVIVED


# -- the reference -----------------------------------------------------------------------------------------------------


def reference() -> None:
    """The reference: the original implementations' vectors, the C++ kernels, and its tests of what those cannot see.

    Raises:
        Killed: it differs.
    """
    from tests.core import test_reference

    for path in golden.files():
        vector = golden.load(path)
        if vector.outputs is not None:
            output, _ = vector.layer(vector.inputs, vector.memory)
            compare(output, vector.outputs, golden.tolerances(vector)[0], f"the original's vectors, {path.stem}")
    for name, spec in SPECS.items():
        shape = (spec.num_blocks, spec.num_heads, spec.mem_slots, spec.total_rows)
        for options in ((), OPTIONS):
            case = with_padding(draw(spec, options, dtype=torch.float32))
            exact, weights = unroll(spec, case.to(torch.float64).call())
            found = backends.BACKENDS["cpu"].forward(spec, case.call(), False)[0]
            compare(found, exact, TOLERANCE, f"the C++ kernels, {name}")
            running = _running(case)[:, :, None, None, None].expand(*case.x.shape[:2], *shape[:-1])
            compare(weights.sum(-1), running, TOLERANCE, "weights")
        half = draw(spec, OPTIONS, dtype=torch.bfloat16)
        exact = unroll(spec, half.to(torch.float64).call())[0]
        compare(unroll(spec, half.call())[0], exact, TOLERANCE_HALF, f"bfloat16, {name}")
        empty, weights = unroll(spec, draw(spec, batch=2, steps=0).call())
        if (*empty.shape, *weights.shape) != (2, 0, *exact.shape[2:], 2, 0, *shape):
            raise Killed(f"no steps, {name}")
    for name, dtype in product(VARIANTS, (torch.float32, torch.bfloat16)):
        test_reference.test_chunks_equal_the_whole_bit_for_bit(name, dtype)
    for name in ("blocks", "no-gate", "l0sg", "r2gen"):
        test_reference.test_what_stands_in_the_padding_never_matters(name, torch.nan)
    test_reference.test_lengths_freeze_the_memory_and_resets_past_them_are_ignored()
    test_reference.test_a_reset_starts_from_reset_memory_and_cuts_the_gradient()
    test_reference.test_gates_of_half_types_are_float32()


# -- what they share ---------------------------------------------------------------------------------------------------


def expected(case: DrawnCall) -> dict[str, Tensor]:
    """Memories, and the gradients of all leaves for the cotangent of `outcome`, by the reference."""
    for leaf in case.leaves().values():
        leaf.requires_grad_()
    memories = unroll(case.spec, case.call())[0]
    gradients = torch.autograd.grad(memories, list(case.leaves().values()), _cotangent(memories))
    found = {"memories": memories.detach(), **dict(zip(case.leaves(), gradients, strict=True))}
    for leaf in case.leaves().values():
        leaf.requires_grad_(False)
    return found


def outcome(
    backend: str | backends.Backend, case: DrawnCall, kept: bool, wanted: set[str] | None = None
) -> dict[str, Tensor]:
    """The same by a fused backend, all of it or only some gradients."""
    if isinstance(backend, str):
        backend = backends.BACKENDS[backend]
    call = case.call()
    memories, activations, _ = backend.forward(case.spec, call, kept)
    order: dict[str, Any] = {"x": call.x, "memory": call.memory, "reset_memory": call.reset_memory, **case.params}
    needs = [value is not None and (wanted is None or name in wanted) for name, value in order.items()]
    gradients = backend.backward(case.spec, call, memories, activations, _cotangent(memories), needs)
    named = zip(order, gradients, strict=True)
    return {"memories": memories, **{name: gradient for name, gradient in named if gradient is not None}}


def _cotangent(memories: Tensor) -> Tensor:
    drawn = torch.randn(memories.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return drawn.to(torch.float32).to(memories.dtype)


def _running(case: DrawnCall) -> Tensor:
    """[B, T], 1 where the step is within the element's length."""
    steps = torch.arange(case.x.shape[1])
    lengths = case.options.get("lengths", torch.full(case.x.shape[:1], len(steps)))
    return (steps < lengths[:, None]).double()


def with_padding(case: DrawnCall) -> DrawnCall:
    """The same with NaN past the lengths."""
    case.x[_running(case) == 0] = torch.nan
    return case


def compare_all(found: dict[str, Tensor], exact: dict[str, Tensor], what: str) -> None:
    for key, value in found.items():
        tolerance = _TOLERANCE_64 if value.dtype is torch.float64 else TOLERANCE
        compare(value, exact[key], tolerance, f"{key}, {what}")
        if key in ("x", "reset_memory") and value[exact[key] == 0].any():
            raise Killed(f"no zero: {key}, {what}")


def compare(found: Tensor, exact: Tensor, tolerance: float, what: str) -> None:
    if found.shape != exact.shape:
        raise Killed(f"a shape: {what}")
    error = float((found.double() - exact.double()).abs().max() / exact.abs().max().clamp(min=1.0))
    if not error <= tolerance:
        raise Killed(f"an error of {error:.1e}: {what}")
