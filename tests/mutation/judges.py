"""What a mutant has to survive: a small part of what the tests check, so that whatever dies here dies there.

`verdict` says what became of it. A judge goes from what finds most in the shortest time to what is dear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle, product
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from rmc_kernels import CellSpec, backends
from rmc_kernels.backends import cpu
from rmc_kernels.backends.reference import unroll
from tests import golden
from tests.cases import SPECS, VARIANTS, Case, draw
from tests.mutation.mutant import SURVIVED

#: Largest error of float32 in units of the largest value; honest float32 is within a hundredth of it.
TOLERANCE = 1e-5
#: Of bfloat16, and of float64.
_TOLERANCE_HALF = 0.1
_TOLERANCE_64 = 1e-11
_OPTIONS = ("lengths", "resets")


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
    from tests import test_reference

    for path in golden.files():
        vector = golden.load(path)
        if vector.outputs is not None:
            output, _ = vector.layer(vector.inputs, vector.memory)
            _compare(output, vector.outputs, golden.tolerances(vector)[0], f"the original's vectors, {path.stem}")
    for name, spec in SPECS.items():
        shape = (spec.num_blocks, spec.num_heads, spec.mem_slots, spec.total_rows)
        for options in ((), _OPTIONS):
            case = _with_padding(draw(spec, options, dtype=torch.float32))
            exact, weights = unroll(spec, case.to(torch.float64).call())
            found = backends.BACKENDS["cpu"].forward(spec, case.call(), False)[0]
            _compare(found, exact, TOLERANCE, f"the C++ kernels, {name}")
            running = _running(case)[:, :, None, None, None].expand(*case.x.shape[:2], *shape[:-1])
            _compare(weights.sum(-1), running, TOLERANCE, "weights")
        half = draw(spec, _OPTIONS, dtype=torch.bfloat16)
        exact = unroll(spec, half.to(torch.float64).call())[0]
        _compare(unroll(spec, half.call())[0], exact, _TOLERANCE_HALF, f"bfloat16, {name}")
        empty, weights = unroll(spec, draw(spec, batch=2, steps=0).call())
        if (*empty.shape, *weights.shape) != (2, 0, *exact.shape[2:], 2, 0, *shape):
            raise Killed(f"no steps, {name}")
    for name, dtype in product(VARIANTS, (torch.float32, torch.bfloat16)):
        test_reference.test_chunks_equal_the_whole_bit_for_bit(name, dtype)
    test_reference.test_what_stands_in_the_padding_never_matters()
    test_reference.test_lengths_freeze_the_memory_and_resets_past_them_are_ignored()
    test_reference.test_a_reset_starts_from_reset_memory_and_cuts_the_gradient()
    test_reference.test_gates_of_half_types_are_float32()


# -- the Triton kernels ------------------------------------------------------------------------------------------------

#: Cells whose sizes need several blocks of every loop, and many layers.
_WIDE = {
    "wide-heads": CellSpec.sonnet(9, 2, 70, 1),
    "wide-keys": CellSpec.sonnet(3, 3, 12, 2, key_size=75),
    "five-layers": replace(SPECS["sonnet"], attention_mlp_layers=5),
}
#: For the Triton kernels, whose loops and masks depend on what the widths are multiples of; variants with an output
#: projection, and input rows in the tile, that are wide.
_WIDTHS = {
    "whole blocks": CellSpec.sonnet(4, 3, 16, 2),
    "one more": CellSpec.sonnet(3, 2, 17, 1),
    "whole blocks of parts of heads": CellSpec.sonnet(3, 2, 12, 4),
    "wide textbook": CellSpec.textbook(5, 4, 20, 2),
    "wide matrix": CellSpec.sonnet(3, 2, 20, 2, num_blocks=3, input_rows=2),
}
#: Small cells that reach every line of the device functions; those that reach most come first.
_SMALL = (
    "sonnet", "matrix-blocks", "r2gen", "textbook", "memory-gate", "no-gate", "matrix", "blocks", "one-mlp-layer",
    "key-size",
)  # fmt: skip
#: Which options they have, by turns: a kernel is another one without each of them.
_TURNS = (("lengths", "resets"), ("resets",), ("lengths",))


def triton() -> None:
    """The forward pass of the Triton kernels in the strict interpreter: right, and no hazard.

    Raises:
        Killed: it differs, or nothing orders two accesses.
    """
    for name, case in triton_cases().items():
        _interpreted(name, case, False)
    from tests import test_triton_interpreted as tests

    for name, value in product(("sonnet", "matrix-blocks"), (torch.nan, torch.inf)):
        tests.test_what_is_not_finite_stays_in_its_batch_element(name, value)
    for name in ("sonnet", "matrix-blocks"):
        tests.test_what_rounds_to_infinity_stays_in_its_batch_element(name)
        tests.test_a_norm_that_is_not_finite_is_seen(name.replace("-blocks", ""), "bias")
    for name in ("sonnet", "textbook", "r2gen"):
        tests.test_a_value_that_overflows_stays_in_its_batch_element(name, torch.float32, 1e25, 1e15)
        tests.test_a_value_that_overflows_stays_in_its_batch_element(name, torch.float16, 1e4, 1e2)
    tests.test_tanh_and_sigmoid(1e-30, 0.3499, 0.75)
    tests.test_tanh_and_sigmoid(0.5, 100.0, 2.5)
    tests.test_tanh_and_sigmoid_at_the_edges()
    for name in ("sonnet", "r2gen"):  # what these functions keep for the backward pass
        _interpreted(name, triton_cases()[name], True, True)


def triton_backward() -> None:
    """Their gradients too, from activations that are computed again and from those that were kept.

    Raises:
        Killed: one differs, or nothing orders two accesses.
    """
    for number, (name, case) in enumerate(triton_cases().items()):
        for kept in (False, True) if number < 3 else (number % 2 > 0,):
            _interpreted(name, case, True, kept)
    from tests import test_triton_backward as tests

    tests.test_what_is_not_finite_stays_in_its_batch_element()


def _interpreted(name: str, case: Case, gradients: bool, kept: bool = False) -> None:
    from rmc_kernels.backends.triton import launch, tiles
    from tests.strict import strict

    several = case.x.shape[0] > 2
    processors = 10**6 if several else 1  # many: the tile of fewest rows, of which there are several then
    projection = tiles.Tile(16, 16, 16, 0, 4, 2) if several else tiles.PROJECTION
    with (
        strict() as report,
        patch.object(launch, "_processors", lambda: processors),
        patch.object(tiles, "PROJECTION", projection),
    ):
        found = outcome("triton", case, kept) if gradients else {"memories": _forward("triton", case)}
    if report.hazards:
        raise Killed(f"{next(iter(report.hazards)).kind}, {name}")
    exact = expected(case.to(torch.float64))
    tolerance = TOLERANCE if case.x.dtype is torch.float32 else _TOLERANCE_HALF
    for key, value in found.items():
        _compare(value, exact[key], tolerance, f"{key}, {name}")


def triton_cases() -> dict[str, Case]:
    """Small cells that reach every line of the device functions; those that reach most come first."""
    lengths = torch.tensor([3, 0, 2, 1, 3])
    resets = torch.tensor(
        [[0, 1, 0], [1, 0, 0], [0, 0, 1], [1, 0, 0], [0, 1, 1]]
    )  # of the second and third: past the end
    found = {}
    for name, options in zip(_SMALL, cycle(_TURNS), strict=False):
        batch = 3 if name.startswith("matrix") else 5  # one more than fits the smallest tile
        case = draw(SPECS[name], options, batch=batch, steps=3, dtype=torch.float32)
        drawn = {"lengths": lengths[:batch], "resets": resets[:batch].bool()}
        case.options |= {option: drawn[option] for option in options}
        found[name] = _with_padding(case)
    found |= {f"{name} bfloat16": found[name].to(torch.bfloat16) for name in ("sonnet", "matrix-blocks", "r2gen")}
    wide = _WIDTHS | _WIDE
    return found | {name: draw(spec, batch=2, steps=2, dtype=torch.float32) for name, spec in wide.items()}


# -- the C++ kernels ---------------------------------------------------------------------------------------------------


#: A case with what the reference makes of it.
Vector = tuple[str, Case, dict[str, Tensor]]


def cpp_vectors(dtype: str) -> list[Vector]:
    """Every cell with and without options; one step; several groups of batch elements; wide heads and keys."""
    drawn: dict[str, Case] = {}
    kind = getattr(torch, dtype)
    for name, spec in SPECS.items():
        for options in (_OPTIONS, ()):
            drawn[f"{name}{' with options' * bool(options)}"] = draw(spec, options, dtype=kind)
    drawn["groups"] = draw(SPECS["sonnet"], _OPTIONS, batch=40, steps=9, dtype=kind)
    drawn |= {f"one step, {name}": draw(SPECS[name], batch=2, steps=1, dtype=kind) for name in VARIANTS}
    drawn |= {name: draw(spec, batch=2, steps=2, dtype=kind) for name, spec in _WIDE.items()}
    return [(name, case, expected(case.to(torch.float64))) for name, case in drawn.items() if _with_padding(case)]


def cpp(backend: backends.Backend, vectors: Sequence[Vector]) -> None:
    """C++ kernels against the reference: memories and gradients, saved and recomputed, in one thread and in two.

    Raises:
        Killed: something differs.
    """
    for threads, kept, (name, case, exact) in _cpp_calls(vectors):
        torch.set_num_threads(threads)
        for key, value in outcome(backend, case, kept).items():
            tolerance = _TOLERANCE_64 if value.dtype is torch.float64 else TOLERANCE
            _compare(value, exact[key], tolerance, f"{key}, {name}")
    if vectors[0][1].x.dtype is torch.float32:
        _cpp_functions()
    name, case, exact = next(vector for vector in vectors if vector[0] == "groups")
    for wanted in ("x", "memory", "blocks.0.qkv.weight"):
        found = outcome(backend, case, False, {wanted})[wanted]
        _compare(found, exact[wanted], TOLERANCE, f"{wanted} alone, {name}")


def _cpp_functions() -> None:
    """exp, sigmoid and tanh of float32, at the edges too."""
    module = vars(cpu)["_C"]
    x = torch.cat([torch.linspace(-86, 86, 4001), torch.tensor([200.0, -200.0, torch.inf, -torch.inf, torch.nan])])
    for number, function in enumerate((torch.exp, torch.sigmoid, torch.tanh)):
        y = torch.empty_like(x)
        module.vector_math("generic", number, x.data_ptr(), y.data_ptr(), x.numel())
        exact = function(x)
        same = torch.isclose(y, exact, rtol=4e-7, atol=1e-37, equal_nan=True)
        if not same.all():
            raise Killed(f"{function.__name__} of {x[~same][0]:g}")


def _cpp_calls(vectors: Sequence[Vector]) -> Iterator[tuple[int, bool, Vector]]:
    """(threads, whether activations are kept, vector)."""
    for vector in vectors:
        for kept in (True, False):
            yield 1, kept, vector
            if vector[0] == "groups":
                yield 2, kept, vector


# -- what they share ---------------------------------------------------------------------------------------------------


def expected(case: Case) -> dict[str, Tensor]:
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
    backend: str | backends.Backend, case: Case, kept: bool, wanted: set[str] | None = None
) -> dict[str, Tensor]:
    """The same by a fused backend, all of it or only some gradients."""
    if isinstance(backend, str):
        backend = backends.BACKENDS[backend]
    call = case.call()
    memories, activations = backend.forward(case.spec, call, kept)
    order: dict[str, Any] = {"x": call.x, "memory": call.memory, "reset_memory": call.reset_memory, **case.params}
    needs = [value is not None and (wanted is None or name in wanted) for name, value in order.items()]
    gradients = backend.backward(case.spec, call, memories, activations, _cotangent(memories), needs)
    named = zip(order, gradients, needs, strict=True)
    return {"memories": memories, **{name: gradient for name, gradient, need in named if need}}


def _forward(backend: str, case: Case) -> Tensor:
    return backends.BACKENDS[backend].forward(case.spec, case.call(), False)[0]


def _cotangent(memories: Tensor) -> Tensor:
    drawn = torch.randn(memories.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return drawn.to(torch.float32).to(memories.dtype)


def _running(case: Case) -> Tensor:
    """[B, T], 1 where the step is within the element's length."""
    steps = torch.arange(case.x.shape[1])
    lengths = case.options.get("lengths", torch.full(case.x.shape[:1], len(steps)))
    return (steps < lengths[:, None]).double()


def _with_padding(case: Case) -> Case:
    """The same with NaN past the lengths."""
    case.x[_running(case) == 0] = torch.nan
    return case


def _compare(found: Tensor, exact: Tensor, tolerance: float, what: str) -> None:
    if found.shape != exact.shape:
        raise Killed(f"a shape: {what}")
    error = float((found.double() - exact.double()).abs().max() / exact.abs().max().clamp(min=1.0))
    if not error <= tolerance:
        raise Killed(f"an error of {error:.1e}: {what}")
