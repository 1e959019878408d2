"""The models that are compared: a recurrent core and the same readout, with the same number of parameters."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from rmc_kernels import errors
from rmc_kernels.layers import RelationalMemory
from rmc_kernels.spec import CellSpec

Core = Literal["rmc", "lstm"]
CORES: tuple[Core, ...] = ("rmc", "lstm")


@dataclass(frozen=True)
class ModelConfig:
    """A classifier of sequences: its core, and the readout MLP behind the core's last output.

    The sizes are those of the RMC. An LSTM takes the hidden size that brings it closest to that RMC's parameter count.

    Attributes:
        core: "rmc" or "lstm".
        slots, heads, head_size: memory of the RMC.
        readout_layers, readout_width: hidden ReLU layers of the readout.
        backend: backend of the RMC; see `rmc_kernels.explain`.
    """

    core: Core = "rmc"
    slots: int = 8
    heads: int = 8
    head_size: int = 32
    readout_layers: int = 4
    readout_width: int = 256
    backend: str = "auto"

    def __post_init__(self) -> None:
        errors.one_of("core", self.core, CORES)
        for name in ("slots", "heads", "head_size", "readout_layers", "readout_width"):
            errors.positive_int(name, getattr(self, name))


class Classifier(nn.Module):
    """`core` over the sequence, then an MLP on its output after the last step: [B, T, I] -> logits [B, classes]."""

    def __init__(self, core: nn.Module, core_size: int, classes: int, config: ModelConfig) -> None:
        super().__init__()
        self.core = core
        widths = [core_size] + [config.readout_width] * config.readout_layers
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [_linear(inputs, outputs), nn.ReLU()]
        self.readout = nn.Sequential(*layers, _linear(widths[-1], classes))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [B, classes] for sequences [B, T, I]."""
        outputs, _ = self.core(inputs)
        logits: Tensor = self.readout(outputs[:, -1])
        return logits


def build(config: ModelConfig, input_size: int, classes: int) -> Classifier:
    """The classifier that `config` describes, its weights drawn from torch's global generator."""
    if config.core == "lstm":
        return _lstm(matching_hidden_size(config, input_size, classes), config, input_size, classes)
    return _rmc(config, input_size, classes)


def matching_hidden_size(config: ModelConfig, input_size: int, classes: int) -> int:
    """The hidden size whose LSTM classifier is closest in parameters to the RMC classifier of `config`."""

    def lstm_count(hidden: int) -> int:
        with torch.device("meta"):
            return parameter_count(_lstm(hidden, config, input_size, classes))

    with torch.device("meta"):
        wanted = parameter_count(_rmc(config, input_size, classes))
    above = bisect_left(range(1, wanted), wanted, key=lstm_count) + 1
    return min((above - 1, above), key=lambda hidden: abs(lstm_count(hidden) - wanted)) if above > 1 else above


def parameter_count(model: nn.Module) -> int:
    """Number of scalars in all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """A Linear that starts as He et al. (2015) have it for ReLU networks: N(0, 2 / inputs), biases 0.

    torch's default is 2.4 times smaller, which fades what the core found layer by layer: see docs/training.md.
    """
    layer = nn.Linear(inputs, outputs)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer


def _rmc(config: ModelConfig, input_size: int, classes: int) -> Classifier:
    spec = CellSpec.sonnet(input_size, config.slots, config.head_size, config.heads)
    core = RelationalMemory.from_spec(spec, backend=config.backend)
    return Classifier(core, core.output_size, classes, config)


def _lstm(hidden: int, config: ModelConfig, input_size: int, classes: int) -> Classifier:
    return Classifier(nn.LSTM(input_size, hidden, batch_first=True), hidden, classes, config)
