"""Every public argument, wrong in every way: a clear error that names it, before anything runs."""

from __future__ import annotations

import typing
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

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
from rmc_kernels.training import checkpointed, truncated
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


@pytest.mark.parametrize("cls", [RelationalMemory, RelationalMemoryCell])
def test_type_hints_can_be_read(cls: Any) -> None:
    """As tools that build a command line or a form out of a constructor do."""
    for function in (cls.__init__, cls.from_spec):
        options = typing.get_type_hints(function)["options"]
        (named,) = typing.get_args(options)
        names = {"initial_memory", "read_head", "backend", "recompute", "device", "dtype"}
        assert set(typing.get_type_hints(named)) == names


def test_an_unknown_argument() -> None:
    with pytest.raises(TypeError, match="no argument 'slots'"):
        _layer(slots=3)
    with pytest.raises(TypeError, match="no argument 'num_heads'"):
        RelationalMemory.from_spec(SPECS["sonnet"], num_heads=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="spec must be a CellSpec"):
        RelationalMemory.from_spec("sonnet")  # type: ignore[arg-type]


CALL: list[tuple[str, dict[str, Any], type[Exception]]] = [
    ("x", {"x": [[0.0]]}, TypeError),
    ("x", {"x": torch.zeros(2, 3, 6)}, ValueError),
    ("x", {"x": torch.zeros(5)}, ValueError),
    ("x", {"x": torch.zeros(1, 2, 3, 5)}, ValueError),
    ("x", {"x": torch.zeros(2, 3, 5, dtype=torch.int64)}, TypeError),
    ("x", {"x": torch.zeros(2, 3, 5, dtype=torch.complex64)}, TypeError),
    ("x", {"x": X.double()}, TypeError),
    ("x", {"x": X.bfloat16()}, TypeError),
    ("x", {"x": X.to(META)}, TypeError),
    ("memory", {"memory": torch.zeros(2, 3, 5)}, ValueError),
    ("memory", {"memory": torch.zeros(3, 3, 4)}, ValueError),
    ("memory", {"memory": torch.zeros(2, 12)}, ValueError),
    ("memory", {"memory": (torch.zeros(2, 3, 4),)}, TypeError),
    ("memory", {"memory": torch.zeros(2, 3, 4, dtype=torch.float64)}, TypeError),
    ("memory", {"memory": torch.zeros(2, 3, 4, device=META)}, ValueError),
    ("lengths", {"lengths": [1, 2, 3]}, ValueError),
    ("lengths", {"lengths": [1, 4]}, ValueError),
    ("lengths", {"lengths": [2**70, 1]}, ValueError),
    ("lengths", {"lengths": [-1, 1]}, ValueError),
    ("lengths", {"lengths": [1.0, 2.0]}, TypeError),
    ("lengths", {"lengths": [True, False]}, TypeError),
    ("lengths", {"lengths": [[1, 2]]}, TypeError),
    ("lengths", {"lengths": np.array([1.0, 2.0])}, TypeError),
    ("lengths", {"lengths": np.array([[1, 2]])}, TypeError),
    ("lengths", {"lengths": {1, 2}}, TypeError),
    ("lengths", {"lengths": 2}, TypeError),
    ("lengths", {"lengths": "12"}, TypeError),
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
with warnings.catch_warnings():  # torch calls each of these kinds a prototype
    warnings.simplefilter("ignore")
    CSR = X[0].to_sparse_csr()
    RAGGED = [torch.nested.nested_tensor(list(X), layout=layout) for layout in (torch.jagged, torch.strided)]
    QUANTIZED = torch.quantize_per_tensor(X, 0.1, 0, torch.quint8)


@pytest.mark.parametrize(("name", "arguments", "error"), CALL)
def test_layer_call(name: str, arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{name}\b"):
        _layer()(**{"x": X, **arguments})


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [case for case in CALL if case[0] == "memory" or ("x" in case[1] and case[2] is TypeError)]
    + [("x", {"x": torch.zeros(2, 4)}, ValueError), ("x", {"x": None}, TypeError)],
)
def test_cell_call(name: str, arguments: dict[str, Any], error: type[Exception]) -> None:
    cell = RelationalMemoryCell(5, 3, 4, backend="reference")
    x = arguments.get("x", X)
    given = {**arguments, "x": x[:, 0] if isinstance(x, torch.Tensor) and x.dim() == 3 else x}
    with pytest.raises(error, match=rf"^{name}\b"):
        cell(**given)


@pytest.mark.parametrize("name", ["x", "memory", "lengths", "resets"])
@pytest.mark.parametrize("value", RAGGED, ids=["jagged", "strided"])
def test_ragged_batches(name: str, value: Tensor) -> None:
    message = rf"^{name} must be .*, got a nested tensor \({value.layout}\); .* pass a PackedSequence or lengths$"
    for call in (_layer(), _layer(batch_first=False)):
        with pytest.raises(TypeError, match=message):
            call(**{"x": X.transpose(0, 1) if not call.batch_first else X, name: value})
    if name in ("x", "memory"):
        with pytest.raises(TypeError, match=message):
            RelationalMemoryCell(5, 3, 4, backend="reference")(**{"x": X[:, 0], name: value})
        with pytest.raises(TypeError, match=message):
            relational_memory(**{**draw(SPECS["sonnet"], dtype=torch.float32).arguments(), name: value})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            X.to_sparse(),
            r"x must be a tensor \[B, T, 5\] or \[T, 5\], got a torch.sparse_coo tensor .*; call .to_dense\(\)",
        ),
        (CSR, r"got a torch.sparse_csr tensor of shape \[3, 5\]"),
        (X.to_mkldnn(), "got a torch._mkldnn tensor"),
        (QUANTIZED, r"got torch.quint8; call .dequantize\(\)"),
        (X.long(), "got torch.int64; convert it with .to.*, or embed ids with nn.Embedding"),
        (torch.zeros(2, 3, dtype=torch.int64), "got torch.int64; .* embed ids with nn.Embedding"),
        (X.numpy(), r"got a numpy array of shape \[2, 3, 5\], float32"),
        (X.double(), "x must be torch.float32 on cpu, as the parameters are, got torch.float64 on cpu; convert x"),
        (X.half(), "x must be torch.float32 on cpu, as the parameters are, got torch.float16 on cpu; convert x"),
        (X.to(META), "x must be torch.float32 on cpu, as the parameters are, got torch.float32 on meta; convert x"),
    ],
)
def test_x_of_another_kind(value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        _layer()(value)


@pytest.mark.parametrize("variant", ["sonnet", "l0sg"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("place", [torch.float16, torch.float64, META])
def test_a_layer_of_another_dtype_or_device_blames_x(variant: str, backend: str, place: Any) -> None:
    """Though l0sg's 0-d biases are taken in any dtype."""
    made = RelationalMemory.from_spec(SPECS[variant], backend=backend).to(place)
    dtype = made.get_parameter("mlp.0.weight").dtype
    with pytest.raises(TypeError, match=f"^x must be {dtype} on {'meta' if place is META else 'cpu'}, as the param"):
        made(torch.zeros(2, 3, 5))


def test_one_parameter_of_another_dtype_is_blamed_itself() -> None:
    made = _layer()
    made.get_submodule("mlp.1").double()
    with pytest.raises(
        TypeError, match=r"^params\['mlp.1.weight'\] must be torch.float32 on cpu, as x is, got torch.float64"
    ):
        made(X)


@dataclass
class Holder:
    memory: Tensor


SECRET = torch.full((2, 3, 5), 7654321.0)
SECRETS: list[Any] = [
    SECRET,
    SECRET[0, 0, 0],
    SECRET.numpy(),
    SECRET.tolist(),
    [SECRET],
    (SECRET, SECRET),
    ((SECRET, SECRET), [SECRET.numpy()]),
    {"memory": SECRET},
    {SECRET: SECRET},
    {7654321.0},
    Holder(SECRET),
    nn.Parameter(SECRET),
    pack_padded_sequence(SECRET, [3, 2], batch_first=True),
    SECRET.to_sparse(),
    SECRET.long(),
]


@pytest.mark.parametrize("value", SECRETS, ids=lambda value: type(value).__name__)
def test_no_message_shows_contents(value: Any) -> None:
    """Every argument, as what it must not be: only types, shapes and counts may be told."""
    good = draw(SPECS["sonnet"], ("resets",), dtype=torch.float32).arguments()
    made, cell, head = _layer(), RelationalMemoryCell(5, 3, 4, backend="reference"), ReadHead("mean", 2, 4)
    calls: list[Callable[[], Any]] = [
        *[partial(made, **{"x": X, name: value}) for name in ("memory", "lengths", "resets", "return_attention")],
        *[partial(_layer, **{case[0]: value}) for case in CONSTRUCTOR],
        *[partial(relational_memory, **{**good, name: value}) for name in (*good, "lengths", "dropout_mask")],
        partial(relational_memory, **{**good, "params": {**good["params"], "mlp.0.bias": value}}),
        *[partial(function, made, X, chunk_steps=2, **{name: value}) for name in ("lengths", "resets")
          for function in (checkpointed, lambda *a, **k: list(truncated(*a, **k)))],
        partial(checkpointed, value, X, chunk_steps=2),
        partial(checkpointed, made, X, chunk_steps=value),
        partial(cell, X[:, 0], value),
        partial(head, value),
        partial(made.initial_memory, value),
        partial(explain, value, X),
        partial(explain, SPECS["sonnet"], [value]),  # type: ignore[arg-type]
        partial(CellSpec.r2gen, 3, value),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises((TypeError, ValueError)) as raised:
            call()
        assert " must " in str(raised.value)
        assert "7654321" not in str(raised.value)
        assert "e+06" not in str(raised.value)


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
    with pytest.raises(ValueError, match=r"x must be a PackedSequence of rows \[6\], got rows \[5\]"):
        _layer(input_size=6)(packed)


def test_function() -> None:
    case = draw(SPECS["sonnet"], ("resets",))
    good = case.arguments()

    def refused(error: type[Exception], match: str, **changes: Any) -> None:
        with pytest.raises(error, match=match):
            relational_memory(**{**good, **changes})

    refused(TypeError, "spec must be a CellSpec", spec="sonnet")
    refused(TypeError, "params must be a mapping", params=list(case.params.values()))
    without = {name: value for name, value in case.params.items() if name != "mlp.1.bias"}
    refused(ValueError, r"missing: \['mlp.1.bias'\]", params=without)
    refused(ValueError, r"unknown: \['extra'\]", params={**case.params, "extra": X})
    refused(
        ValueError, r"params\['mlp.0.bias'\] must be \[8\], got \[2, 3, 5\]", params={**case.params, "mlp.0.bias": X}
    )
    refused(
        TypeError, r"params\['mlp.0.bias'\] must be a tensor \[8\], got 1.0", params={**case.params, "mlp.0.bias": 1.0}
    )
    refused(
        TypeError,
        r"params\['mlp.0.bias'\] must be torch.float64 on cpu, as x",
        params={**case.params, "mlp.0.bias": torch.zeros(8)},
    )
    refused(TypeError, "memory", memory=None)
    refused(ValueError, "reset_memory must be the memory that resets load", reset_memory=None)
    refused(ValueError, "reset_memory requires resets", resets=None)
    four = torch.zeros(4, 4, dtype=torch.float64)
    refused(ValueError, r"reset_memory must be \[N, D\] = \[3, 8\], got \[4, 4\]", reset_memory=four)
    refused(ValueError, r"reset_memory must be \[B, N, D\] = \[3, 3, 8\], got \[1, 4, 4\]", reset_memory=four[None])
    refused(ValueError, "backend must be one of", backend="gpu")
    refused(ValueError, "recompute must be one of", recompute=None)
    refused(ValueError, r"dropout_mask must be \[B, T, H, N, S\] = ", dropout_mask=torch.zeros(1, dtype=torch.float64))
    refused(TypeError, "dropout_mask must be a", dropout_mask=0.1)
    several = draw(SPECS["blocks"])
    with pytest.raises(ValueError, match="dropout_mask must be None for l0sg"):
        relational_memory(**several.arguments(), dropout_mask=torch.zeros(1))


def test_explain() -> None:
    with pytest.raises(TypeError, match="spec must be a CellSpec"):
        explain("sonnet", X)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        explain(SPECS["sonnet"], torch.zeros(1, dtype=torch.int64))
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        explain(SPECS["sonnet"], 1.0)  # type: ignore[arg-type]


def test_read_head() -> None:
    with pytest.raises(ValueError, match="read_head must be one of"):
        ReadHead("max", 2, 3)
    with pytest.raises(ValueError, match="mem_slots"):
        ReadHead("mean", 0, 3)
    with pytest.raises(TypeError, match="mem_size"):
        ReadHead("mean", 2, 3.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"memory must be \[..., 2, 3\], got \[4, 3, 2\]"):
        ReadHead("mean", 2, 3)(torch.zeros(4, 3, 2))
    with pytest.raises(TypeError, match=r"memory must be a tensor \[..., 2, 3\], got None"):
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
