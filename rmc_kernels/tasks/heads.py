"""Readouts: from a core's features to the losses of the answers, the most likely answers and their probabilities."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, Protocol

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Head = Literal["mlp", "tied", "adaptive"]
HEADS: tuple[Head, ...] = ("mlp", "tied", "adaptive")


class Readout(Protocol):
    """What a model asks of its head; features are [K, F], one row for each answer."""

    def losses(self, features: Tensor, targets: Tensor) -> Tensor:
        """Cross entropies [K], in nats."""

    def log_probabilities(self, features: Tensor) -> Tensor:
        """Of every class, [K, classes]."""

    def best(self, features: Tensor) -> Tensor:
        """The most likely class [K]."""


class MLP(nn.Module):
    """Hidden ReLU layers of `width`, then a Linear to the classes (the paper's readout: four of 256)."""

    def __init__(self, size: int, classes: int, layers: int, width: int) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for inputs, outputs in pairwise([size, *[width] * layers, classes]):
            parts += [_linear(inputs, outputs), nn.ReLU()]
        self.layers = nn.Sequential(*parts[:-1])

    def forward(self, features: Tensor) -> Tensor:
        """Logits [K, classes]."""
        logits: Tensor = self.layers(features)
        return logits

    def losses(self, features: Tensor, targets: Tensor) -> Tensor:
        """Cross entropies [K], in nats."""
        return cross_entropy(self(features), targets, reduction="none")

    def log_probabilities(self, features: Tensor) -> Tensor:
        """Of every class, [K, classes]."""
        return self(features).log_softmax(-1)  # type: ignore[no-any-return]

    def best(self, features: Tensor) -> Tensor:
        """The most likely class [K]."""
        return self(features).argmax(-1)  # type: ignore[no-any-return]


class Tied(MLP):
    """A Linear to the embedding's size, then the embedding as output weights (Press and Wolf 2017), and a bias."""

    def __init__(self, size: int, embedding: nn.Embedding) -> None:
        nn.Module.__init__(self)
        classes, width = embedding.weight.shape
        output = nn.Linear(width, classes)
        output.weight = embedding.weight
        nn.init.zeros_(output.bias)
        self.layers = nn.Sequential(nn.Linear(size, width), output)


class Adaptive(nn.Module):
    """Adaptive softmax (Grave et al. 2017): frequent classes in a head, rare ones in tails of fewer dimensions.

    Classes are numbered by falling frequency. The head has an eighth of them, the first tail the next quarter.
    """

    def __init__(self, size: int, classes: int, width: int) -> None:
        super().__init__()
        if classes < 16:
            raise ValueError(f"head must be 'mlp' or 'tied' below 16 classes, got 'adaptive' for {classes}")
        self.project = nn.Linear(size, width)
        cutoffs = [classes // 8, classes * 3 // 8]
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(width, classes, cutoffs, div_value=2.0)

    def losses(self, features: Tensor, targets: Tensor) -> Tensor:
        """Cross entropies [K], in nats."""
        return -self.softmax(self.project(features), targets).output  # type: ignore[no-any-return]

    def log_probabilities(self, features: Tensor) -> Tensor:
        """Of every class, [K, classes]."""
        return self.softmax.log_prob(self.project(features))

    def best(self, features: Tensor) -> Tensor:
        """The most likely class [K]."""
        return self.softmax.predict(self.project(features))


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """A Linear that starts as He et al. (2015) have it for ReLU networks: N(0, 2 / inputs), biases 0.

    torch's default is 2.4 times smaller, which fades what the core found layer by layer: see docs/training.md.
    """
    layer = nn.Linear(inputs, outputs)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer
