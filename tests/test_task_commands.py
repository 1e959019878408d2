"""`rmc train`, `compare`, `inspect`, `sample` and `results`, at tiny sizes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import fields
from itertools import count
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from rmc_kernels.tasks import comparison as compared
from rmc_kernels.tasks import jobs
from rmc_kernels.tasks.command import comparison, train
from rmc_kernels.tasks.comparison import TUNING, best_rate
from rmc_kernels.tasks.history import History, Point
from rmc_kernels.tasks.inspection import answers, attention, example, inspect
from rmc_kernels.tasks.models import ModelConfig
from rmc_kernels.tasks.options import option_name
from rmc_kernels.tasks.presets import PRESETS
from rmc_kernels.tasks.registry import TASKS, trained
from rmc_kernels.tasks.results import BLOCK, fill, read_runs, results, table
from rmc_kernels.tasks.sampling import continuation, sample
from rmc_kernels.tasks.training import TrainingConfig

ROOT = Path(__file__).parent.parent
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
    kept = History.read(runs / f"{name}-rmc-seed0.json")
    assert kept.options["name"] == name
    assert kept.final.update == 2
    assert kept.answers > 0
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
            "config takes small or medium or paper for nth-farthest, got",
        ),
        (["program-eval", "--kind", "poetry"], "kind must be one of 'all', 'addition'"),
        (["babi", "--data", "/nowhere.tar.gz"], "/nowhere.tar.gz"),
        (["nth-farthest", "--head", "tied"], "head takes 'mlp' where a step is no token"),
        (["lm", "--model", "hmm"], "'hmm' is not one of 'rmc', 'lstm', 'gru', 'transformer'"),
    ],
)
def test_a_wrong_option_is_named(arguments: list[str], said: str, tmp_path: Path) -> None:
    assert said in wrong(train, *arguments, "--out", str(tmp_path))


def test_resume_takes_the_same_run_only(runs: Path) -> None:
    sizes = [*TINY, *OF_TASK["babi"], "--out", str(runs), "--resume"]
    assert "going on from" in call(train, "babi", *sizes)
    assert "batch_size of the checkpoint takes 6, got 7" in wrong(train, "babi", *sizes, "--batch-size", "7")


@pytest.mark.slow
def test_compare_trains_every_model_from_every_seed_and_goes_on(tmp_path: Path) -> None:
    arguments = ["program-eval", *TINY, *OF_TASK["program-eval"], "--models", "gru,transformer", "--seeds", "1"]
    shown = call(comparison, *arguments, "--processes", "1", "--out", str(tmp_path))
    assert all(f"{core} " in shown for core in ("gru", "transformer"))
    names = [f"program-eval-{core}-seed0" for core in ("gru", "transformer")]
    assert {path.name for path in tmp_path.glob("*.json")} == {f"{name}.json" for name in names}
    assert (tmp_path / "program-eval.png").exists()


def test_compare_gives_every_model_the_best_of_the_same_learning_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 0.02 and 1e-9 the first learns. The jobs run in this process; a second call finds them done."""
    monkeypatch.setattr(jobs, "_queue", SimpleQueue(), raising=False)
    monkeypatch.setattr(compared, "train_all", lambda all_, processes, watch: [*map(jobs._train, count(), all_)])
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
        (["--models", "rmc,elman"], "models takes rmc, lstm"),
        (["--rates", "1e-3,fast"], "rates takes numbers with commas between, got '1e-3,fast'"),
        (["--rates", "1e-3,0"], "rates takes numbers above 0, got '1e-3,0'"),
        (["--rates", "1e-3", "--lr", "1e-3"], "rates takes the place of lr; got both"),
    ],
)
def test_compare_names_a_wrong_option(arguments: list[str], said: str, tmp_path: Path) -> None:
    assert said in wrong(comparison, "nth-farthest", *arguments, "--out", str(tmp_path))


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
    with pytest.raises(ValueError, match="example takes a number below 1000 here, got 1000"):
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
    assert "takes one of lm, got one of babi" in wrong(as_command(sample), str(runs / "babi-rmc-seed0.pt"))


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
        kept = json.loads(json.dumps(HISTORY))
        kept["training"]["seed"], kept["points"][0]["accuracy"] = seed, accuracy
        (tmp_path / f"{seed}.json").write_text(json.dumps(kept))
    text = table(read_runs(tmp_path))
    assert "| RMC | 1,234 | 0.001 | 0 | 50.0% | 10 | 3 | 9 |" in text
    assert "| **RMC, mean of 2** |  | 0.001 |  | **62.5%** |  | 3 |  |" in text
    assert "chance 33.3%" in text
    assert "    rmc train x" in text
    with pytest.raises(ValueError, match="takes folders with the JSON"):
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
    call(as_command(results), "--page", str(page), "--runs", str(tmp_path / "runs"))
    text = page.read_text()
    assert text.startswith("before\n<!-- table: some -->\n| model |")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text
    assert (tmp_path / "runs" / "some" / "curves.png").stat().st_size > 10_000


def test_the_results_page_is_what_its_runs_give() -> None:
    page = (ROOT / "docs" / "results.md").read_text()
    assert len(BLOCK.findall(page)) >= 4
    assert fill(page, ROOT / "docs" / "results") == page
