"""Program evaluation, bAbI and language modelling: the data against what a reader would find."""

from __future__ import annotations

import contextlib
import io
import sysconfig
import tarfile
from collections import defaultdict
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import nn

from rmc_kernels.tasks.babi import Babi
from rmc_kernels.tasks.heads import Adaptive, Tied
from rmc_kernels.tasks.language import LanguageModelling
from rmc_kernels.tasks.models import IGNORE, Words
from rmc_kernels.tasks.program_eval import VOCABULARY, ProgramEvaluation, encode
from rmc_kernels.tasks.programs import KINDS, Problem
from rmc_kernels.tasks.stories import GENERATED, Question, made_up, parse, read_stories
from rmc_kernels.tasks.texts import join, python_library, split, streams, vocabulary

# -- program evaluation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["addition", "control", "program"])
def test_a_program_prints_its_answer(kind: str) -> None:
    for seed in range(200):
        problem = KINDS[kind](3, 1 + seed % 4, Random(seed))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(problem.source, {})
        assert printed.getvalue().strip() == problem.answer, problem.source


def test_programs_use_every_kind_of_statement() -> None:
    sources = "\n".join(KINDS["program"](2, 3, Random(seed)).source for seed in range(100))
    assert all(part in sources for part in ("for x in range(", " if ", "+=", "-=", "*", "=", "-"))
    assert {*sources} <= {*VOCABULARY}


def test_the_level_of_programs_is_what_knowing_their_answers_only_gives() -> None:
    """Of copied digits a tenth can be guessed, and the full stop behind the fifth is known; reversed no less."""
    copied = ProgramEvaluation("copy", length=5).levels["program unread"]
    assert (5 * 0.1 + 1) / 6 < copied < (5 * 0.13 + 1) / 6  # the most frequent of ten digits among 500
    both = ProgramEvaluation("all", digits=2, length=5)
    assert list(both.part_levels) == both.kinds
    assert both.part_levels["copy"] == pytest.approx(copied, abs=0.01)
    assert min(both.part_levels.values()) < both.levels["program unread"] < max(both.part_levels.values())
    assert ProgramEvaluation("copy").part_levels == {}


@pytest.mark.parametrize(("kind", "answer"), [("copy", "{0}"), ("reverse", "{1}"), ("double", "{0}{0}")])
def test_memorisation(kind: str, answer: str) -> None:
    problem = KINDS[kind](7, 1, Random(3))
    digits = problem.source[1:]
    assert len(digits) == 7
    assert problem.answer == answer.format(digits, digits[::-1])


def test_only_the_characters_of_the_answer_are_asked() -> None:
    batch = encode([Problem("print(1+2)", "3"), Problem("c12345678", "12345678")])
    for row, (text, answer) in enumerate([("print(1+2)@3", "3."), ("c12345678@12345678", "12345678.")]):
        read = "".join(VOCABULARY[token] for token in batch.inputs[row].tolist())
        assert read[: len(text)] == text
        asked = (batch.targets[row] != IGNORE).nonzero()[:, 0].tolist()
        assert asked == list(range(len(text) - len(answer), len(text)))
        assert "".join(VOCABULARY[token] for token in batch.targets[row, asked].tolist()) == answer


def test_mix_draws_every_size_up_to_the_full_one_and_held_out_problems_are_of_full_size() -> None:
    task = ProgramEvaluation("copy", length=4)
    lengths = (task.source(400, 0).next().targets != IGNORE).sum(1) - 1
    assert set(lengths.tolist()) == {1, 2, 3, 4}
    (batch,) = task.held_out(400, 50)["copy"]
    assert set(((batch.targets != IGNORE).sum(1) - 1).tolist()) == {4}


# -- bAbI -----------------------------------------------------------------------------------------------------------

FILE = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel's friend took the milk, the apple.
5 What is John carrying?\tmilk,apple\t4
1 Sandra slept.
2 Is Sandra asleep?\tyes\t1
"""


def test_the_official_format_is_read() -> None:
    first, second, third = parse(FILE)
    told = [["mary", "moved", "to", "the", "bathroom"], ["john", "went", "to", "the", "hallway"]]
    assert first == Question(told, ["where", "is", "mary"], "bathroom")
    assert second == Question([*told, ["daniel's", "friend", "took", "the", "milk", "the", "apple"]],
                              ["what", "is", "john", "carrying"], "milk,apple")  # fmt: skip
    assert third == Question([["sandra", "slept"]], ["is", "sandra", "asleep"], "yes")


def test_a_folder_and_an_archive_of_it_are_read_alike(tmp_path: Path) -> None:
    deep = tmp_path / "en"
    deep.mkdir()
    for name in ("qa10_b", "qa2_a-c"):
        for part in ("train", "test"):
            (deep / f"{name}_{part}.txt").write_text(FILE)
    (deep / "readme.txt").write_text("no stories")
    with tarfile.open(tmp_path / "stories.tar.gz", "w:gz") as archive:
        archive.add(deep, "en")
    stories = read_stories(tmp_path)
    assert list(stories) == ["qa2 a-c", "qa10 b"]
    assert len(stories["qa10 b"]["test"]) == 3
    assert read_stories(tmp_path / "stories.tar.gz") == stories
    with pytest.raises(ValueError, match=r"must be a folder or \.tar\.gz"):
        read_stories(deep / "readme.txt")
    (deep / "qa2_a-c_test.txt").unlink()
    with pytest.raises(ValueError, match=rf"{tmp_path} must hold qa2_a-c_test.txt beside the other file"):
        read_stories(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="qaN_NAME_train"):
        read_stories(tmp_path / "empty")


def archive(path: Path, **members: bytes | dict[str, Any]) -> Path:
    """A .tar.gz with one task, whose members are replaced by, or get, what is given: content or fields of TarInfo."""
    files: dict[str, bytes | dict[str, Any]] = {"train": FILE.encode(), "test": FILE.encode(), **members}
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as packed:
        for name, content in files.items():
            member = tarfile.TarInfo(f"en/qa1_one_{name}.txt" if name in ("train", "test") else name)
            if isinstance(content, bytes):
                member.size = len(content)
                packed.addfile(member, io.BytesIO(content))
            else:
                for field, value in content.items():
                    setattr(member, field, value)
                packed.addfile(member)
    return path


LINK = {"type": tarfile.SYMTYPE}


@pytest.mark.parametrize(
    ("member", "said"),
    [
        ({**LINK, "linkname": "nowhere"}, r"must be a file, got a link to 'nowhere', which leads to no file"),
        ({**LINK, "linkname": "qa1_one_test.txt"}, r"got a link to 'qa1_one_test.txt', which leads to no file"),
        ({**LINK, "linkname": "../other"}, r"got a link to '../other', which leads to no file"),
        ({**LINK, "linkname": "/etc/hostname"}, r"got a link to '/etc/hostname', which leads to no file"),
        ({"type": tarfile.LNKTYPE, "linkname": "en/qa1_one_test.txt"}, r"which leads to no file"),
        ({"type": tarfile.CHRTYPE}, r"must be a file, got a folder, a device"),
        ({"type": tarfile.FIFOTYPE}, r"must be a file, got a folder, a device"),
        ({"type": tarfile.DIRTYPE}, r"must be a file, got a folder, a device"),
        (b"", r"must have a question"),
        (b"1 Mary slept.\n", r"must have a question"),
        (b"1 Mary slept.\n2Where?\tbed\t1\n", r", line 2 must be a number, a blank and a text, got '2Where\?"),
        (b"1 Mary slept.\n\n2\n", r", line 3 must be a number, a blank and a text, got '2'"),
        (b"one Mary slept.\n", r", line 1 must be a number, a blank and a text, got 'one Mary slept.'"),
        (b"1 Mary slept.\r\n-2 Where?\tbed\t1\r\n", r", line 2 must be a number"),
        (b"1 Mary slept.\n3 Where?\tbed\t1\n", r", line 2 must have the number 2, or 1 for a new story, got 3"),
        (b"2 Mary slept.\n", r", line 1 must have the number 1, or 1 for a new story, got 2"),
        (b"1 Mary slept.\n2 Where?\t\t1\n", r", line 2 must have an answer behind the tab"),
        (b"1 Mary slept.\n2 Where?\tb\xe9d\t1\n", r", line 2: text must be UTF-8, got a byte 0xe9"),
    ],
)
def test_a_malformed_file_of_an_archive_is_named(member: bytes | dict[str, Any], said: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "stories.tar.gz", test=member, other={**LINK, "linkname": "nowhere"})
    with pytest.raises(ValueError, match=rf"en/qa1_one_test.txt in {path}.*{said}"):
        read_stories(path)
    if isinstance(member, bytes):
        (tmp_path / "qa1_one_test.txt").write_bytes(member)
        with pytest.raises(ValueError, match=rf"{tmp_path}/qa1_one_test.txt.*{said}"):
            read_stories(tmp_path)


def test_a_loop_of_links_is_refused_and_a_link_to_a_file_is_read(tmp_path: Path) -> None:
    one, other = ({**LINK, "linkname": f"qa1_one_{name}.txt"} for name in ("test", "train"))
    with pytest.raises(ValueError, match=r"en/qa1_one_train.txt in .* must be a file, got a link"):
        read_stories(archive(tmp_path / "loop.tar.gz", train=one, test=other))
    read = read_stories(archive(tmp_path / "link.tar.gz", test=other))
    assert read["qa1 one"]["test"] == read["qa1 one"]["train"] == parse(FILE)


@pytest.mark.parametrize("kind", ["missing", "self", "folder"])
def test_what_is_no_file_in_a_folder_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "qa1_one_test.txt"
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if kind == "self" else tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"{path} must be a file, got a folder, a device, or a link"):
        read_stories(tmp_path)


def test_an_archive_of_several_languages_is_not_mixed(tmp_path: Path) -> None:
    path = archive(tmp_path / "stories.tar.gz", **{"hn/qa1_one_test.txt": FILE.replace("yes", "no").encode()})
    with pytest.raises(ValueError, match=r"must hold qa1_one_test.txt once, got hn/qa1_one_test.txt in .* too"):
        read_stories(path)
    with pytest.raises(ValueError, match=r"\.\./qa2_x_test.txt in .* must lie in a folder of the archive"):
        read_stories(archive(path, **{"../qa2_x_test.txt": FILE.encode()}))
    with pytest.raises(ValueError, match=r"/qa2_x_test.txt in .* must lie in a folder of the archive"):
        read_stories(archive(path, **{"/qa2_x_test.txt": FILE.encode()}))


@pytest.mark.parametrize("name", ["stories.tar.gz", "stories.tar"])
def test_a_damaged_archive_is_refused(name: str, tmp_path: Path) -> None:
    """Cut off anywhere, or with a bit flipped where it changes what is read."""
    path = archive(tmp_path / name)
    content, whole, refused = path.read_bytes(), read_stories(path), 0
    packed = name.endswith("gz")
    end = len(content) if packed else 4 * tarfile.BLOCKSIZE  # a tar has zeros behind its four blocks
    for length in range(0, end, 1 if packed else 128):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"stories must be a folder or \.tar\.gz, .*got {path}"):
            read_stories(path)
    places = range(0, end, 1 if packed else 5)
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            same = read_stories(path) == whole
        except ValueError:
            refused += 1
        else:
            assert same or not packed  # a tar has checksums of its headers only
    assert refused > (0.9 if packed else 0.1) * len(places)


def told_places(question: Question) -> dict[str, str]:
    """Where everyone and everything is at the end of a story, as a reader who writes it down finds."""
    where: dict[str, str] = {}
    holder: dict[str, str] = {}
    for sentence in question.story:
        who, verb, what = sentence[0], sentence[1], sentence[-1]
        if verb in ("went", "moved", "travelled"):
            where[who] = what
        elif verb == "took":
            holder[what] = who
        else:
            del holder[what]
        where |= {thing: where[person] for thing, person in holder.items() if person in where}
    return where


def told_fear(question: Question) -> str:
    kinds = {"mice": "mouse", "sheep": "sheep", "wolves": "wolf", "cats": "cat"}
    fears = {kinds[s[0]]: kinds[s[-1]] for s in question.story if "afraid" in s}
    kind = {s[0]: s[-1] for s in question.story if "is" in s}
    return fears[kind[question.question[2]]]


def told_count(question: Question) -> str:
    held: set[str] = set()
    for sentence in question.story:
        if sentence[1] in ("took", "dropped"):
            held ^= {sentence[-1]}
    return ("none", "one", "two", "three")[len(held)]


@pytest.mark.parametrize("name", GENERATED)
def test_made_up_stories_tell_their_answers(name: str) -> None:
    questions = parse(made_up(name, 300, seed=5))
    assert len(questions) == 300
    answers: defaultdict[str, int] = defaultdict(int)
    for question in questions:
        told = {
            "qa1_single-supporting-fact": lambda q: told_places(q)[q.question[-1]],
            "qa2_two-supporting-facts": lambda q: told_places(q)[q.question[-1]],
            "qa6_yes-no-questions": lambda q: "yes" if told_places(q)[q.question[1]] == q.question[-1] else "no",
            "qa7_counting": told_count,
            "qa15_basic-deduction": told_fear,
        }[name](question)
        assert question.answer == told, question
        answers[question.answer] += 1
    assert max(answers.values()) < 200, "no answer is right most of the time"


def test_training_and_test_stories_are_others() -> None:
    assert made_up("qa1_single-supporting-fact", 20, 0) != made_up("qa1_single-supporting-fact", 20, 1)


def test_stories_become_padded_tokens_and_the_answer_is_asked_behind_the_question() -> None:
    task = Babi(questions=30)
    questions = task.read["qa1 single-supporting-fact"]["train"][:8]
    batch = task.encode(questions)
    for row, question in enumerate(questions):
        captions = task.captions(batch, row)
        end = len(question.story)
        assert captions[: end + 1] == [" ".join(words) for words in (*question.story, question.question)]
        assert not any(captions[end + 1 :])
        assert batch.targets[row].tolist() == [
            task.vocabulary.index(question.answer) if step == end else IGNORE for step in range(len(captions))
        ]
    assert task.encode([Question([["xyzzy"]], ["plugh"], "unheard-of")]).inputs.tolist() == [[[0], [0]]]


def test_an_epoch_asks_every_question_once() -> None:
    task = Babi(questions=13)
    source = task.source(batch_size=10, seed=3)
    count = sum(len(splits["train"]) for splits in task.read.values())
    drawn = [source.next() for _ in range(count // 10)]
    assert sum(batch.asked for batch in drawn) == count
    assert sorted(number for batch in source.batches for number in batch) == list(range(count))
    first = source.batches
    source.next()
    assert source.epoch == 1
    assert source.batches != first


def test_the_order_of_words_counts_and_padding_does_not() -> None:
    words = Words(nn.Embedding(9, 6))
    one, other, padded = (words(torch.tensor([[row]])) for row in ([3, 4, 5], [5, 4, 3], [3, 4, 5, 0, 0]))
    assert not torch.allclose(one, other)
    torch.testing.assert_close(padded, one)
    assert not words(torch.zeros(1, 1, 4, dtype=torch.int64)).any()


# -- language modelling ---------------------------------------------------------------------------------------------


def test_text_is_split_and_joined() -> None:
    assert split(" = A title = \n\n b @-@ c", "word") == [
        "=", "A", "title", "=", "<eos>", "<eos>", "b", "@-@", "c", "<eos>",
    ]  # fmt: skip
    code = "def f(x):\n    return x+12\n"
    assert split(code, "code") == ["def", "f", "(", "x", ")", ":", "<eos>    ", "return", "x", "+", "12", "<eos>"]
    assert join(split(code, "character"), "character") == code
    assert join(split(code, "code"), "code") == "def f ( x ) :\n    return x + 12\n"


def test_the_vocabulary_has_the_most_frequent_tokens() -> None:
    assert vocabulary(list("abbccc") + ["<unk>"] * 9, most=3) == ("<unk>", "c", "b")


def test_streams_ask_for_every_next_token_and_go_on_from_batch_to_batch() -> None:
    batches = streams(torch.arange(23), batch_size=2, steps=4)
    assert [tuple(batch.inputs.shape) for batch in batches] == [(2, 4), (2, 4), (2, 3)]
    whole = torch.cat([batch.inputs for batch in batches], dim=1)
    assert whole.tolist() == [list(range(11)), list(range(11, 22))]
    assert all(torch.equal(batch.targets, batch.inputs + 1) for batch in batches)
    with pytest.raises(ValueError, match="must be less than the tokens of the text, 3, got 3"):
        streams(torch.arange(3), batch_size=3, steps=4)


def test_the_python_library_is_text_for_everyone() -> None:
    task = LanguageModelling(level="character", characters=5000)
    train, test = python_library(test=False), python_library(test=True)
    assert "def " in train
    assert "def " in test
    files = [path.read_text(errors="replace") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    assert sum(file in train for file in files) > 5 * sum(file in test for file in files) > 0
    assert len(task.texts[0]) == 5000
    assert [task.vocabulary[token] for token in task.encode(list("def "))] == list("def ")


def test_without_a_test_text_the_last_tenth_is_kept(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a" * 90 + "b" * 10)
    assert LanguageModelling(str(text), level="character").texts == (["a"] * 90, ["b"] * 10)


def test_a_text_that_is_none_is_named(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(b"one\r\ntwo\r\n" * 20)
    task = LanguageModelling(str(text), level="character", test=str(tmp_path / "test.txt"))
    with pytest.raises(FileNotFoundError, match=r"test\.txt"):
        _ = task.texts
    (tmp_path / "test.txt").write_bytes(b"one\ntwo\nthr\xffe\n")
    with pytest.raises(ValueError, match=r"test\.txt, line 3: text must be UTF-8, got a byte 0xff"):
        _ = task.texts
    (tmp_path / "test.txt").write_bytes("\ufeffone\rtwo".encode())
    assert task.texts == (list("one\ntwo\n" * 20), list("one\ntwo"))


def test_tied_embeddings_are_one_parameter() -> None:
    embedding = nn.Embedding(20, 6)
    head = Tied(8, embedding)
    assert head.layers[1].weight is embedding.weight
    features, targets = torch.rand(5, 8), torch.tensor([0, 3, 19, 3, 1])
    picked = -head.log_probabilities(features)[torch.arange(5), targets]
    torch.testing.assert_close(head.losses(features, targets), picked)


def test_adaptive_softmax_agrees_with_itself() -> None:
    head = Adaptive(8, 40, 12)
    features, targets = torch.rand(6, 8), torch.tensor([0, 4, 5, 14, 15, 39])
    log_probabilities = head.log_probabilities(features)
    torch.testing.assert_close(log_probabilities.exp().sum(1), torch.ones(6))
    torch.testing.assert_close(head.losses(features, targets), -log_probabilities[torch.arange(6), targets])
    assert torch.equal(head.best(features), log_probabilities.argmax(1))
    with pytest.raises(ValueError, match="below 16 classes"):
        Adaptive(8, 15, 12)
