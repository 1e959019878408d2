"""Settings by name: the paper's, and one small enough for a laptop (how it was found: docs/training.md)."""

from __future__ import annotations

from dataclasses import dataclass

from rmc_kernels.tasks.models import ModelConfig
from rmc_kernels.tasks.nth_farthest import NthFarthest
from rmc_kernels.tasks.training import TrainingConfig


@dataclass(frozen=True)
class Preset:
    """A task, the RMC that is to learn it, and how."""

    task: NthFarthest
    model: ModelConfig
    training: TrainingConfig


NTH_FARTHEST = {
    "small": Preset(
        NthFarthest(objects=3, dims=1),
        ModelConfig(slots=4, heads=4, head_size=16, readout_layers=2, readout_width=256),
        TrainingConfig(updates=1500, batch_size=128, learning_rate=1e-3),
    ),
    "paper": Preset(
        NthFarthest(objects=8, dims=16),
        ModelConfig(slots=8, heads=8, head_size=32, readout_layers=4, readout_width=256),
        TrainingConfig(updates=1_000_000, batch_size=1600, learning_rate=1e-4, evaluate_every=1000),
    ),
}
