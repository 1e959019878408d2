"""Argument checks: every message names the argument, what it must be, and what it got, without tensor contents."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence


def describe(value: object) -> str:
    """What `value` is, for an error message: of tensors, arrays and collections only types, shapes and counts."""
    if isinstance(value, Tensor):
        return _describe_tensor(value)
    if isinstance(value, PackedSequence):
        return f"a PackedSequence of {_describe_tensor(value.data)}"
    if isinstance(value, (tuple, list, dict, set, frozenset)):
        kinds = ", ".join(dict.fromkeys(type(item).__name__ for item in value))
        return f"a {type(value).__name__} of length {len(value)}" + (f" ({_short(kinds)})" if kinds else "")
    if value is None:
        return "None"
    if isinstance(value, Proxy):
        return (
            "a Proxy of torch.fx, which cannot trace into this call: trace a module that holds the RelationalMemory, "
            "which is then a leaf, or use torch.export"
        )
    if isinstance(value, (str, bytes, numbers.Number, np.generic, torch.dtype, torch.device)):
        return f"{_short(repr(value))} ({type(value).__name__})"
    if isinstance(value, np.ndarray):
        return f"a numpy array of shape {list(value.shape)}, {value.dtype}"
    return f"the class {value.__name__}" if isinstance(value, type) else f"an object of type {type(value).__name__}"


def _describe_tensor(value: Tensor) -> str:
    if value.is_nested:  # its shape may be refused
        return f"a nested tensor ({value.layout})"
    kind = "a tensor" if value.layout is torch.strided else f"a {value.layout} tensor"
    return f"{kind} of shape {list(value.shape)}, {value.dtype} on {value.device}"


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def in_short(error: BaseException) -> str:
    """An exception in a line, with the one that it comes from in the end: a compiler's own says where, not what."""
    first = error
    while (cause := first.__cause__ or (None if first.__suppress_context__ else first.__context__)) is not None:
        first = cause
    lines = [f"{type(each).__name__}: {str(each).strip().partition(chr(10))[0]}" for each in (error, first)]
    return lines[0] if first is error else f"{lines[0]} ({lines[1]})"


def positive_int(name: str, value: object, minimum: int = 1) -> int:
    """`value` as an int of at least `minimum`; bool and float are refused, numpy integers are taken."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} must be an int of at least {minimum}, got {describe(value)}")
    if number < minimum:
        raise ValueError(f"{name} must be an int of at least {minimum}, got {number}")
    return number


def real_number(name: str, value: object) -> float:
    """`value` as a float; infinities are allowed (they close or open a gate for good), NaN is not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a real number, got {describe(value)}")
    number = float(value)
    if number != number:
        raise ValueError(f"{name} must be a real number, got nan")
    return number


def one_of(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in choices):
        allowed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {allowed}; got {describe(value)}")


def boolean(name: str, value: object) -> bool:
    """`value` if it is a bool; TypeError otherwise."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")
    return value


def is_dense(value: object) -> TypeGuard[Tensor]:
    """Whether `value` is a tensor, and neither a nested nor a sparse one."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested


def is_tensor(name: str, value: object, must_be: str) -> Tensor:
    """`value` if it is a tensor, and neither a nested nor a sparse one; TypeError as of `not_dense` otherwise."""
    if not is_dense(value):
        raise not_dense(name, value, must_be)
    return value


def not_dense(name: str, value: object, must_be: str) -> TypeError:
    """The error for a `value` that `is_dense` is not true of: what `name` must be, what it is, and the cure."""
    cure = ""
    if isinstance(value, Tensor):
        cure = "for a ragged batch, pass a PackedSequence or lengths" if value.is_nested else "call .to_dense()"
    elif isinstance(value, PackedSequence):
        cure = "only RelationalMemory takes one: elsewhere pad it (torch.nn.utils.rnn.pad_packed_sequence)"
    return TypeError(f"{name} must be {must_be}, got {describe(value)}" + (f"; {cure}" if cure else ""))
