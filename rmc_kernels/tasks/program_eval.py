"""Learning to execute (Zaremba and Sutskever 2014; Santoro et al. 2018, section 4.2), character by character.

A sequence is a source text, `@`, and its answer with a full stop behind. From `@` on, the next character is asked; the
model reads the right one before (teacher forcing), as in both papers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import ClassVar

import torch
from torch.nn.utils.rnn import pad_sequence

from rmc_kernels import errors
from rmc_kernels.tasks.models import IGNORE, ModelConfig, SequenceModel, build
from rmc_kernels.tasks.programs import KINDS, Problem
from rmc_kernels.tasks.task import HELD_OUT_SEED, Batch, FreshExamples

ASK, END = "@", "."
#: Token 0 pads.
VOCABULARY = ("", *sorted({*"0123456789abcdefghx+-*()=:<> \nprintfogelsicd", ASK, END}))
TOKEN = {character: token for token, character in enumerate(VOCABULARY)}


@dataclass(frozen=True)
class ProgramEvaluation:
    """The task: programs to evaluate and digits to memorise.

    Attributes:
        kind: addition, control, program, copy, reverse, double, or all six in turn.
        digits: Of the programs' numbers, at most.
        nesting: Operations of a program.
        length: Digits of the texts to copy, reverse and double.
        curriculum: mix draws the digits, nesting and length of a training example uniformly up to these; none takes
            them as they are. Held-out examples always do.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes.
    """

    kind: str = "all"
    digits: int = 3
    nesting: int = 2
    length: int = 10
    curriculum: str = "mix"

    name: ClassVar[str] = "program-eval"
    carries: ClassVar[bool] = False
    measure: ClassVar[str] = "accuracy"
    vocabulary: ClassVar[tuple[str, ...]] = VOCABULARY

    def __post_init__(self) -> None:
        errors.one_of("kind", self.kind, ("all", *KINDS))
        errors.one_of("curriculum", self.curriculum, ("mix", "none"))
        for name in ("digits", "length", "nesting"):
            errors.positive_int(name, getattr(self, name))
        if self.nesting > 8:
            raise ValueError(f"nesting must be an int from 1 to 8, got {self.nesting}")

    @property
    def title(self) -> str:
        """The task and its size."""
        kind = "programs and memorisation" if self.kind == "all" else self.kind
        return f"Program evaluation, {kind}: {self.digits} digits, nesting {self.nesting}, length {self.length}"

    @property
    def levels(self) -> Mapping[str, float]:
        """The most frequent character at each place of each kind's answers, always; the full stop counts as one."""
        right, asked = (sum(column) for column in zip(*self._unread.values(), strict=True))
        return {"program unread": right / asked}

    @property
    def part_levels(self) -> Mapping[str, float]:
        """The same of each kind."""
        return {kind: right / asked for kind, (right, asked) in self._unread.items()} if len(self.kinds) > 1 else {}

    @cached_property
    def _unread(self) -> Mapping[str, tuple[int, int]]:
        """Of 500 problems of each kind, the characters that are the most frequent one of their place, and all."""
        generator, found = torch.Generator().manual_seed(0), {}
        for kind in self.kinds:
            targets = self.sample(500, generator, [kind], mixed=False).targets
            places = pad_sequence([row[row != IGNORE] for row in targets], padding_value=IGNORE)
            right = sum(int(place[place != IGNORE].bincount().max()) for place in places)
            found[kind] = right, int((places != IGNORE).sum())
        return found

    @property
    def kinds(self) -> list[str]:
        """The kinds of problems that are asked."""
        return list(KINDS) if self.kind == "all" else [self.kind]

    def model(self, config: ModelConfig) -> SequenceModel:
        """The model that `config` describes, of exactly its sizes."""
        return build(config, len(VOCABULARY))

    def source(self, batch_size: int, seed: int) -> FreshExamples:
        """Training batches of `batch_size` sequences."""
        mixed = self.curriculum == "mix"
        return FreshExamples(lambda generator: self.sample(batch_size, generator, self.kinds, mixed), seed)

    def held_out(self, batch_size: int, examples: int) -> dict[str, list[Batch]]:
        """`examples` problems, as many of each kind, of full size."""
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        count = max(1, examples // len(self.kinds))
        sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
        return {kind: [self.sample(size, generator, [kind], mixed=False) for size in sizes] for kind in self.kinds}

    def captions(self, batch: Batch, row: int) -> list[str]:
        """The characters."""
        characters = [VOCABULARY[token] for token in batch.inputs[row].tolist()]
        return ["\\n" if character == "\n" else character for character in characters if character]

    def sample(self, batch_size: int, generator: torch.Generator, kinds: list[str], mixed: bool) -> Batch:
        """Problems of `kinds` in turn, of full size or, `mixed`, of any up to it."""
        random = Random(int(torch.randint(2**62, (), generator=generator)))
        return encode([self._problem(kinds[i % len(kinds)], random, mixed) for i in range(batch_size)])

    def _problem(self, kind: str, random: Random, mixed: bool) -> Problem:
        digits = self.length if kind in ("copy", "reverse", "double") else self.digits
        nesting = self.nesting
        if mixed:
            digits, nesting = random.randint(1, digits), random.randint(1, nesting)
        return KINDS[kind](digits, nesting, random)


def encode(problems: list[Problem]) -> Batch:
    """Tokens [B, T], padded at the end, and targets where a character of an answer comes next."""
    texts = [torch.tensor([TOKEN[c] for c in f"{p.source}{ASK}{p.answer}{END}"]) for p in problems]
    tokens = pad_sequence(texts, batch_first=True)
    steps = torch.arange(tokens.shape[1] - 1)
    first = torch.tensor([len(problem.source) for problem in problems])[:, None]
    last = torch.tensor([len(text) - 2 for text in texts])[:, None]
    targets = tokens[:, 1:].where((steps >= first) & (steps <= last), IGNORE)
    return Batch(tokens[:, :-1], targets)
