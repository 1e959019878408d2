"""Who is timed: the eager yardstick, its rivals, and this package's backends, each as one callable per problem."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rmc_kernels import RelationalMemory, backends, reference
from rmc_kernels.bench import eager, models
from rmc_kernels.bench.cases import Case, Mode
from rmc_kernels.bench.problem import Problem

YARDSTICK = "eager"
RIVALS = (YARDSTICK, "compile", "graph", *models.NAMES)
#: Forward costs of a forward and backward pass, without and with computing the step again.
SAVED, RECOMPUTED = 3, 4

Run = Callable[[], tuple[Tensor, ...]]


class Prepared(NamedTuple):
    """A contestant on the tensors of one problem.

    Attributes:
        forward: gives the output [B, T, features].
        leaves: name -> tensor that a gradient is computed for.
        grad: gradient of the output.
    """

    forward: Callable[[], Tensor]
    leaves: Mapping[str, Tensor]
    grad: Tensor


@dataclass(frozen=True)
class Contestant:
    """One way to compute a case.

    Attributes:
        name: as shown.
        bind: puts it on the tensors of a problem.
        threads: that it is given.
        flops: floating-point operations of one call, counted.
        parameters: how many it has.
        ours: whether it belongs to this package, whose failure is an error.
        is_rmc: whether it computes the cell, so that parity can be asked of it.
        note: what else a reader should know.
    """

    name: str
    bind: Callable[[Problem], Prepared]
    threads: int
    flops: int
    parameters: int
    ours: bool = False
    is_rmc: bool = True
    note: str = ""


def timed(prepared: Prepared, mode: Mode) -> Run:
    """What is timed, and checked: the output, and in the mode with backward the gradients of all leaves."""
    leaves = list(prepared.leaves.values())

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (prepared.forward(),)

    def forward_backward() -> tuple[Tensor, ...]:
        output = prepared.forward()
        return (output, *torch.autograd.grad(output, leaves, prepared.grad))

    return forward if mode == "forward" else forward_backward


def line_up(
    case: Case, against: Iterable[str], backend_names: Iterable[str], *, saved: bool = False, at_width: bool = False
) -> list[Contestant]:
    """The contestants of a case; more threads than one bring the yardstick and our backends on one thread, too.

    Args:
        case: what is timed.
        against: names of `RIVALS`.
        backend_names: names of backends that serve the case.
        saved: whether our backends also train with saved activations.
        at_width: whether other models also run at the cell's width.
    """
    training = case.mode == "forward+backward"
    flops, parameters = case.forward_flops * (SAVED if training else 1), case.spec.parameter_count
    threads = sorted({1, case.threads})
    loops = {YARDSTICK: bind_eager, "compile": bind_compiled, "graph": bind_graphed}
    exact = case.dtype == "float32"
    found = []
    for name in against:
        if name in loops:
            found += [
                Contestant(
                    name, loops[name], count, flops, parameters, is_rmc=exact,
                    note="" if exact else f"its memory is in {case.dtype}, too, so without parity",
                )
                for count in (threads if name == YARDSTICK else [case.threads])
            ]  # fmt: skip
        else:
            found += [_other_model(name, case, wide) for wide in ((False, True) if at_width else (False,))]
    for backend in backend_names:
        fused = backend != backends.REFERENCE.name
        for recompute in ("full", "none") if training and saved and fused else ("full",):
            again = training and fused and recompute == "full"
            name = f"rmc {backend}" + (", saved" if recompute == "none" else "")
            cost = case.forward_flops * RECOMPUTED if again else flops
            bind = _bind_layer(backend, recompute)
            found += [Contestant(name, bind, count, cost, parameters, ours=True) for count in threads]
    return found


def bind_reference(problem: Problem) -> Prepared:
    """The definition: what parity is measured against."""
    x, params, leaves = _leaves(problem)
    return Prepared(
        lambda: reference.unroll(x, problem.memory, params, problem.spec)[0].flatten(2), leaves, problem.grad
    )  # fmt: skip


def bind_eager(problem: Problem, step: eager.Step | None = None) -> Prepared:
    """The frozen eager loop; its memory is in the dtype of x."""
    x, params, leaves = _leaves(problem)
    memory = problem.memory.to(x.dtype)
    return Prepared(lambda: eager.unroll(x, memory, params, problem.spec, step).flatten(2), leaves, problem.grad)


def bind_compiled(problem: Problem) -> Prepared:
    """The frozen eager loop with its step compiled."""
    return bind_eager(problem, eager.compiled_step())


def bind_graphed(problem: Problem) -> Prepared:
    """The frozen eager loop in CUDA graphs, one forward and one backward; what it hoists runs before them.

    Raises:
        RuntimeError: not on a GPU.
    """
    x, params, leaves = _leaves(problem)
    if not x.is_cuda:
        raise RuntimeError("a CUDA graph needs a GPU")
    memory, spec, names = problem.memory.to(x.dtype), problem.spec, list(params)

    def loop(rows: Tensor, gates: Tensor, *values: Tensor) -> Tensor:
        given, after, memories = dict(zip(names, values, strict=True)), memory, []
        for row, gate in zip(rows.unsqueeze(2).unbind(1), gates.unsqueeze(2).unbind(1), strict=True):
            after = eager.eager_step(after, row, gate, given, spec)
            memories.append(after)
        return torch.stack(memories, dim=1).flatten(2)

    sample = tuple(t.detach().requires_grad_() for t in eager.hoist(x, params, spec))
    arguments = (*sample, *params.values())
    graphed: Any = torch.cuda.make_graphed_callables(loop, arguments, allow_unused_input=True)
    return Prepared(lambda: graphed(*eager.hoist(x, params, spec), *params.values()), leaves, problem.grad)


def _bind_layer(backend: str, recompute: str) -> Callable[[Problem], Prepared]:
    """This package as users call it: through the layer."""

    def bind(problem: Problem) -> Prepared:
        x = problem.x.clone().requires_grad_()
        layer = RelationalMemory.from_spec(
            problem.spec, backend=backend, recompute=recompute, device=x.device, dtype=x.dtype
        )
        layer.load_state_dict(problem.params)
        leaves = {"x": x, **dict(layer.named_parameters())}
        return Prepared(lambda: layer(x, problem.memory)[0], leaves, problem.grad)

    return bind


def _leaves(problem: Problem) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    x = problem.x.clone().requires_grad_()
    params = {name: value.clone().requires_grad_() for name, value in problem.params.items()}
    return x, params, {"x": x, **params}


def _other_model(name: str, case: Case, at_width: bool) -> Contestant:
    """Another model with about as many parameters as the cell, or as wide as one of its slots."""
    model = models.model(name, case, at_width=at_width)

    def bind(problem: Problem) -> Prepared:
        x = problem.x.clone().requires_grad_()
        module = model.build().to(x.device, x.dtype)
        grad = x.new_ones(*x.shape[:2], model.features)
        return Prepared(lambda: module(x), {"x": x, **dict(module.named_parameters())}, grad)

    return Contestant(
        f"{name} at D" if at_width else name,
        bind,
        case.threads,
        model.flops * (SAVED if case.mode == "forward+backward" else 1),
        model.parameters,
        is_rmc=False,
        note=model.note,
    )
