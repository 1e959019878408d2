"""Verification can fail: each deliberately wrong backend is caught; and it does not fail on another honest one."""

from __future__ import annotations

import itertools
import json
import math
import random
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from typer.testing import CliRunner

from rmc_kernels import CellSpec
from rmc_kernels.backends import BACKENDS, Call, Unrolled, last_memory
from rmc_kernels.backends.reference import ReferenceBackend
from rmc_kernels.spec import GATE_STYLES, VARIANTS
from rmc_kernels.verify import (
    Case,
    CaseResult,
    Comparison,
    Errors,
    baseline,
    check,
    check_case,
    covering,
    criterion,
    histograms,
    quick_cover,
    random_case,
    reproducer,
    run,
    runner,
)
from rmc_kernels.verify.command import verify
from rmc_kernels.verify.draws import Draw, by_eager, draw, evaluate
from rmc_kernels.verify.probe import Probe

CASE = Case(CellSpec.sonnet(5, 3, 4, 2, forget_bias=1.0), batch_size=12, steps=2, lengths=True, resets=True)


class Altered(ReferenceBackend):
    """The reference, under the name of a fused backend, with an alteration of what goes in or comes out."""

    name = "cpu"

    def __init__(
        self,
        spec: Callable[[CellSpec], CellSpec] = lambda spec: spec,
        call: Callable[[CellSpec, Call], Call] = lambda spec, call: call,
        grads: Callable[[CellSpec, list[Tensor]], list[Tensor]] = lambda spec, grads: grads,
        output: Callable[[Tensor], Tensor] = lambda memories: memories,
        mode: Callable[[], TorchFunctionMode] = Probe,
    ) -> None:
        self.output = output
        self.spec, self.call, self.grads, self.mode = spec, call, grads, mode

    def forward(self, spec: CellSpec, call: Call, save: bool) -> Unrolled:
        with self.mode():
            memories, activations, _ = super().forward(self.spec(spec), self.call(spec, call), save)
        changed = self.output(memories)
        return Unrolled(changed, activations, last_memory(changed))

    def backward(
        self, spec: CellSpec, call: Call, memories: Tensor, activations: Tensor, grad: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        with self.mode():
            found = super().backward(self.spec(spec), self.call(spec, call), memories, activations, grad, needs)
        altered = self.grads(spec, [torch.empty(0) if each is None else each for each in found])
        return [each if need else None for each, need in zip(altered, needs, strict=True)]


class OtherOrder(TorchFunctionMode):
    """The same mathematics by other sums: as exact as eager PyTorch, without sharing its rounding errors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, bias = args
            half = (x.shape[-1] + 1) // 2
            return (x[..., half:] @ weight[:, half:].t() + bias) + x[..., :half] @ weight[:, :half].t()
        if func is torch.softmax:
            powers = torch.exp(args[0] - args[0].amax(-1, keepdim=True))
            return powers / powers.sum(-1, keepdim=True)
        return func(*args, **(kwargs or {}))


class Rougher(TorchFunctionMode):
    """Matrix products with errors of two units in the last place on top."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not F.linear:
            return result
        return result * (1 + 2.0**-22 * torch.randn(result.shape, generator=self.generator))


class ThroughBf16(TorchFunctionMode):
    """Matrix products in bfloat16."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return F.linear(*(value.bfloat16() for value in args)).float()
        return func(*args, **(kwargs or {}))


def swap_gates(spec: CellSpec, call: Call) -> Call:
    def swapped(name: str, value: Tensor) -> Tensor:
        return value.roll(spec.gate_size, 0) if "gate" in name else value

    return replace(call, params=tuple(map(swapped, spec.parameter_names, call.params)))


def zero_gradient(name: str) -> Callable[[CellSpec, list[Tensor]], list[Tensor]]:
    def zero(spec: CellSpec, grads: list[Tensor]) -> list[Tensor]:
        place = 3 + spec.parameter_names.index(name)  # after x, memory, reset_memory
        return [torch.zeros_like(grad) if number == place else grad for number, grad in enumerate(grads)]

    return zero


def raising(spec: CellSpec, call: Call) -> Call:
    raise RuntimeError("out of registers")


def scale_gate(spec: CellSpec, call: Call) -> Call:
    """The memory's gate weights, too large by a thousandth."""
    factors = {"memory_gate.weight": 1.001}
    pairs = zip(spec.parameter_names, call.params, strict=True)
    return replace(call, params=tuple(value * factors.get(name, 1.0) for name, value in pairs))


WRONG = {
    "gate scaled": Altered(call=scale_gate),
    "forget bias off": Altered(spec=lambda spec: replace(spec, forget_bias=0.0)),
    "epsilon-like change of a bias": Altered(spec=lambda spec: replace(spec, forget_bias=1.0 + 1e-5)),
    "gates swapped": Altered(call=swap_gates),
    "gradient of one bias zero": Altered(grads=zero_gradient("mlp.1.bias")),
    "gradient of x misses a step": Altered(
        grads=lambda spec, grads: [grads[0] * torch.tensor([[0.0], [1.0]]), *grads[1:]]
    ),
    "float32 through bfloat16": Altered(mode=ThroughBf16),
    "reset to the carried memory": Altered(call=lambda spec, call: replace(call, reset_memory=call.memory)),
    "reset a step late": Altered(call=lambda spec, call: replace(call, resets=call.resets.roll(1, 1))),  # type: ignore[union-attr]
    "lengths ignored": Altered(call=lambda spec, call: replace(call, x=call.x.nan_to_num(), lengths=None)),
    "not a number": Altered(grads=lambda spec, grads: [*grads[:-1], grads[-1] * torch.nan]),
    "wrong shape": Altered(grads=lambda spec, grads: [*grads[:-1], grads[-1][:1]]),
    "wrong dtype": Altered(output=lambda memories: memories.double()),
    "raises": Altered(call=raising),
}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[ReferenceBackend], None]:
    """Puts a backend in the place of "cpu" for one test."""
    return lambda backend: monkeypatch.setitem(BACKENDS, "cpu", backend)


# -- what is right and what is wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_backend_is_caught(name: str, install: Callable[[ReferenceBackend], None]) -> None:
    install(WRONG[name])
    result = check_case(CASE, "cpu")
    assert result.status == "miss"
    assert result.misses or result.reason


def test_the_tensor_that_is_wrong_is_named(install: Callable[[ReferenceBackend], None]) -> None:
    install(WRONG["gradient of one bias zero"])
    assert list(check_case(CASE, "cpu").misses) == ["gradient of mlp.1.bias"]
    install(WRONG["raises"])
    assert check_case(CASE, "cpu").reason == "RuntimeError: out of registers"


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_orders_of_summation_are_right(variant: str, install: Callable[[ReferenceBackend], None]) -> None:
    install(Altered(mode=OtherOrder))
    case = next(case for case in covering() if case.spec.variant == variant and case.spec.mem_size >= 8)
    result = check_case(case, "cpu")
    assert result.status == "right", result.misses
    assert any(found.rms_ratio != 1 for found in result.comparisons.values())


#: A memory that grows without norms and gates, where all errors of a draw are one, and a seed of its draws with which
#: another order of summation has 2.2 times the error of eager PyTorch.
GROWING = Case(
    replace(CellSpec.r2gen(4, 20, 4), gate_style=None), batch_size=1, steps=8, gradients="inputs", magnitude=0.1
)
UNLUCKY = 24


def judged_at_once(case: Case, seed: int, monkeypatch: pytest.MonkeyPatch) -> CaseResult:
    """By the usual draws alone."""
    with monkeypatch.context() as patch:
        patch.setattr(check, "baselines", lambda *where, pooled=True, **more: baseline.baselines(*where, pooled=pooled))
        return check_case(case, "cpu", seed=seed)


def test_few_errors_are_not_a_miss(
    install: Callable[[ReferenceBackend], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(Altered(mode=OtherOrder))
    at_once = judged_at_once(GROWING, UNLUCKY, monkeypatch)
    assert at_once.status == "miss", "the seed shows nothing"
    result = check_case(GROWING, "cpu", seed=UNLUCKY)
    assert result.status == "right", result.misses
    assert result.draws >= 3 * at_once.draws
    assert max(found.rms_ratio for found in result.comparisons.values()) < 1.5


def test_more_draws_excuse_nothing(install: Callable[[ReferenceBackend], None]) -> None:
    install(Altered(mode=Rougher))
    result = check_case(CASE, "cpu")
    assert result.status == "miss"
    assert result.draws >= 48
    assert result.misses["memories"].rms_ratio > 2


#: A memory that grows until softmaxes saturate: the gradients of eager PyTorch have no right digit in bfloat16.
SATURATED = Case(
    CellSpec("r2gen", 8, 2, 4, 2, gate_style=None, attention_mlp_layers=1), "bfloat16", batch_size=4, steps=6,
    gradients="parameters", magnitude=2.0,
)  # fmt: skip


@pytest.mark.slow
def test_what_zeros_would_pass_has_no_yardstick(
    install: Callable[[ReferenceBackend], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "THOROUGH_NOISE", baseline.USUAL_NOISE)  # for time
    larger = Altered(grads=lambda spec, grads: [100 * grad for grad in grads])
    install(larger)
    result = check_case(SATURATED, "cpu")
    assert result.status == "not served"
    assert "zeros would pass for gradient of" in result.reason
    install(Altered(grads=larger.grads, output=lambda memories: memories * 1.5))
    assert "memories" in check_case(SATURATED, "cpu").misses, "the memories have a yardstick"
    install(larger)
    assert check_case(replace(SATURATED, magnitude=0.1, steps=2), "cpu").status == "miss", "here gradients have one"


def test_draws_count_by_what_rounding_does_to_them() -> None:
    def needed(*sizes: float, weight: float = 1.0) -> int:
        first, *others = sizes
        bases = [SimpleNamespace(rounding={"x": first, "y": 1.0}, weights={"x": weight})]
        bases += [SimpleNamespace(rounding={"x": size, "y": 1.0}, weights={}) for size in others]
        return baseline.draws_to_be_sure(bases, ["y", "x"])  # type: ignore[arg-type]

    assert needed(*[1e-7] * 16) == 48
    assert needed(*[1e-7] * 64) == 64, "never fewer than there are"
    assert needed(*[1e-7] * 4, *[0.0] * 12) == 4 * 48
    assert needed(3e-7, *[1e-7] * 15, weight=1 / 3) == 48
    assert needed(1e-7, *[1e-9] * 15) == 16 * 16, "no more than 16 times as many"
    assert needed(*[0.0] * 16) == 48
    assert needed(*[1e-200] * 16) == 48


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_machinery_around_the_reference_adds_nothing(dtype: str) -> None:
    result = check_case(replace(CASE, dtype=dtype), "reference")
    assert result.status == "right"
    assert {found.rms_ratio for found in result.comparisons.values()} == {1.0}
    names = ("x", "memory", "reset_memory", *CASE.spec.parameter_names)
    assert set(result.comparisons) == {"memories", "final memory", *(f"gradient of {name}" for name in names)}


def test_a_memory_that_never_changes_has_no_error_at_all(install: Callable[[ReferenceBackend], None]) -> None:
    case = Case(CellSpec.sonnet(5, 3, 4, forget_bias=math.inf, input_bias=-math.inf))
    assert check_case(case, "reference").status == "right"
    install(Altered(call=lambda spec, call: replace(call, memory=call.memory * (1 + 1e-5))))
    assert "memories" in check_case(case, "cpu").misses


# -- the criterion -----------------------------------------------------------------------------------------------------


def test_the_criterion_draws_the_line_at_twice_and_four_times() -> None:
    exact = torch.zeros(100, dtype=torch.float64)
    eager = torch.full((100,), 1e-3)
    assert criterion(1.99 * eager, eager, exact).ok
    assert not criterion(2.01 * eager, eager, exact).ok
    one = torch.zeros(100).index_fill(0, torch.tensor(7), 3.99e-3)
    assert criterion(one, eager, exact).ok
    assert not criterion(one * 1.01, eager, exact).ok


def test_ulps_count_only_where_eager_is_exact() -> None:
    exact = torch.ones(8, dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    assert criterion(torch.ones(8) + 3 * eps, torch.ones(8), exact).ok
    assert not criterion(torch.ones(8) + 5 * eps, torch.ones(8), exact).ok
    assert not criterion(torch.ones(8) + 3 * eps, torch.ones(8) + eps, exact).ok
    assert criterion(torch.zeros(8), torch.zeros(8), 0 * exact).ok
    assert not criterion(torch.full((8,), 1e-30), torch.zeros(8), 0 * exact).ok


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_wrong(value: float) -> None:
    exact, eager = torch.zeros(4, dtype=torch.float64), torch.full((4,), 1e-3)
    for place in range(4):
        assert not criterion(eager.index_fill(0, torch.tensor(place), value), eager, exact).ok


def test_shapes_have_to_agree() -> None:
    with pytest.raises(ValueError, match=r"takes a tensor of shape \(4, 1\), got \(4,\)"):
        criterion(torch.zeros(4), torch.zeros(4, 1), torch.zeros(4, 1, dtype=torch.float64))


def test_pooling_is_concatenation() -> None:
    torch.manual_seed(0)
    exact = torch.randn(2, 5, dtype=torch.float64)
    actual, eager = exact.float() + 1e-3, exact.float() - 2e-3 * torch.rand(2, 5)
    pooled = Comparison(
        Errors.pool(Errors.of(*pair) for pair in zip(actual, exact, strict=True)),
        Errors.pool(Errors.of(*pair) for pair in zip(eager, exact, strict=True)),
    )
    whole = criterion(actual, eager, exact)
    assert pooled.rms_ratio == pytest.approx(whole.rms_ratio)
    assert pooled.largest_ratio == whole.largest_ratio


# -- cases -------------------------------------------------------------------------------------------------------------


def test_every_pair_of_options_occurs() -> None:
    cases = covering()
    for variant, other in itertools.product(VARIANTS, ("lengths", "resets", "strided")):
        assert any(case.spec.variant == variant and getattr(case, other) for case in cases)
    for gate, blocks in itertools.product(GATE_STYLES, (1, 2)):
        assert any((case.spec.gate_style, case.spec.num_blocks) == (gate, blocks) for case in cases)
    for flags in itertools.product((False, True), repeat=2):
        assert any((case.lengths, case.resets) == flags for case in cases)
    for rows, recompute in itertools.product((None, 3), ("full", "none")):
        assert any((case.spec.input_rows, case.recompute) == (rows, recompute) for case in cases)
    assert {case.spec.variant for case in quick_cover()} == set(VARIANTS)
    assert any(case.dropout_mask for case in quick_cover())
    smallest = {(case.spec.mem_slots, case.spec.mem_size, case.batch_size, case.steps) for case in quick_cover()}
    assert (1, 3, 1, 1) in smallest


def test_cases_survive_json() -> None:
    rng = random.Random(0)
    drawn = [random_case(rng, rng.choice(["float32", "bfloat16"])) for _ in range(200)]
    for case in (*covering(), *drawn):
        assert Case.from_json(case.as_json()) == case


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "takes JSON"),
        ("[]", 'under "spec"'),
        ('{"spec": {}}', "missing"),
        ('{"spec": {"variant": "sonnet", "input_size": 1, "mem_slots": 1, "head_size": 0}}', "head_size must be"),
        ('{"spec": {"variant": "sonnet", "input_size": 1, "mem_slots": 1, "head_size": 1}, "bach": 1}', "bach"),
        ('{"spec": {"variant": "sonnet", "input_size": 1, "mem_slots": 1, "head_size": 1}, "dtype": "int8"}', "dtype"),
        (
            '{"spec": {"variant": "l0sg", "input_size": 1, "mem_slots": 1, "head_size": 1}, "dropout_mask": true}',
            "mask",
        ),
    ],
)
def test_a_wrong_case_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Case.from_json(text)


def test_a_draw_follows_from_its_seed_alone() -> None:
    case = replace(CASE, strided=True)
    one, again, other = draw(case, 1), draw(case, 1), draw(case, 2)
    plain = draw(CASE, 1)
    assert torch.equal(one.call.memory, again.call.memory)
    assert not torch.equal(one.call.memory, other.call.memory)
    assert torch.equal(one.call.memory, plain.call.memory)
    assert not one.call.memory.is_contiguous()
    assert not one.call.params[0].is_contiguous()
    assert one.call.x.isnan().any()  # the padding


# -- ReLU inputs within rounding of 0 ----------------------------------------------------------------------------------

NEAR = Case(CellSpec.sonnet(5, 3, 4, 2), batch_size=9, steps=1)
PLACE = (0, (2, 1, 3))


@pytest.fixture
def near_zero(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every draw has one ReLU input just beside 0, where eager PyTorch is still on the right side."""

    def shifted(case: Case, seed: int, device: str = "cpu") -> Draw:
        drawn = draw(case, seed, device)
        place = case.spec.parameter_names.index("mlp.0.bias")
        bias = drawn.call.params[place]
        for _ in range(2):  # the second time removes what the first left by rounding
            with Probe() as exact:
                evaluate(drawn.wide(), by_eager(case.spec))
            with Probe() as eager:
                evaluate(drawn, by_eager(case.spec))
            rounding = float((exact.relu_inputs[0] - eager.relu_inputs[0]).abs().max())
            bias[PLACE[1][-1]] -= float(exact.relu_inputs[0][PLACE[1]]) - 2 * rounding
        return drawn

    monkeypatch.setattr(baseline, "draw", shifted)
    monkeypatch.setattr(baseline, "OUTLIER", math.inf)  # every draw of this case is one that would be passed over
    monkeypatch.setattr(baseline, "_weighted", lambda base, typical: base)
    baseline._baseline.cache_clear()
    yield
    baseline._baseline.cache_clear()


def test_a_relu_input_that_crossed_zero_is_named(near_zero: None, install: Callable[[ReferenceBackend], None]) -> None:
    install(Altered(mode=lambda: Probe(flips=[PLACE])))
    result = check_case(NEAR, "cpu")
    assert result.status == "right", result.misses
    assert result.flips
    assert all("at step 0, block 0, MLP layer 0, batch element 2, row 1, unit 3" in flip for flip in result.flips)


@pytest.mark.parametrize("kind", ["another input", "a gradient besides"])
def test_a_wrong_gradient_is_not_excused(
    kind: str, near_zero: None, install: Callable[[ReferenceBackend], None]
) -> None:
    elsewhere = (0, (2, 1, 4))
    wrong = {
        "another input": Altered(mode=lambda: Probe(flips=[elsewhere])),
        "a gradient besides": Altered(mode=lambda: Probe(flips=[PLACE]), grads=zero_gradient("mlp.1.bias")),
    }
    install(wrong[kind])
    result = check_case(NEAR, "cpu")
    assert result.status == "miss"
    assert not result.flips


def test_a_probe_flips_one_derivative() -> None:
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    with Probe(flips=[(1, (0,))]) as probe:
        first, second = torch.relu(x), torch.relu(x)
    assert torch.autograd.grad(first.sum(), x)[0].tolist() == [0, 1]
    assert torch.autograd.grad(second.sum(), x)[0].tolist() == [1, 1]
    assert len(probe.relu_inputs) == 2


# -- runs --------------------------------------------------------------------------------------------------------------


def test_a_run_reports_what_is_not_served_and_what_missed(install: Callable[[ReferenceBackend], None]) -> None:
    install(WRONG["gates swapped"])
    shares: list[float] = []
    report = run(cases=[CASE], progress=lambda result, share: shares.append(share))
    statuses = {result.backend: result.status for result in report.results}
    assert statuses == {"cpu": "miss", "reference": "right", "triton": "not served"}
    assert not report.ok
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert [(line.backend, line.misses) for line in report.lines()] == [("cpu", 1), ("reference", 0)]
    assert json.loads(json.dumps(report.as_dict()))["ok"] is False
    (miss,) = report.misses
    words = shlex.split(reproducer(miss))
    assert Case.from_json(words[words.index("--case") + 1]) == CASE


def test_nothing_verified_is_not_right() -> None:
    report = run(cases=[CASE], backends=["triton"])
    assert not report.misses
    assert not report.ok


def test_a_mutant_is_found_by_random_cases_and_reproduced(
    install: Callable[[ReferenceBackend], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Start to end, as a user has it: `rmc verify --time-budget`, then the command that it prints."""
    install(WRONG["gate scaled"])
    app, written = typer.Typer(), tmp_path / "verify.json"
    app.command()(verify)
    clock = itertools.count()  # a second a look: the budget is a number of cases
    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    monkeypatch.setattr(runner, "_built_in", lambda *args: [])
    chosen = ["--backend", "cpu", "--variant", "sonnet", "--dtype", "float32", "--histogram"]
    found = CliRunner().invoke(app, [*chosen, "--time-budget", "4", "--json", str(written)])
    assert found.exit_code == 1
    assert "errors of" in found.output
    assert "past 2" in found.output
    data = json.loads(written.read_text())
    assert data["histograms"][0]["rms"]["counts"][-1] > 0
    missed = next(one for one in data["results"] if one["status"] == "miss")
    assert Case.from_json(missed["case"]) not in (*covering(), *quick_cover())
    assert missed["reproduce"] in found.output
    command = shlex.split(missed["reproduce"])
    assert command[:2] == ["rmc", "verify"]
    assert CliRunner().invoke(app, command[2:]).exit_code == 1
    install(Altered())
    assert CliRunner().invoke(app, command[2:]).exit_code == 0


def test_a_time_budget_bounds_the_built_in_cases_too(install: Callable[[ReferenceBackend], None]) -> None:
    install(WRONG["raises"])
    report = run(backends=["cpu"], time_budget=1e-9)
    assert not report.results
    assert report.left_out == 3 * len(quick_cover())
    assert not report.ok


def test_random_cases_have_half_of_a_time_budget(
    install: Callable[[ReferenceBackend], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(WRONG["raises"])
    clock = itertools.count()
    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    report = run(backends=["cpu"], variants=["sonnet"], dtypes=["float32"], time_budget=16)
    built_in = [one for one in report.results if one.case in quick_cover()]
    assert built_in
    assert len(report.results) > len(built_in)


def test_histograms_count_every_tensor() -> None:
    def compared(rms: float, largest: float) -> Comparison:
        return Comparison(Errors(1, rms**2, largest, 1.0, 1e-7), Errors(1, 1.0, 1.0, 1.0, 1e-7))

    values = {"a": (0.0, 0.0), "b": (1.99, 3.99), "c": (2.0, 4.0), "d": (2.01, 4.01), "e": (math.inf, math.inf)}
    comparisons = {name: compared(*errors) for name, errors in values.items()}
    results = [
        CaseResult(CASE, "cpu", "cpu", 0, "miss", comparisons=comparisons),
        CaseResult(CASE, "cpu", "cpu", 0, "not served"),
        CaseResult(replace(CASE, dtype="bfloat16"), "cpu", "cpu", 0, "right", comparisons={"a": compared(0.5, 0.5)}),
    ]
    first, second = histograms(results)
    assert first.rms == first.largest == (1, 0, 0, 0, 0, 0, 0, 2, 2)
    assert second.rms == (0, 0, 1, 0, 0, 0, 0, 0, 0)
    assert second.largest == (0, 1, 0, 0, 0, 0, 0, 0, 0)
    stored = json.loads(json.dumps(first.as_dict()))
    assert stored["rms"]["edges"] == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]


def test_random_cases_vary_everything() -> None:
    rng = random.Random(0)
    drawn = [random_case(rng, "float32") for _ in range(300)]
    assert {case.spec.variant for case in drawn} == set(VARIANTS)
    for flag in ("lengths", "resets", "dropout_mask", "strided"):
        assert {getattr(case, flag) for case in drawn} == {True, False}
    assert max(case.steps for case in drawn) > 16
    assert max(case.batch_size * case.spec.mem_slots for case in drawn) > 128
    assert any(case.spec.mem_size % 16 for case in drawn)
    assert min(case.magnitude for case in drawn) < 0.02
    assert max(case.magnitude for case in drawn) > 1.5


def test_random_cases_fill_the_time_budget(install: Callable[[ReferenceBackend], None]) -> None:
    install(WRONG["raises"])
    report = run(cases=[], backends=["cpu"], variants=["r2gen"], dtypes=["float32"], time_budget=0.5, seed=5)
    assert report.seconds >= 0.5
    assert len({result.case for result in report.results}) == len(report.results) > 0
    assert len(report.misses) == len(report.results)


@pytest.mark.parametrize("name", ["backends", "variants", "dtypes", "devices"])
def test_unknown_names_are_refused(name: str) -> None:
    wrong: dict[str, Any] = {name: ["abacus"]}
    with pytest.raises(ValueError, match=f"{name} must be one of"):
        run(**wrong)
