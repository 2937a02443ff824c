"""The embedded commonsense set: true items, no leak between splits, nothing to be read off the choices."""

import hashlib
import json
import math
import re
from collections import Counter
from itertools import combinations, pairwise

import pytest

from lsr_scale.data import commonsense
from lsr_scale.data.commonsense import Fact, Row, Split
from lsr_scale.errors import UserError

SPLITS: tuple[Split, ...] = ("train", "heldout")
RELATIONS = list(commonsense.tables())
CHAINED = [relation for relation in RELATIONS if commonsense.tables()[relation].chains]
SMALL_WORDS = (
    "a an the of in to on is has with your their from at for by his her it that and who was what have not when into "
    "after than while any no them up you"
)
LEVELLED = [relation for relation in RELATIONS if commonsense.tables()[relation].levels]


def right(row: Row) -> str:
    return row["choices"][row["answer"]]


def of(relation: str, split: Split) -> list[Row]:
    return [row for row in commonsense.rows(split) if row["relation"] == relation]


def entities(fact: Fact) -> set[str]:
    return {fact.subject, fact.other} - {""}


def words(text: str) -> set[str]:
    return set(re.findall("[a-z]{2,}", text.lower())) - set(SMALL_WORDS.split())


def chance(rows: list[Row]) -> float:
    return sum(1 / len(row["choices"]) for row in rows) / len(rows)


def test_the_set_has_the_size_and_variety_that_the_documentation_names() -> None:
    train, heldout = commonsense.rows("train"), commonsense.rows("heldout")
    assert (len(train), len(heldout)) == (497, 195)
    assert len(RELATIONS) == 21
    assert min(Counter(row["relation"] for row in train).values()) >= 20
    assert min(Counter(row["relation"] for row in heldout).values()) >= 8
    ids = [row["id"] for row in train + heldout]
    assert len(set(ids)) == len(ids)
    questions = [row["question"] for row in train + heldout]
    assert len(set(questions)) == len(questions)


def test_every_machine_makes_the_same_rows() -> None:
    text = json.dumps([commonsense.rows(split) for split in SPLITS])
    digest = "887a1c49d0d4286e14dcfdec5a66e3dcf7af2da71bca394e641e64d86e925daf"
    assert hashlib.sha256(text.encode()).hexdigest() == digest


@pytest.mark.parametrize("relation", RELATIONS)
def test_no_subject_of_a_relation_is_in_both_splits(relation: str) -> None:
    train, heldout = (set().union(*map(entities, commonsense.facts(relation, split))) for split in SPLITS)
    assert train
    assert heldout
    assert not train & heldout


@pytest.mark.parametrize("relation", CHAINED)
def test_an_order_goes_to_one_split_whole(relation: str) -> None:
    train, heldout = (set().union(*map(entities, commonsense.facts(relation, split))) for split in SPLITS)
    for chain in commonsense.tables()[relation].chains:
        assert not (train & set(chain) and heldout & set(chain))


@pytest.mark.parametrize("relation", RELATIONS)
def test_no_two_subjects_with_the_same_answer_share_a_word_that_would_carry_it_over(relation: str) -> None:
    table = commonsense.tables()[relation]
    alike = list(table.facts.values()) or [[entity for level in table.levels for entity in level]]
    if table.chains:
        alike = [[" ".join(chain) for chain in table.chains]]
    assert [(a, b) for group in alike for a, b in combinations(group, 2) if words(a) & words(b)] == []


@pytest.mark.parametrize("relation", RELATIONS)
def test_no_subject_names_its_own_answer(relation: str) -> None:
    for answer, subjects in commonsense.tables()[relation].facts.items():
        assert [subject for subject in subjects if words(answer) & words(subject)] == []


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_tables_contradict_themselves_nowhere(relation: str) -> None:
    table = commonsense.tables()[relation]
    assert 2 <= len(table.questions) <= 4
    assert all("{s}" in question for question in table.questions)
    subjects = [subject for under in table.facts.values() for subject in under]
    subjects += [entity for group in table.levels + table.chains for entity in group]
    assert [subject for subject, count in Counter(subjects).items() if count > 1] == []
    assert {answer for group in table.overlaps for answer in group} <= set(table.answers)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("relation", RELATIONS)
def test_the_right_choice_is_true_and_no_other_is(relation: str, split: Split) -> None:
    table = commonsense.tables()[relation]
    answer_of = {subject: answer for answer, subjects in table.facts.items() for subject in subjects}
    height = {entity: i for i, level in enumerate(table.levels) for entity in level}
    for chain in table.chains:
        height |= {entry: i for i, entry in enumerate(chain)}
    for row, fact in zip(of(relation, split), commonsense.facts(relation, split), strict=True):
        assert fact.subject in row["question"]
        assert len(set(row["choices"])) == len(row["choices"]) == table.num_choices
        if table.facts:
            assert right(row) == answer_of[fact.subject]
        else:
            assert fact.other in row["question"]
            assert right(row) == table.answers[height[fact.subject] < height[fact.other]]
        assert not commonsense.true_answers(relation, fact) & (set(row["choices"]) - {right(row)})


@pytest.mark.parametrize("relation", LEVELLED)
def test_compared_things_stand_on_different_levels(relation: str) -> None:
    table = commonsense.tables()[relation]
    height = {entity: i for i, level in enumerate(table.levels) for entity in level}
    for split in SPLITS:
        assert all(height[fact.subject] != height[fact.other] for fact in commonsense.facts(relation, split))


@pytest.mark.parametrize(
    ("relation", "subject", "never"),
    [
        ("baby_animal", "fox", "a cub"),
        ("baby_animal", "wallaby", "a cub"),
        ("baby_animal", "goose", "a chick"),
        ("made_of", "a newspaper", "wood"),
        ("made_of", "a brick", "stone"),
        ("color", "a fire truck", "orange"),
        ("color", "tar", "gray"),
        ("diet", "a seal", "meat"),
        ("feeling", "is lost in a dark forest", "sad"),
        ("what_happens", "to straw that catches fire", "it melts"),
    ],
)
def test_a_second_answer_that_could_be_defended_is_not_offered(relation: str, subject: str, never: str) -> None:
    fact = next(fact for split in SPLITS for fact in commonsense.facts(relation, split) if fact.subject == subject)
    assert never in commonsense.tables()[relation].answers
    assert never in commonsense.true_answers(relation, fact)


@pytest.mark.parametrize(
    ("relation", "words", "answer"),
    [
        ("color", "carrot", "orange"),
        ("legs", "tarantula", "eight"),
        ("taste", "maple syrup", "sweet"),
        ("baby_animal", "kangaroo", "a joey"),
        ("sense", "thunder", "hearing"),
        ("float_or_sink", "cannonball", "sink"),
        ("danger", "drink bleach", "dangerous"),
        ("made_of", "butter", "milk"),
        ("worn_on", "necktie", "around the neck"),
        ("what_happens", "to an icicle in the sun", "it melts"),
        ("manners", "cut in line", "rude"),
        ("covering", "parrot", "feathers"),
    ],
)
def test_well_known_items_have_the_answer_that_everybody_gives(relation: str, words: str, answer: str) -> None:
    found = [row for split in SPLITS for row in of(relation, split) if words in row["question"]]
    assert [right(row) for row in found] == [answer]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("relation", RELATIONS)
def test_every_answer_is_right_in_its_share_of_the_items_that_offer_it(relation: str, split: Split) -> None:
    items = of(relation, split)
    num_choices = commonsense.tables()[relation].num_choices
    as_right = Counter(right(row) for row in items)
    offered = Counter(choice for row in items for choice in row["choices"])
    assert offered == {answer: num_choices * count for answer, count in as_right.items()}


@pytest.mark.parametrize("split", SPLITS)
def test_the_places_of_the_right_choice_are_balanced(split: Split) -> None:
    for relation in RELATIONS:
        counts = Counter(row["answer"] for row in of(relation, split))
        per_place = [counts[place] for place in range(commonsense.tables()[relation].num_choices)]
        assert max(per_place) - min(per_place) <= 1


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("pick", [max, min])
def test_the_longest_or_shortest_choice_is_right_no_more_often_than_chance(split: Split, pick) -> None:
    items = commonsense.rows(split)
    correct = 0.0
    for row in items:
        extreme = pick(map(len, row["choices"]))
        of_that_length = [choice for choice in row["choices"] if len(choice) == extreme]
        correct += (right(row) in of_that_length) / len(of_that_length)
    standard_error = math.sqrt(chance(items) * (1 - chance(items)) / len(items))
    assert abs(correct / len(items) - chance(items)) < 2 * standard_error


def test_what_beats_what_in_training_does_not_tell_the_heldout_answers() -> None:
    wins: Counter[tuple[str, str, str]] = Counter()
    for row in commonsense.rows("train"):
        wins.update((row["relation"], right(row), other) for other in row["choices"] if other != right(row))

    def strength(row: Row, choice: str) -> float:
        won_lost = [
            (wins[row["relation"], choice, other] + 0.5, wins[row["relation"], other, choice] + 0.5)
            for other in row["choices"]
            if other != choice
        ]
        return sum(math.log(won / (won + lost)) for won, lost in won_lost)

    items, correct = commonsense.rows("heldout"), 0.0
    for row in items:
        strengths = {choice: strength(row, choice) for choice in row["choices"]}
        best = [choice for choice, value in strengths.items() if value == max(strengths.values())]
        correct += (right(row) in best) / len(best)
    standard_error = math.sqrt(chance(items) * (1 - chance(items)) / len(items))
    assert correct / len(items) < chance(items) + 2 * standard_error


@pytest.mark.parametrize("relation", [r for r in RELATIONS if len(commonsense.tables()[r].answers) == 2])
def test_neither_wording_nor_first_place_gives_a_two_way_answer_away(relation: str) -> None:
    table = commonsense.tables()[relation]
    items = of(relation, "train")
    for start in {question.split("{")[0] for question in table.questions}:
        asked = [row for row in items if row["question"].startswith(start)]
        counts = Counter(right(row) for row in asked)
        assert len(counts) == 2
        assert max(counts.values()) - min(counts.values()) <= 1 + len(asked) % 2


@pytest.mark.parametrize("split", SPLITS)
def test_the_first_rows_are_a_balanced_sample_of_the_relations(split: Split) -> None:
    for num_rows in (21, 42, 100):
        counts = Counter(row["relation"] for row in commonsense.rows(split)[:num_rows])
        assert len(counts) == len(RELATIONS)
        assert max(counts.values()) - min(counts.values()) <= 1
    turns = [row["id"].rsplit("-", 1)[1] for row in commonsense.rows(split)]
    assert all(int(before) <= int(after) for before, after in pairwise(turns))


def test_shuffled_rows_mark_another_choice_everywhere_and_leave_the_rest() -> None:
    rows = commonsense.rows("train")
    control = commonsense.shuffled(rows, seed=3)
    assert rows == commonsense.rows("train")
    assert all(a["answer"] != b["answer"] for a, b in zip(rows, control, strict=True))
    assert [{**row, "answer": 0} for row in rows] == [{**row, "answer": 0} for row in control]
    assert all(0 <= row["answer"] < len(row["choices"]) for row in control)
    assert control == commonsense.shuffled(rows, seed=3)
    assert control != commonsense.shuffled(rows, seed=4)


def test_an_unknown_split_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="did you mean 'heldout'"):
        commonsense.rows("held-out")  # pyright: ignore[reportArgumentType]
