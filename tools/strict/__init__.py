"""Triton's interpreter, made strict: see `tools.strict.interpreter`."""

from tools.strict.interpreter import Report, round_to_bfloat16, round_to_tf32, strict

__all__ = ["Report", "round_to_bfloat16", "round_to_tf32", "strict"]
