"""Every task teaches something in seconds: more than can be had without what the task is about."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from rmc_kernels.tasks.babi import Babi
from rmc_kernels.tasks.comparison import MARGIN
from rmc_kernels.tasks.cores import Core
from rmc_kernels.tasks.history import History
from rmc_kernels.tasks.language import LanguageModelling
from rmc_kernels.tasks.models import ModelConfig
from rmc_kernels.tasks.nth_farthest import NthFarthest
from rmc_kernels.tasks.program_eval import ProgramEvaluation
from rmc_kernels.tasks.task import Task
from rmc_kernels.tasks.training import Trainer, TrainingConfig

MODEL = ModelConfig(slots=2, heads=2, head_size=8, embedding=16, readout_layers=1, readout_width=32)
RMC_AND_LSTM = ["rmc", pytest.param("lstm", marks=pytest.mark.slow)]


def learnt(task: Task, core: Core, updates: int, rate: float = 1e-2) -> History:
    config = TrainingConfig(
        updates=updates, batch_size=32, learning_rate=rate, evaluate_every=updates, evaluation_examples=1000
    )
    return Trainer(task, replace(MODEL, core=core), config).run()


@pytest.mark.parametrize("core", RMC_AND_LSTM)
def test_nth_farthest(core: Core) -> None:
    """Of two vectors, one coordinate each: n tells whether the answer is m or the other one."""
    history = learnt(NthFarthest(2, 1), core, 150)
    assert history.points[-1].loss < history.points[0].loss / 4
    assert history.final.accuracy > 0.9
    assert history.margin(history.levels["chance"]) > MARGIN


@pytest.mark.parametrize("core", RMC_AND_LSTM)
def test_program_evaluation(core: Core) -> None:
    history = learnt(ProgramEvaluation("copy", length=2), core, 200)
    assert history.margin(history.levels["program unread"]) > MARGIN


@pytest.mark.parametrize("core", RMC_AND_LSTM)
def test_babi(core: Core) -> None:
    history = learnt(Babi(questions=200, sentences=10), core, 450, rate=5e-3)
    assert history.margin(history.levels["each task's most frequent answer"]) > MARGIN


@pytest.mark.parametrize("core", RMC_AND_LSTM)
def test_language_modelling(core: Core, tmp_path: Path) -> None:
    """Three sentences over and over: a word tells much of the next one, and its frequency tells less."""
    text = tmp_path / "text.txt"
    text.write_text("one two three four\nfive two one\nthree five six one\n" * 200)
    task = LanguageModelling(str(text), level="word", window=10)
    history = learnt(task, core, 60)
    words = Counter(task.texts[1])
    of_frequencies = -sum(n * math.log(n / words.total()) for n in words.values()) / words.total()
    assert history.final.loss < of_frequencies / 2
