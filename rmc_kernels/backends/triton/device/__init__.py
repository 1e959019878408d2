"""Triton device functions: imported only where triton is installed."""
