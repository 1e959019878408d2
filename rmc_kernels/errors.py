"""Argument checks: every message names the argument, what it got, and what it takes."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch


def describe(value: object) -> str:
    """A short rendering of `value` for an error message; tensors show shape, dtype and device, not numbers."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype} on {value.device}"
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def in_short(error: BaseException) -> str:
    """An exception in a line, with the one that it comes from in the end: a compiler's own says where, not what."""
    first = error
    while (cause := first.__cause__ or (None if first.__suppress_context__ else first.__context__)) is not None:
        first = cause
    lines = [f"{type(each).__name__}: {str(each).strip().partition(chr(10))[0]}" for each in (error, first)]
    return lines[0] if first is error else f"{lines[0]} ({lines[1]})"


def positive_int(name: str, value: object, minimum: int = 1) -> int:
    """`value` as an int of at least `minimum`; bool and float are refused, numpy integers are taken."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} takes an int of at least {minimum}, got {describe(value)}")
    number = operator.index(value)
    if number < minimum:
        raise ValueError(f"{name} takes an int of at least {minimum}, got {number}")
    return number


def real_number(name: str, value: object) -> float:
    """`value` as a float; infinities are allowed (they close or open a gate for good), NaN is not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} takes a real number, got {describe(value)}")
    number = float(value)
    if number != number:
        raise ValueError(f"{name} takes a real number, got nan")
    return number


def one_of(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in choices):
        allowed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} takes one of {allowed}; got {describe(value)}")


def boolean(name: str, value: object) -> bool:
    """`value` if it is a bool; TypeError otherwise."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} takes True or False, got {describe(value)}")
    return value


def is_tensor(name: str, value: object, takes: str) -> torch.Tensor:
    """`value` if it is a tensor; TypeError saying what `name` takes otherwise."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} takes {takes}, got {describe(value)}")
    return value
