"""Triton's compiler without a GPU: see `tools.offline.compiler`, and `assembly` for what the compiled code uses."""

from tools.offline.compiler import TARGETS, Launch, offline

__all__ = ["TARGETS", "Launch", "offline"]
