"""The tasks by name, and those that checkpoints were trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rmc_kernels.tasks.babi import Babi
from rmc_kernels.tasks.checkpoints import read_checkpoint
from rmc_kernels.tasks.language import LanguageModelling
from rmc_kernels.tasks.models import ModelConfig, SequenceModel
from rmc_kernels.tasks.nth_farthest import NthFarthest
from rmc_kernels.tasks.program_eval import ProgramEvaluation
from rmc_kernels.tasks.task import Task

TASKS: Mapping[str, type[NthFarthest | ProgramEvaluation | Babi | LanguageModelling]] = {
    task.name: task for task in (NthFarthest, ProgramEvaluation, Babi, LanguageModelling)
}


def trained(path: Path) -> tuple[Task, SequenceModel, dict[str, Any]]:
    """The task and the model of a checkpoint, the model in evaluation mode, and all that the checkpoint holds.

    Raises:
        FileNotFoundError, ValueError: there is no such checkpoint, or its text has changed.
    """
    loaded = read_checkpoint(path)
    options = dict(loaded["what"]["options"])
    task: Task = TASKS[options.pop("name")](**options)
    if list(task.vocabulary) != loaded["vocabulary"]:
        raise ValueError(f"{path} must be of the text that it was trained on, which has changed since")
    model = task.model(ModelConfig(**loaded["what"]["model"]))
    model.load_state_dict(loaded["model"])
    return task, model.eval(), loaded
