"""Weights of other implementations, in and out: `sonnet`, `l0sg`, `r2gen`."""
