"""A pytest plugin: which habits were tested on which backend and variant, written as docs/compatibility.md.

A test says `@pytest.mark.feature("packed sequences")`; backend and variant are its parameters of these names, or the
marker's. `make compatibility` (`python -m pytest -m feature --compatibility=docs/compatibility.md`) writes the page
from the tests that really ran.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

BACKENDS = ("cpu", "reference")
_INTRODUCTION = """# Compatibility

What works, by the tests that ran: `make compatibility` runs every test that is marked as a feature and writes this page
from the results. A cell names the variants of the cell for which a test compared values on that backend; "all" is
sonnet, textbook, l0sg and r2gen. "-" means that no test ran there; torch.func and ONNX need plain PyTorch, which is
`reference`. `cpu` serves float32, bfloat16 and float16; float64 runs on `reference`. `triton` needs a GPU and is
tested apart (triton-backend.md).

"""
_VARIANTS = ("sonnet", "textbook", "l0sg", "r2gen")
_results = pytest.StashKey["Results"]()


class Results:
    """Outcomes by feature, backend and variant, in the order in which the tests ran."""

    def __init__(self) -> None:
        self.outcomes: dict[str, dict[str, dict[str, set[str]]]] = {}

    def add(self, feature: str, backend: str, variant: str, outcome: str) -> None:
        cells = self.outcomes.setdefault(feature, {name: {} for name in BACKENDS})
        cells[backend].setdefault(variant, set()).add(outcome)

    def page(self) -> str:
        rows = [["", *(f"`{name}`" for name in BACKENDS)], ["---"] * (1 + len(BACKENDS))]
        rows += [[feature, *map(_cell, cells.values())] for feature, cells in self.outcomes.items()]
        return _INTRODUCTION + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(variants: dict[str, set[str]]) -> str:
    passed = [name for name in _VARIANTS if variants.get(name) == {"passed"}]
    parts = ["all" if len(passed) == len(_VARIANTS) else ", ".join(passed)] if passed else []
    for outcome in ("failed", "skipped"):
        parts += [f"{outcome}: {name}" for name in _VARIANTS if outcome in variants.get(name, ())]
    return "; ".join(parts) or "-"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compatibility", type=Path, default=None, metavar="PATH", help="write docs/compatibility.md")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_results] = Results()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Function, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: pytest.TestReport = yield  # type: ignore[assignment]
    marker = item.get_closest_marker("feature")
    if marker is not None and (report.when == "call" or report.outcome != "passed"):
        parameters = {**getattr(getattr(item, "callspec", None), "params", {}), **marker.kwargs}
        backend, variant = parameters["backend"], parameters["variant"].removeprefix("compat ")
        item.config.stash[_results].add(marker.args[0], backend, variant, report.outcome)
    return report  # type: ignore[return-value]


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--compatibility")
    if path is not None:
        path.write_text(session.config.stash[_results].page())
