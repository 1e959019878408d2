"""One thread for torch; a strict interpreter around every test where Triton interprets.

The suite's tensors are tiny, and parity must not depend on how busy the machine is. `make test` runs what concerns
Triton a second time under TRITON_INTERPRET=1, which holds for a whole process: there every kernel runs as
`tools.strict` has it.
"""

import os
import signal
from collections.abc import Iterator

import pytest
import torch

pytest_plugins = ["tests.compatibility"]

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell ignores it for background jobs
    signal.signal(signal.SIGINT, signal.default_int_handler)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=INTERPRETED)
def strict_interpreter() -> Iterator[None]:
    """Nothing that a test runs may be a hazard."""
    from tools.strict import strict

    with strict() as report:
        yield
    assert not report.hazards
