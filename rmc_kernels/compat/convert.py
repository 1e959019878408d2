"""`python -m rmc_kernels.compat.convert CHECKPOINT OUT`: a TensorFlow checkpoint as .npz or .safetensors.

Run it where TensorFlow is installed; `compat.sonnet.load` reads the result anywhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rmc_kernels.compat import checkpoints


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert, and print each variable that was written."""
    parser = argparse.ArgumentParser(prog="python -m rmc_kernels.compat.convert", description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint directory, or a prefix such as run/model.ckpt-1000")
    parser.add_argument("out", help="a file that ends in .npz or .safetensors")
    parser.add_argument("--scope", default="", help="only variables whose name starts with this")
    options = parser.parse_args(arguments)
    found = checkpoints.read(options.checkpoint)
    chosen = {name: value for name, value in sorted(found.items()) if name.startswith(options.scope)}
    if not chosen:
        parser.error(f"--scope must be the beginning of a variable's name, such as one of {sorted(found)[:8]}")
    checkpoints.write(chosen, options.out)
    for name, value in chosen.items():
        print(f"{name} {list(value.shape)}")


if __name__ == "__main__":
    main()
