"""Acting with a memory: a small partially observable grid, and a policy gradient.

    python examples/recall_grid.py [--updates 120] [--seed 0] [--backend auto]

The task. A corridor leads to two goals, one up and one down at its far end. A lamp at the start says which one pays +1;
the other costs 1. The agent sees the 3 x 3 cells around itself, so the lamp only while it stands at the start: without
memory no policy is right more often than half the time.

The habits to copy. Acting runs the layer one step at a time and carries the memory, `resets` telling where an episode
begins; learning runs the same layer once over the whole rollout, with the memory the rollout began with and the same
`resets`. Both give the same numbers, and learning is one fused call.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmc_kernels import RelationalMemory

LENGTH = 4  # cells from the start to the far end
LIMIT = 24  # steps after which an episode ends unpaid
MOVES = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])  # up, down, left, right as (row, column)
VIEW = torch.tensor([[row, column] for row in (-1, 0, 1) for column in (-1, 0, 1)])
FEATURES = len(VIEW) + 2


def floor_plan() -> Tensor:
    """1 where one can stand: a corridor in the middle row and a goal above and below its end; walls around."""
    plan = torch.zeros(5, LENGTH + 3)
    plan[2, 1 : LENGTH + 2] = 1
    plan[1:4, LENGTH + 1] = 1
    return plan


@dataclass
class RecallGrid:
    """`batch` copies of the task, stepped together; an episode that ends starts over by itself."""

    batch: int
    plan: Tensor = field(default_factory=floor_plan)

    def __post_init__(self) -> None:
        self.position = torch.zeros(self.batch, 2, dtype=torch.long)
        self.lamp = torch.zeros(self.batch, dtype=torch.long)
        self.age = torch.zeros(self.batch, dtype=torch.long)
        self._start(torch.ones(self.batch, dtype=torch.bool))

    def observe(self) -> Tensor:
        """[batch, FEATURES]: which of the 3 x 3 cells are floor, and the lamp, one-hot, at the start only."""
        around = self.position[:, None] + VIEW
        lamp = F.one_hot(self.lamp, 2) * (self.position[:, 1] == 1)[:, None]
        return torch.cat([self.plan[around[..., 0], around[..., 1]], lamp.float()], 1)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Reward [batch] and whether the episode ended [batch]; then the next one has begun."""
        moved = self.position + MOVES[action]
        free = self.plan[moved[:, 0], moved[:, 1]] > 0
        self.position = torch.where(free[:, None], moved, self.position)
        self.age += 1
        at_goal = self.position[:, 0] != 2
        right = (self.position[:, 0] == 3) == (self.lamp == 1)
        reward = at_goal.float() * torch.where(right, 1.0, -1.0)
        done = at_goal | (self.age >= LIMIT)
        self._start(done)
        return reward, done

    def _start(self, which: Tensor) -> None:
        self.position[which] = torch.tensor([2, 1])
        self.lamp[which] = torch.randint(0, 2, (self.batch,))[which]
        self.age[which] = 0


class Policy(nn.Module):
    """A relational memory, and from its output the actions' logits and the expected return."""

    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        self.core = RelationalMemory(FEATURES, mem_slots=2, head_size=16, num_heads=2, backend=backend)
        self.heads = nn.Linear(self.core.output_size, len(MOVES) + 1)

    def forward(self, seen: Tensor, memory: Tensor, begins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Observations [B, T, FEATURES] and where episodes begin [B, T] to logits, values and the memory after."""
        output, memory = self.core(seen, memory, resets=begins)
        logits, values = self.read(output)
        return logits, values, memory

    def read(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """The core's output to logits and values."""
        heads = self.heads(output)
        return heads[..., :-1], heads[..., -1]


@dataclass
class Rollout:
    """What acting leaves: everything [batch, steps] but the memory it began with."""

    memory: Tensor
    seen: Tensor
    begins: Tensor
    actions: Tensor
    log_probabilities: Tensor
    rewards: Tensor
    ends: Tensor


@torch.no_grad()
def act(policy: Policy, grid: RecallGrid, memory: Tensor, begins: Tensor, steps: int) -> tuple[Rollout, Tensor, Tensor]:
    """`steps` steps, one at a time; also the memory and the episode starts to go on with."""
    first = memory
    columns: list[tuple[Tensor, ...]] = []
    with policy.core.frozen_weights() as frozen:  # packed once for all steps
        for _ in range(steps):
            seen = grid.observe()
            output, memory = frozen.step(seen, memory, resets=begins)
            choice = torch.distributions.Categorical(logits=policy.read(output)[0])
            action = choice.sample()
            reward, end = grid.step(action)
            columns.append((seen, begins, action, choice.log_prob(action), reward, end))
            begins = end
    rollout = Rollout(first, *(torch.stack(column, 1) for column in zip(*columns, strict=True)))
    return rollout, memory, begins


def loss(policy: Policy, rollout: Rollout, discount: float = 0.95, entropy_weight: float = 0.02) -> Tensor:
    """Policy gradient with a learned baseline, over the whole rollout in one call."""
    logits, values, _ = policy(rollout.seen, rollout.memory, rollout.begins)
    to_come, returns = values[:, -1].detach() * ~rollout.ends[:, -1], []
    for reward, end in zip(reversed(rollout.rewards.unbind(1)), reversed(rollout.ends.unbind(1)), strict=True):
        to_come = reward + discount * to_come * ~end
        returns.append(to_come)
    advantage = torch.stack(returns[::-1], 1) - values
    choice = torch.distributions.Categorical(logits=logits)
    gain = choice.log_prob(rollout.actions) * advantage.detach() + entropy_weight * choice.entropy()
    total: Tensor = 0.5 * advantage.square().mean() - gain.mean()
    return total


def train(policy: Policy, updates: int, batch: int = 64, steps: int = 32, show: int = 20) -> list[float]:
    """Train; the share of finished episodes that ended at the right goal, per update."""
    grid = RecallGrid(batch)
    memory, begins = policy.core.initial_memory(batch), torch.ones(batch, dtype=torch.bool)
    optimizer = torch.optim.Adam(policy.parameters(), 2e-3)
    shares = []
    for update in range(1, updates + 1):
        rollout, memory, begins = act(policy, grid, memory, begins, steps)
        optimizer.zero_grad()
        loss(policy, rollout).backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        shares.append(((rollout.rewards > 0).sum() / rollout.ends.sum().clamp(min=1)).item())
        if show and update % show == 0:
            print(f"update {update}: {sum(shares[-show:]) / show:.1%} of the episodes at the right goal")
    return shares


def main() -> None:
    """Train and print; half is what no policy without memory exceeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="auto")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    train(Policy(options.backend), options.updates)


if __name__ == "__main__":
    main()
