"""The benchmarks: what they count, check and conclude. Nothing here depends on how fast the machine is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from rmc_kernels import CellSpec, reference
from rmc_kernels.bench import eager, machine, models, parity
from rmc_kernels.bench.cases import SPEED_TABLE, SUITES, Case
from rmc_kernels.bench.contestants import (
    RIVALS,
    Contestant,
    Prepared,
    bind_eager,
    line_up,
    timed,
)
from rmc_kernels.bench.problem import Problem, draw
from rmc_kernels.bench.suite import SuiteResult
from tests.bench_cases import ALL_CASES, SMALL, SMALL_TRAINING, CountOps, run_small


def ops_of(case: Case) -> CountOps:
    problem = draw(case)
    count = CountOps()
    with torch.no_grad(), count:
        eager.unroll(problem.x, problem.memory, problem.params, problem.spec)
    return count


# -- the yardstick -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [SMALL, Case(1, 3, 4, 128), Case(16, 3, 8, 256)], ids=lambda case: case.size)
def test_the_yardstick_is_frozen(case: Case) -> None:
    first, more = ops_of(case), ops_of(replace(case, steps=case.steps + 2))
    assert (more.kernels - first.kernels, more.ops - first.ops) == (
        2 * eager.KERNELS_PER_STEP,
        2 * eager.OPS_PER_STEP,
    )
    assert (eager.KERNELS_PER_STEP, eager.OPS_PER_STEP) == (19, 37)


@pytest.mark.parametrize("biases", [(1.0, 0.0), (-0.5, 2.0)])
@pytest.mark.parametrize("key_size", [None, 3])
def test_the_yardstick_computes_the_cell(biases: tuple[float, float], key_size: int | None) -> None:
    spec = CellSpec.sonnet(5, 3, 8, 2, forget_bias=biases[0], input_bias=biases[1], key_size=key_size)
    problem = replace(draw(SMALL), spec=spec)
    values = {name: torch.randn(shape).double() for name, shape in spec.parameter_shapes.items()}
    x, memory = problem.x.double(), problem.memory.double()
    found = eager.unroll(x, memory, values, spec)
    torch.testing.assert_close(found, reference.unroll(x, memory, values, spec)[0], rtol=1e-10, atol=1e-10)


def test_the_compiled_step_is_the_same_code() -> None:
    problem = draw(SMALL)
    eager_backend: eager.Step = torch.compile(eager.eager_step, fullgraph=True, dynamic=False, backend="eager")
    (found,) = timed(bind_eager(problem, eager_backend), "forward")()
    (plain,) = timed(bind_eager(problem), "forward")()
    torch.testing.assert_close(found, plain)


# -- other models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.NAMES)
def test_other_models_have_as_many_parameters(name: str) -> None:
    for case in SPEED_TABLE:
        found = models.model(name, case, at_width=False)
        assert sum(value.numel() for value in found.build().parameters()) == found.parameters
        assert abs(found.parameters - case.spec.parameter_count) < 0.01 * case.spec.parameter_count


@pytest.mark.parametrize("name", models.NAMES)
def test_other_models_have_the_width_of_a_slot(name: str) -> None:
    found = models.model(name, SMALL, at_width=True)
    module = found.build()
    assert sum(value.numel() for value in module.parameters()) == found.parameters
    assert module(draw(SMALL).x).shape == (SMALL.batch_size, SMALL.steps, SMALL.mem_size)


@pytest.mark.parametrize("name", models.NAMES)
def test_other_models_see_no_later_step(name: str) -> None:
    module = models.model(name, SMALL, at_width=False).build()
    x = draw(SMALL).x
    later = x.clone()
    later[:, 1:] += 1
    one, other = module(x), module(later)
    torch.testing.assert_close(one[:, 0], other[:, 0])
    assert not torch.allclose(one[:, 1], other[:, 1])


@pytest.mark.parametrize(("name", "gates"), models.GATES.items())
def test_flops_of_recurrent_models_are_linear_in_steps(name: str, gates: int) -> None:
    one, two = (models.model(name, replace(SMALL, steps=steps), at_width=True).flops for steps in (1, 2))
    assert (one, two) == (2 * 4 * gates * 16 * (5 + 16), 2 * one)


def test_flops_of_attention_are_quadratic_in_steps() -> None:
    flops = [models.model("transformer", replace(SMALL, steps=steps), at_width=True).flops for steps in (1, 2, 3)]
    second_difference = flops[2] - 2 * flops[1] + flops[0]
    assert second_difference == 2 * 2 * SMALL.batch_size * SMALL.mem_size  # scores and values of one step more


# -- cases -------------------------------------------------------------------------------------------------------------


def test_the_speed_table_is_complete() -> None:
    def sizes(threads: int, mode: str) -> set[tuple[int, int, int]]:
        chosen = [case for case in SPEED_TABLE if (case.threads, case.mode) == (threads, mode)]
        assert all((case.num_heads, case.input_size, case.dtype) == (4, 64, "float32") for case in chosen)
        assert all(case.steps == 32 for case in chosen if case.batch_size == 1)
        return {(case.batch_size, case.mem_slots, case.mem_size) for case in chosen}

    large, single = {(16, 8, 256), (64, 8, 256), (64, 4, 128)}, {(1, 8, 256), (1, 4, 128)}
    for mode in ("forward", "forward+backward"):
        assert sizes(1, mode) == large | single
        assert sizes(2, mode) == large
    assert all(set(SPEED_TABLE) <= set(SUITES[name].cases) for name in ("quick", "targets", "full"))


@pytest.mark.parametrize("name", SUITES)
def test_no_case_is_run_twice(name: str) -> None:
    cases = SUITES[name].cases
    assert len(set(cases)) == len(cases)
    assert sum(len(group.cases) * group.seconds for group in SUITES[name].groups) < SUITES[name].limit


def test_the_full_suite_varies_everything() -> None:
    cases = SUITES["full"].cases
    for field in ("batch_size", "steps", "mem_slots", "mem_size", "num_heads", "dtype"):
        assert len({getattr(case, field) for case in cases}) >= 3
    assert {case.threads for case in cases} == {1, 2}
    assert {case.mode for case in cases} == {"forward", "forward+backward"}


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
def test_a_case_is_read_from_its_name(case: Case) -> None:
    assert Case.from_text(case.name) == case


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("B=1 T=2 N=3", "D missing in"),
        ("B=1 T=2 N=3 D=8 sideways", "got 'sideways'"),
        ("B=0 T=2 N=3 D=8", "got 'B=0'"),
        ("B=1 T=2 N=3 D=9 H=2", "mem_size takes a multiple"),
    ],
)
def test_a_wrong_name_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case.from_text(text)


def test_what_a_name_leaves_out_is_the_default() -> None:
    assert Case.from_text("B=1 T=2 N=3 D=8") == Case(1, 2, 3, 8)
    assert Case.from_text("I=5 D=8 N=3 T=2 B=1 bfloat16 2 threads").input_size == 5


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
def test_every_case_is_buildable(case: Case) -> None:
    assert eager.serves(case.spec)
    names = [contestant.name for contestant in line_up(case, RIVALS, ["cpu"], saved=True, at_width=True)]
    assert {*RIVALS, "lstm at D", "transformer at D", "rmc cpu"} <= set(names)
    assert ("rmc cpu, saved" in names) == (case.mode == "forward+backward")
    assert len(case.name) > 10
    assert case.spec.mem_size == case.mem_size


@pytest.mark.parametrize("case", [SMALL, SMALL_TRAINING], ids=lambda case: case.mode)
def test_every_contestant_runs(case: Case) -> None:
    problem = draw(case)
    for contestant in line_up(case, ["eager", *models.NAMES], ["reference"], saved=True, at_width=True):
        prepared = contestant.bind(problem)
        results = timed(prepared, case.mode)()
        assert results[0].shape[:2] == (case.batch_size, case.steps)
        assert len(results) == (1 if case.mode == "forward" else 1 + len(prepared.leaves))
        assert "x" in prepared.leaves


def test_flops_follow_the_mode() -> None:
    def flops(case: Case) -> dict[str, int]:
        return {c.name: c.flops for c in line_up(case, ["eager", "lstm"], ["cpu", "reference"], saved=True)}

    forward, training = flops(SMALL), flops(SMALL_TRAINING)
    unit = SMALL.steps * SMALL.spec.flops_per_step(SMALL.batch_size)
    assert forward["eager"] == forward["rmc cpu"] == unit
    assert training["eager"] == training["rmc cpu, saved"] == training["rmc reference"] == 3 * unit
    assert training["rmc cpu"] == 4 * unit
    assert training["lstm"] == 3 * forward["lstm"] > 0


def test_more_threads_are_compared_with_one() -> None:
    found = line_up(replace(SMALL, threads=2), ["eager", "lstm"], ["cpu"])
    assert [(c.name, c.threads) for c in found] == [
        ("eager", 1), ("eager", 2), ("lstm", 2), ("rmc cpu", 1), ("rmc cpu", 2),
    ]  # fmt: skip


def test_relu_inputs_are_clear_of_zero() -> None:
    problem = draw(Case(16, 4, 8, 64)).double()
    inputs: list[torch.Tensor] = []
    memory = problem.memory
    rows, gates = eager.hoist(problem.x, problem.params, problem.spec)
    original = torch.Tensor.relu_

    def recorded(value: torch.Tensor) -> torch.Tensor:
        inputs.append(value.clone())
        return original(value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "relu_", recorded)
        for t in range(4):
            memory = eager.eager_step(memory, rows[:, t, None], gates[:, t, None], problem.params, problem.spec)
    values = torch.cat([value.flatten() for value in inputs])
    assert values.abs().min() > 1e-4
    assert 0.4 < float((values > 0).double().mean()) < 0.6


# -- parity ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [SMALL, SMALL_TRAINING, replace(SMALL_TRAINING, batch_size=1)], ids=lambda c: c.name)
def test_the_yardstick_is_green(case: Case) -> None:
    verdict = parity.check(bind_eager, case)
    assert verdict.ok, verdict.worst


def spoiled(tensor: str) -> Callable[[Problem], Prepared]:
    """The eager loop with one result wrong by a few times its rounding."""

    def bind(problem: Problem) -> Prepared:
        prepared = bind_eager(problem)
        if tensor == "memories":
            return prepared._replace(forward=lambda: prepared.forward() * (1 + 3e-6))
        leaf: Any = prepared.leaves[tensor]
        leaf.register_hook(lambda grad: grad * (1 + 3e-5))
        return prepared

    return bind


@pytest.mark.parametrize("tensor", ["memories", "x", "mlp.0.bias", "blocks.0.qkv.weight"])
def test_a_wrong_tensor_is_red(tensor: str) -> None:
    verdict = parity.check(spoiled(tensor), SMALL_TRAINING)
    assert not verdict.ok
    assert verdict.severity > 1
    assert tensor in verdict.worst or tensor == "memories"


def raising(problem: Problem) -> Prepared:
    raise RuntimeError("no such instruction\nand a long story")


def test_red_parity_suppresses_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_small(monkeypatch, Contestant("wrong", spoiled("memories"), 1, 1, 1, ours=True))
    right, wrong = result.figures
    assert (right.status, wrong.status) == ("timed", "parity failed")
    assert right.seconds
    assert wrong.seconds == wrong.wall == []
    assert result.summary(wrong) == {}
    assert not result.ok
    whole = SuiteResult("demo", machine.describe("cpu"), {}, [result])
    assert not whole.ok
    shown = [str(cell) for column in whole.table().columns for cell in column.cells]
    assert sum("parity FAILED" in cell for cell in shown) == 1
    assert any(note.startswith("PARITY FAILED") and "wrong" in note for note in whole.notes())


@pytest.mark.parametrize(("ours", "status", "ok"), [(True, "error", False), (False, "unavailable", True)])
def test_what_breaks_is_named_and_the_rest_is_timed(
    monkeypatch: pytest.MonkeyPatch, ours: bool, status: str, ok: bool
) -> None:
    result = run_small(monkeypatch, Contestant("broken", raising, 1, 1, 1, ours=ours))
    assert (result.figures[0].status, result.figures[1].status) == ("timed", status)
    assert result.figures[1].note == "RuntimeError: no such instruction"
    assert result.ok == ok
