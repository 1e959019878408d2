"""Question-answering stories in the bAbI format (Weston et al. 2015, arXiv:1502.05698): read them, or make some.

The format: every line is `ID text`, or `ID question<TAB>answer<TAB>supporting IDs`; an ID of 1 begins a new story.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

FILE = re.compile(r"qa(\d+)_([\w-]+)_(train|test)\.txt$")


class Question(NamedTuple):
    """A question, what was told before it, and its answer; texts are lists of lower-case words."""

    story: list[list[str]]
    question: list[str]
    answer: str


#: Questions by task ("qa1 single-supporting-fact") and split ("train" or "test").
Stories = dict[str, dict[str, list[Question]]]


def read_stories(path: Path) -> Stories:
    """Every task in a directory, its folders included, or in a .tar.gz, ordered by number.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: it holds no pair of files named `qaN_NAME_train.txt` and `qaN_NAME_test.txt`.
    """
    found: dict[tuple[int, str], dict[str, list[Question]]] = {}
    for name, text in _files(path):
        if match := FILE.search(name):
            number, title, split = match.groups()
            found.setdefault((int(number), title), {})[split] = parse(text)
    stories = {f"qa{number} {title}": splits for (number, title), splits in sorted(found.items()) if len(splits) == 2}
    if not stories:
        raise ValueError(f"stories takes a folder or .tar.gz with qaN_NAME_train.txt and qaN_NAME_test.txt, got {path}")
    return stories


def _files(path: Path) -> Iterator[tuple[str, str]]:
    if path.is_dir():
        for file in sorted(path.rglob("*.txt")):
            yield str(file), file.read_text()
        return
    try:
        with tarfile.open(path) as archive:
            for member in archive.getmembers():
                if (content := archive.extractfile(member)) is not None:
                    yield member.name, content.read().decode()
    except tarfile.ReadError as error:
        raise ValueError(f"stories takes a folder or .tar.gz, got {path}: {error}") from error


def parse(text: str) -> list[Question]:
    """The questions of a file, in order."""
    questions: list[Question] = []
    story: list[list[str]] = []
    for line in filter(None, text.splitlines()):
        number, rest = line.split(" ", 1)
        if number == "1":
            story = []
        sentence, *answer = rest.split("\t")
        if answer:
            questions.append(Question(list(story), _words(sentence), answer[0].strip().lower()))
        else:
            story.append(_words(sentence))
    return questions


def _words(sentence: str) -> list[str]:
    return re.findall(r"[\w'-]+", sentence.lower())


# -- our own -------------------------------------------------------------------------------------------------------

PEOPLE = ("mary", "john", "sandra", "daniel")
PLACES = ("kitchen", "garden", "office", "bathroom", "hallway", "bedroom")
THINGS = ("football", "apple", "milk")
KINDS = ("mice", "sheep", "wolves", "cats")
SINGULAR = {"mice": "mouse", "sheep": "sheep", "wolves": "wolf", "cats": "cat"}
ANIMALS = ("gertrude", "winona", "jessica", "emily")


def _moves(random: Random, count: int) -> tuple[list[str], dict[str, str]]:
    lines, where = list[str](), dict[str, str]()
    for _ in range(count):
        person = random.choice(PEOPLE)
        where[person] = random.choice([place for place in PLACES if place != where.get(person)])
        lines.append(f"{person} {random.choice(('went', 'moved', 'travelled'))} to the {where[person]}.")
    return lines, where


def _one_fact(random: Random) -> tuple[list[str], str, str]:
    """Where is a person who moved?"""
    lines, where = _moves(random, random.randint(2, 8))
    person = random.choice(sorted(where))
    return lines, f"where is {person}?", where[person]


def _two_facts(random: Random) -> tuple[list[str], str, str]:
    """Where is a thing that someone took and carried about, and perhaps put down?"""
    thing, person = random.choice(THINGS), random.choice(PEOPLE)
    lines, where = _moves(random, random.randint(1, 4))
    if person not in where:
        where[person] = random.choice(PLACES)
        lines.append(f"{person} went to the {where[person]}.")
    lines.append(f"{person} took the {thing}.")
    place, held = where[person], True
    for _ in range(random.randint(1, 5)):
        if held and random.random() < 0.25:
            lines.append(f"{person} dropped the {thing}.")
            held = False
            continue
        mover = random.choice((person, random.choice(PEOPLE)))
        new = random.choice([other for other in PLACES if other != where.get(mover)])
        where[mover] = new
        lines.append(f"{mover} went to the {new}.")
        if mover == person and held:
            place = new
    return lines, f"where is the {thing}?", place


def _yes_no(random: Random) -> tuple[list[str], str, str]:
    """Is a person in a place?"""
    lines, where = _moves(random, random.randint(2, 8))
    person = random.choice(sorted(where))
    place = where[person] if random.random() < 0.5 else random.choice(PLACES)
    return lines, f"is {person} in the {place}?", "yes" if place == where[person] else "no"


def _counting(random: Random) -> tuple[list[str], str, str]:
    """How many things does a person carry?"""
    person, lines, held = random.choice(PEOPLE), list[str](), set[str]()
    for _ in range(random.randint(2, 6)):
        thing = random.choice(THINGS)
        lines.append(f"{person} {'dropped' if thing in held else 'took'} the {thing}.")
        held ^= {thing}
        lines += _moves(random, random.randint(0, 1))[0]
    return lines, f"how many objects is {person} carrying?", ("none", "one", "two", "three")[len(held)]


def _deduction(random: Random) -> tuple[list[str], str, str]:
    """What is an animal afraid of, as all of its kind are?"""
    order = random.sample(KINDS, len(KINDS))
    fears = dict(zip(order, [*order[1:], order[0]], strict=True))
    kinds = {animal: random.choice(KINDS) for animal in ANIMALS}
    lines = [f"{kind} are afraid of {fears[kind]}." for kind in KINDS]
    lines += [f"{animal} is a {SINGULAR[kind]}." for animal, kind in kinds.items()]
    random.shuffle(lines)
    animal = random.choice(ANIMALS)
    return lines, f"what is {animal} afraid of?", SINGULAR[fears[kinds[animal]]]


#: The tasks that can be made here, under the file names of the originals that they are like.
GENERATED = {
    "qa1_single-supporting-fact": _one_fact,
    "qa2_two-supporting-facts": _two_facts,
    "qa6_yes-no-questions": _yes_no,
    "qa7_counting": _counting,
    "qa15_basic-deduction": _deduction,
}


def made_up(name: str, questions: int, seed: int) -> str:
    """A file's text in the official format: stories of one question each, of a task in `GENERATED`."""
    random, lines = Random(f"{name} {seed}"), list[str]()
    for _ in range(questions):
        story, question, answer = GENERATED[name](random)
        lines += [f"{number} {sentence}" for number, sentence in enumerate(story, start=1)]
        lines.append(f"{len(story) + 1} {question}\t{answer}\t")
    return "\n".join(lines) + "\n"


def make_stories(questions: int) -> Stories:
    """Every task in `GENERATED`, with `questions` to train on and 1000 to test with."""
    return {
        name.replace("_", " "): {"train": parse(made_up(name, questions, 0)), "test": parse(made_up(name, 1000, 1))}
        for name in GENERATED
    }
