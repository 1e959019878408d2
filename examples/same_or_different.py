"""The exercise: a textbook relational memory of four slots and one head learns a simple relation.

    python examples/same_or_different.py [--updates 1000] [--seed 0] [--backend auto]

Three symbols out of six come one a step. Was one of them shown twice? No single step tells: what is shown has to be
compared with all that was shown before. Half of the sequences have such a pair, so a guess is right half the time.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmc_kernels import CellSpec, RelationalMemory

SYMBOLS, STEPS = 6, 3


def sample(batch: int) -> tuple[Tensor, Tensor]:
    """Symbols, one-hot [batch, STEPS, SYMBOLS], and whether one of them occurs twice [batch]."""
    shown = torch.rand(batch, SYMBOLS).argsort(1)[:, :STEPS]  # all different
    twice = torch.rand(batch) < 0.5
    first, second = torch.rand(batch, STEPS).argsort(1)[:, :2].unbind(1)
    rows = torch.arange(batch)
    shown[rows, second] = torch.where(twice, shown[rows, first], shown[rows, second])
    return F.one_hot(shown, SYMBOLS).float(), twice.long()


class Comparer(nn.Module):
    """The memory, and what is read from it after the last step."""

    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        spec = CellSpec.textbook(input_size=SYMBOLS, mem_slots=4, head_size=64, num_heads=1)
        self.memory = RelationalMemory.from_spec(spec, backend=backend)
        self.answer = nn.Sequential(nn.Linear(self.memory.output_size, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, shown: Tensor) -> Tensor:
        """Logits [batch, 2]."""
        logits: Tensor = self.answer(self.memory(shown)[0][:, -1])
        return logits


def learn(updates: int = 1000, seed: int = 0, backend: str = "auto") -> float:
    """Train, and return the share of right answers to 2000 new sequences."""
    torch.manual_seed(seed)
    model = Comparer(backend)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    for update in range(1, updates + 1):
        shown, twice = sample(128)
        loss = F.cross_entropy(model(shown), twice)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if update % 100 == 0:
            print(f"update {update}: loss {loss.item():.3f}")
    shown, twice = sample(2000)
    with torch.no_grad():
        return float((model(shown).argmax(1) == twice).float().mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A textbook relational memory learns whether a symbol comes twice.")
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="auto")
    arguments = vars(parser.parse_args())
    torch.set_num_threads(1)
    print(f"{learn(**arguments):.1%} right, a guess 50 %")
