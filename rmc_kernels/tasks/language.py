"""Language modelling: the next word or character of a text, the memory carried on through all of it.

Backpropagation is cut every `window` tokens; the memory, detached, goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from rmc_kernels import errors
from rmc_kernels.tasks.files import text_of
from rmc_kernels.tasks.models import ModelConfig, SequenceModel, build
from rmc_kernels.tasks.task import Batch
from rmc_kernels.tasks.texts import LEVELS, Level, TextStream, python_library, split, streams, vocabulary

PYTHON = "python"


@dataclass(frozen=True)
class LanguageModelling:
    """The task: a text to train on and another to be tested with.

    Attributes:
        text: Text file to train on, or python for the source of the Python standard library.
        test: Text file to test with; if not given, the last tenth of the text (of python every tenth module).
        level: Tokens: word (between blanks), code (names, numbers, marks) or character.
        most_words: Size of the vocabulary at most; what is rarer is one unknown token.
        window: Tokens between the cuts of backpropagation.
        characters: Characters taken of the training text; 0 for all.

    Raises:
        FileNotFoundError, TypeError, ValueError: naming the argument, what it got and what it takes.
    """

    text: str = PYTHON
    test: str = ""
    level: Level = "code"
    most_words: int = 10_000
    window: int = 35
    characters: int = 0

    name: ClassVar[str] = "lm"
    carries: ClassVar[bool] = True
    measure: ClassVar[str] = "perplexity"
    part_levels: ClassVar[Mapping[str, float]] = {}

    def __post_init__(self) -> None:
        errors.one_of("level", self.level, LEVELS)
        errors.positive_int("most_words", self.most_words, minimum=2)
        errors.positive_int("window", self.window)
        errors.positive_int("characters", self.characters, minimum=0)

    @cached_property
    def texts(self) -> tuple[list[str], list[str]]:
        """The tokens to train on and those to test with."""
        if self.text == PYTHON and not self.test:
            train, test = python_library(test=False), python_library(test=True)
        else:
            train = python_library(test=False) if self.text == PYTHON else _read(self.text)
            cut = len(train) if self.test else len(train) * 9 // 10
            test = _read(self.test) if self.test else train[cut:]
            train = train[:cut]
        return split(train[: self.characters or None], self.level), split(test, self.level)

    @property
    def title(self) -> str:
        """The task and its data."""
        of = "the Python standard library" if self.text == PYTHON else Path(self.text).name
        tested = f", tested on {Path(self.test).name}" if self.test else ""
        return f"Language modelling, {self.level} level: {of}{tested}"

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """The tokens by falling frequency behind the unknown one."""
        return vocabulary(self.texts[0], self.most_words)

    @cached_property
    def levels(self) -> Mapping[str, float]:
        """The most frequent token, always."""
        encoded = self.encode(self.texts[1]).tolist()
        best = Counter(self.encode(self.texts[0]).tolist()).most_common(1)[0][0]
        return {"most frequent token": encoded.count(best) / len(encoded)}

    def model(self, config: ModelConfig) -> SequenceModel:
        """The model that `config` describes, of exactly its sizes."""
        return build(config, len(self.vocabulary))

    def source(self, batch_size: int, seed: int) -> TextStream:
        """The training text in `batch_size` streams; the same for every seed."""
        return TextStream(streams(self.encode(self.texts[0]), batch_size, self.window))

    def held_out(self, batch_size: int, examples: int) -> dict[str, list[Batch]]:
        """The test text in `batch_size` streams, at most `examples` times `window` tokens of it."""
        tokens = self.encode(self.texts[1])[: examples * self.window]
        return {"": streams(tokens, batch_size, self.window)}

    def captions(self, batch: Batch, row: int) -> list[str]:
        """The tokens."""
        return [self.vocabulary[token].replace("\n", "\\n") for token in batch.inputs[row].tolist()]

    def encode(self, tokens: list[str]) -> Tensor:
        """The numbers [n] of tokens in the vocabulary."""
        return torch.tensor([self._token.get(token, 0) for token in tokens])

    @cached_property
    def _token(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.vocabulary)}


def _read(path: str) -> str:
    return text_of(path, Path(path).read_bytes())
