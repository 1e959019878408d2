"""How fast the cell is, measured as a sceptical reader would: `rmc bench`.

cases -> problem -> contestants -> parity -> timing (with ceilings) -> record -> table, plots; suite runs them in this
order. Shipped as `rmc_kernels.benchmarks`.
"""
