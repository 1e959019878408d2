"""The training loop: Adam, gradients clipped, evaluated on held-out examples that never change; can be interrupted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rmc_kernels import errors
from rmc_kernels.backends import explain
from rmc_kernels.info import cpu_name
from rmc_kernels.layers import RelationalMemory
from rmc_kernels.tasks import ranks
from rmc_kernels.tasks.checkpoints import read_checkpoint, write_checkpoint
from rmc_kernels.tasks.cores import Recurrent, State, detached
from rmc_kernels.tasks.files import left_by_a_run
from rmc_kernels.tasks.history import History, Point
from rmc_kernels.tasks.models import ModelConfig
from rmc_kernels.tasks.schedule import SCHEDULES, Schedule, rate_factor
from rmc_kernels.tasks.task import Task

#: Fields of a TrainingConfig that may differ between a run and its continuation.
MAY_CHANGE = ("updates", "seconds", "device")
#: The fields of the task, of the ModelConfig and of the TrainingConfig, under "options", "model" and "training".
Settings = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained.

    Attributes:
        updates: Optimizer updates.
        batch_size: Sequences of an update, over all processes.
        learning_rate: Adam's, after the warm-up.
        schedule: Of the learning rate after the warm-up: constant, linear or cosine.
        warmup_updates: Updates over which the learning rate rises linearly from 0.
        weight_decay: Decoupled, as in AdamW.
        clip_norm: The gradient's norm is clipped to this.
        seed: Of the weights and of the training examples.
        seconds: Wall time after which training stops; no limit if not given.
        evaluate_every: Updates between evaluations, and between checkpoints.
        evaluation_examples: Held-out examples, where the task makes its own.
        device: A torch device, such as cpu or cuda.
    """

    updates: int = 2000
    batch_size: int = 1600
    learning_rate: float = 1e-4
    schedule: Schedule = "constant"
    warmup_updates: int = 0
    weight_decay: float = 0.0
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
        errors.one_of("schedule", self.schedule, SCHEDULES)
        if not 0 <= errors.positive_int("seed", self.seed, minimum=0) < 2**32:
            raise ValueError(f"seed must be an int from 0 to 2**32 - 1, got {self.seed}")
        for name in ("learning_rate", "clip_norm"):
            if not errors.real_number(name, getattr(self, name)) > 0:
                raise ValueError(f"{name} must be a number above 0, got {getattr(self, name)}")
        if not errors.real_number("weight_decay", self.weight_decay) >= 0:
            raise ValueError(f"weight_decay must be a number of at least 0, got {self.weight_decay}")

    def rate(self, update: int) -> float:
        """The learning rate of an update, 1 to `updates`."""
        return self.learning_rate * rate_factor(self.schedule, update, self.updates, self.warmup_updates)


class Trainer:
    """One model on its way through one task.

    In every process that torchrun started it trains on its share of each batch: the updates are those of one process
    on the whole batch, up to rounding.

    Attributes:
        model: the model.
        update: updates made so far.
        history: its curve so far.
        evaluated: whether the last update was followed by an evaluation.
        saved: the updates that the run's checkpoint has; None while there is none.

    Args:
        task, model, config: what learns what, and how.
        checkpoint: file that every evaluation leaves, with the curve as JSON and CSV beside it; None for no files.
        resume: go on from `checkpoint` if it exists. It must be of the same task, model and config, but for
            `MAY_CHANGE`, and of no more updates.
        overwrite: replace what a run has left in `checkpoint` and beside it.
        command: the command line that repeats the run, if there is one.

    Raises:
        FileExistsError: a run has left files there, which are neither resumed nor overwritten.
        OSError: the checkpoint cannot be read.
        ValueError: the device cannot be used, or the checkpoint is damaged, of other settings, or of another number of
            processes.

    Example:
        >>> trainer = Trainer(NthFarthest(3, 1), ModelConfig(), TrainingConfig(updates=100), Path("runs/first.pt"))
        >>> trainer.run().final.accuracy
    """

    def __init__(
        self,
        task: Task,
        model: ModelConfig,
        config: TrainingConfig,
        checkpoint: Path | None = None,
        resume: bool = False,
        overwrite: bool = False,
        command: str = "",
    ) -> None:
        if resume and overwrite:
            raise ValueError("overwrite must not be given beside resume: a run is gone on with or replaced")
        check_device(config.device)
        self._settings = settings(task, model, config)
        found = None
        if checkpoint is not None and resume:
            found = checkpoint_to_resume(checkpoint, self._settings)
        elif checkpoint is not None and not overwrite:
            refuse_another_run(checkpoint)
        self.task, self.config, self.checkpoint = task, config, checkpoint
        self.update, self.examples, self.tokens, self.evaluated = 0, 0, 0, False
        self.saved: int | None = None
        self.rank, self.world = ranks.rank(), ranks.world()
        if config.batch_size < self.world:
            raise ValueError(
                f"batch_size must be at least one sequence a process, {self.world}, got {config.batch_size}"
            )
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.model = task.model(model).to(config.device)
            self.random = _random_state()
        self.parallel: nn.Module = self.model
        if self.world > 1:
            unused = task.carries and model.memory == "learned"
            self.parallel = DistributedDataParallel(self.model, find_unused_parameters=unused)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.source = task.source(config.batch_size, config.seed)
        self.held_out = task.held_out(config.batch_size, config.evaluation_examples)
        self.state: State = None
        self._losses = [0.0, 0]  # sum and number since the evaluation before
        self._earlier = self._earlier_cpu = 0.0  # seconds of the stretches before
        answers = sum(batch.asked for batches in self.held_out.values() for batch in batches)
        self._made_by = MadeBy(self._backend(), command, f"{cpu_name()}, torch {torch.__version__}")
        self.history = History(
            task.title, dict(task.levels), _parameter_count(self.model), model=self._settings["model"],
            training=self._settings["training"], options=self._settings["options"], answers=answers,
            part_levels=dict(task.part_levels), measure=task.measure, **self._made_by._asdict(),
        )  # fmt: skip
        if found is not None:
            self._load(found)

    def run(self, watch: Callable[[Trainer], None] = lambda trainer: None) -> History:
        """Train to the end, and call `watch` after every update.

        Raises:
            OSError: a file cannot be written. The checkpoint before is as it was.
        """
        with torch.random.fork_rng():
            resumed = bool(self.history.points)
            _set_random_state(self.random, 0 if resumed else self.rank)
            self._start, self._start_cpu = time.perf_counter(), time.process_time()
            finished = resumed and self._finished()
            if finished:
                self._write_history()  # a run that was killed between its last two files lacks the second
            elif resumed:
                self._go_on()
            else:
                self._evaluate()
            while not finished:
                self._learn()
                finished, due = self._finished(), self.update % self.config.evaluate_every == 0
                self.evaluated = finished or due
                if self.evaluated:
                    self._evaluate()
                watch(self)
        return self.history

    @property
    def seconds(self) -> float:
        """Wall time of the training so far."""
        return self._earlier + time.perf_counter() - self._start

    def _finished(self) -> bool:
        if self.config.seconds is None or self.update == 0:
            return self.update >= self.config.updates
        late = ranks.summed([float(self.rank == 0 and self.seconds >= self.config.seconds)], self.config.device)[0] > 0
        return late or self.update >= self.config.updates

    def _learn(self) -> None:
        config = self.config
        whole = self.source.next()
        batch = whole.rows(self.rank, self.world).to(config.device)
        answers = self.parallel(*batch, self.state)
        loss: Tensor = answers.losses.sum() / whole.asked
        self.optimizer.zero_grad()
        (loss * self.world).backward()  # DDP averages over the processes
        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        total = ranks.summed([loss.item()], config.device)[0]
        self.source.heard(total)
        self.update += 1
        self.optimizer.param_groups[0]["lr"] = config.rate(self.update)
        self.optimizer.step()
        if self.task.carries:
            self.state = detached(answers.state)
        self._losses[0] += total
        self._losses[1] += 1
        self.examples += whole.inputs.shape[0]
        self.tokens += whole.targets.numel()

    def _evaluate(self) -> None:
        scores = {part: self._score(batches) for part, batches in self.held_out.items()}
        losses, right, asked = (sum(score[i] for score in scores.values()) for i in range(3))
        if len(scores) > 1:
            self.history.parts = {part: score[1] / score[2] for part, score in scores.items()}
        total, count = self._losses
        self.history.points.append(
            Point(
                self.update, self.examples, self.seconds, losses / asked, right / asked, self.tokens,
                self._earlier_cpu + time.process_time() - self._start_cpu,
                total / count if count else None, self.optimizer.param_groups[0]["lr"],
            )
        )  # fmt: skip
        if self.update % self.config.evaluate_every == 0:
            self._losses = [0.0, 0]
        self._save()

    @torch.no_grad()
    def _score(self, batches: list[Any]) -> list[float]:
        """Sum of the losses, right answers, and answers asked for."""
        self.model.eval()
        state, score = None, torch.zeros(3, dtype=torch.float64)
        for whole in batches:
            batch = whole.rows(self.rank, self.world).to(self.config.device)
            answers = self.model(*batch, state if self.task.carries else None)
            state = answers.state
            found = (answers.losses.double().sum(), answers.right.double().sum(), torch.tensor(len(answers.losses)))
            score += torch.stack([value.cpu().double() for value in found])
        self.model.train()
        return ranks.summed(score.tolist(), self.config.device)

    def _backend(self) -> str:
        core = self.model.core
        if not isinstance(core, Recurrent) or not isinstance(core.layer, RelationalMemory):
            return "torch"
        layer = core.layer
        if layer.backend != "auto":
            return layer.backend
        like = torch.empty(1, 1, layer.spec.input_size, device=self.config.device)
        return explain(layer.spec, like).backend

    # -- files ----------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        own = ranks.gathered({"state": _to_cpu(self.state), "random": _random_state(), "losses": self._losses})
        if self.rank == 0:
            history = asdict(self.history)
            write_checkpoint(
                self.checkpoint,
                {
                    "what": self._settings, "made_by": self._made_by._asdict(),
                    "vocabulary": list(self.task.vocabulary), "update": self.update, "examples": self.examples,
                    "tokens": self.tokens, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                    "source": self.source.state_dict(), "processes": own, "points": history["points"],
                    "parts": history["parts"],
                },
            )  # fmt: skip
        self.saved = self.update
        self._write_history()

    def _write_history(self) -> None:
        if self.checkpoint is not None and self.rank == 0:
            self.history.write(self.checkpoint.parent, self.checkpoint.stem)

    def _load(self, loaded: Mapping[str, Any]) -> None:
        if loaded["vocabulary"] != list(self.task.vocabulary):
            raise ValueError(f"{self.checkpoint} must be of the text that it was trained on, which has changed since")
        if len(loaded["processes"]) != self.world:
            raise ValueError(
                f"{self.checkpoint} must be resumed by {len(loaded['processes'])} processes, as it was trained by, "
                f"got {self.world}"
            )
        self.model.load_state_dict(loaded["model"])
        self.optimizer.load_state_dict(loaded["optimizer"])
        self.source.load_state_dict(loaded["source"])
        own = loaded["processes"][self.rank]
        self.state, self.random, self._losses = _to(own["state"], self.config.device), own["random"], own["losses"]
        self.update, self.examples, self.tokens = loaded["update"], loaded["examples"], loaded["tokens"]
        self.saved = self.update
        self.history.points, self.history.parts = [Point(**point) for point in loaded["points"]], dict(loaded["parts"])
        self._earlier, self._earlier_cpu = self.history.final.seconds, self.history.final.cpu_seconds
        made_by = MadeBy(**loaded["made_by"]) if "made_by" in loaded else self._made_by  # version 1 has none
        self._describe(loaded["what"]["training"], made_by)

    def _go_on(self) -> None:
        """From here on it is this training's run, whose curve has no point where a shorter run ended.

        Where that run had another learning rate there, the point stays, to show it.
        """
        self._describe(self._settings["training"], self._made_by)
        due = self.update % self.config.evaluate_every == 0
        if not due and math.isclose(self.history.final.learning_rate, self.config.rate(self.update), rel_tol=1e-9):
            self.history.points.pop()

    def _describe(self, training: Mapping[str, Any], made_by: MadeBy) -> None:
        self.history.training = training
        self.history.backend, self.history.command, self.history.machine = made_by


class MadeBy(NamedTuple):
    """What a history says of the process that made its last update."""

    backend: str
    command: str
    machine: str


def settings(task: Task, model: ModelConfig, config: TrainingConfig) -> Settings:
    """What a checkpoint must be of, to be gone on from."""
    return {"options": {"name": task.name, **asdict(task)}, "model": asdict(model), "training": asdict(config)}


def check_device(device: str) -> None:
    """Raise ValueError where nothing can be computed on `device`."""
    try:
        torch.zeros((), device=device).item()
    except Exception as error:
        why = errors.in_short(error)
        raise ValueError(f"device must be one that torch can use here, got {device!r}: {why}") from error


def refuse_another_run(checkpoint: Path) -> None:
    """Raise FileExistsError where a run has left files."""
    if left := left_by_a_run(checkpoint):
        raise FileExistsError(
            f"{checkpoint.parent} must have no run {checkpoint.stem} yet, got {_names(left)}: "
            "pass --resume to go on with it, --overwrite to replace it, or another --out"
        )


def checkpoint_to_resume(checkpoint: Path, wanted: Settings) -> dict[str, Any] | None:
    """The checkpoint that a training of these settings goes on from; None where it begins.

    Raises:
        FileExistsError: a run has left files but no checkpoint.
        OSError: the checkpoint cannot be read.
        ValueError: it is damaged, of other settings, or of more updates.
    """
    if not checkpoint.exists():
        if left := left_by_a_run(checkpoint):
            raise FileExistsError(
                f"{checkpoint} must be there to go on with a run, got only {_names(left)}: move that away, or pass "
                "another --out"
            )
        return None
    loaded = read_checkpoint(checkpoint)
    for group, fields in wanted.items():
        for name, value in fields.items():
            before = loaded["what"][group].get(name)
            if before != value and not (group == "training" and name in MAY_CHANGE):
                name = "task" if name == "name" else name
                raise ValueError(f"{name} must be {before!r} to go on from {checkpoint}, got {value!r}")
    updates = wanted["training"]["updates"]
    if loaded["update"] > updates:
        raise ValueError(f"updates must be at least {loaded['update']}, which {checkpoint} has made, got {updates}")
    return loaded


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths)


def _random_state() -> dict[str, Tensor]:
    """The state of torch's global generators."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def _set_random_state(state: Mapping[str, Tensor], skip: int) -> None:
    """Restore what `_random_state` gave; `skip` sets processes apart that start from one seed."""
    torch.set_rng_state(state["cpu"])
    if skip:
        torch.manual_seed(int(torch.randint(2**62, ())) + skip)
    elif "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _to(state: State, device: str) -> State:
    if isinstance(state, tuple):
        return tuple(part.to(device) for part in state)
    return None if state is None else state.to(device)


def _to_cpu(state: State) -> State:
    return _to(state, "cpu")


def _parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
