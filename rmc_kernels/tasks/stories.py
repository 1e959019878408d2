"""Question-answering stories in the bAbI format (Weston et al. 2015, arXiv:1502.05698): read them, or make some.

The format: every line is `ID text`, or `ID question<TAB>answer<TAB>supporting IDs`; an ID of 1 begins a new story.
"""

from __future__ import annotations

import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from random import Random
from typing import NamedTuple

from rmc_kernels.tasks.files import text_of

FILE = re.compile(r"qa(\d+)_([\w-]+)_(train|test)\.txt")


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
        OSError: there is nothing at `path`, or it cannot be read.
        ValueError: it is neither, or a damaged archive; it holds no files named `qaN_NAME_train.txt` and
            `qaN_NAME_test.txt`, one without the other, one twice, or one that is no text in the format. The message
            names the file, and the line.
    """
    found: dict[tuple[int, str], dict[str, list[Question]]] = {}
    for name, (number, title, split), content in _files(path):
        splits = found.setdefault((int(number), title), {})
        if split in splits:
            file = f"qa{number}_{title}_{split}.txt"
            raise ValueError(f"{path} must hold {file} once, got {name} too: pass one of its folders, unpacked")
        splits[split] = parse(text_of(name, content), name)
    if not found:
        raise ValueError(
            f"stories must be a folder or .tar.gz with qaN_NAME_train.txt and qaN_NAME_test.txt, got {path}"
        )
    stories = {f"qa{number} {title}": splits for (number, title), splits in sorted(found.items())}
    for task, splits in stories.items():
        for split in {"train", "test"} - set(splits):
            file = f"{task.replace(' ', '_')}_{split}.txt"
            raise ValueError(f"{path} must hold {file} beside the other file of that task, got none")
    return stories


def _files(path: Path) -> Iterator[tuple[str, tuple[str, ...], bytes]]:
    """Name, number, title, split and content of every file whose name the format has."""
    if path.is_dir():
        for file in sorted(path.rglob("*.txt")):
            if match := FILE.fullmatch(file.name):
                if not file.is_file():
                    raise ValueError(f"{file} must be a file, got a folder, a device, or a link that leads to no file")
                yield str(file), match.groups(), file.read_bytes()
        return
    if path.exists() and not path.is_file():
        raise ValueError(f"stories must be a folder or .tar.gz, got {path}, a device")
    with path.open("rb") as packed:
        try:
            with tarfile.open(fileobj=packed) as archive:
                for member in archive:
                    if match := FILE.fullmatch(PurePosixPath(member.name).name):
                        name = f"{member.name} in {path}"
                        yield name, match.groups(), _content(name, archive, member)
                _check_end(path, archive)
        except (EOFError, OSError, lzma.LZMAError, tarfile.TarError, zlib.error) as error:
            raise ValueError(f"stories must be a folder or .tar.gz, got {path}, a damaged one: {error}") from error


def _content(name: str, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """What an archive has under a name, by way of links within the archive."""
    if member.name.startswith("/") or ".." in PurePosixPath(member.name).parts:
        raise ValueError(f"{name} must lie in a folder of the archive, got a path that leads out of it")
    try:
        content = archive.extractfile(member)
    except (KeyError, RecursionError):
        raise ValueError(f"{name} must be a file, got a link to {member.linkname!r}, which leads to no file") from None
    if content is None:
        raise ValueError(f"{name} must be a file, got a folder, a device, or a link to one")
    return content.read()


def _check_end(path: Path, archive: tarfile.TarFile) -> None:
    """Raise ValueError unless zeros follow the last member: tarfile takes what it cannot read there for the end.

    Reading to the end also compares the checksum of a gzip file, if it is one.
    """
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    end = archive.fileobj.read(-1)
    if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
        raise ValueError(f"stories must be a folder or .tar.gz, got {path}, which is damaged or cut off")


def parse(text: str, source: str = "stories") -> list[Question]:
    """The questions of a file, in order; ValueError naming `source` and the line that breaks the format."""
    questions: list[Question] = []
    story: list[list[str]] = []
    before = 0
    for place, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{source}, line {place}"
        number, _, rest = line.partition(" ")
        if not number.isdecimal() or not rest.strip():
            raise ValueError(f"{where} must be a number, a blank and a text, got {line[:60]!r}")
        if number == "1":
            story, before = [], 0
        if number != str(before + 1):
            raise ValueError(f"{where} must have the number {before + 1}, or 1 for a new story, got {number[:60]}")
        before += 1
        sentence, *answer = rest.split("\t")
        if not answer:
            story.append(_words(sentence))
        elif answer[0].strip():
            questions.append(Question(list(story), _words(sentence), answer[0].strip().lower()))
        else:
            raise ValueError(f"{where} must have an answer behind the tab, got {line[:60]!r}")
    if not questions:
        raise ValueError(f"{source} must have a question, which is a line with a tab and an answer, got none")
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
