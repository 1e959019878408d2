"""The Triton backend: a whole sequence of the cell in one launch. Importing it needs no triton."""

from rmc_kernels.backends.triton.backend import TritonBackend

__all__ = ["TritonBackend"]
