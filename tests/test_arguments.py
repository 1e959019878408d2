"""Every public argument, wrong in every way: a clear error that names it, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rmc_kernels import (
    CellSpec,
    ReadHead,
    RelationalMemory,
    RelationalMemoryCell,
    explain,
    reference,
    relational_memory,
)
from rmc_kernels.compat import l0sg, r2gen, sonnet
from tests.cases import SPECS, draw

X = torch.zeros(2, 3, 5)
META = torch.device("meta")


@pytest.fixture(autouse=True)
def _nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that comes after a step was computed came too late."""

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a step was computed before the arguments were checked")

    monkeypatch.setattr(reference, "step", forbidden)


def _layer(**changes: Any) -> RelationalMemory:
    return RelationalMemory(**{"input_size": 5, "mem_slots": 3, "head_size": 4, "backend": "reference", **changes})


CONSTRUCTOR: list[tuple[str, Any, type[Exception]]] = [
    *[
        (name, value, error)
        for name in ("input_size", "mem_slots", "head_size", "num_heads", "num_blocks", "attention_mlp_layers")
        for value, error in ((0, ValueError), (-2, ValueError), (2.0, TypeError), ("2", TypeError), (None, TypeError))
    ],
    ("key_size", 0, ValueError),
    ("key_size", "a", TypeError),
    ("input_rows", 0, ValueError),
    ("input_rows", 1.5, TypeError),
    ("gate_style", "both", ValueError),
    ("forget_bias", "one", TypeError),
    ("forget_bias", float("nan"), ValueError),
    ("input_bias", [0.0], TypeError),
    ("initial_memory", "ones", ValueError),
    ("initial_memory", None, ValueError),
    ("read_head", "max", ValueError),
    ("read_head", 3, ValueError),
    ("backend", "cuda", ValueError),
    ("backend", None, ValueError),
    ("recompute", "some", ValueError),
    ("dtype", torch.int32, TypeError),
    ("dtype", "float32", TypeError),
]


@pytest.mark.parametrize("cls", [RelationalMemory, RelationalMemoryCell])
@pytest.mark.parametrize(("name", "value", "error"), CONSTRUCTOR)
def test_constructor(cls: type, name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        cls(**{"input_size": 5, "mem_slots": 3, "head_size": 4, name: value})


def test_batch_first_takes_a_bool() -> None:
    with pytest.raises(TypeError, match="batch_first"):
        _layer(batch_first=1)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("num_layers", "stack several layers"),
        ("bidirectional", "reversed in time"),
        ("hidden_size", "mem_slots"),
        ("proj_size", "Linear"),
        ("dropout", "nn.Dropout"),
        ("bias", "every Linear"),
        ("nonlinearity", "definition"),
    ],
)
@pytest.mark.parametrize("make", [_layer, lambda **k: RelationalMemoryCell(5, 3, 4, **k)])
def test_what_an_lstm_has_and_this_has_not(make: Callable[..., Any], name: str, hint: str) -> None:
    with pytest.raises(TypeError, match=f"{name}.*{hint}"):
        make(**{name: 1})


def test_an_unknown_argument() -> None:
    with pytest.raises(TypeError, match="no argument 'slots'"):
        _layer(slots=3)
    with pytest.raises(TypeError, match="no argument 'num_heads'"):
        RelationalMemory.from_spec(SPECS["sonnet"], num_heads=2)
    with pytest.raises(TypeError, match="spec takes a CellSpec"):
        RelationalMemory.from_spec("sonnet")  # type: ignore[arg-type]


CALL: list[tuple[str, dict[str, Any], type[Exception]]] = [
    ("x", {"x": [[0.0]]}, TypeError),
    ("x", {"x": torch.zeros(2, 3, 6)}, ValueError),
    ("x", {"x": torch.zeros(5)}, ValueError),
    ("x", {"x": torch.zeros(1, 2, 3, 5)}, ValueError),
    ("x", {"x": torch.zeros(2, 3, 5, dtype=torch.int64)}, TypeError),
    ("x", {"x": torch.zeros(2, 3, 5, dtype=torch.complex64)}, TypeError),
    ("params", {"x": X.double()}, TypeError),
    ("params", {"x": X.bfloat16()}, TypeError),
    ("params", {"x": X.to(META)}, TypeError),
    ("memory", {"memory": torch.zeros(2, 3, 5)}, ValueError),
    ("memory", {"memory": torch.zeros(3, 3, 4)}, ValueError),
    ("memory", {"memory": torch.zeros(2, 12)}, ValueError),
    ("memory", {"memory": (torch.zeros(2, 3, 4),)}, TypeError),
    ("memory", {"memory": torch.zeros(2, 3, 4, dtype=torch.float64)}, TypeError),
    ("memory", {"memory": torch.zeros(2, 3, 4, device=META)}, ValueError),
    ("lengths", {"lengths": [1, 2]}, TypeError),
    ("lengths", {"lengths": torch.tensor([1.0, 2.0])}, TypeError),
    ("lengths", {"lengths": torch.tensor([True, False])}, TypeError),
    ("lengths", {"lengths": torch.tensor([1, 2, 3])}, ValueError),
    ("lengths", {"lengths": torch.tensor([[1, 2]])}, ValueError),
    ("lengths", {"lengths": torch.tensor([-1, 2])}, ValueError),
    ("lengths", {"lengths": torch.tensor([1, 4])}, ValueError),
    ("lengths", {"lengths": torch.zeros(2, dtype=torch.int64, device=META)}, ValueError),
    ("resets", {"resets": torch.zeros(2, 3)}, TypeError),
    ("resets", {"resets": [[True]]}, TypeError),
    ("resets", {"resets": torch.zeros(2, 4, dtype=torch.bool)}, ValueError),
    ("resets", {"resets": torch.zeros(3, 2, dtype=torch.bool)}, ValueError),
    ("resets", {"resets": torch.zeros(2, 3, dtype=torch.bool, device=META)}, ValueError),
    ("return_attention", {"return_attention": 1}, TypeError),
]


@pytest.mark.parametrize(("name", "arguments", "error"), CALL)
def test_layer_call(name: str, arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{name}\b"):
        _layer()(**{"x": X, **arguments})


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [case for case in CALL if case[0] in ("memory", "params")]
    + [("x", {"x": torch.zeros(2, 4)}, ValueError), ("x", {"x": None}, TypeError)],
)
def test_cell_call(name: str, arguments: dict[str, Any], error: type[Exception]) -> None:
    cell = RelationalMemoryCell(5, 3, 4, backend="reference")
    x = arguments.get("x", X)
    given = {**arguments, "x": x[:, 0] if isinstance(x, torch.Tensor) and x.dim() == 3 else x}
    with pytest.raises(error, match=rf"^{name}\b"):
        cell(**given)


def test_unbatched_and_time_first_resets() -> None:
    with pytest.raises(ValueError, match="resets"):
        _layer()(X[0], resets=torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="resets"):
        _layer()(X[0], resets=[True, False, False])
    with pytest.raises(ValueError, match="resets"):
        _layer(batch_first=False)(X.transpose(0, 1), resets=torch.zeros(3, dtype=torch.bool))


def test_packed_sequences_bring_their_own_lengths() -> None:
    packed = torch.nn.utils.rnn.pack_padded_sequence(X, torch.tensor([3, 2]), batch_first=True)
    with pytest.raises(ValueError, match="lengths"):
        _layer()(packed, lengths=torch.tensor([3, 2]))
    with pytest.raises(ValueError, match="x takes packed rows"):
        _layer(input_size=6)(packed)


def test_function() -> None:
    case = draw(SPECS["sonnet"], ("resets",))
    good = case.arguments()

    def refused(error: type[Exception], match: str, **changes: Any) -> None:
        with pytest.raises(error, match=match):
            relational_memory(**{**good, **changes})

    refused(TypeError, "spec takes a CellSpec", spec="sonnet")
    refused(TypeError, "params takes a mapping", params=list(case.params.values()))
    without = {name: value for name, value in case.params.items() if name != "mlp.1.bias"}
    refused(ValueError, r"missing: \['mlp.1.bias'\]", params=without)
    refused(ValueError, r"unknown: \['extra'\]", params={**case.params, "extra": X})
    refused(ValueError, r"params\['mlp.0.bias'\] takes shape", params={**case.params, "mlp.0.bias": X})
    refused(TypeError, r"params\['mlp.0.bias'\] takes a tensor", params={**case.params, "mlp.0.bias": 1.0})
    refused(TypeError, r"params\['mlp.0.bias'\] takes the dtype", params={**case.params, "mlp.0.bias": torch.zeros(8)})
    refused(TypeError, "memory", memory=None)
    refused(ValueError, "reset_memory takes the memory that resets load", reset_memory=None)
    refused(ValueError, "reset_memory takes None", resets=None)
    refused(ValueError, "reset_memory takes shape", reset_memory=torch.zeros(4, 4, dtype=torch.float64))
    refused(ValueError, "backend takes one of", backend="gpu")
    refused(ValueError, "recompute takes one of", recompute=None)
    refused(ValueError, "dropout_mask takes shape", dropout_mask=torch.zeros(1, dtype=torch.float64))
    refused(TypeError, "dropout_mask takes", dropout_mask=0.1)
    several = draw(SPECS["blocks"])
    with pytest.raises(ValueError, match="dropout_mask is for one-block cells"):
        relational_memory(**several.arguments(), dropout_mask=torch.zeros(1))


def test_explain() -> None:
    with pytest.raises(TypeError, match="spec takes a CellSpec"):
        explain("sonnet", X)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="x takes a floating-point tensor"):
        explain(SPECS["sonnet"], torch.zeros(1, dtype=torch.int64))
    with pytest.raises(TypeError, match="x takes a floating-point tensor"):
        explain(SPECS["sonnet"], 1.0)  # type: ignore[arg-type]


def test_read_head() -> None:
    with pytest.raises(ValueError, match="read_head takes one of"):
        ReadHead("max", 2, 3)
    with pytest.raises(ValueError, match="mem_slots"):
        ReadHead("mean", 0, 3)
    with pytest.raises(TypeError, match="mem_size"):
        ReadHead("mean", 2, 3.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="memory takes a tensor of shape"):
        ReadHead("mean", 2, 3)(torch.zeros(4, 3, 2))
    with pytest.raises(TypeError, match="memory takes a tensor of shape"):
        ReadHead("mean", 2, 3)(None)


@pytest.mark.parametrize("batch_size", [-1, 1.5, None, "2"])
def test_initial_memory(batch_size: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="batch_size"):
        _layer().initial_memory(batch_size)


@pytest.mark.parametrize(
    ("compat", "spec"),
    [(sonnet, SPECS["sonnet"]), (l0sg, SPECS["l0sg"]), (r2gen, SPECS["r2gen"])],
)
def test_compat(compat: Any, spec: CellSpec) -> None:
    layer = RelationalMemory.from_spec(spec)
    good = compat.export_variables(layer)
    name = next(iter(good))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    for wrong, error, match in (
        ({k: v for k, v in good.items() if k != name}, ValueError, "missing"),
        ({**good, "other": good[name]}, ValueError, "unknown"),
        ({**good, name: good[name][..., :-1]}, ValueError, "must be of shape"),
        ([good], TypeError, "variables must be a mapping"),
    ):
        with pytest.raises(error, match=match):
            compat.load_variables(layer, wrong)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    other = RelationalMemory.from_spec(SPECS["textbook"])
    with pytest.raises(ValueError, match="layer must be of the"):
        compat.load_variables(other, good)
    with pytest.raises(TypeError, match="layer must be a RelationalMemory"):
        compat.export_variables(torch.nn.Linear(2, 2))
