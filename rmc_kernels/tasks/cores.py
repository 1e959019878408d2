"""The recurrent cores that are compared, and what makes them interchangeable: features in, features and a state out."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rmc_kernels.layers import RelationalMemory

Core = Literal["rmc", "lstm", "gru", "transformer"]
CORES: tuple[Core, ...] = ("rmc", "lstm", "gru", "transformer")
TRANSFORMER_LAYERS = 2
TRANSFORMER_HEADS = 4

#: What is carried from one call to the next: a memory, (h, c), h, or nothing.
State = Any


class Recurrent(nn.Module):
    """A core over a sequence: `features, state = core(x, state)`, for x [B, T, I] or, of no state, from its start.

    Args:
        layer: a `RelationalMemory`, `nn.LSTM` or `nn.GRU`, batch first.
        size: features of a step's output.
    """

    def __init__(self, layer: RelationalMemory | nn.LSTM | nn.GRU, size: int) -> None:
        super().__init__()
        self.layer, self.size = layer, size

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Features [B, T, size] and the state after the last step, with gradient."""
        features, state = self.layer(x, state)
        return features, state


class Transformer(nn.Module):
    """A causal Transformer: every step attends to itself and the steps before it, back to the start of its call.

    Two pre-norm layers of four heads behind a Linear, with sinusoidal positions. It carries nothing: what came before
    the call is out of its sight.

    Args:
        input_size: features `I` of a step.
        size: its width, a multiple of 4.
        feedforward: width of the feed-forward layers.
        dropout: probability.
    """

    def __init__(self, input_size: int, size: int, feedforward: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.size = size
        self.project = nn.Linear(input_size, size)
        layer = nn.TransformerEncoderLayer(
            size, TRANSFORMER_HEADS, feedforward, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, TRANSFORMER_LAYERS, nn.LayerNorm(size), enable_nested_tensor=False)

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Features [B, T, size], and no state."""
        steps = x.shape[1]
        hidden = torch.ones(steps, steps, dtype=torch.bool, device=x.device).triu(1)
        features = self.project(x) + positions(steps, self.size).to(x)
        return self.layers(features, mask=hidden, is_causal=True), None


def positions(steps: int, size: int) -> Tensor:
    """Sinusoidal positions [steps, size] (Vaswani et al. 2017), sines in the first half, cosines in the second."""
    frequencies = torch.exp(torch.arange(size // 2) * (-2 * math.log(10_000) / size))
    angles = torch.arange(steps)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def detached(state: State) -> State:
    """The state cut off from what computed it."""
    if isinstance(state, tuple):
        return tuple(part.detach() for part in state)
    return None if state is None else state.detach()
