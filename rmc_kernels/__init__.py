"""The Relational Memory Core for PyTorch, fast: fused kernels behind a layer that feels like nn.LSTM."""

import warnings

from rmc_kernels._version import __version__
from rmc_kernels.backends import BACKENDS, explain
from rmc_kernels.functional import relational_memory
from rmc_kernels.layers import RelationalMemory, RelationalMemoryCell
from rmc_kernels.read_heads import ReadHead
from rmc_kernels.spec import CellSpec

__all__ = [
    "CellSpec",
    "ReadHead",
    "RelationalMemory",
    "RelationalMemoryCell",
    "__version__",
    "explain",
    "relational_memory",
]

if (_reason := BACKENDS["cpu"].unavailable()) is not None:
    warnings.warn(f"rmc_kernels runs without its compiled CPU backend: {_reason}", RuntimeWarning, stacklevel=2)
