"""The models that are compared: a recurrent core and the same readout, with the same number of parameters."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

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
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(_readout_widths(core_size, classes, config)):
            layers += [_linear(inputs, outputs), nn.ReLU()]
        self.readout = nn.Sequential(*layers[:-1])

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [B, classes] for sequences [B, T, I]."""
        outputs, _ = self.core(inputs)
        logits: Tensor = self.readout(outputs[:, -1])
        return logits


def build(config: ModelConfig, input_size: int, classes: int) -> Classifier:
    """The classifier that `config` describes, its weights drawn from torch's global generator."""
    core: nn.Module
    if config.core == "lstm":
        core_size = matching_hidden_size(config, input_size, classes)
        core = nn.LSTM(input_size, core_size, batch_first=True)
    else:
        core = RelationalMemory.from_spec(_spec(config, input_size), backend=config.backend)
        core_size = core.output_size
    return Classifier(core, core_size, classes, config)


def matching_hidden_size(config: ModelConfig, input_size: int, classes: int) -> int:
    """The hidden size whose LSTM classifier is closest in parameters to the RMC classifier of `config`."""

    def readout_count(core_size: int) -> int:
        return sum((inputs + 1) * outputs for inputs, outputs in pairwise(_readout_widths(core_size, classes, config)))

    def lstm_count(hidden: int) -> int:
        return 4 * hidden * (input_size + hidden + 2) + readout_count(hidden)

    spec = _spec(config, input_size)
    wanted = spec.parameter_count + readout_count(spec.mem_slots * spec.mem_size)
    above = bisect_left(range(wanted), wanted, lo=1, key=lstm_count)
    return min((max(1, above - 1), above), key=lambda hidden: abs(lstm_count(hidden) - wanted))


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


def _readout_widths(core_size: int, classes: int, config: ModelConfig) -> list[int]:
    return [core_size, *[config.readout_width] * config.readout_layers, classes]


def _spec(config: ModelConfig, input_size: int) -> CellSpec:
    return CellSpec.sonnet(input_size, config.slots, config.head_size, config.heads)
