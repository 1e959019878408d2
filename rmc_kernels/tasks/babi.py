"""bAbI (Weston et al. 2015): questions about short stories, all tasks learnt by one model.

A step is a sentence, its words embedded and summed with weights for their place; the last step is the question. The
answer, a word or a list of words, is one of all answers that the training stories have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from rmc_kernels import errors
from rmc_kernels.tasks.models import IGNORE, ModelConfig, SequenceModel, build
from rmc_kernels.tasks.stories import Question, Stories, make_stories, read_stories
from rmc_kernels.tasks.task import Batch


@dataclass(frozen=True)
class Babi:
    """The task: the stories at `stories`, or some made up here.

    Attributes:
        stories: Folder or .tar.gz of stories in the official format; made up if not given.
        questions: Training questions of each task that is made up.
        sentences: Sentences kept of a story, the last ones.

    Raises:
        FileNotFoundError, TypeError, ValueError: naming the argument, what it got and what it takes.
    """

    stories: str = ""
    questions: int = 1000
    sentences: int = 50

    name: ClassVar[str] = "babi"
    carries: ClassVar[bool] = False
    measure: ClassVar[str] = "accuracy"

    def __post_init__(self) -> None:
        errors.positive_int("questions", self.questions)
        errors.positive_int("sentences", self.sentences)

    @cached_property
    def read(self) -> Stories:
        """The stories."""
        return read_stories(Path(self.stories)) if self.stories else make_stories(self.questions)

    @property
    def title(self) -> str:
        """The task and its data."""
        return f"bAbI, {len(self.read)} tasks{'' if self.stories else ' made up here'}, learnt together"

    @cached_property
    def answers(self) -> tuple[str, ...]:
        """The answers to the training questions."""
        return tuple(sorted({question.answer for splits in self.read.values() for question in splits["train"]}))

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """Token 0, which is no word, then the answers, then the other words. All are classes; only answers occur."""
        words = {
            word
            for splits in self.read.values()
            for question in splits["train"]
            for sentence in (*question.story, question.question)
            for word in sentence
        }
        return ("", *self.answers, *sorted(words - set(self.answers)))

    @property
    def levels(self) -> Mapping[str, float]:
        """The most frequent answer of each task, always."""
        asked = [len(splits["test"]) for splits in self.read.values()]
        right = sum(share * count for share, count in zip(self.part_levels.values(), asked, strict=True))
        return {"each task's most frequent answer": right / sum(asked)}

    @cached_property
    def part_levels(self) -> Mapping[str, float]:
        """The same of each task."""
        return {name: _most_frequent(splits) for name, splits in self.read.items()}

    def model(self, config: ModelConfig) -> SequenceModel:
        """The model that `config` describes, of exactly its sizes."""
        return build(config, len(self.vocabulary), words=True)

    def source(self, batch_size: int, seed: int) -> Epochs:
        """Training batches of `batch_size` questions."""
        return Epochs(self, [q for splits in self.read.values() for q in splits["train"]], batch_size, seed)

    def held_out(self, batch_size: int, examples: int) -> dict[str, list[Batch]]:
        """The test questions of each task, at most `examples` in all."""
        most, parts = max(1, examples // len(self.read)), {}
        for name, splits in self.read.items():
            tests = sorted(splits["test"][:most], key=lambda question: len(question.story))
            parts[name] = [self.encode(tests[i : i + batch_size]) for i in range(0, len(tests), batch_size)]
        return parts

    def captions(self, batch: Batch, row: int) -> list[str]:
        """The sentences."""
        return [" ".join(self.vocabulary[token] for token in step if token) for step in batch.inputs[row].tolist()]

    def encode(self, questions: list[Question]) -> Batch:
        """Tokens [B, T, W], stories shorter than the longest padded behind their question, where the answer is asked.

        A word or answer that the training stories lack is no word, or an answer that counts as wrong.
        """
        texts = [[*question.story[-self.sentences :], question.question] for question in questions]
        steps, words = max(map(len, texts)), max(len(sentence) for text in texts for sentence in text)
        inputs = torch.zeros(len(texts), steps, words, dtype=torch.int64)
        targets = torch.full((len(texts), steps), IGNORE)
        for row, text in enumerate(texts):
            for step, sentence in enumerate(text):
                inputs[row, step, : len(sentence)] = self._tokens(sentence)
            targets[row, len(text) - 1] = self._token.get(questions[row].answer, 0)
        return Batch(inputs, targets)

    def _tokens(self, words: list[str]) -> Tensor:
        return torch.tensor([self._token.get(word, 0) for word in words])

    @cached_property
    def _token(self) -> dict[str, int]:
        return {word: token for token, word in enumerate(self.vocabulary)}


def _most_frequent(splits: Mapping[str, list[Question]]) -> float:
    """How often the most frequent training answer of a task is right in its test."""
    best = Counter(question.answer for question in splits["train"]).most_common(1)[0][0]
    return sum(question.answer == best for question in splits["test"]) / len(splits["test"])


class Epochs:
    """All questions once in random order, then again in another; a batch has stories of like length."""

    def __init__(self, task: Babi, questions: list[Question], batch_size: int, seed: int) -> None:
        self.task, self.questions, self.batch_size, self.seed = task, questions, batch_size, seed
        self._go_to(0, 0)

    def _go_to(self, epoch: int, index: int) -> None:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.questions), generator=generator).tolist()
        order.sort(key=lambda number: len(self.questions[number].story) // 4)
        starts = [i * self.batch_size for i in range(max(1, len(order) // self.batch_size))]
        batches = [order[i:j] for i, j in zip(starts, [*starts[1:], len(order)], strict=True)]
        self.batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        self.epoch, self.index = epoch, index

    def next(self) -> Batch:
        """The next batch; one of an epoch takes up what is left of a division by the batch size."""
        if self.index == len(self.batches):
            self._go_to(self.epoch + 1, 0)
        batch = self.task.encode([self.questions[number] for number in self.batches[self.index]])
        self.index += 1
        return batch

    def heard(self, loss: float) -> None:
        """Nothing follows from it."""

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and the next batch in it."""
        return {"epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._go_to(state["epoch"], state["index"])
