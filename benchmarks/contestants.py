"""Who is timed: the eager yardstick, its rivals, and this package's backends, each as one callable per problem."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rmc_kernels import RelationalMemory, backends, reference
from rmc_kernels.benchmarks import eager
from rmc_kernels.benchmarks.cases import Case, Mode
from rmc_kernels.benchmarks.problem import Problem

YARDSTICK = "eager"
RIVALS = ("compile", "lstm", "gru")
#: Forward costs of a forward and backward pass, without and with computing the step again.
SAVED, RECOMPUTED = 3, 4

Run = Callable[[], tuple[Tensor, ...]]


class Bound(NamedTuple):
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
        ours: whether it belongs to this package, whose failure is an error.
        is_rmc: whether it computes the cell, so that parity can be asked of it.
        note: what else a reader should know.
    """

    name: str
    bind: Callable[[Problem], Bound]
    threads: int
    flops: int
    ours: bool = False
    is_rmc: bool = True
    note: str = ""


def timed(bound: Bound, mode: Mode) -> Run:
    """What is timed, and checked: the output, and in the mode with backward the gradients of all leaves."""
    leaves = list(bound.leaves.values())

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (bound.forward(),)

    def forward_backward() -> tuple[Tensor, ...]:
        output = bound.forward()
        return (output, *torch.autograd.grad(output, leaves, bound.grad))

    return forward if mode == "forward" else forward_backward


def line_up(case: Case, against: Iterable[str], backend_names: Iterable[str], both_modes: bool) -> list[Contestant]:
    """The contestants of a case; more threads than one bring the yardstick and our backends on one thread, too.

    Args:
        case: what is timed.
        against: names of `RIVALS`.
        backend_names: names of backends that serve the case.
        both_modes: whether our backends also run with saved activations.
    """
    training = case.mode == "forward+backward"
    flops = case.forward_flops * (SAVED if training else 1)
    found = [Contestant(YARDSTICK, bind_eager, threads, flops) for threads in sorted({1, case.threads})]
    for name in against:
        if name == "compile":
            found.append(Contestant(name, bind_compiled, case.threads, flops))
        else:
            found.append(_other_model(name, case))
    for backend in backend_names:
        fused = backend != backends.REFERENCE.name
        for recompute in ("full", "none") if training and both_modes and fused else ("full",):
            again = training and fused and recompute == "full"
            name = f"rmc {backend}" + (", saved" if recompute == "none" else "")
            cost = case.forward_flops * (RECOMPUTED if again else SAVED) if training else case.forward_flops
            for threads in sorted({1, case.threads}):
                found.append(Contestant(name, _bind_layer(backend, recompute), threads, cost, ours=True))
    return found


def bind_reference(problem: Problem) -> Bound:
    """The definition: what parity is measured against."""
    x, params, leaves = _leaves(problem)
    return Bound(
        lambda: reference.unroll(x, problem.memory, params, problem.spec)[0].flatten(2), leaves, problem.grad
    )  # fmt: skip


def bind_eager(problem: Problem, step: eager.Step | None = None) -> Bound:
    """The frozen eager loop."""
    x, params, leaves = _leaves(problem)
    return Bound(lambda: eager.unroll(x, problem.memory, params, problem.spec, step).flatten(2), leaves, problem.grad)


def bind_compiled(problem: Problem) -> Bound:
    """The frozen eager loop with its step compiled."""
    return bind_eager(problem, eager.compiled_step())


def _bind_layer(backend: str, recompute: str) -> Callable[[Problem], Bound]:
    """This package as users call it: through the layer."""

    def bind(problem: Problem) -> Bound:
        x = problem.x.clone().requires_grad_()
        layer = RelationalMemory.from_spec(
            problem.spec, backend=backend, recompute=recompute, device=x.device, dtype=x.dtype
        )
        layer.load_state_dict(problem.params)
        leaves = {"x": x, **dict(layer.named_parameters())}
        return Bound(lambda: layer(x, problem.memory)[0], leaves, problem.grad)

    return bind


def _leaves(problem: Problem) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    x = problem.x.clone().requires_grad_()
    params = {name: value.clone().requires_grad_() for name, value in problem.params.items()}
    return x, params, {"x": x, **params}


def _other_model(name: str, case: Case) -> Contestant:
    """nn.LSTM or nn.GRU with about as many parameters as the cell."""
    cell, gates = {"lstm": (nn.LSTM, 4), "gru": (nn.GRU, 3)}[name]
    inputs, hidden = case.input_size, equal_hidden_size(case.spec.parameter_count, case.input_size, gates)

    def bind(problem: Problem) -> Bound:
        x = problem.x.clone().requires_grad_()
        layer: Any = cell(inputs, hidden, batch_first=True, device=x.device, dtype=x.dtype)
        grad = x.new_ones(*x.shape[:2], hidden)
        return Bound(lambda: layer(x)[0], {"x": x, **dict(layer.named_parameters())}, grad)

    flops = 2 * case.batch_size * case.steps * gates * hidden * (inputs + hidden)
    flops *= SAVED if case.mode == "forward+backward" else 1
    note = f"nn.{cell.__name__} of as many parameters: {hidden} units"
    return Contestant(name, bind, case.threads, flops, is_rmc=False, note=note)


def equal_hidden_size(parameters: int, input_size: int, gates: int) -> int:
    """The hidden size with which gates * h * (I + h + 2) parameters come nearest to `parameters`."""

    def distance(hidden: int) -> int:
        return abs(gates * hidden * (input_size + hidden + 2) - parameters)

    return min(range(1, int((parameters / gates) ** 0.5) + 2), key=distance)
