"""Texts to model: where they come from, their vocabulary, and their tokens in batches of parallel streams."""

from __future__ import annotations

import re
import sysconfig
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from rmc_kernels.tasks.task import Batch

Level = Literal["word", "code", "character"]
LEVELS: tuple[Level, ...] = ("word", "code", "character")
#: Stands for what is not in the vocabulary; WikiText has it in its text already.
UNKNOWN = "<unk>"
END_OF_LINE = "<eos>"
#: Every so many files of the standard library are for testing.
TEST_SHARE = 10


def python_library(test: bool) -> str:
    """The source of the Python standard library's top-level modules: a tenth of the files, or the other nine."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    chosen = [file for number, file in enumerate(files) if (number % TEST_SHARE == TEST_SHARE - 1) == test]
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in chosen)


def split(text: str, level: Level) -> list[str]:
    """Characters, words between blanks (as WikiText is prepared), or what code is made of.

    Of code, names, numbers, single marks and the blanks at the start of a line are tokens. `END_OF_LINE` stands where a
    line ends.
    """
    if level == "character":
        return list(text)
    if level == "word":
        return [word for line in text.splitlines() for word in (*line.split(), END_OF_LINE)]
    pieces = re.findall(r"\n[ \t]*|\w+|[^\w\s]", text)
    return [END_OF_LINE + piece[1:] if piece[0] == "\n" else piece for piece in pieces]


def join(tokens: list[str], level: Level) -> str:
    """The text of tokens, words with a blank between."""
    if level == "character":
        return "".join(tokens)
    text = ""
    for token in tokens:
        if token.startswith(END_OF_LINE):
            text += "\n" + token.removeprefix(END_OF_LINE)
        else:
            text += token if not text or text[-1].isspace() else f" {token}"
    return text


def vocabulary(tokens: list[str], most: int) -> tuple[str, ...]:
    """`UNKNOWN`, and the `most` - 1 most frequent tokens, by falling frequency."""
    counted = Counter(tokens)
    counted.pop(UNKNOWN, None)
    ranked = sorted(counted, key=lambda token: (-counted[token], token))
    return (UNKNOWN, *ranked[: most - 1])


def streams(tokens: Tensor, batch_size: int, steps: int) -> list[Batch]:
    """The text cut into `batch_size` streams side by side, and these into batches of `steps`; what is left is dropped.

    Every token but a stream's first is a target once: each batch goes on where the one before ended.
    """
    length = (len(tokens) - 1) // batch_size
    if length < 1:
        raise ValueError(f"batch_size must be less than the tokens of the text, {len(tokens)}, got {batch_size}")
    inputs = tokens[: batch_size * length].view(batch_size, length)
    targets = tokens[1 : batch_size * length + 1].view(batch_size, length)
    return [Batch(*pair) for pair in zip(inputs.split(steps, dim=1), targets.split(steps, dim=1), strict=True)]


class TextStream:
    """The batches of a text in order, over and over."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches, self.position = batches, 0

    def next(self) -> Batch:
        """The next batch."""
        batch = self.batches[self.position]
        self.position = (self.position + 1) % len(self.batches)
        return batch

    def heard(self, loss: float) -> None:
        """Nothing follows from it."""

    def state_dict(self) -> dict[str, Any]:
        """The position."""
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.position = state["position"]
