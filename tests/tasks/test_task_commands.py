"""`rmc train`, `compare`, `inspect`, `sample` and `results`, at tiny sizes."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer import Typer
from typer.testing import CliRunner

from rmc_kernels.demo import demo
from rmc_kernels.tasks import comparison as compared
from rmc_kernels.tasks import summary
from rmc_kernels.tasks.command import comparison, train
from rmc_kernels.tasks.comparison import TUNING, best_rate
from rmc_kernels.tasks.history import History, Point
from rmc_kernels.tasks.inspection import answers, attention, example, inspect
from rmc_kernels.tasks.jobs import Job
from rmc_kernels.tasks.models import ModelConfig
from rmc_kernels.tasks.options import option_name
from rmc_kernels.tasks.presets import PRESETS
from rmc_kernels.tasks.progress import TrainingProgress
from rmc_kernels.tasks.registry import TASKS, trained
from rmc_kernels.tasks.results import BLOCK, COLOURS, fill, read_runs, results, table
from rmc_kernels.tasks.sampling import continuation, sample
from rmc_kernels.tasks.training import Trainer, TrainingConfig

ROOT = Path(__file__).parents[2]
SIZES = "--slots 2 --heads 2 --head-size 4 --embedding 8 --steps 2 --batch-size 6 --evaluation-examples 20"
TINY = SIZES.split()
OF_TASK = {
    "nth-farthest": ["--objects", "3", "--dims", "2", "--curriculum", "grow"],
    "program-eval": ["--kind", "addition"],
    "babi": ["--questions", "20"],
    "lm": ["--characters", "3000", "--level", "character"],
}


def call(app: Typer, *arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def wrong(app: Typer, *arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2, result.output
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())


def as_command(function: Callable[..., None]) -> Typer:
    app = Typer()
    app.command()(function)
    return app


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of every task."""
    folder = tmp_path_factory.mktemp("runs")
    for name in TASKS:
        call(train, name, *TINY, *OF_TASK[name], "--out", str(folder))
    return folder


@pytest.mark.parametrize("name", TASKS)
def test_every_task_trains_and_leaves_its_files(name: str, runs: Path) -> None:
    record = History.read(runs / f"{name}-rmc-seed0.json")
    assert record.options["name"] == name
    assert record.final.update == 2
    assert record.answers > 0
    assert sorted(path.suffix for path in runs.glob(f"{name}-*")) == [".csv", ".json", ".png", ".pt"]


@pytest.mark.parametrize("name", TASKS)
def test_every_field_is_an_option_with_help(name: str) -> None:
    shown = call(train, name, "--help")
    for config in (TASKS[name], ModelConfig, TrainingConfig):
        assert all(f"--{option_name(field.name)} " in shown for field in fields(config))
    assert "Optimizer updates." in shown


def test_no_two_fields_are_one_option() -> None:
    for task in TASKS.values():
        names = [option_name(field.name) for config in (task, ModelConfig, TrainingConfig) for field in fields(config)]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("name", TASKS)
def test_every_preset_is_of_its_task(name: str) -> None:
    assert all(preset.task.name == name for preset in PRESETS[name].values())
    assert "small" in PRESETS[name]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["nth-farthest", "--config", "huge"],
            "config must be small or medium or paper for nth-farthest, got",
        ),
        (["program-eval", "--kind", "poetry"], "kind must be one of 'all', 'addition'"),
        (["babi", "--data", "/nowhere.tar.gz"], "/nowhere.tar.gz"),
        (["nth-farthest", "--head", "tied"], "head must be 'mlp' where a step is no token"),
        (["lm", "--model", "hmm"], "'hmm' is not one of 'rmc', 'lstm', 'gru', 'transformer'"),
    ],
)
def test_a_wrong_option_is_named(arguments: list[str], said: str, tmp_path: Path) -> None:
    assert said in wrong(train, *arguments, "--out", str(tmp_path))


def test_resume_takes_the_same_run_only(runs: Path) -> None:
    sizes = [*TINY, *OF_TASK["babi"], "--out", str(runs), "--resume"]
    assert "going on from" in call(train, "babi", *sizes)
    assert "--batch-size must be 6 to go on from" in wrong(train, "babi", *sizes, "--batch-size", "7")


@pytest.mark.slow
def test_compare_trains_every_model_from_every_seed_and_goes_on(tmp_path: Path) -> None:
    arguments = ["program-eval", *TINY, *OF_TASK["program-eval"], "--models", "gru,transformer", "--seeds", "1"]
    shown = call(comparison, *arguments, "--processes", "1", "--out", str(tmp_path))
    assert all(f"{core} " in shown for core in ("gru", "transformer"))
    names = [f"program-eval-{core}-seed0" for core in ("gru", "transformer")]
    assert {path.name for path in tmp_path.glob("*.json")} == {f"{name}.json" for name in names}
    assert (tmp_path / "program-eval.png").exists()


def test_compare_gives_every_model_the_best_of_the_same_learning_rates(tmp_path: Path, trained_here: None) -> None:
    """Of 0.02 and 1e-9 the first learns. The jobs run in this process; a second call finds them done."""
    arguments = ["nth-farthest", *TINY, "--objects", "2", "--dims", "1", "--steps", "60", "--models", "rmc,lstm"]
    arguments += ["--seeds", "2", "--rates", "0.02,1e-9,0.02", "--out", str(tmp_path)]
    shown = call(comparison, *arguments)
    assert "accuracy by learning rate, seed 2" in shown
    assert len(re.findall(r"│ (?:rmc|lstm) .*│ 0.02 +│\n", shown)) == 2
    tried = {path.name: History.read(path) for path in (tmp_path / TUNING).glob("*.json")}
    assert set(tried) == {
        f"nth-farthest-{c}-seed2-lr{rate}.json" for c in ("rmc", "lstm") for rate in ("0.02", "1e-09")
    }
    found = {path.name: History.read(path) for path in tmp_path.glob("*.json")}
    assert set(found) == {f"nth-farthest-{core}-seed{seed}.json" for core in ("rmc", "lstm") for seed in (0, 1)}
    assert {history.training["learning_rate"] for history in found.values()} == {0.02}
    call(comparison, *arguments)
    assert {path.name: History.read(path) for path in tmp_path.glob("*.json")} == found


def test_the_best_learning_rate_is_of_the_run_that_did_best() -> None:
    def run(rate: float, accuracy: float, loss: float, measure: str) -> History:
        points = [Point(10, 80, 9.0, loss, accuracy)]
        return History("task", {}, 1, "cpu", {"core": "rmc"}, {"learning_rate": rate}, points, measure=measure)

    assert best_rate([run(1, 0.5, 2.0, "accuracy"), run(2, 0.7, 3.0, "accuracy")]) == 2
    assert best_rate([run(1, 0.5, 2.0, "perplexity"), run(2, 0.7, 3.0, "perplexity")]) == 1
    assert best_rate([run(1, 0.9, math.nan, "accuracy"), run(2, 0.1, 3.0, "accuracy")]) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--models", "rmc,elman"], "models must be some of rmc, lstm"),
        (["--rates", "1e-3,fast"], "rates must be numbers with commas between, got '1e-3,fast'"),
        (["--rates", "1e-3,0"], "rates must be numbers above 0, got '1e-3,0'"),
        (["--rates", "1e-3", "--lr", "1e-3"], "rates must not be given beside lr"),
    ],
)
def test_compare_names_a_wrong_option(arguments: list[str], said: str, tmp_path: Path) -> None:
    assert said in wrong(comparison, "nth-farthest", *arguments, "--out", str(tmp_path))


# -- runs that are there, or cannot be --------------------------------------------------------------------------------


def refused(app: Typer, *arguments: str) -> str:
    """The one line on stderr of a command that exits with 2."""
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def suffixes(folder: Path) -> set[str]:
    return {path.suffix for path in folder.iterdir()}


def train_here(job: Job) -> History:
    return Trainer(job.task, job.model, job.training, job.checkpoint, resume=True, command=job.command).run()


@pytest.fixture
def trained_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """`rmc compare` trains in this process."""
    monkeypatch.setattr(compared, "train_all", lambda jobs, processes, watch: [*map(train_here, jobs)])


def test_a_run_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    arguments = ["nth-farthest", *TINY, "--out", str(tmp_path)]
    call(train, *arguments)
    before = contents(tmp_path)
    said = refused(train, *arguments, "--steps", "3")
    assert "nth-farthest-rmc-seed0.pt" in said
    assert "--resume" in said
    assert "--overwrite" in said
    assert "--overwrite must not be given beside resume" in refused(train, *arguments, "--resume", "--overwrite")
    assert contents(tmp_path) == before
    call(train, *arguments, "--steps", "3", "--overwrite")
    assert History.read(tmp_path / "nth-farthest-rmc-seed0.json").final.update == 3
    assert contents(tmp_path).keys() == before.keys()
    call(train, *arguments, "--seed", "1")
    assert len(contents(tmp_path)) == 2 * len(before)


def test_overwrite_removes_the_plots_of_the_run_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["nth-farthest", *TINY, "--out", str(tmp_path), "--overwrite"]
    call(train, *arguments)
    events = tmp_path / "nth-farthest-rmc-seed0" / "events.out.tfevents.1"
    events.parent.mkdir()
    events.write_text("")
    monkeypatch.setattr(TrainingProgress, "show", lambda *_: signal.raise_signal(signal.SIGINT))
    assert CliRunner().invoke(train, arguments).exit_code == 130
    assert not events.exists()
    assert suffixes(tmp_path) == {".pt", ".json", ".csv", ""}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lr", "0.5"], "--lr must be 0.001 to go on from"),
        (["--slots", "3"], "--slots must be 2 to go on from"),
        (["--objects", "4"], "--objects must be 3 to go on from"),
        (["--steps", "1"], "--steps must be at least 2, which"),
        (["--batch-size", "7"], "--batch-size must be 6 to go on from"),
    ],
)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_run_of_other_settings_is_neither_resumed_nor_compared(
    command: str, options: list[str], said: str, tmp_path: Path, trained_here: None
) -> None:
    call(train, "nth-farthest", *TINY, "--out", str(tmp_path))
    before = contents(tmp_path)
    arguments = ["nth-farthest", *TINY, *options, "--out", str(tmp_path)]
    if command == "train":
        found = refused(train, *arguments, "--resume")
    else:
        found = refused(comparison, *arguments, "--seeds", "1", "--models", "lstm,rmc")
    assert said in found
    assert f"{tmp_path}/nth-farthest-rmc-seed0.pt" in found
    assert contents(tmp_path) == before


def test_compare_takes_a_run_as_long_for_its_own_and_leaves_its_record(tmp_path: Path, trained_here: None) -> None:
    call(train, "nth-farthest", *TINY, "--out", str(tmp_path))
    before = contents(tmp_path)
    call(comparison, "nth-farthest", *TINY, "--seeds", "1", "--out", str(tmp_path))
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    runs = [History.read(path) for path in tmp_path.glob("*.json")]
    assert [run.final.update for run in runs] == [2, 2]


def test_compare_does_not_go_on_with_learning_rates_of_another_schedule(tmp_path: Path, trained_here: None) -> None:
    """A cosine of 2 updates that went on to 4 is none of 4; a constant rate that went on is."""
    for schedule in ("cosine", "constant"):
        arguments = ["nth-farthest", *TINY, "--schedule", schedule, "--out", str(tmp_path / schedule)]
        call(train, *arguments)
        before = contents(tmp_path / schedule)
        longer = [*arguments, "--steps", "4", "--seeds", "1", "--models", "rmc"]
        if schedule == "cosine":
            said = refused(comparison, *longer)
            assert "--steps must be as many as" in said
            assert "a cosine schedule of so many has a learning rate of 0.0005 at update 2, not 0" in said
            assert contents(tmp_path / schedule) == before
            call(train, *arguments, "--steps", "4", "--resume")
            assert "--steps must be as many as" in refused(comparison, *longer)
        else:
            call(comparison, *longer)
            call(train, *arguments, "--steps", "4", "--resume")


def test_compare_looks_at_every_run_before_it_trains(tmp_path: Path, trained_here: None) -> None:
    """Also at those that get the best of several learning rates later."""
    arguments = ["nth-farthest", *TINY, "--models", "lstm,rmc", "--seeds", "2", "--out", str(tmp_path)]
    call(train, "nth-farthest", *TINY, "--seed", "1", "--out", str(tmp_path))
    before = contents(tmp_path)
    assert "--lr must be 0.001 to go on from" in refused(comparison, *arguments, "--rates", "0.01,0.02")
    (tmp_path / "nth-farthest-rmc-seed1.pt").unlink()
    assert "nth-farthest-rmc-seed1.pt must be there" in refused(comparison, *arguments)
    (tmp_path / "nth-farthest-rmc-seed1.pt").write_bytes(before["nth-farthest-rmc-seed1.pt"][:-1])
    assert "nth-farthest-rmc-seed1.pt must be a checkpoint" in refused(comparison, *arguments, "--rates", "0.001,0.01")
    (tmp_path / "nth-farthest-rmc-seed1.pt").write_bytes(before["nth-farthest-rmc-seed1.pt"])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", ["train", "compare", "demo"])
@pytest.mark.parametrize("wrong", ["device", "file", "below a file", "read-only"])
def test_a_device_or_folder_that_cannot_be_is_told_in_a_line(
    wrong: str, command: str, tmp_path: Path, trained_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = {"train": train, "compare": comparison, "demo": as_command(demo)}[command]
    arguments = [] if command == "demo" else ["nth-farthest", *TINY]
    (tmp_path / "file").write_text("")
    if wrong == "device":
        if command == "demo":
            pytest.skip("the demo has no --device")
        said = refused(app, *arguments, "--device", "cuda:99", "--out", str(tmp_path / "out"))
        assert "--device must be one that torch can use here, got 'cuda:99'" in said
    elif wrong == "read-only":  # whoever runs this may be root, whom no permission stops
        monkeypatch.setattr(Path, "mkdir", refuse(errno.EROFS, "Read-only file system"))
        assert "Read-only file system" in refused(app, *arguments, "--out", str(tmp_path / "out"))
    else:
        out = tmp_path / ("file" if wrong == "file" else "file/deep")
        assert str(out) in refused(app, *arguments, "--out", str(out))
    assert contents(tmp_path) == {"file": b""}


def refuse(number: int, said: str) -> Callable[..., None]:
    def raises(path: Path, *_: object, **__: object) -> None:
        raise OSError(number, said, str(path))

    return raises


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_full_disk_is_told_in_a_line_and_leaves_the_run(
    command: str, tmp_path: Path, trained_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["nth-farthest", *TINY, "--out", str(tmp_path)]
    call(train, *arguments)
    before = contents(tmp_path)

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    longer = ["--steps", "4", *(["--resume"] if command == "train" else ["--seeds", "1", "--models", "rmc"])]
    said = refused(train if command == "train" else comparison, *arguments, *longer)
    assert said == f"Error: No space left on device: {tmp_path}/nth-farthest-rmc-seed0.pt\n"
    assert contents(tmp_path) == before
    monkeypatch.undo()
    call(train, *arguments, "--steps", "4", "--resume")


def test_a_damaged_checkpoint_is_told_in_a_line(runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "lm-rmc-seed0.pt"
    content = bytearray((runs / "lm-rmc-seed0.pt").read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)
    for app, arguments in (
        (train, ["lm", *TINY, *OF_TASK["lm"], "--resume", "--out", str(tmp_path)]),
        (comparison, ["lm", *TINY, *OF_TASK["lm"], "--out", str(tmp_path)]),
        (as_command(inspect), [str(path), "--out", str(tmp_path / "a.png")]),
        (as_command(sample), [str(path)]),
    ):
        said = refused(app, *arguments)
        assert (
            said == f"Error: {path} is damaged, its checksum is another: restore a copy, or train again (--overwrite)\n"
        )
    assert contents(tmp_path) == {path.name: bytes(content)}


# -- what an interruption says ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("extra", [[], ["--resume"], ["--overwrite"]])
def test_an_interruption_says_how_to_go_on(
    extra: list[str], number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says, called, gives the run that was not interrupted."""
    arguments = ["nth-farthest", *TINY, "--steps", "7", "--evaluate-every", "2", "--out", str(tmp_path / "a b")]
    monkeypatch.setattr(sys, "argv", ["rmc", "train", *arguments, *extra])

    def show(progress: TrainingProgress, bar: object, update: int, *_: object) -> None:
        if update == 5:
            signal.raise_signal(number)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingProgress, "show", show)
        result = CliRunner().invoke(train, [*arguments, *extra])
    assert result.exit_code == 128 + number
    line = result.stderr.removeprefix("Interrupted; to go on from update 4: ").removesuffix("\n")
    assert shlex.split(line) == ["rmc", "train", *arguments, "--resume"]
    assert suffixes(tmp_path / "a b") == {".pt", ".json", ".csv"}
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    call(train, *shlex.split(line)[2:])
    call(train, *arguments[:-1], str(tmp_path / "whole"))
    again, whole = (History.read(tmp_path / folder / "nth-farthest-rmc-seed0.json") for folder in ("a b", "whole"))
    assert [(p.update, p.loss) for p in again.points] == [(p.update, p.loss) for p in whole.points]


def test_an_interruption_before_the_first_checkpoint_says_to_begin_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["nth-farthest", *TINY, "--out", str(tmp_path)]
    call(train, *arguments)
    before = contents(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rmc", "train", *arguments, "--overwrite"])
    monkeypatch.setattr(Trainer, "run", lambda trainer, watch: signal.raise_signal(signal.SIGINT))
    result = CliRunner().invoke(train, [*arguments, "--overwrite"])
    assert result.stderr == f"Interrupted; to begin again: {shlex.join(sys.argv)}\n"
    assert contents(tmp_path) == {name: content for name, content in before.items() if not name.endswith(".png")}


def test_an_interrupted_comparison_says_how_to_go_on(
    tmp_path: Path, trained_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["nth-farthest", *TINY, "--seeds", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["rmc", "compare", *arguments])
    with monkeypatch.context() as patched:
        patched.setattr(compared, "train_all", lambda *_: signal.raise_signal(signal.SIGTERM))
        result = CliRunner().invoke(comparison, arguments)
    assert result.exit_code == 143
    assert result.stderr == f"Interrupted; to go on: {shlex.join(sys.argv)}\n"


# -- inspect --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nth-farthest", "lm"])
def test_inspect_draws_the_attention_of_every_task(name: str, runs: Path, tmp_path: Path) -> None:
    picture = tmp_path / "deep" / "attention.png"
    call(as_command(inspect), str(runs / f"{name}-rmc-seed0.pt"), "--last", "2", "--out", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_attention_is_a_share_of_every_row(runs: Path) -> None:
    task, model, _ = trained(runs / "nth-farthest-rmc-seed0.pt")
    weights = attention(model, example(task, 3).inputs)
    assert weights.shape == (3, 1, 2, 2, 3)  # steps, blocks, heads, slots, slots and the input
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 1, 2, 2))
    assert not torch.equal(weights, attention(model, example(task, 4).inputs))


@pytest.mark.parametrize("name", ["nth-farthest", "lm"])
def test_inspect_tells_what_the_model_answers(name: str, runs: Path) -> None:
    task, model, _ = trained(runs / f"{name}-rmc-seed0.pt")
    for number in range(4):
        batch = example(task, number)
        given, right = answers(task, model, batch)
        target = int(batch.targets[0, -1])
        assert right == (task.vocabulary[target].replace("\n", "\\n") if task.vocabulary else str(target))
        last = model.eval()(*batch).right[-1]
        assert (given == right) == bool(last)


def test_an_example_ends_with_its_last_answer(runs: Path) -> None:
    task, _, _ = trained(runs / "babi-rmc-seed0.pt")
    batch = example(task, 0)
    assert (batch.targets >= 0).tolist()[0] == [False] * (batch.targets.shape[1] - 1) + [True]
    assert task.captions(batch, 0)[-1].startswith("where is")
    assert not torch.equal(example(task, 5).inputs, example(task, 6).inputs)
    with pytest.raises(ValueError, match="example must be a number below 1000 here, got 1000"):
        example(task, 1000)


def test_inspect_says_what_it_takes(tmp_path: Path) -> None:
    call(train, "nth-farthest", *TINY, *OF_TASK["nth-farthest"], "--model", "lstm", "--out", str(tmp_path))
    checkpoint = str(tmp_path / "nth-farthest-lstm-seed0.pt")
    assert "only its slots attend" in wrong(as_command(inspect), checkpoint)
    assert "No such file" in wrong(as_command(inspect), str(tmp_path / "none.pt"))


# -- sample ---------------------------------------------------------------------------------------------------------


def test_sample_writes_on_from_the_prompt(runs: Path) -> None:
    checkpoint = str(runs / "lm-rmc-seed0.pt")
    one, same, other = (
        call(as_command(sample), checkpoint, "--prompt", "def ", "--length", "30", "--seed", seed) for seed in "112"
    )
    assert one == same != other
    assert one.startswith("def ")
    assert len(one) == len("def ") + 30 + 1
    assert "must be one of lm, got one of babi" in wrong(as_command(sample), str(runs / "babi-rmc-seed0.pt"))


@pytest.mark.parametrize("core", ["lstm", "transformer"])
def test_the_likeliest_continuation_is_what_a_whole_pass_gives(core: str, runs: Path) -> None:
    """Token by token with a carried state or all over again: each is the best after all that came before."""
    task, _, _ = trained(runs / "lm-rmc-seed0.pt")
    torch.manual_seed(0)
    model = task.model(ModelConfig(core=core, slots=2, heads=2, head_size=4, embedding=8)).eval()  # type: ignore[arg-type]
    drawn = continuation(model, [3, 5], 6, temperature=0, generator=torch.Generator())
    with torch.no_grad():
        features, _ = model.features(torch.tensor([[3, 5, *drawn]]))
        scores = model.head.log_probabilities(features[0])
    scores[:, 0] = -torch.inf
    assert scores.argmax(1)[1:-1].tolist() == drawn


# -- results --------------------------------------------------------------------------------------------------------


def test_a_table_has_a_row_for_every_run_and_a_mean_for_every_model(tmp_path: Path) -> None:
    for seed, accuracy in ((0, 0.5), (1, 0.75)):
        record = json.loads(json.dumps(HISTORY))
        record["training"]["seed"], record["points"][0]["accuracy"] = seed, accuracy
        (tmp_path / f"{seed}.json").write_text(json.dumps(record))
    text = table(read_runs(tmp_path))
    assert "| RMC | 1,234 | 0.001 | 0 | 50.0% | 10 | 3 | 9 |" in text
    assert "| **RMC, mean of 2** |  | 0.001 |  | **62.5%** |  | 3 |  |" in text
    assert "chance 33.3%" in text
    assert "    rmc train x" in text
    with pytest.raises(ValueError, match="must be folders with the JSON"):
        read_runs(tmp_path / "none")


HISTORY = {
    "task": "task", "levels": {"chance": 1 / 3}, "parameters": 1234, "backend": "cpu", "model": {"core": "rmc"},
    "training": {"learning_rate": 1e-3, "seed": 0}, "command": "rmc train x", "machine": "a machine",
    "points": [{"update": 10, "examples": 80, "seconds": 9.0, "loss": 0.5, "accuracy": 0.9, "cpu_seconds": 3.0}],
}  # fmt: skip


def test_results_fills_the_page_and_draws_the_curves(tmp_path: Path) -> None:
    (tmp_path / "runs" / "some").mkdir(parents=True)
    (tmp_path / "runs" / "some" / "run.json").write_text(json.dumps(HISTORY))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: some -->\nold\n<!-- end -->\nafter\n")
    arguments = ["--page", str(page), "--runs", str(tmp_path / "runs")]
    call(as_command(results), *arguments)
    text = page.read_text()
    assert text.startswith("before\n<!-- table: some -->\n| model |")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text
    picture = tmp_path / "runs" / "some" / "curves.png"
    assert not picture.exists()  # the page shows none
    page.write_text(f"{text}![curves](runs/some/curves.png)\n")
    call(as_command(results), *arguments)
    with Image.open(picture) as drawn:
        assert drawn.size == (800, 450)
        colours = drawn.convert("RGB").getcolors()
    assert colours is not None
    assert 3 < len(colours) <= COLOURS
    assert min(sum(abs(a - b) for a, b in zip(c, (0, 114, 178), strict=True)) for _, c in colours) < 9  # the RMC's blue


def test_a_summary_keeps_settings_curves_and_last_points(tmp_path: Path) -> None:
    points = [
        {"update": 0, "examples": 0, "seconds": 0.5, "loss": 1 / 3, "accuracy": 0.25, "tokens": 0},
        {**HISTORY["points"][0], "training_loss": 0.75, "learning_rate": 1e-3, "tokens": 7},  # type: ignore[index]
    ]
    folder = tmp_path / "raw"
    folder.mkdir()
    for seed, core in ((0, "rmc"), (1, "rmc"), (0, "lstm")):
        record = json.loads(json.dumps({**HISTORY, "points": points}))
        record["training"]["seed"], record["model"]["core"] = seed, core
        record["part_levels"] = {"one": 0.5} if seed else {}
        record["points"][1]["accuracy"] += 0.01 * seed
        (folder / f"{core}{seed}.json").write_text(json.dumps(record))
    before = read_runs(folder)
    page = tmp_path / "page.md"
    page.write_text("<!-- table: kept -->\n<!-- end -->\n![curves](runs/kept/curves.png)\n")
    arguments = ["--page", str(page), "--runs", str(tmp_path / "runs"), "--add", str(folder), "--name", "kept"]
    call(as_command(results), *arguments)
    path = tmp_path / "runs" / "kept" / "runs.csv"
    after = summary.read(path)
    assert not list(path.parent.glob("*.json"))
    assert table(before) in page.read_text()
    assert table(after) == table(before)
    for old, new in zip(before, after, strict=True):
        assert replace(new, points=[]) == replace(old, points=[], levels={"chance": 0.3333333})
        assert new.final == old.final
        first = new.points[0]
        assert (first.update, first.accuracy) == (0, 0.25)
        assert all(math.isnan(value) for value in (first.loss, first.seconds, first.cpu_seconds))
    page.write_text(page.read_text().partition("![curves]")[0])
    call(as_command(results), *arguments)
    assert [len(run.points) for run in summary.read(path)] == [1, 1, 1]
    assert path.read_text().count("levels.chance") == 1  # a name is written once


def test_runs_of_a_summary_may_have_other_fields_and_odd_texts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one run"):
        summary.write([], tmp_path, curves=True)
    (tmp_path / "one.json").write_text(json.dumps(HISTORY))
    run = replace(History.read(tmp_path / "one.json"), levels={"chance": 0.25})
    odd = replace(
        run, task='12, "a"\n', command="", machine="null", model={"core": "rmc", "a.b": None, "deep": [1, {"c": ""}]},
        parts={"of. two": 0.5}, measure="perplexity",
        points=[replace(run.final, update=100), replace(run.final, update=20), run.final],
    )  # fmt: skip
    first, second = summary.read(summary.write([replace(run, parts={}), odd], tmp_path, curves=True))
    assert first == replace(run, parts={})
    assert replace(second, points=[]) == replace(odd, points=[])
    assert [point.update for point in second.points] == [20, 100, run.final.update]
    assert [point.loss for point in second.points] == [run.final.loss] * 3


@pytest.mark.parametrize(
    "text", ["", "{}", ",run 1\n", ",run 1\ntask\n", ",run 1\ntask,a\n", ",run 1\nlast,{}\n", ',run 1\ntask,"a\n', "\0"]
)
def test_a_damaged_summary_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / summary.NAME).write_text(text)
    with pytest.raises(ValueError, match=r"runs\.csv must be a summary of runs"):
        read_runs(tmp_path)


def test_the_results_that_are_committed_are_small() -> None:
    files = [path for path in (ROOT / "docs" / "results").rglob("*") if path.is_file()]
    shown = (ROOT / "docs" / "results.md").read_text()
    for path in files:
        name = path.relative_to(ROOT / "docs").as_posix()
        assert path.name == summary.NAME or f"({name})" in shown, f"{name} is shown nowhere"
    files += [path for path in (ROOT / "benchmarks" / "results").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 150_000


def test_the_results_page_is_what_its_runs_give() -> None:
    page = (ROOT / "docs" / "results.md").read_text()
    assert len(BLOCK.findall(page)) >= 4
    assert fill(page, ROOT / "docs" / "results") == page
