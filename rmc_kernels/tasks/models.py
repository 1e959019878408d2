"""The models that are compared: an encoder, a recurrent core and a readout, with the same number of parameters."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from rmc_kernels import backends, errors, initial
from rmc_kernels.layers import RelationalMemory
from rmc_kernels.spec import VARIANTS, CellSpec, GateStyle, Variant
from rmc_kernels.tasks.cores import CORES, TRANSFORMER_HEADS, Core, Recurrent, State, Transformer
from rmc_kernels.tasks.heads import HEADS, MLP, Adaptive, Head, Tied

Gate = Literal["unit", "memory", "none"]
GATES: tuple[Gate, ...] = ("unit", "memory", "none")
#: The target of a step after which nothing is asked.
IGNORE = -100


@dataclass(frozen=True)
class ModelConfig:
    """A model of sequences: its core, and what stands before and behind it.

    The sizes are those of the RMC. The other cores take the width that brings the whole model closest to that of the
    RMC in parameters.

    Attributes:
        core: Recurrent core; each has as many parameters as the RMC.
        variant: Variant of the RMC; r2gen and textbook have no gates to choose.
        slots: Memory slots of the RMC.
        heads: Attention heads of the RMC.
        head_size: Units of a head.
        blocks: Attention blocks of a step; sonnet and l0sg.
        mlp_layers: Layers of the RMC's MLP; r2gen has two.
        gate: Gates of sonnet and l0sg: unit, memory or none.
        memory: Initial memory of the RMC.
        embedding: Size of a token's embedding.
        head: Readout: mlp, tied (the embedding once more) or adaptive (adaptive softmax).
        readout_layers: Hidden ReLU layers of the mlp readout.
        readout_width: Their width.
        dropout: Probability of dropping a feature behind the embedding and the core, in training.
        backend: Backend of the RMC: auto, triton, cpu or reference.
    """

    core: Core = "rmc"
    variant: Variant = "sonnet"
    slots: int = 8
    heads: int = 8
    head_size: int = 32
    blocks: int = 1
    mlp_layers: int = 2
    gate: Gate = "unit"
    memory: str = "identity"
    embedding: int = 64
    head: Head = "mlp"
    readout_layers: int = 4
    readout_width: int = 256
    dropout: float = 0.0
    backend: str = "auto"

    def __post_init__(self) -> None:
        errors.one_of("core", self.core, CORES)
        errors.one_of("variant", self.variant, VARIANTS)
        errors.one_of("gate", self.gate, GATES)
        errors.one_of("memory", self.memory, initial.MEMORY_MODES)
        errors.one_of("head", self.head, HEADS)
        errors.one_of("backend", self.backend, backends.CHOICES)
        for name in ("slots", "heads", "head_size", "blocks", "mlp_layers", "embedding", "readout_width"):
            errors.positive_int(name, getattr(self, name))
        errors.positive_int("readout_layers", self.readout_layers, minimum=0)
        if not 0 <= errors.real_number("dropout", self.dropout) < 1:
            raise ValueError(f"dropout must be a probability in [0, 1), got {self.dropout}")

    def spec(self, input_size: int) -> CellSpec:
        """The RMC's cell for `input_size` features."""
        if self.variant == "textbook":
            return CellSpec.textbook(input_size, self.slots, self.head_size, self.heads, self.mlp_layers)
        if self.variant == "r2gen":
            return CellSpec.r2gen(self.slots, self.heads * self.head_size, self.heads)
        made = CellSpec.sonnet if self.variant == "sonnet" else CellSpec.l0sg
        return made(
            input_size=input_size, mem_slots=self.slots, head_size=self.head_size, num_heads=self.heads,
            num_blocks=self.blocks, gate_style=self.gate_style, attention_mlp_layers=self.mlp_layers,
        )  # fmt: skip

    @property
    def gate_style(self) -> GateStyle | None:
        """The gate as a CellSpec takes it."""
        return None if self.gate == "none" else self.gate


class Answers(NamedTuple):
    """What a model says to the `K` answers asked of a batch.

    Attributes:
        losses: [K] cross entropies in nats, with gradient.
        right: [K] bool, whether the most likely class is the target; None in training.
        state: the core's state after the last step, with gradient.
    """

    losses: Tensor
    right: Tensor | None
    state: State


class Words(nn.Module):
    """Embeddings of a step's words [B, T, W], weighted by their place and summed; token 0 is no word.

    The weights are those of Sukhbaatar et al. (2015), so that the order of the words counts.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, embedding]."""
        size, words = self.embedding.embedding_dim, tokens.shape[-1]
        count = (tokens != 0).sum(-1, keepdim=True).clamp(min=1)[..., None]
        place = torch.arange(1, words + 1, device=tokens.device)[:, None] / count
        part = torch.arange(1, size + 1, device=tokens.device) / size
        weights = (1 - place - part * (1 - 2 * place)) * (tokens != 0)[..., None]
        summed: Tensor = (self.embedding(tokens) * weights).sum(-2)
        return summed


class SequenceModel(nn.Module):
    """Encoder, core and head; answers are computed only after the steps at which one is asked for."""

    def __init__(self, encoder: nn.Module, core: Recurrent | Transformer, head: MLP | Adaptive, dropout: float) -> None:
        super().__init__()
        self.encoder, self.core, self.head, self.dropout = encoder, core, head, nn.Dropout(dropout)

    def forward(self, inputs: Tensor, targets: Tensor, state: State = None) -> Answers:
        """Answers to the targets [B, T] that are not `IGNORE`, row by row, for a batch's inputs."""
        features, state = self.features(inputs, state)
        asked = targets != IGNORE
        rows, wanted = features[asked], targets[asked]
        right = None if self.training else self.head.best(rows) == wanted
        return Answers(self.head.losses(rows, wanted), right, state)

    def features(self, inputs: Tensor, state: State = None) -> tuple[Tensor, State]:
        """What the head gets, [B, T, F], and the state after the last step."""
        features, state = self.core(self.dropout(self.encoder(inputs)), state)
        return self.dropout(features), state


def build(config: ModelConfig, classes: int, *, input_size: int | None = None, words: bool = False) -> SequenceModel:
    """The model that `config` describes, its weights drawn from torch's global generator.

    Args:
        config: what it is made of.
        classes: answers to choose from; for tokens also the size of the vocabulary.
        input_size: features of a step; None where a step is a token.
        words: whether a step is several tokens.
    """
    if config.core == "rmc":
        return _build(config, classes, input_size, words, 0, 0)
    wanted = _size(lambda: _build(replace(config, core="rmc"), classes, input_size, words, 0, 0))

    def size(width: int, feedforward: int = 0) -> int:
        return _size(lambda: _build(config, classes, input_size, words, width, feedforward))

    if config.core != "transformer":
        return _build(config, classes, input_size, words, _closest(size, wanted), 0)
    unit = TRANSFORMER_HEADS
    quarter = _closest(lambda width: size(unit * width, 4 * unit * width), wanted)
    while quarter > 1 and size(unit * quarter, 1) > wanted:
        quarter -= 1
    feedforward = _closest(lambda wide: size(unit * quarter, wide), wanted)
    return _build(config, classes, input_size, words, unit * quarter, feedforward)


def _size(make: Callable[[], nn.Module]) -> int:
    """Scalars in the parameters of what `make` makes, without making them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make().parameters())


def _closest(size: Callable[[int], int], wanted: int) -> int:
    """The width from 1 on whose `size`, which rises with it, is closest to `wanted`."""
    above = bisect_left(range(1 << 14), wanted, lo=1, key=size)
    return min((max(1, above - 1), above), key=lambda width: abs(size(width) - wanted))


def _build(
    config: ModelConfig, classes: int, input_size: int | None, words: bool, width: int, feedforward: int
) -> SequenceModel:
    """A model whose core, if it is no RMC, has the given width."""
    if input_size is not None:
        encoder: nn.Module = nn.Identity()
        features = input_size
    else:
        embedding = nn.Embedding(classes, config.embedding)
        nn.init.normal_(embedding.weight, std=config.embedding**-0.5)
        encoder, features = Words(embedding) if words else embedding, config.embedding
    if config.core == "rmc":
        wide = config.heads * config.head_size
        if config.variant == "r2gen" and features != wide:
            encoder, features = nn.Sequential(encoder, nn.Linear(features, wide)), wide
        layer = RelationalMemory.from_spec(config.spec(features), initial_memory=config.memory, backend=config.backend)
        core: Recurrent | Transformer = Recurrent(layer, layer.output_size)
    elif config.core == "transformer":
        core = Transformer(features, width, feedforward, config.dropout)
    else:
        core_class = nn.LSTM if config.core == "lstm" else nn.GRU
        core = Recurrent(core_class(features, width, batch_first=True), width)
    head: MLP | Adaptive
    if config.head == "mlp":
        head = MLP(core.size, classes, config.readout_layers, config.readout_width)
    elif input_size is not None:
        raise ValueError(f"head must be 'mlp' where a step is no token, got {config.head!r}")
    elif config.head == "tied":
        head = Tied(core.size, embedding)
    else:
        head = Adaptive(core.size, classes, config.embedding)
    return SequenceModel(encoder, core, head, config.dropout)
