"""Vectors of the original implementations: where they are and how each becomes a layer and its inputs."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmc_kernels import CellSpec, RelationalMemory
from rmc_kernels.compat import l0sg, r2gen, sonnet

_HERE = Path(__file__).parent
#: The committed vectors have what tests read; those that the originals gave have each step's gates and memories too.
#: Vectors beside the checkout are read too, when present; RMC_GOLDEN names another folder.
_FOLDERS = [_HERE / "data", Path(os.environ.get("RMC_GOLDEN", _HERE.parent.parent / "shared" / "golden"))]


@dataclass
class Vector:
    """One file: a layer with its variables, inputs, and what the original computed (batch first)."""

    layer: RelationalMemory
    compat: ModuleType
    inputs: Tensor
    memory: Tensor
    cot_outputs: Tensor
    cot_final: Tensor | None
    outputs: Tensor | None
    final: Tensor | None
    raw: dict[str, Any]

    @property
    def gradients(self) -> dict[str, Tensor]:
        """The original's gradients by its own names; empty for seeded files."""
        found = {name[5:]: torch.tensor(value) for name, value in self.raw.items() if name.startswith("grad/")}
        return found


def files(prefix: str = "") -> list[Path]:
    """Every vector file found, each name once, in a stable order."""
    found: dict[str, Path] = {}
    for folder in _FOLDERS:
        for path in sorted(folder.rglob("*.npz")):
            found.setdefault(path.stem, path)
    return [path for name, path in sorted(found.items()) if name.startswith(prefix)]


def load(path: Path) -> Vector:
    """The vector in `path`, in its own dtype."""
    raw = dict(np.load(path))
    config = json.loads(str(raw["config"]))
    if "treat_input_as_matrix" in config:
        return _sonnet(raw, config)
    if "mode" in config:
        spec = CellSpec.r2gen(config["num_slots"], config["d_model"], config["num_heads"])
        return _port(raw, spec, r2gen)
    return _port(raw, CellSpec.l0sg(**config["constructor"]), l0sg)


def tolerances(vector: Vector) -> tuple[float, float]:
    """Memories, gradients: float64 files to rounding; of the float32 file, gradients reach 80."""
    return (1e-10, 1e-8) if vector.inputs.dtype == torch.float64 else (1e-5, 1e-5 * 80)


def _port(raw: dict[str, Any], spec: CellSpec, compat: ModuleType) -> Vector:
    layer = RelationalMemory.from_spec(spec, dtype=torch.float64).eval()
    compat.load_variables(layer, {name[4:]: value for name, value in raw.items() if name.startswith("var/")})
    tensor = {name: torch.tensor(value) for name, value in raw.items() if name != "config"}
    return Vector(
        layer, compat, tensor["inputs"], tensor["initial_memory"], tensor["cot_outputs"],
        tensor.get("cot_final_memory"), tensor["outputs"], tensor.get("final_memory"), raw,
    )  # fmt: skip


def _sonnet(raw: dict[str, Any], config: dict[str, Any]) -> Vector:
    matrix = config["treat_input_as_matrix"]
    spec = CellSpec.sonnet(
        config["input_shape"][-1], input_rows=config["input_shape"][0] if matrix else None, **config["constructor"]
    )
    layer = RelationalMemory.from_spec(spec, dtype=getattr(torch, config["dtype"]))
    if config["seeded"]:
        return _seeded(raw, config, layer)
    sonnet.load_variables(layer, {name[4:]: value for name, value in raw.items() if name.startswith("var/")})
    tensor = {name: torch.tensor(value) for name, value in raw.items() if name != "config"}
    return Vector(
        layer, sonnet, tensor["inputs"].transpose(0, 1), tensor["initial_memory"],
        tensor["cot_outputs"].transpose(0, 1), tensor["cot_final_memory"], tensor["outputs"].transpose(0, 1),
        tensor["outputs"][-1].view_as(tensor["initial_memory"]), raw,  # Sonnet's output is its memory
    )  # fmt: skip


def _seeded(raw: dict[str, Any], config: dict[str, Any], layer: RelationalMemory) -> Vector:
    name = config["name"]
    steps, batch, slots, width = config["num_steps"], config["batch"], config["mem_slots"], config["mem_size"]
    variables = {}
    for tf_name, shape in config["variables"]:
        z = _normal(f"{name}|{tf_name}", shape)
        last = tf_name.rsplit("/", 1)[1]
        scaled = {"w": 1.2 * z / np.sqrt(shape[0]), "b": 0.3 * z, "gamma": 1 + 0.3 * z, "beta": 0.3 * z}[last]
        variables[tf_name] = _grid(scaled)
    sonnet.load_variables(layer, variables)
    cot_outputs = _grid(_normal(f"{name}||cot_outputs", [steps, batch, slots * width]))
    cot_final = _grid(_normal(f"{name}||cot_final_memory", [batch, slots, width]))
    return Vector(
        layer, sonnet, torch.tensor(raw["inputs"]).transpose(0, 1), layer.initial_memory(batch),
        torch.tensor(cot_outputs).transpose(0, 1), torch.tensor(cot_final), None, torch.tensor(raw["memory_final"]),
        raw,
    )  # fmt: skip


def probe(name: str, tf_name: str, shape: tuple[int, ...]) -> Tensor:
    """The four random projections under which a seeded file stores a gradient."""
    return torch.tensor(_grid(_normal(f"{name}||probe|{tf_name}", [4, *shape])))


def _normal(key: str, shape: list[int]) -> Any:
    return np.random.RandomState(int(sha256(key.encode()).hexdigest()[:8], 16)).standard_normal(shape)


def _grid(x: Any) -> Any:
    return np.round(x * 4096) / 4096
