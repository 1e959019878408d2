"""The Relational Memory Core for PyTorch, fast: fused kernels behind a layer that feels like nn.LSTM."""

from rmc_kernels._version import __version__
from rmc_kernels.backends import explain
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
