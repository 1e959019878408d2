"""One thread for torch: the suite's tensors are tiny, and parity must not depend on how busy the machine is."""

import torch

pytest_plugins = ["tests.compatibility"]

torch.set_num_threads(1)
