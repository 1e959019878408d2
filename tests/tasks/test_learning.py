"""Every task teaches something measurable in seconds."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rmc_kernels.tasks.babi import Babi
from rmc_kernels.tasks.cores import Core
from rmc_kernels.tasks.language import LanguageModelling
from rmc_kernels.tasks.models import ModelConfig
from rmc_kernels.tasks.nth_farthest import NthFarthest
from rmc_kernels.tasks.program_eval import ProgramEvaluation
from rmc_kernels.tasks.training import Trainer, TrainingConfig

pytestmark = pytest.mark.slow
MODEL = ModelConfig(slots=4, heads=4, head_size=8, embedding=32, readout_layers=1, readout_width=64)
CONFIG = TrainingConfig(updates=200, batch_size=32, learning_rate=3e-3, evaluate_every=1000, evaluation_examples=500)


def test_the_rmc_compares_distances() -> None:
    """Three vectors in 1-d: without distances 66.7 % would be the end."""
    model = replace(MODEL, head_size=16, readout_layers=2, readout_width=256)
    config = replace(CONFIG, updates=800, batch_size=128, learning_rate=1e-3, evaluation_examples=2000)
    history = Trainer(NthFarthest(3, 1), model, config).run()
    assert history.margin(history.levels["no distances"]) > 5


@pytest.mark.parametrize("core", ["rmc", "lstm", "gru"])
def test_digits_are_copied_doubled_and_turned(core: Core) -> None:
    task = ProgramEvaluation("copy", length=2)
    history = Trainer(task, replace(MODEL, core=core), replace(CONFIG, updates=300)).run()
    assert history.points[0].accuracy < 0.2
    assert history.margin(history.levels["program unread"]) > 5


def test_stories_are_understood_better_than_by_guessing() -> None:
    history = Trainer(Babi(questions=300), MODEL, replace(CONFIG, updates=600)).run()
    (level,) = history.levels.values()
    assert history.margin(level) > 5


@pytest.mark.parametrize("core", ["rmc", "lstm", "gru", "transformer"])
def test_the_next_character_of_python_is_foreseen(core: Core) -> None:
    task = LanguageModelling(level="character", characters=100_000, window=20)
    model = replace(MODEL, core=core, head="tied")
    history = Trainer(task, model, replace(CONFIG, evaluation_examples=200)).run()
    counts = task.encode(task.texts[1]).bincount(minlength=len(task.vocabulary)).double()
    shares = counts / counts.sum()
    by_frequency = -(shares * shares.clamp(min=1e-12).log()).sum().item()  # the best that a model without memory can do
    assert history.final.loss < by_frequency - 0.3


def test_the_exercise_is_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    monkeypatch.delitem(sys.modules, "same_or_different", raising=False)
    from same_or_different import learn

    assert learn() > 0.9
