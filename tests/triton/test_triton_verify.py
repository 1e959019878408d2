"""`rmc verify --backend triton` in the strict interpreter: outputs and gradients of the covering set, each dtype."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec

import pytest

if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
    pytest.skip("runs under TRITON_INTERPRET=1, which `make interpret` sets", allow_module_level=True)

from rmc_kernels.verify import Case, check_case
from rmc_kernels.verify.cases import DTYPES
from rmc_kernels.verify.cover import covering

CASES = [case for case in covering() if case.spec.variant != "l0sg"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{CASES.index(case)}-{case.spec.variant}")
def test_the_covering_set(case: Case, dtype: str) -> None:
    """Every two values of any two options meet in it."""
    result = check_case(replace(case, dtype=dtype), "triton")
    assert result.status == "right", (result.reason, result.misses, result.case.as_json())
