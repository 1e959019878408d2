"""How fast the cell is, measured as a sceptical reader would: `rmc bench`.

cases -> problem -> contestants (eager, models) -> parity -> timing (with ceilings) -> memory -> record -> case_run (one
case) -> scaling -> table, plots; suite runs them in this order. compare and report start from its JSON, profiling from
a case; gpu/ is `make gpu`.
"""
