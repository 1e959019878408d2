"""Trainings that are interrupted, logged, and run on two processes."""

from __future__ import annotations

import errno
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from rmc_kernels.tasks import logs
from rmc_kernels.tasks.babi import Babi
from rmc_kernels.tasks.checkpoints import read_checkpoint, write_checkpoint
from rmc_kernels.tasks.cores import Core
from rmc_kernels.tasks.files import claimed
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
    for task, model, config, said in (
        (NthFarthest(5, 2, "grow", 2), MODEL, CONFIG, r"objects must be 4 to go on from .*, got 5"),
        (tasks["lm"], MODEL, CONFIG, r"task must be 'nth-farthest' to go on from .*, got 'lm'"),
        (tasks["nth-farthest"], replace(MODEL, slots=3), CONFIG, r"slots must be 2 to go on from .*, got 3"),
        (tasks["nth-farthest"], MODEL, replace(CONFIG, updates=6), r"updates must be at least 7, which .*, got 6"),
    ):
        with pytest.raises(ValueError, match=said):
            Trainer(task, model, config, tmp_path / "run.pt", resume=True)


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
    task, model, saved = trained(tmp_path / "run.pt")
    assert task == tasks["lm"]
    assert saved["update"] == 7
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


# -- what an interruption loses, and what it does not -----------------------------------------------------------------


@pytest.mark.parametrize(("name", "update"), [("nth-farthest", 1), ("nth-farthest", 2), ("lm", 1)])
def test_a_run_ended_before_its_second_evaluation_has_the_first_once(
    name: str, update: int, tasks: dict[str, Task], tmp_path: Path
) -> None:
    path = tmp_path / "run.pt"
    killed_after(update, Trainer(tasks[name], MODEL, CONFIG, path))
    killed_after(update, Trainer(tasks[name], MODEL, CONFIG, path, resume=True))
    again = Trainer(tasks[name], MODEL, CONFIG, path, resume=True).run()
    assert [point.update for point in again.points] == [0, 3, 6, 7]
    assert curve(again) == curve(Trainer(tasks[name], MODEL, CONFIG).run())
    assert History.read(tmp_path / "run.json") == again


def test_a_run_that_had_its_time_keeps_its_last_evaluation(tasks: dict[str, Task], tmp_path: Path) -> None:
    task, path = tasks["nth-farthest"], tmp_path / "run.pt"
    short = Trainer(task, MODEL, replace(CONFIG, seconds=1e-6), path).run()
    assert [point.update for point in short.points] == [0, 1]
    again = Trainer(task, MODEL, replace(CONFIG, seconds=1e-6), path, resume=True).run()
    assert again == short == History.read(tmp_path / "run.json")
    longer = Trainer(task, MODEL, CONFIG, path, resume=True).run()
    assert curve(longer) == curve(Trainer(task, MODEL, CONFIG).run())


def test_a_finished_run_keeps_its_record(tasks: dict[str, Task], tmp_path: Path) -> None:
    """Also what it says of the command and the settings of those who trained it; what is missing is written again."""
    path, record = tmp_path / "run.pt", tmp_path / "run.json"
    Trainer(tasks["lm"], MODEL, CONFIG, path, command="the first").run()
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    other = replace(CONFIG, seconds=100.0)
    again = Trainer(tasks["lm"], MODEL, other, path, resume=True, command="the second")
    assert again.run().command == "the first"
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files
    record.unlink()
    Trainer(tasks["lm"], MODEL, other, path, resume=True, command="the second").run()
    assert record.read_bytes() == files["run.json"]
    longer = Trainer(tasks["lm"], MODEL, replace(CONFIG, updates=9), path, resume=True, command="the third").run()
    assert (longer.command, longer.training["updates"]) == ("the third", 9)
    assert History.read(record) == longer


def test_what_a_run_has_left_is_not_replaced_unasked(tasks: dict[str, Task], tmp_path: Path) -> None:
    task, path = tasks["nth-farthest"], tmp_path / "run.pt"
    Trainer(task, MODEL, CONFIG, path).run()
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(files) == {"run.pt", "run.json", "run.csv"}
    with pytest.raises(FileExistsError, match=r"no run run yet, got run.pt, run.json, run.csv: pass --resume"):
        Trainer(task, MODEL, CONFIG, path)
    with pytest.raises(ValueError, match="overwrite must not be given beside resume"):
        Trainer(task, MODEL, CONFIG, path, resume=True, overwrite=True)
    path.unlink()
    with pytest.raises(FileExistsError, match=r"run.pt must be there to go on with a run, got only run.json, run.csv"):
        Trainer(task, MODEL, CONFIG, path, resume=True)
    with pytest.raises(FileExistsError, match=r"got run.json, run.csv"):
        Trainer(task, MODEL, CONFIG, path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {
        name: content for name, content in files.items() if name != "run.pt"
    }
    other = Trainer(task, MODEL, replace(CONFIG, seed=1), path, overwrite=True).run()
    assert History.read(tmp_path / "run.json") == other
    assert read_checkpoint(path)["what"]["training"]["seed"] == 1


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.pt"
    with claimed(path):
        with pytest.raises(FileExistsError, match=r"run.pt is being trained by another process"), claimed(path):
            pass
        with claimed(path.with_name("other.pt")):
            pass
    with claimed(path):
        pass
    assert list(path.parent.iterdir()) == []


# -- files that cannot be written -------------------------------------------------------------------------------------


def folder_contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), SystemExit(1)]
)
def test_a_write_that_ends_early_leaves_the_file_before(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every single write of torch's, which itself puts another error on top of most."""
    path = tmp_path / "a.pt"
    write_checkpoint(path, {"value": torch.zeros(3)})
    before, save, ended, names = folder_contents(tmp_path), torch.save, 0, set[str | None]()

    class Ending:
        def __init__(self, file: IO[bytes], writes: int) -> None:
            self.file, self.writes = file, writes

        def write(self, content: bytes) -> int:
            self.writes -= 1
            if self.writes < 0:
                raise error
            return self.file.write(content)

        def flush(self) -> None:
            self.file.flush()

    for writes in range(100):
        monkeypatch.setattr(torch, "save", lambda state, file, n=writes: save(state, Ending(file, n)))  # type: ignore[arg-type]
        try:
            write_checkpoint(path, {"value": torch.ones(3)})
        except type(error) as raised:
            ended += 1
            assert folder_contents(tmp_path) == before
            names.add(getattr(raised, "filename", None))
        else:
            break
    assert names == {str(path) if isinstance(error, OSError) else None}
    assert ended > 10
    assert read_checkpoint(path)["value"].tolist() == [1, 1, 1]


def test_a_full_disk_leaves_the_run_as_it_was(tasks: dict[str, Task], tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk, for the third checkpoint."""
    task, path = tasks["nth-farthest"], tmp_path / "run.pt"
    killed_after(5, Trainer(task, MODEL, CONFIG, path))
    before = folder_contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["run.pt"]) // 2, hard))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            Trainer(task, MODEL, CONFIG, path, resume=True).run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.filename == str(path)
    assert folder_contents(tmp_path) == before
    assert curve(Trainer(task, MODEL, CONFIG, path, resume=True).run()) == curve(Trainer(task, MODEL, CONFIG).run())


def test_a_folder_that_cannot_be_is_named(tasks: dict[str, Task], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "deep"):
        said = rf"out must be a folder that can be written to, got {folder} \("
        with pytest.raises(OSError, match=said), claimed(folder / "run.pt"):
            pass
        with pytest.raises(OSError, match=r"run\.pt"):
            Trainer(tasks["nth-farthest"], MODEL, CONFIG, folder / "run.pt").run()


@pytest.mark.parametrize("device", ["cuda:99", "meta", "abacus"])
def test_a_device_that_is_not_there_is_named(device: str, tasks: dict[str, Task], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"device must be one that torch can use here, got '{device}'") as raised:
        Trainer(tasks["nth-farthest"], MODEL, replace(CONFIG, device=device), tmp_path / "run.pt")
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


# -- files that are no longer what was written ------------------------------------------------------------------------


def flipped(content: bytes, places: Iterable[int]) -> Iterator[bytes]:
    """The content with one bit flipped: of each of these bytes in turn another one of the eight."""
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        yield bytes(changed)


def test_a_flipped_bit_of_a_checkpoint_is_noticed_in_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    write_checkpoint(path, {"value": torch.arange(3), "name": "text", "number": 0.5})
    content = path.read_bytes()
    for changed in flipped(content, range(len(content))):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"a.pt (is damaged|must be a checkpoint)"):
            read_checkpoint(path)
    for length in [*range(0, len(content), 9), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"a.pt must be a checkpoint"):
            read_checkpoint(path)
    for changed in (content + b"\n", content + content, b"\n" + content, content.replace(b"text", b"tExt")):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"a.pt (is damaged|must be a checkpoint)"):
            read_checkpoint(path)
    path.write_bytes(content)
    assert read_checkpoint(path)["name"] == torch.load(path, weights_only=True)["name"] == "text"


def test_nothing_is_unpickled_before_its_checksum_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt"
    write_checkpoint(path, {"value": torch.arange(3)})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    with pytest.raises(ValueError, match="is damaged"):
        read_checkpoint(path)


def same(one: object, other: object) -> bool:
    """Whether two checkpoints hold the same."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def test_a_checkpoint_of_version_1_goes_on_and_a_damaged_one_does_not(tasks: dict[str, Task], tmp_path: Path) -> None:
    """It has no checksum of the whole; what a flipped bit leaves readable is what was written."""
    task, path = tasks["nth-farthest"], tmp_path / "run.pt"
    killed_after(5, Trainer(task, MODEL, CONFIG, path))
    state = read_checkpoint(path)
    torch.save({**{name: value for name, value in state.items() if name != "made_by"}, "version": 1}, path)
    content, saved = path.read_bytes(), read_checkpoint(path)
    generator = random.Random(0)
    places = [generator.randrange(len(content)) for _ in range(100)]
    places += [generator.randrange(len(content) - 5000, len(content)) for _ in range(100)]  # the archive's directory
    refused = 0
    for changed in flipped(content, places):
        path.write_bytes(changed)
        try:
            assert same(read_checkpoint(path), saved)
        except ValueError:
            refused += 1
    assert 100 < refused < 200
    path.write_bytes(content)
    assert curve(Trainer(task, MODEL, CONFIG, path, resume=True).run()) == curve(Trainer(task, MODEL, CONFIG).run())
    assert read_checkpoint(path)["version"] == 2


def test_a_flipped_bit_of_a_record_is_noticed_in_every_byte(tmp_path: Path) -> None:
    """But for those that leave every value what it was, such as a capital E in 1e-05."""
    history = History("t", {"chance": 0.5}, 3, "cpu", {"core": "rmc"}, {"lr": 1e-5}, [Point(0, 0, 0.125, 1.0, 0.5)])
    path, _ = history.write(tmp_path, "run")
    content, same_values = path.read_bytes(), 0
    for changed in flipped(content, range(len(content))):
        path.write_bytes(changed)
        try:
            found = History.read(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            same_values += 1
            assert found == history
    assert same_values < 3
    for other in (b"", b"[]", b"3", b'"text"', b"{}", b'{"points": [3]}', content[:-3]):
        path.write_bytes(other)
        with pytest.raises(ValueError, match=r"run.json must be a record of `rmc train`"):
            History.read(path)


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


# -- processes that are ended -----------------------------------------------------------------------------------------

RMC = (sys.executable, "-m", "rmc_kernels")
ROOT = Path(__file__).parents[2]
TINY = "--slots 2 --heads 2 --head-size 4 --readout-width 8 --batch-size 8 --evaluation-examples 20 --dropout 0.2"


def run_until(seen: Callable[[], bool], end: Callable[[subprocess.Popen[str]], None], *arguments: str) -> str:
    """Start a command, and end it as soon as something is seen; gives what it says on stderr."""
    with subprocess.Popen(
        [*RMC, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    ) as running:  # fmt: skip
        while not seen():
            assert running.poll() is None, running.communicate()[1]
            time.sleep(0.005)
        end(running)
        return running.communicate(timeout=120)[1]


def evaluations(record: Path) -> int:
    return len(History.read(record).points) if record.exists() else 0


def assert_uninterrupted(folder: Path, core: Core, points: int) -> None:
    """A run has the curve of one that was never ended, and nothing but its files."""
    what = read_checkpoint(folder / f"nth-farthest-{core}-seed0.pt")["what"]
    model, config = ModelConfig(**what["model"]), TrainingConfig(**what["training"])
    found = History.read(folder / f"nth-farthest-{core}-seed0.json")
    assert len(found.points) == points
    assert curve(found) == curve(Trainer(NthFarthest(3, 1), model, config).run())
    assert {path.suffix for path in folder.iterdir()} == {".pt", ".json", ".csv", ".png"}


@pytest.mark.slow
def test_a_run_killed_again_and_again_has_the_curve_of_one_that_was_not(tmp_path: Path) -> None:
    """With kill -9, up to 40 ms after a checkpoint; most of the time of this run goes into writing."""
    record = tmp_path / "nth-farthest-rmc-seed0.json"
    arguments = ["train", "nth-farthest", *TINY.split(), "--steps", "40", "--evaluate-every", "1", "--resume"]
    arguments += ["--out", str(tmp_path)]
    generator = random.Random(0)
    for _ in range(5):
        made = evaluations(record)

        def kill(running: subprocess.Popen[str]) -> None:
            time.sleep(generator.random() / 25)
            running.kill()

        run_until(lambda made=made: evaluations(record) > made, kill, *arguments)  # type: ignore[misc]
        assert read_checkpoint(record.with_suffix(".pt"))["update"] < 40
    subprocess.run([*RMC, *arguments], cwd=ROOT, check=True, timeout=300)
    assert_uninterrupted(tmp_path, "rmc", 41)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["train", "compare"])
def test_an_interrupted_command_ends_and_says_what_goes_on(
    command: str, number: signal.Signals, tmp_path: Path
) -> None:
    """A terminal sends SIGINT to all processes of a command, a supervisor SIGTERM to the first."""
    folder = tmp_path / "runs"
    given = ["nth-farthest", *TINY.split(), "--steps", "100", "--evaluate-every", "10", "--out", str(folder)]
    given += ["--seeds", "1", "--processes", "2"] if command == "compare" else []
    codes = []

    def interrupt(running: subprocess.Popen[str]) -> None:
        (os.killpg if number == signal.SIGINT else os.kill)(running.pid, number)
        codes.append(running.wait(timeout=120))

    said = run_until(lambda: (folder / "nth-farthest-rmc-seed0.csv").exists(), interrupt, command, *given)
    assert codes == [128 + number]
    assert said.startswith("Interrupted; to go on")
    assert said.count("\n") == 1
    words = shlex.split(said[said.index(": rmc ") + 2 :])
    assert words == ["rmc", command, *given, *(["--resume"] if command == "train" else [])]
    left = folder_contents(folder)
    assert {Path(name).suffix for name in left} == {".pt", ".json", ".csv"}
    time.sleep(1)
    assert folder_contents(folder) == left, "a process goes on"
    subprocess.run([*RMC, *words[1:]], cwd=ROOT, check=True, timeout=300)
    for core in ("rmc", "lstm") if command == "compare" else ("rmc",):
        assert_uninterrupted(folder, core, 11)


# -- the paper's sizes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nth-farthest", "lm"])
def test_the_paper_s_presets_train(name: str, tmp_path: Path) -> None:
    """Two updates, through the backend that runs here and through the reference: 1.3 and 81 million parameters."""
    text = tmp_path / "text.txt"
    generator = random.Random(0)
    text.write_text("\n".join(" ".join(f"w{generator.randrange(60)}" for _ in range(20)) for _ in range(200)))
    given = {"nth-farthest": ["--threads", "2", "--evaluation-examples", "400"], "lm": ["--text", str(text)]}[name]
    losses = []
    for backend in ("auto", "reference"):
        folder = tmp_path / backend
        arguments = ["train", name, "--config", "paper", *given, "--steps", "2", "--backend", backend]
        subprocess.run([*RMC, *arguments, "--out", str(folder)], cwd=ROOT, check=True, timeout=600)
        found = History.read(folder / f"{name}-rmc-seed0.json")
        assert [point.update for point in found.points] == [0, 2]
        losses.append([found.points[0].loss, found.final.training_loss, found.final.loss])
        shutil.rmtree(folder)  # 1 GB
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


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
        cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    record = History.read(folder / "lm-rmc-seed0.json")
    assert record.command.startswith("rmc train lm")
    return record.points


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

    with subprocess.Popen([*command, "--steps", "1000000"], cwd=Path(__file__).parents[2]) as running:
        while not curve.exists() or len(curve.read_text().splitlines()) < 5:
            assert running.poll() is None
            time.sleep(0.1)
        running.kill()
    before = curve.read_text()
    while (after := grown(before)) != before:
        before = after
        assert len(after.splitlines()) < 100_000
    made = len(after.splitlines()) - 2
    subprocess.run([*command, "--steps", str(made + 2)], cwd=Path(__file__).parents[2], check=True, timeout=300)
    assert curve.read_text().startswith(after)


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(tmp_path: Path) -> None:
    """The command under torchrun against a training here; gradients are summed in another order."""
    found = run_command(tmp_path / "two", 4, *TWO)
    saved = read_checkpoint(tmp_path / "two" / "lm-rmc-seed0.pt")
    options = dict(saved["what"]["options"])
    assert options.pop("name") == "lm"
    config = TrainingConfig(**saved["what"]["training"])
    expected = Trainer(LanguageModelling(**options), ModelConfig(**saved["what"]["model"]), config).run().points
    assert len(saved["processes"]) == 2
    assert [point.update for point in found] == [point.update for point in expected] == [0, 2, 4]
    assert [point.loss for point in found] == pytest.approx([point.loss for point in expected], rel=1e-4)
    assert [point.tokens for point in found] == [point.tokens for point in expected]


@pytest.mark.slow
def test_two_processes_go_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    run_command(tmp_path / "again", 2, *TWO)
    again, whole = run_command(tmp_path / "again", 4, *TWO), run_command(tmp_path / "whole", 4, *TWO)
    assert [(p.update, p.loss, p.accuracy) for p in again] == [(p.update, p.loss, p.accuracy) for p in whole]
    path = tmp_path / "again" / "lm-rmc-seed0.pt"
    task, _, saved = trained(path)
    model, config = ModelConfig(**saved["what"]["model"]), TrainingConfig(**saved["what"]["training"])
    with pytest.raises(ValueError, match="resumed by 2 processes, as it was trained by, got 1"):
        Trainer(task, model, config, path, resume=True)
