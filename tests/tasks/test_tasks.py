"""The tasks: the generator against brute force, equal sizes, a training that learns and repeats itself."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import os
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from typer import Exit
from typer.testing import CliRunner

from rmc_kernels import RelationalMemory, demo
from rmc_kernels.spec import Variant
from rmc_kernels.tasks.checkpoints import read_checkpoint
from rmc_kernels.tasks.command import train
from rmc_kernels.tasks.comparison import MARGIN, Comparison
from rmc_kernels.tasks.cores import CORES, Core
from rmc_kernels.tasks.history import History, Point
from rmc_kernels.tasks.jobs import Job, News, train_all
from rmc_kernels.tasks.models import IGNORE, ModelConfig, build
from rmc_kernels.tasks.nth_farthest import NthFarthest, farthest
from rmc_kernels.tasks.plots import plot_curves
from rmc_kernels.tasks.presets import PRESETS, Preset
from rmc_kernels.tasks.training import Trainer, TrainingConfig

TINY = ModelConfig(slots=2, heads=2, head_size=8, readout_layers=1, readout_width=32, backend="reference")
MEASURED = 4096  # answers of a history made up here
SHORT = TrainingConfig(updates=6, batch_size=16, learning_rate=1e-3, evaluate_every=4, evaluation_examples=50)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- the generator ------------------------------------------------------------------------------------------------


def read_example(steps: Tensor, task: NthFarthest) -> tuple[dict[int, list[float]], int, int]:
    """Vectors by label, n and m, as a reader of one sequence [N, d + 3N] finds them."""
    vectors = {}
    questions = set()
    for step in steps.tolist():
        vector, rest = step[: task.dims], step[task.dims :]
        one_hots = [rest[i : i + task.objects] for i in range(0, 3 * task.objects, task.objects)]
        assert all(sorted(hot) == [0.0] * (task.objects - 1) + [1.0] for hot in one_hots)
        label, n, m = (hot.index(1.0) for hot in one_hots)
        vectors[label] = vector
        questions.add((n, m))
    assert sorted(vectors) == list(range(task.objects)), "every label exactly once"
    ((n, m),) = questions
    return vectors, n, m


@pytest.mark.parametrize(("objects", "dims"), [(2, 1), (3, 1), (5, 3), (8, 16)])
def test_the_target_is_what_brute_force_finds(objects: int, dims: int) -> None:
    task = NthFarthest(objects, dims)
    inputs, targets = task.sample(200, generator())
    assert inputs.shape == (200, objects, task.input_size)
    assert inputs.dtype == torch.float32
    assert (targets[:, :-1] == IGNORE).all()
    for steps, target in zip(inputs, targets[:, -1].tolist(), strict=True):
        vectors, n, m = read_example(steps, task)
        squares = {a: sum((p - q) ** 2 for p, q in zip(v, vectors[m], strict=True)) for a, v in vectors.items()}
        assert target == sorted(squares, key=lambda label: -squares[label])[n]


def test_the_paper_s_input_has_40_features() -> None:
    assert NthFarthest().input_size == 40


def test_of_equally_far_vectors_the_lower_label_counts_as_farther() -> None:
    vectors = torch.tensor([[[0.0], [1.0], [-1.0], [0.5]]]).expand(4, -1, -1)
    assert farthest(vectors, n=torch.arange(4), m=torch.zeros(4, dtype=torch.int64)).tolist() == [1, 2, 3, 0]


def test_the_answer_does_not_depend_on_the_order_of_the_labels() -> None:
    vectors = torch.rand(4, 2, generator=generator())
    n, m = torch.tensor([1]), torch.tensor([2])
    expected = int(farthest(vectors[None], n, m))
    for order in permutations(range(4)):
        renamed = farthest(vectors[list(order)][None], n, torch.tensor([order.index(2)]))
        assert order[int(renamed)] == expected


def test_questions_labels_and_vectors_are_uniform_and_independent() -> None:
    task = NthFarthest(3, 2)
    inputs, _ = task.sample(20_000, generator())
    vectors, labels, n, m = torch.split(inputs, [2, 3, 3, 3], dim=-1)
    for hot in (labels, n, m):
        torch.testing.assert_close(hot.mean(0), torch.full((3, 3), 1 / 3), atol=0.02, rtol=0)
    joint = torch.einsum("bi,bj->ij", n[:, 0], m[:, 0]) / 20_000
    torch.testing.assert_close(joint, torch.full((3, 3), 1 / 9), atol=0.02, rtol=0)
    assert -1 <= vectors.min() < -0.99
    assert 0.99 < vectors.max() < 1
    torch.testing.assert_close(vectors.std(0), torch.full((3, 2), 3**-0.5), atol=0.02, rtol=0)


def test_the_levels_are_what_guessing_achieves() -> None:
    task = NthFarthest(3, 1)
    inputs, targets = task.sample(20_000, generator())
    n, m = inputs[:, 0, 4:7].argmax(1), inputs[:, 0, 7:].argmax(1)
    without_distances = torch.where(n == 2, m, (m + 1) % 3)
    assert (targets[:, -1] == 0).float().mean() == pytest.approx(task.levels["chance"], abs=0.02)
    assert (targets[:, -1] == without_distances).float().mean() == pytest.approx(task.levels["no distances"], abs=0.02)


def test_a_seed_gives_the_same_examples_and_another_gives_others() -> None:
    task = NthFarthest(4, 2)
    first, again, other = (task.sample(8, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.inputs, other.inputs)


@pytest.mark.parametrize(("objects", "dims", "named"), [(1, 1, "objects"), (3, 0, "dims")])
def test_impossible_sizes_are_refused(objects: int, dims: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        NthFarthest(objects, dims)


# -- the curriculum -----------------------------------------------------------------------------------------------


def test_the_curriculum_grows_to_the_task() -> None:
    assert NthFarthest(6, 5, "grow").stages == [(3, 1), (3, 2), (3, 4), (3, 5), (4, 5), (5, 5), (6, 5)]
    assert NthFarthest(4, 1, "grow").stages == [(3, 1), (4, 1)]
    assert NthFarthest(2, 1, "grow").stages == [(2, 1)]
    assert NthFarthest(6, 5).stages == [(6, 5)]


def test_a_stage_has_fewer_vectors_and_coordinates_in_inputs_of_full_size() -> None:
    task = NthFarthest(5, 4, "grow")
    inputs, targets = task.source(200, 0).next()
    assert inputs.shape == (200, 3, task.input_size)
    vectors, labels, n, m = torch.split(inputs, [4, 5, 5, 5], dim=-1)
    assert vectors[..., 0].all()
    assert not vectors[..., 1:].any()
    for hot in (labels, n, m):
        assert hot[..., :3].sum(-1).eq(1).all()
    assert targets[:, -1].max() == 2
    assert task.held_out(64, 100)[""][0].inputs.shape == (64, 5, task.input_size)


def test_a_stage_ends_when_it_is_learnt_or_has_had_its_time() -> None:
    source = NthFarthest(4, 2, "grow", patience=300).source(8, 0)
    for _ in range(299):
        source.heard(0.46)  # nothing learnt
    assert source.stage == 0
    source.heard(0.46)
    assert source.stage == 1
    learnt = 0
    while source.stage == 1:
        source.heard(0.1)
        learnt += 1
    assert 30 < learnt < 100
    for _ in range(700):
        source.heard(0.0)
    assert source.stage == 2, "the last stage has no end"


# -- the models ---------------------------------------------------------------------------------------------------


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("core", CORES[1:])
@pytest.mark.parametrize("name", PRESETS)
def test_every_model_has_as_many_parameters_as_the_rmc_within_one_percent(name: str, core: Core) -> None:
    config = PRESETS[name]["small"].model
    with torch.device("meta"):
        input_size, words = 40 if name == "nth-farthest" else None, name == "babi"
        rmc, other = (build(replace(config, core=c), 500, input_size=input_size, words=words) for c in ("rmc", core))
    assert size(other) == pytest.approx(size(rmc), rel=0.01)
    assert [tuple(p.shape) for p in other.head.parameters()][1:] == [tuple(p.shape) for p in rmc.head.parameters()][1:]


def test_the_lstm_s_hidden_size_is_the_closest_one() -> None:
    lstm = build(replace(TINY, core="lstm"), 3, input_size=10)
    wanted = size(build(TINY, 3, input_size=10))
    assert isinstance(lstm.core.layer, nn.LSTM)
    hidden = lstm.core.layer.hidden_size

    def count(size: int) -> int:
        return 4 * size * (10 + size + 2) + (size + 1) * 32 + 33 * 3

    assert size(lstm) == count(hidden)
    assert abs(count(hidden) - wanted) == min(abs(count(size) - wanted) for size in range(1, 200))


@pytest.mark.parametrize("core", CORES)
def test_a_model_sees_nothing_of_the_future(core: Core) -> None:
    model = build(replace(TINY, core=core), 3, input_size=5).eval()
    inputs = torch.rand(2, 6, 5, generator=generator())
    changed = inputs.clone()
    changed[:, 4:] = 0
    with torch.no_grad():
        (one, _), (other, _) = model.features(inputs), model.features(changed)
    torch.testing.assert_close(one[:, :4], other[:, :4])
    assert not torch.allclose(one[:, 4:], other[:, 4:])


@pytest.mark.parametrize("core", ["rmc", "lstm", "gru"])
def test_a_carried_state_makes_chunks_one_sequence(core: Core) -> None:
    model = build(replace(TINY, core=core), 3, input_size=5).eval()
    inputs = torch.rand(2, 6, 5, generator=generator())
    with torch.no_grad():
        whole, _ = model.features(inputs)
        first, state = model.features(inputs[:, :4])
        second, _ = model.features(inputs[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)


@pytest.mark.parametrize("variant", ["sonnet", "textbook", "l0sg", "r2gen"])
def test_every_variant_can_be_the_core(variant: Variant) -> None:
    config = replace(TINY, variant=variant, gate="memory" if variant == "l0sg" else "unit", memory="learned")
    model = build(config, 3, input_size=5)
    answers = model(torch.rand(2, 4, 5), torch.tensor([[IGNORE, 0, IGNORE, 1], [IGNORE, IGNORE, IGNORE, 2]]))
    assert answers.losses.shape == (3,)
    answers.losses.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert isinstance(model.core.layer, RelationalMemory)
    assert model.core.layer.spec.variant == variant


@pytest.mark.parametrize(
    ("change", "named"), [({"core": "rnn"}, "core"), ({"dropout": 1.0}, "dropout"), ({"gate": "both"}, "gate")]
)
def test_impossible_models_are_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        replace(TINY, **change)


# -- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("core", ["rmc", "lstm"])
def test_a_short_training_learns_what_the_question_gives_away(core: Core) -> None:
    """One coordinate, two objects: the answer is m or the other one, which n tells."""
    config = TrainingConfig(updates=100, batch_size=64, learning_rate=5e-3, evaluate_every=100)
    history = Trainer(NthFarthest(2, 1), replace(TINY, core=core), config).run()
    before, after = history.points
    assert after.loss < before.loss / 4
    assert history.margin(history.levels["chance"]) > 20
    assert after.accuracy > 0.9


def test_training_repeats_itself_by_seed() -> None:
    def run(seed: int) -> list[tuple[int, float, float]]:
        history = Trainer(NthFarthest(3, 1), TINY, replace(SHORT, seed=seed)).run()
        return [(point.update, point.loss, point.accuracy) for point in history.points]

    torch.manual_seed(5)
    first = run(1)
    torch.manual_seed(6)
    assert run(1) == first
    assert run(2) != first
    assert [update for update, _, _ in first] == [0, 4, 6]


def test_training_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    Trainer(NthFarthest(3, 1), TINY, SHORT).run()
    assert torch.equal(torch.get_rng_state(), before)


def test_every_model_and_seed_is_evaluated_on_the_same_examples() -> None:
    one = Trainer(NthFarthest(3, 1), TINY, SHORT)
    other = Trainer(NthFarthest(3, 1), replace(TINY, core="lstm"), replace(SHORT, seed=3))
    held_out = one.held_out[""][0]
    assert torch.equal(held_out.inputs, other.held_out[""][0].inputs)
    trained_on = one.source.next()
    assert not torch.equal(held_out.inputs, trained_on.inputs)


def test_the_gradient_is_clipped_and_the_learning_rate_warms_up() -> None:
    trainer = Trainer(NthFarthest(3, 1), TINY, replace(SHORT, clip_norm=1e-3, warmup_updates=4))
    seen = []

    def watch(trainer: Trainer) -> None:
        squares = [p.grad.square().sum() for p in trainer.model.parameters() if p.grad is not None]
        seen.append((trainer.optimizer.param_groups[0]["lr"], float(torch.stack(squares).sum().sqrt())))

    trainer.run(watch)
    assert [rate for rate, _ in seen] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])
    assert all(norm == pytest.approx(1e-3, rel=1e-3) for _, norm in seen)


def test_a_time_limit_ends_training_early_with_an_evaluation() -> None:
    history = Trainer(NthFarthest(3, 1), TINY, replace(SHORT, updates=10_000, seconds=1e-6)).run()
    assert [point.update for point in history.points] == [0, 1]


@pytest.mark.parametrize(
    ("change", "named"),
    [({"updates": 0}, "updates"), ({"learning_rate": -1.0}, "learning_rate"), ({"seed": -1}, "seed")],
)
def test_impossible_trainings_are_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        replace(SHORT, **change)


def test_jobs_run_in_a_process_and_give_what_a_run_here_gives() -> None:
    jobs = [Job(NthFarthest(3, 1), replace(TINY, core=core), SHORT) for core in ("rmc", "lstm")]
    heard: list[News] = []
    histories = train_all(jobs, processes=1, watch=heard.append)
    assert [history.model["core"] for history in histories] == ["rmc", "lstm"]
    for number, job in enumerate(jobs):
        expected = Trainer(job.task, job.model, job.training).run().final
        assert histories[number].final.loss == pytest.approx(expected.loss, rel=1e-4)
        assert [news.point.update for news in heard if news.job == number] == [4, 6]


@dataclass(frozen=True)
class Failing(NthFarthest):
    """A task that fails in its process at the third batch: by an exception, or by the end of the process."""

    how: str = "ValueError"

    def source(self, batch_size: int, seed: int) -> Any:
        source = super().source(batch_size, seed)
        draw, drawn = source.next, iter(range(3))

        def failing() -> Any:
            if next(drawn) < 2:
                return draw()
            if self.how == "exit":
                os._exit(3)
            raise {"ValueError": ValueError, "OSError": OSError}[self.how]("no third batch")

        source.next = failing  # type: ignore[method-assign]
        return source


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ("ValueError", RuntimeError, r"(?s)a training failed in its process:.*in failing.*no third batch"),
        pytest.param("OSError", OSError, "no third batch", marks=pytest.mark.slow),
        ("exit", ChildProcessError, "the process of a training ended with exit code 3"),
    ],
)
def test_a_job_that_fails_ends_the_others(how: str, error: type[Exception], said: str, tmp_path: Path) -> None:
    """The one beside it has no end of its own; what it had saved stays, and nothing half written does."""
    endless = Job(NthFarthest(3, 1), TINY, replace(SHORT, updates=10**6, evaluate_every=1), tmp_path / "endless.pt")
    failing = Job(Failing(3, 1, how=how), TINY, SHORT, tmp_path / "failing.pt")
    with pytest.raises(error, match=said):
        train_all([endless, failing], processes=2, watch=lambda news: None)
    assert not multiprocessing.active_children()
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {f"{name}.{kind}" for name in ("endless", "failing") for kind in ("pt", "json", "csv", "lock")}
    assert {path for path in left if path.endswith(".lock")} <= ({"failing.lock"} if how == "exit" else set())
    assert read_checkpoint(tmp_path / "failing.pt")["update"] == 0


def test_jobs_that_cannot_be_are_refused_by_the_error_of_the_trainer(tmp_path: Path) -> None:
    job = Job(NthFarthest(3, 1), replace(TINY, head="tied"), SHORT)
    with pytest.raises(ValueError, match=r"head .* where a step is no token"):
        train_all([job], processes=1, watch=lambda news: None)


# -- what is left behind ------------------------------------------------------------------------------------------


def history(accuracy: float, core: str = "rmc") -> History:
    points = [Point(0, 0, 0.1, 1.1, 0.33), Point(10, 1280, 2.0, 0.5, accuracy)]
    return History(
        "task", {"chance": 1 / 3, "no distances": 2 / 3}, 1234, "reference", {"core": core},
        {"seed": 0, "learning_rate": 1e-3}, points, answers=MEASURED,
    )  # fmt: skip


def test_a_history_is_kept_as_json_and_csv(tmp_path: Path) -> None:
    as_json, as_csv = history(0.9).write(tmp_path / "deep", "run")
    record = json.loads(as_json.read_text())
    assert record["parameters"] == 1234
    assert [point["accuracy"] for point in record["points"]] == [0.33, 0.9]
    with as_csv.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["update"], row["accuracy"]) for row in rows] == [("0", "0.33"), ("10", "0.9")]


def test_a_margin_is_counted_in_standard_errors() -> None:
    assert history(0.75).margin(2 / 3) == pytest.approx((0.75 - 2 / 3) / (2 / 9 / MEASURED) ** 0.5)
    assert [history(accuracy).margin(1.0) for accuracy in (0.9, 1.0)] == [-math.inf, 0.0]


def test_a_comparison_has_learnt_only_where_every_rmc_run_is_above_every_level() -> None:
    close = 2 / 3 + 0.9 * MARGIN * (2 / 9 / MEASURED) ** 0.5
    lstm = history(0.6, "lstm")
    assert Comparison((history(0.95), history(0.75), lstm)).learnt
    one_lags = Comparison((history(0.95), history(close), lstm))
    assert one_lags.left_behind == {"chance": True, "no distances": False}
    assert not one_lags.learnt


def test_curves_are_drawn_into_a_png(tmp_path: Path) -> None:
    runs = [history(0.9), history(0.8), history(0.6, "lstm")]
    path = plot_curves(runs, tmp_path / "deep" / "curves.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


# -- the command line ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["rmc", "lstm"])
def test_the_command_trains_and_leaves_its_files(model: str, tmp_path: Path) -> None:
    sizes = "--objects 3 --dims 2 --slots 2 --heads 2 --head-size 4 --steps 2 --batch-size 8 --lr 0.01"
    arguments = ["--model", model, *sizes.split(), "--seed", "7", "--backend", "reference"]
    arguments += ["--threads", str(torch.get_num_threads()), "--out", str(tmp_path)]
    result = CliRunner().invoke(train, ["nth-farthest", *arguments])
    assert result.exit_code == 0, result.output
    stem = f"nth-farthest-{model}-seed7"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{stem}.{kind}" for kind in ("csv", "json", "png", "pt")
    ]
    record = json.loads((tmp_path / f"{stem}.json").read_text())
    assert record["task"] == "Nth farthest, 3 objects in 2-d"
    assert (record["model"]["head_size"], record["training"]["learning_rate"]) == (4, 0.01)
    assert record["points"][-1]["update"] == 2


def test_the_command_says_what_is_wrong_with_an_option() -> None:
    result = CliRunner().invoke(train, ["nth-farthest", "--objects", "1", "--threads", str(torch.get_num_threads())])
    assert result.exit_code == 2
    assert "objects must be an int of at least 2" in " ".join(result.output.split())


# -- the demo -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [None, "verify", "bench", "training"])
def test_the_demo_keeps_every_finding_and_fails_where_a_stage_fails(
    failing: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("info", "verify", "bench", "training")
    for name in names:
        found = demo.Finding(name != failing, f"{name} found this", {"figure": len(name)})
        monkeypatch.setattr(demo, f"_{name}", lambda out, console, found=found: found)
    with pytest.raises(Exit) as ended:
        demo.demo(tmp_path / "deep")
    assert ended.value.exit_code == (0 if failing is None else 1)
    record = json.loads((tmp_path / "deep" / "results.json").read_text())
    assert record["ok"] == (failing is None)
    assert {name: (record[name]["ok"], record[name]["figure"]) for name in names} == {
        name: (name != failing, len(name)) for name in names
    }
    shown = capsys.readouterr().out
    assert all(f"{name} found this" in shown for name in names)
    assert ("FAILED" in shown) == (failing is not None)


def test_the_demo_s_training_reports_both_models_chance_and_a_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six updates cannot teach anything, and the finding says so."""
    monkeypatch.setitem(PRESETS, "nth-farthest", {"small": Preset(NthFarthest(3, 1), TINY, SHORT)})
    monkeypatch.setattr(demo, "SEEDS", (4,))
    found = demo._training(tmp_path, Console(quiet=True))
    assert not found.ok
    assert [(run["model"]["core"], run["training"]["seed"]) for run in found.data["runs"]] == [("rmc", 4), ("lstm", 4)]
    assert "RMC" in found.summary
    assert "chance 33.3%" in found.summary
    assert [path.name for path in found.files] == ["accuracy.png"]
    assert found.files[0].exists()
