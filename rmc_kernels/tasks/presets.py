"""Settings by task and name: small ones for a laptop, and the paper's (how they were found: docs/training.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rmc_kernels.tasks.babi import Babi
from rmc_kernels.tasks.language import LanguageModelling
from rmc_kernels.tasks.models import ModelConfig
from rmc_kernels.tasks.nth_farthest import NthFarthest
from rmc_kernels.tasks.program_eval import ProgramEvaluation
from rmc_kernels.tasks.task import Task
from rmc_kernels.tasks.training import TrainingConfig


@dataclass(frozen=True)
class Preset:
    """A task, the RMC that is to learn it, and how."""

    task: Task
    model: ModelConfig
    training: TrainingConfig


PRESETS: Mapping[str, Mapping[str, Preset]] = {
    "nth-farthest": {
        "small": Preset(
            NthFarthest(objects=3, dims=1),
            ModelConfig(slots=4, heads=4, head_size=16, readout_layers=2, readout_width=256),
            TrainingConfig(updates=1500, batch_size=128, learning_rate=1e-3),
        ),
        "medium": Preset(
            NthFarthest(objects=4, dims=2, curriculum="grow"),
            ModelConfig(slots=4, heads=4, head_size=16, readout_layers=2, readout_width=256),
            TrainingConfig(
                updates=6000, batch_size=128, learning_rate=1e-3, schedule="cosine", evaluate_every=250,
                evaluation_examples=2048,
            ),
        ),
        "paper": Preset(
            NthFarthest(objects=8, dims=16),
            ModelConfig(slots=8, heads=8, head_size=32, readout_layers=4, readout_width=256),
            TrainingConfig(updates=1_000_000, batch_size=1600, learning_rate=1e-4, evaluate_every=1000),
        ),
    },
    "program-eval": {
        "small": Preset(
            ProgramEvaluation(digits=2, nesting=1, length=5),
            ModelConfig(slots=4, heads=4, head_size=16, embedding=32, readout_layers=1, readout_width=128),
            TrainingConfig(
                updates=1500, batch_size=48, learning_rate=2e-3, schedule="cosine", evaluate_every=250,
                evaluation_examples=600,
            ),
        ),
        "paper": Preset(
            ProgramEvaluation(digits=5, nesting=3, length=20),
            ModelConfig(slots=4, heads=4, head_size=64, gate="memory", embedding=128, readout_layers=1),
            TrainingConfig(updates=200_000, batch_size=128, learning_rate=1e-3, evaluate_every=1000),
        ),
    },
    "babi": {
        "small": Preset(
            Babi(),
            ModelConfig(slots=4, heads=4, head_size=16, embedding=64, readout_layers=1, readout_width=64, dropout=0.1),
            TrainingConfig(
                updates=1500, batch_size=32, learning_rate=1e-3, schedule="cosine", evaluate_every=500,
                evaluation_examples=20_000,
            ),
        ),
    },
    "lm": {
        "small": Preset(
            LanguageModelling(most_words=2000),
            ModelConfig(slots=2, heads=4, head_size=32, embedding=64, head="tied", dropout=0.1),
            TrainingConfig(
                updates=600, batch_size=20, learning_rate=2e-3, schedule="cosine", warmup_updates=50, clip_norm=0.5,
                evaluate_every=200, evaluation_examples=1000,
            ),
        ),
        "paper": Preset(
            LanguageModelling(level="word", most_words=300_000, window=50),
            ModelConfig(slots=1, heads=4, head_size=625, mlp_layers=5, embedding=1024, head="adaptive", dropout=0.1),
            TrainingConfig(updates=500_000, batch_size=64, learning_rate=1e-3, clip_norm=0.1, evaluate_every=1000),
        ),
    },
}  # fmt: skip
