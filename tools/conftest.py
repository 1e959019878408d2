"""The tests of the tools run as those of tests/ do: one thread, and strictly where Triton interprets."""

from tests.conftest import strict_interpreter

__all__ = ["strict_interpreter"]
