"""Other implementations: drop-in classes (`l0sg`, `textgan`, `r2gen`) and weights in and out (`sonnet` too)."""
