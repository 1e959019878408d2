"""The other models that the cell is set beside: nn.LSTM, nn.GRU and a causal Transformer encoder layer.

At equal parameters, or at equal width: their hidden size (`d_model`) is then the width of one memory slot, `D`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from rmc_kernels.bench.cases import Case

#: Gates of the recurrent models.
GATES = {"lstm": 4, "gru": 3}
NAMES = (*GATES, "transformer")
#: A Transformer's feed-forward layer is usually so many times its width.
USUAL_EXPANSION = 4


@dataclass(frozen=True)
class Model:
    """A model at a size.

    Attributes:
        build: makes it, in float32 on the CPU; it maps [B, T, I] to [B, T, features].
        features: of its output.
        parameters: how many it has.
        flops: of one forward pass, counted: matrix products and attention, two per multiply-add.
        note: what it is, in a line.
    """

    build: Callable[[], nn.Module]
    features: int
    parameters: int
    flops: int
    note: str


class Recurrent(nn.Module):
    """nn.LSTM or nn.GRU, batch first, without its final state."""

    def __init__(self, name: str, input_size: int, hidden_size: int) -> None:
        super().__init__()
        module_class = {"lstm": nn.LSTM, "gru": nn.GRU}[name]
        self.layer = module_class(input_size, hidden_size, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, I] to [B, T, hidden]."""
        output: Tensor = self.layer(x)[0]
        return output


class CausalEncoder(nn.Module):
    """A projection to the width and one nn.TransformerEncoderLayer in which a step sees itself and those before it.

    Left in training mode, without dropout: the fast path of evaluation masks the full product, and took 12 times as
    long at 4096 steps.
    """

    def __init__(self, steps: int, input_size: int, width: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.projection = nn.Linear(input_size, width)
        self.layer = nn.TransformerEncoderLayer(width, heads, feedforward, dropout=0.0, batch_first=True)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(steps), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, I] to [B, T, width]; `is_causal` spares torch the mask."""
        output: Tensor = self.layer(self.projection(x), src_mask=self.mask, is_causal=True)
        return output


def model(name: str, case: Case, *, at_width: bool) -> Model:
    """The model `name`, of `NAMES`, that stands beside the cell of `case`.

    Args:
        name: which one.
        case: the sizes.
        at_width: whether it has the width of a slot, instead of as many parameters as the cell.
    """
    count = case.spec.parameter_count
    if name == "transformer":
        return _transformer(case, USUAL_EXPANSION * case.mem_size if at_width else equal_feedforward(count, case))
    hidden = case.mem_size if at_width else equal_hidden_size(count, case.input_size, GATES[name])
    return _recurrent(name, case, hidden)


def _recurrent(name: str, case: Case, hidden: int) -> Model:
    gates, inputs = GATES[name], case.input_size
    parameters = gates * hidden * (inputs + hidden + 2)
    flops = 2 * case.batch_size * case.steps * gates * hidden * (inputs + hidden)
    note = f"nn.{name.upper()}, {hidden} units, {parameters:,} parameters"

    def build() -> nn.Module:
        # In training mode cuDNN fills a reserve that the backward pass alone reads, under no_grad, too.
        return Recurrent(name, inputs, hidden).train(case.mode != "forward")

    return Model(build, hidden, parameters, flops, note)


def _transformer(case: Case, feedforward: int) -> Model:
    inputs, width, heads, steps = case.input_size, case.mem_size, case.num_heads, case.steps
    parameters = _fixed_parameters(case) + feedforward * (2 * width + 1)
    products = inputs * width + 4 * width**2 + 2 * width * feedforward
    attention = width * (steps + 1)  # scores and values over the steps so far, (T + 1) / 2 on average
    note = f"nn.TransformerEncoderLayer, causal, width {width}, feed-forward {feedforward}, {parameters:,} parameters"
    return Model(
        lambda: CausalEncoder(steps, inputs, width, heads, feedforward),
        width,
        parameters,
        2 * case.batch_size * steps * (products + attention),
        note,
    )


def equal_hidden_size(parameters: int, input_size: int, gates: int) -> int:
    """The hidden size with which gates * h * (I + h + 2) parameters come nearest to `parameters`."""

    def distance(hidden: int) -> int:
        return abs(gates * hidden * (input_size + hidden + 2) - parameters)

    return min(range(1, int((parameters / gates) ** 0.5) + 2), key=distance)


def equal_feedforward(parameters: int, case: Case) -> int:
    """The feed-forward size with which the Transformer comes nearest to `parameters`; at least 1."""
    return max(1, round((parameters - _fixed_parameters(case)) / (2 * case.mem_size + 1)))


def _fixed_parameters(case: Case) -> int:
    """Those of projection, attention, norms and the feed-forward's last bias."""
    width = case.mem_size
    return width * (case.input_size + 1) + 4 * width * (width + 1) + 4 * width + width
