"""Trainings that are interrupted, logged, and run on two processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rmc_kernels.tasks import logs
from rmc_kernels.tasks.babi import Babi
from rmc_kernels.tasks.checkpoints import read_checkpoint, write_checkpoint
from rmc_kernels.tasks.cores import Core
from rmc_kernels.tasks.history import History, Point
from rmc_kernels.tasks.language import LanguageModelling
from rmc_kernels.tasks.models import ModelConfig
from rmc_kernels.tasks.nth_farthest import NthFarthest
from rmc_kernels.tasks.program_eval import ProgramEvaluation
from rmc_kernels.tasks.registry import trained
from rmc_kernels.tasks.schedule import rate_factor
from rmc_kernels.tasks.task import Task
from rmc_kernels.tasks.training import Trainer, TrainingConfig

#: Dropout, a schedule and a curriculum: everything that an interruption could lose.
MODEL = ModelConfig(slots=2, heads=2, head_size=4, embedding=8, readout_layers=1, readout_width=8, dropout=0.2)
CONFIG = TrainingConfig(
    updates=7, batch_size=8, learning_rate=1e-2, schedule="cosine", warmup_updates=2, evaluate_every=3,
    evaluation_examples=20,
)  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Task]:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("one two three four\nfive two one\n" * 60)
    language = LanguageModelling(str(text), level="word", window=7)
    return {t.name: t for t in (NthFarthest(4, 2, "grow", 2), ProgramEvaluation(), Babi(questions=20), language)}


def curve(history: History) -> list[tuple[Any, ...]]:
    """All of a curve but its times."""
    return [
        (p.update, p.examples, p.tokens, p.loss, p.accuracy, p.training_loss, p.learning_rate) for p in history.points
    ]


class Killed(Exception):
    """What ends a training in these tests."""


def killed_after(update: int, trainer: Trainer) -> None:
    def watch(trainer: Trainer) -> None:
        if trainer.update == update:
            raise Killed

    with pytest.raises(Killed):
        trainer.run(watch)


@pytest.mark.parametrize(
    ("name", "core"), [("nth-farthest", "rmc"), ("program-eval", "gru"), ("babi", "rmc"), ("lm", "rmc"), ("lm", "lstm")]
)
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    name: str, core: Core, tasks: dict[str, Task], tmp_path: Path
) -> None:
    task, model = tasks[name], replace(MODEL, core=core)
    whole = Trainer(task, model, CONFIG)
    whole.run()
    path = tmp_path / "run.pt"
    killed_after(5, Trainer(task, model, CONFIG, path))
    again = Trainer(task, model, CONFIG, path, resume=True)
    assert again.update == 3
    assert curve(again.run()) == curve(whole.history)
    pairs = zip(again.model.state_dict().values(), whole.model.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_finished_run_can_be_made_longer(tasks: dict[str, Task], tmp_path: Path) -> None:
    task, config = tasks["nth-farthest"], replace(CONFIG, schedule="constant")
    whole = Trainer(task, MODEL, replace(config, updates=11)).run()
    Trainer(task, MODEL, config, tmp_path / "run.pt").run()
    longer = Trainer(task, MODEL, replace(config, updates=11), tmp_path / "run.pt", resume=True)
    assert longer.update == 7
    assert curve(longer.run()) == curve(whole)


def test_a_finished_run_stays_as_it_is(tasks: dict[str, Task], tmp_path: Path) -> None:
    first = Trainer(tasks["babi"], MODEL, CONFIG, tmp_path / "run.pt").run()
    again = Trainer(tasks["babi"], MODEL, CONFIG, tmp_path / "run.pt", resume=True).run()
    assert again.points == first.points
    assert again.parts == first.parts


def test_a_run_killed_while_it_writes_leaves_the_checkpoint_before(
    tasks: dict[str, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.pt"
    killed_after(3, Trainer(tasks["nth-farthest"], MODEL, CONFIG, path))

    def half(state: object, file: Any) -> None:
        file.write(b"half of it")
        raise Killed

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(Killed):
        Trainer(tasks["nth-farthest"], MODEL, CONFIG, path, resume=True).run()
    assert read_checkpoint(path)["update"] == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [({"batch_size": 9}, "batch_size"), ({"seed": 1}, "seed"), ({"learning_rate": 0.5}, "learning_rate")],
)
def test_a_checkpoint_of_another_training_is_refused(
    change: dict[str, Any], named: str, tasks: dict[str, Task], tmp_path: Path
) -> None:
    Trainer(tasks["nth-farthest"], MODEL, CONFIG, tmp_path / "run.pt").run()
    with pytest.raises(ValueError, match=f"{named} must be .* to go on from"):
        Trainer(tasks["nth-farthest"], MODEL, replace(CONFIG, **change), tmp_path / "run.pt", resume=True)
    with pytest.raises(ValueError, match=r"objects must be 4 to go on from .*, got 5"):
        Trainer(NthFarthest(5, 2, "grow", 2), MODEL, CONFIG, tmp_path / "run.pt", resume=True)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(ValueError, match="must be a checkpoint of `rmc train`"):
        read_checkpoint(tmp_path / "text.pt")
    torch.save({"version": 0}, tmp_path / "old.pt")
    with pytest.raises(ValueError, match="must be a checkpoint of `rmc train`"):
        read_checkpoint(tmp_path / "old.pt")
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "none.pt")


def test_a_checkpoint_gives_task_and_model_back(tasks: dict[str, Task], tmp_path: Path) -> None:
    trainer = Trainer(tasks["lm"], MODEL, CONFIG, tmp_path / "run.pt")
    trainer.run()
    task, model, kept = trained(tmp_path / "run.pt")
    assert task == tasks["lm"]
    assert kept["update"] == 7
    assert not model.training
    batch = task.held_out(4, 20)[""][0]
    with torch.no_grad():
        assert torch.equal(model(*batch).losses, trainer.model.eval()(*batch).losses)


def test_a_changed_text_is_noticed(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three\n" * 50)
    task = LanguageModelling(str(text), level="word", window=5)
    Trainer(task, MODEL, replace(CONFIG, updates=1), tmp_path / "run.pt").run()
    text.write_text("one two four\n" * 50)
    with pytest.raises(ValueError, match="text that it was trained on"):
        trained(tmp_path / "run.pt")


def test_what_write_checkpoint_leaves_is_whole_and_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "deep" / "a.pt", {"value": 1})
    write_checkpoint(tmp_path / "deep" / "a.pt", {"value": 2})
    assert read_checkpoint(tmp_path / "deep" / "a.pt")["value"] == 2
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.pt"]


def test_the_learning_rate_rises_and_falls() -> None:
    def rates(schedule: Any) -> list[float]:
        return [rate_factor(schedule, update, 6, 2) for update in range(1, 7)]

    assert rates("constant") == [0.5, 1, 1, 1, 1, 1]
    assert rates("linear") == [0.5, 1, 0.75, 0.5, 0.25, 0]
    assert rates("cosine") == pytest.approx([0.5, 1, 0.85355, 0.5, 0.14645, 0], abs=1e-5)


# -- logs -----------------------------------------------------------------------------------------------------------


def test_a_killed_run_leaves_its_curve(tasks: dict[str, Task], tmp_path: Path) -> None:
    killed_after(5, Trainer(tasks["nth-farthest"], MODEL, CONFIG, tmp_path / "run.pt"))
    assert [point.update for point in History.read(tmp_path / "run.json").points] == [0, 3]
    assert len((tmp_path / "run.csv").read_text().splitlines()) == 3


def test_tensorboard_gets_every_evaluation(
    tasks: dict[str, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a stand-in for the writer, since tensorboard is optional."""
    written: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def flush(self) -> None:
            pass

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    history = Trainer(tasks["babi"], MODEL, CONFIG).run(logs.tensorboard(tmp_path))
    losses = [(value, step) for name, value, step in written if name == "loss"]
    assert losses == [(point.loss, point.update) for point in history.points[1:]]
    assert {name for name, _, _ in written} >= {"accuracy", "tokens", "accuracy/qa1 single-supporting-fact"}


def test_a_history_is_read_as_it_was_written(tmp_path: Path) -> None:
    history = History("t", {"chance": 0.5}, 3, "cpu", {"core": "rmc"}, {"seed": 1}, [Point(0, 0, 0.1, 1.0, 0.5)])
    history.write(tmp_path, "run")
    assert History.read(tmp_path / "run.json") == history


# -- torchrun -------------------------------------------------------------------------------------------------------


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def run_command(folder: Path, steps: int, *launcher: str) -> list[Point]:
    """`rmc train lm` on a small text in a process of its own, or in those of a launcher; goes on from a checkpoint."""
    folder.mkdir(exist_ok=True)
    text = folder.parent / "text.txt"
    text.write_text("one two three four\nfive two one\n" * 60)
    sizes = "--slots 2 --heads 2 --head-size 4 --embedding 8 --batch-size 6 --evaluation-examples 20 --level word"
    arguments = ["train", "lm", "--text", str(text), *sizes.split(), "--window", "5", "--evaluate-every", "2"]
    arguments += ["--dropout", "0", "--schedule", "constant", "--steps", str(steps), "--resume", "--out", str(folder)]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "rmc_kernels", *arguments], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parent.parent, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    kept = History.read(folder / "lm-rmc-seed0.json")
    assert kept.command.startswith("rmc train lm")
    return kept.points


@pytest.mark.slow
def test_no_job_outlives_the_command_that_started_it(tmp_path: Path) -> None:
    """Its curve stops growing once `rmc compare` is killed; called again, it goes on from there."""
    sizes = "--slots 2 --heads 2 --head-size 4 --embedding 8 --batch-size 6 --evaluation-examples 20"
    arguments = ["compare", "nth-farthest", *sizes.split(), "--models", "rmc", "--seeds", "1", "--processes", "1"]
    command = [sys.executable, "-m", "rmc_kernels", *arguments, "--evaluate-every", "1", "--out", str(tmp_path)]
    curve = tmp_path / "nth-farthest-rmc-seed0.csv"  # written anew at every update

    def grown(since: str) -> str:
        """The curve as soon as it is another one, or as it still is after two seconds."""
        for _ in range(20):
            time.sleep(0.1)
            if curve.exists() and curve.read_text() != since:
                return curve.read_text()
        return since

    with subprocess.Popen([*command, "--steps", "1000000"], cwd=Path(__file__).parent.parent) as running:
        while not curve.exists() or len(curve.read_text().splitlines()) < 5:
            assert running.poll() is None
            time.sleep(0.1)
        running.kill()
    before = curve.read_text()
    while (after := grown(before)) != before:
        before = after
        assert len(after.splitlines()) < 100_000
    made = len(after.splitlines()) - 2
    subprocess.run([*command, "--steps", str(made + 2)], cwd=Path(__file__).parent.parent, check=True, timeout=300)
    assert curve.read_text().startswith(after)


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(tmp_path: Path) -> None:
    """The command under torchrun against a training here; gradients are summed in another order."""
    found = run_command(tmp_path / "two", 4, *TWO)
    kept = read_checkpoint(tmp_path / "two" / "lm-rmc-seed0.pt")
    options = dict(kept["what"]["options"])
    assert options.pop("name") == "lm"
    config = TrainingConfig(**kept["what"]["training"])
    expected = Trainer(LanguageModelling(**options), ModelConfig(**kept["what"]["model"]), config).run().points
    assert len(kept["processes"]) == 2
    assert [point.update for point in found] == [point.update for point in expected] == [0, 2, 4]
    assert [point.loss for point in found] == pytest.approx([point.loss for point in expected], rel=1e-4)
    assert [point.tokens for point in found] == [point.tokens for point in expected]


@pytest.mark.slow
def test_two_processes_go_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    run_command(tmp_path / "again", 2, *TWO)
    again, whole = run_command(tmp_path / "again", 4, *TWO), run_command(tmp_path / "whole", 4, *TWO)
    assert [(p.update, p.loss, p.accuracy) for p in again] == [(p.update, p.loss, p.accuracy) for p in whole]
    path = tmp_path / "again" / "lm-rmc-seed0.pt"
    task, _, kept = trained(path)
    model, config = ModelConfig(**kept["what"]["model"]), TrainingConfig(**kept["what"]["training"])
    with pytest.raises(ValueError, match="resumed by 2 processes, as it was trained by, got 1"):
        Trainer(task, model, config, path, resume=True)
