"""CellSpec: presets, validation, names and shapes, and the figures that follow from them."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from rmc_kernels import CellSpec, reference
from tests.cases import SPECS, draw


def test_presets_fill_the_published_defaults() -> None:
    spec = CellSpec.sonnet(input_size=5, mem_slots=3, head_size=4)
    assert (spec.num_heads, spec.num_blocks, spec.gate_style, spec.attention_mlp_layers) == (1, 1, "unit", 2)
    assert (spec.forget_bias, spec.input_bias, spec.key_size, spec.input_rows) == (1.0, 0.0, 4, None)
    assert CellSpec.l0sg(1, 2, 3) == CellSpec.l0sg(mem_slots=1, head_size=2, input_size=3, return_all_outputs=True)
    assert CellSpec.r2gen(num_slots=3, d_model=8, num_heads=2).head_size == 4
    assert CellSpec.r2gen(3, 8).dropout == 0.1
    assert CellSpec.textbook(8, 4, 8).gate_style is None


def test_specs_are_frozen_hashable_and_equal_by_what_they_compute() -> None:
    spec = CellSpec.sonnet(5, 3, 4)
    assert spec == CellSpec.sonnet(5, 3, 4, key_size=4)
    assert len({spec, CellSpec.sonnet(5, 3, 4), CellSpec.sonnet(5, 3, 4, num_heads=2)}) == 2
    with pytest.raises(FrozenInstanceError):
        spec.mem_slots = 4  # type: ignore[misc]


@pytest.mark.parametrize("name", SPECS)
def test_json_round_trip(name: str) -> None:
    spec = replace(SPECS[name], forget_bias=float("inf")) if SPECS[name].gate_size else SPECS[name]
    assert CellSpec.from_json(spec.as_json) == spec


def test_numpy_integers_are_taken() -> None:
    spec = CellSpec.sonnet(np.int64(5), 3, np.int32(4))
    assert spec == CellSpec.sonnet(5, 3, 4)
    assert type(spec.input_size) is int


GOOD = {"input_size": 5, "mem_slots": 3, "head_size": 4}


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        (name, value, error)
        for name in ("input_size", "mem_slots", "head_size", "num_heads", "num_blocks", "attention_mlp_layers")
        for value, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), ("3", TypeError), (True, TypeError))
    ]
    + [
        ("key_size", 0, ValueError),
        ("key_size", 2.0, TypeError),
        ("input_rows", 0, ValueError),
        ("input_rows", "2", TypeError),
        ("forget_bias", "1", TypeError),
        ("forget_bias", math.nan, ValueError),
        ("input_bias", None, TypeError),
        ("gate_style", "units", ValueError),
        ("gate_style", 1, ValueError),
    ],
)
def test_a_wrong_argument_is_named(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        CellSpec.sonnet(**{**GOOD, name: value})


def test_arguments_that_do_not_fit_the_variant_are_refused() -> None:
    with pytest.raises(ValueError, match="d_model must be a multiple of num_heads"):
        CellSpec.r2gen(3, 7, 2)
    with pytest.raises(ValueError, match=r"dropout must be a probability"):
        CellSpec.r2gen(3, 8, dropout=1.0)
    for changes, name in (
        ({"input_rows": 2}, "input_rows"),
        ({"num_blocks": 2}, "num_blocks"),
        ({"gate_style": "unit"}, "gate_style"),
        ({"key_size": 7}, "key_size"),
        ({"dropout": 0.5}, "dropout"),
    ):
        with pytest.raises(ValueError, match=name):
            replace(CellSpec.textbook(5, 4, 6), **changes)


@pytest.mark.parametrize("name", SPECS)
def test_the_reference_needs_exactly_the_listed_parameters(name: str) -> None:
    case = draw(SPECS[name], batch=2, steps=1, requires_grad=True)
    memory = reference.step(case.x[:, 0], case.memory, case.params, case.spec)[0]
    gradients = torch.autograd.grad(memory.sum(), list(case.params.values()), allow_unused=True)
    assert all(gradient is not None for gradient in gradients)
    assert case.spec.parameter_count == sum(value.numel() for value in case.params.values())


@pytest.mark.parametrize("name", SPECS)
def test_flops_agree_with_what_torch_counts(name: str) -> None:
    """The reference also computes rows that are never used, and batched products; without those the counts agree."""
    spec = SPECS[name]
    case = draw(spec, batch=2, steps=1)
    with FlopCounterMode(display=False) as counter:
        reference.step(case.x[:, 0], case.memory, case.params, spec)
    dead = 0 if spec.input_rows_live else 2 * 2 * spec.rows * spec.num_heads * spec.key_width * spec.mem_size
    assert spec.flops_per_step(2) + dead == counter.get_total_flops()
    parts = [spec.flops_per_step(2, part=part) for part in ("recurrent", "hoisted")]
    assert sum(parts) == spec.flops_per_step(2)


def test_what_can_be_hoisted() -> None:
    assert SPECS["sonnet"].hoistable() == ("input_projection", "input_gate", "input_key_value")
    assert SPECS["blocks"].hoistable() == ("input_projection", "input_gate", "input_key_value", "input_query")
    assert SPECS["l0sg"].hoistable() == ("input_projection", "input_gate", "input_qkv_projection")
    assert SPECS["textbook-same-width"].hoistable() == ("input_key_value",)


def test_bytes_per_step() -> None:
    spec = SPECS["sonnet"]
    memory, inputs = 2 * 4 * 3 * 8 * 4, 4 * 5
    assert spec.bytes_per_step(4) == 4 * (spec.parameter_count + inputs) + memory
    assert spec.bytes_per_step(4, itemsize=2) == 2 * (spec.parameter_count + inputs) + memory


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 5), st.integers(1, 7), st.integers(1, 4), st.integers(1, 3),
    st.sampled_from(["unit", "memory", None]), st.integers(1, 3), st.one_of(st.none(), st.integers(1, 9)),
    st.one_of(st.none(), st.integers(1, 3)),
)  # fmt: skip
def test_any_sizes_step(
    inputs: int, slots: int, head: int, heads: int, blocks: int, gate: Any, layers: int, key: Any, rows: Any
) -> None:
    spec = CellSpec.sonnet(
        inputs, slots, head, heads, blocks, gate_style=gate, attention_mlp_layers=layers, key_size=key, input_rows=rows
    )
    case = draw(spec, batch=2, steps=1)
    memory, weights = reference.step(case.x[:, 0], case.memory, case.params, spec)
    assert memory.shape == (2, slots, spec.mem_size)
    assert weights.shape == (blocks, 2, heads, slots, spec.total_rows)
    torch.testing.assert_close(weights.sum(-1), torch.ones(blocks, 2, heads, slots, dtype=torch.float64))
