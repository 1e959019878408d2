"""The training loop: Adam on fresh examples, gradients clipped, evaluated on held-out examples that never change."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rmc_kernels import errors
from rmc_kernels.backends import explain
from rmc_kernels.layers import RelationalMemory
from rmc_kernels.tasks.history import History, Point
from rmc_kernels.tasks.models import ModelConfig, build, parameter_count
from rmc_kernels.tasks.task import Task

#: Seed of the held-out examples: the same for every model and seed. Training seeds are not taken from here.
EVALUATION_SEED = 2**32 + 1806


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained.

    Attributes:
        updates: optimizer updates.
        batch_size: examples of an update.
        learning_rate: Adam's, after the warm-up.
        warmup_updates: updates over which the learning rate rises linearly from 0.
        clip_norm: the gradient's norm is clipped to this.
        seed: of the weights and of the training examples.
        seconds: wall time after which training stops; None for no limit.
        evaluate_every: updates between evaluations.
        evaluation_examples: held-out examples.
        device: where it runs.
    """

    updates: int = 2000
    batch_size: int = 1600
    learning_rate: float = 1e-4
    warmup_updates: int = 0
    clip_norm: float = 1.0
    seed: int = 0
    seconds: float | None = None
    evaluate_every: int = 100
    evaluation_examples: int = 4096
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("updates", "batch_size", "evaluate_every", "evaluation_examples"):
            errors.positive_int(name, getattr(self, name))
        errors.positive_int("warmup_updates", self.warmup_updates, minimum=0)
        if not 0 <= errors.positive_int("seed", self.seed, minimum=0) < 2**32:
            raise ValueError(f"seed takes an int from 0 to 2**32 - 1, got {self.seed}")
        for name in ("learning_rate", "clip_norm"):
            if not errors.real_number(name, getattr(self, name)) > 0:
                raise ValueError(f"{name} takes a number above 0, got {getattr(self, name)}")


class Trainer:
    """One model on its way through one task.

    Attributes:
        model: the classifier.
        update: updates made so far.
        history: its curve so far.
    """

    def __init__(self, task: Task, model: ModelConfig, config: TrainingConfig) -> None:
        self.task, self.config, self.update = task, config, 0
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.model = build(model, task.input_size, task.classes).to(config.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate, fused=True)
        self.generator = torch.Generator(config.device).manual_seed(config.seed)
        held_out = torch.Generator(config.device).manual_seed(EVALUATION_SEED)
        self.held_out = task.sample(config.evaluation_examples, held_out)
        self.history = History(
            task.title, dict(task.levels), parameter_count(self.model), self._backend(), asdict(model), asdict(config)
        )

    def run(self, watch: Callable[[Trainer], None] = lambda trainer: None) -> History:
        """Train to the end, and call `watch` after every update."""
        start, limit = time.perf_counter(), self.config.seconds or math.inf
        self._evaluate(start)
        finished = False
        while not finished:
            self._learn()
            finished = self.update == self.config.updates or time.perf_counter() - start >= limit
            if finished or self.update % self.config.evaluate_every == 0:
                self._evaluate(start)
            watch(self)
        return self.history

    def _learn(self) -> None:
        self.update += 1
        inputs, targets = self.task.sample(self.config.batch_size, self.generator)
        loss: Tensor = cross_entropy(self.model(inputs), targets)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        warmth = min(1.0, self.update / max(1, self.config.warmup_updates))
        self.optimizer.param_groups[0]["lr"] = self.config.learning_rate * warmth
        self.optimizer.step()

    @torch.no_grad()
    def _evaluate(self, start: float) -> None:
        self.model.eval()
        logits = torch.cat([self.model(inputs) for inputs in torch.split(self.held_out.inputs, self.config.batch_size)])
        self.model.train()
        loss = cross_entropy(logits, self.held_out.targets).item()
        accuracy = (logits.argmax(1) == self.held_out.targets).float().mean().item()
        seconds = time.perf_counter() - start
        self.history.points.append(Point(self.update, self.update * self.config.batch_size, seconds, loss, accuracy))

    def _backend(self) -> str:
        core = self.model.core
        if not isinstance(core, RelationalMemory):
            return "torch"
        return explain(core.spec, self.held_out.inputs).backend if core.backend == "auto" else core.backend
