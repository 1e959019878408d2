"""`rmc sample`: text written by a trained language model, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from rmc_kernels.tasks.cores import Transformer
from rmc_kernels.tasks.exits import REFUSALS, one_line
from rmc_kernels.tasks.language import LanguageModelling
from rmc_kernels.tasks.models import SequenceModel
from rmc_kernels.tasks.registry import trained
from rmc_kernels.tasks.texts import UNKNOWN, join, split


@torch.no_grad()
def continuation(
    model: SequenceModel, prompt: list[int], length: int, temperature: float, generator: torch.Generator, never: int = 0
) -> list[int]:
    """`length` tokens drawn one after another behind `prompt`, which has at least one.

    A recurrent core carries its state; a Transformer reads all there is once more for every token.

    Args:
        model: in evaluation mode.
        prompt: tokens to go on from.
        length: tokens to draw.
        temperature: divides the logits; 0 takes the most likely token.
        generator: of the random numbers.
        never: a token that is not drawn.
    """
    tokens, state, fresh = list(prompt), None, list(prompt)
    for _ in range(length):
        features, state = model.features(torch.tensor([fresh]), state)
        scores = model.head.log_probabilities(features[:, -1])[0]
        scores[never] = -torch.inf
        if temperature:
            drawn = int(torch.multinomial((scores / temperature).softmax(-1), 1, generator=generator))
        else:
            drawn = int(scores.argmax())
        tokens.append(drawn)
        fresh = tokens if isinstance(model.core, Transformer) else [drawn]
    return tokens[len(prompt) :]


def sample(
    checkpoint: Annotated[Path, typer.Argument(help="File that `rmc train lm` left.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "\n",
    length: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="Below 1 safer, above 1 bolder; 0 the likeliest.")] = 0.8,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
) -> None:
    """Write text with a trained language model."""
    with one_line(*REFUSALS):
        task, model, _ = trained(checkpoint)
        if not isinstance(task, LanguageModelling):
            raise ValueError(f"checkpoint must be one of lm, got one of {task.name}")
    start = split(prompt, task.level) or split("\n", task.level)
    unknown = task.vocabulary.index(UNKNOWN)
    generator = torch.Generator().manual_seed(seed)
    drawn = continuation(model, task.encode(start).tolist(), length, temperature, generator, unknown)
    typer.echo(join([*start, *(task.vocabulary[token] for token in drawn)], task.level))
