"""Acting step by step and learning over sequences: the same numbers; and the example that does it learns."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.habits import BATCH, EVERY_BACKEND, EVERY_VARIANT, STEPS, close, inputs, layer


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """The names of examples/recall_grid.py."""
    return runpy.run_path(str(Path(__file__).parents[2] / "examples" / "recall_grid.py"))


@pytest.mark.feature("RL: resets, step mode with carried memory")
@EVERY_BACKEND
@EVERY_VARIANT
def test_acting_equals_learning(variant: str, backend: str) -> None:
    """A reset starts from the layer's own memory; stepping with resets is the sequence with resets, bit for bit."""
    made, x, carried = layer(variant, backend), inputs(), inputs(BATCH, 3, 8, seed=2)
    begins = torch.rand(BATCH, STEPS, generator=torch.Generator().manual_seed(3)) < 0.3
    begins[0] = torch.tensor([False, False, True, False, False, False])
    whole, final = made(x, carried, resets=begins)
    memory = carried
    with made.frozen_weights() as frozen:
        for t in range(STEPS):
            called, after = made(x[:, t : t + 1], memory, resets=begins[:, t : t + 1])
            output, memory = frozen.step(x[:, t], memory, resets=begins[:, t])
            assert torch.equal(output, whole[:, t])
            assert torch.equal(output, called[:, 0])
            assert torch.equal(memory, after)
    assert torch.equal(memory, final)
    close(whole[:1, 2:], made(x[:1, 2:])[0])
    close(whole[:1, :2], made(x[:1, :2], carried[:1])[0])


def test_the_grid_pays_the_goal_that_the_lamp_showed(example: dict[str, Any]) -> None:
    grid = example["RecallGrid"](64)
    lamp = grid.lamp.clone()
    first = grid.observe()
    assert torch.equal(first[:, 9:].argmax(1), lamp)
    to_the_end = torch.full((64,), 3)
    for _ in range(example["LENGTH"]):
        reward, done = grid.step(to_the_end)
        assert not reward.any()
        assert not done.any()
        assert grid.observe()[:, 9:].sum() == 0  # the lamp is out of sight
    assert torch.equal(grid.observe()[0, :9], torch.tensor([0, 1, 0, 1, 1, 0, 0, 1, 0.0]))
    reward, done = grid.step(lamp)  # 0 up, 1 down, as the lamp said
    assert (reward == 1).all()
    assert done.all()
    assert torch.equal(grid.observe()[:, 9:].sum(1), torch.ones(64))  # started over
    for _ in range(example["LENGTH"]):
        grid.step(to_the_end)
    assert (grid.step(1 - grid.lamp)[0] == -1).all()


@EVERY_BACKEND
def test_the_examples_learner_sees_what_the_actor_did(example: dict[str, Any], backend: str) -> None:
    torch.manual_seed(0)
    policy, grid = example["Policy"](backend), example["RecallGrid"](8)
    memory, begins = policy.core.initial_memory(8), torch.ones(8, dtype=torch.bool)
    for _ in range(2):  # the second rollout begins in the middle of episodes
        rollout, memory, begins = example["act"](policy, grid, memory, begins, 40)
        logits, _, after = policy(rollout.seen, rollout.memory, rollout.begins)
        ours = torch.distributions.Categorical(logits=logits).log_prob(rollout.actions)
        close(ours, rollout.log_probabilities)
        assert torch.equal(after, memory)
    assert rollout.ends.sum() > 8


@pytest.mark.slow
def test_the_example_learns(example: dict[str, Any]) -> None:
    """Half is the ceiling without memory; 80 % over ten updates of some hundred episodes each is not luck."""
    torch.manual_seed(0)
    shares = example["train"](example["Policy"]("cpu"), 80, show=0)
    assert sum(shares[-10:]) / 10 > 0.8
