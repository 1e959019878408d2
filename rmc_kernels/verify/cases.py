"""What is verified: `Case`, one configuration of cell, sequence and call, as data."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal

import torch

from rmc_kernels import errors
from rmc_kernels.spec import CellSpec

Gradients = Literal["all", "inputs", "parameters", "none"]
DTYPES = ("float32", "bfloat16", "float16")
RECOMPUTE = ("full", "none")
#: That random cases ask for.
GRADIENTS: tuple[Gradients, ...] = ("all", "inputs", "parameters")


@dataclass(frozen=True)
class Case:
    """One configuration to verify; the tensors follow from it and a seed.

    Attributes:
        spec: the cell.
        dtype: "float32", "bfloat16" or "float16".
        batch_size, steps: `B` and `T`, at least 1.
        lengths: whether elements have lengths from 0 to T, with NaN in the padding.
        resets: whether there are resets, with a reset memory of their own per element.
        dropout_mask: whether attention weights are masked; for one-block cells other than l0sg.
        strided: whether every tensor is transposed in memory with gaps between its elements.
        gradients: which gradients are asked for: "all", "inputs" (x and memories), "parameters" or "none".
        recompute: "full" or "none"; see `relational_memory`.
        magnitude: standard deviation of x and the memories.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes.
    """

    spec: CellSpec
    dtype: str = "float32"
    batch_size: int = 3
    steps: int = 4
    lengths: bool = False
    resets: bool = False
    dropout_mask: bool = False
    strided: bool = False
    gradients: Gradients = "all"
    recompute: str = "full"
    magnitude: float = 1.0

    def __post_init__(self) -> None:
        errors.one_of("dtype", self.dtype, DTYPES)
        errors.positive_int("batch_size", self.batch_size)
        errors.positive_int("steps", self.steps)
        for name in ("lengths", "resets", "dropout_mask", "strided"):
            errors.boolean(name, getattr(self, name))
        errors.one_of("gradients", self.gradients, (*GRADIENTS, "none"))
        errors.one_of("recompute", self.recompute, RECOMPUTE)
        if not 0 < errors.real_number("magnitude", self.magnitude) < math.inf:
            raise ValueError(f"magnitude takes a positive number, got {self.magnitude}")
        if self.dropout_mask and self.spec.input_rows_live:
            raise ValueError("dropout_mask is for one-block cells other than l0sg")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of x and the parameters."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def input_gradients(self) -> bool:
        """Whether the gradients of x and the memories are asked for."""
        return self.gradients in ("all", "inputs")

    @property
    def parameter_gradients(self) -> bool:
        """Whether the gradients of the parameters are asked for."""
        return self.gradients in ("all", "parameters")

    @property
    def smallest_tensor(self) -> int:
        """Elements of the smallest tensor that is compared."""
        memory = self.batch_size * self.spec.mem_slots * self.spec.mem_size
        sizes = [memory]
        if self.input_gradients:
            sizes.append(self.batch_size * self.steps * math.prod(self.spec.input_shape))
        if self.parameter_gradients:
            sizes += [math.prod(shape) for shape in self.spec.parameter_shapes.values()]
        return min(sizes)

    def as_json(self) -> str:
        """One line of JSON with what differs from the defaults; `from_json` gives back an equal case."""
        return json.dumps(_differing(self) | {"spec": _differing(self.spec)})

    @classmethod
    def from_json(cls, text: str) -> Case:
        """The case that `as_json` wrote.

        Raises:
            TypeError, ValueError: no JSON object of a case; the message says where.
        """
        try:
            data: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"case takes JSON, got {text!r}: {error}") from None
        if not isinstance(data, dict) or not isinstance(data.get("spec"), dict):
            raise ValueError(f'case takes a JSON object with the cell under "spec", got {text!r}')
        return cls(**data | {"spec": CellSpec(**data["spec"])})


def _differing(value: Case | CellSpec) -> dict[str, Any]:
    """The fields of a dataclass that are not at their defaults; a key size equal to the head size is the default."""
    data = asdict(value)
    for field in fields(value):
        if field.default is not MISSING and data[field.name] == field.default:
            del data[field.name]
    if isinstance(value, CellSpec) and value.key_size == value.head_size:
        del data["key_size"]
    return data
