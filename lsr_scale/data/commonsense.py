"""The embedded multiple-choice set `builtin:commonsense`, made from the hand-written facts of `commonsense.yaml`.

A fact is a subject and its answer in one relation ("the color of a carrot is orange"), or a pair of entities and
their order ("a bus is heavier than a brick"). Each fact becomes one row. Nothing is drawn at random at run time:
where the facts are split, ordered or mixed, SHA-256 of their text decides, or a generator seeded with it; every
machine gets the same rows.

**The splits share no fact.** Within a relation no subject is in both splits. In a comparison no entity is in both,
so that neither a pair nor what is known of one of its members comes over; an order (breakfast, lunch, dinner) goes
to one split whole. Nor do two subjects with the same answer share a word (a belt, a tool belt) that would carry it
over. Answers ("orange", "heavier") and the ways to ask are the same in both: that is what can be learned. One word
may be the subject of different relations in different splits (the color of a thing here, its material there).

**The choices alone tell nothing.** The wrong choices of a split are its own right answers, permuted between rows:
within a relation and split every answer is a wrong choice exactly `num_choices - 1` times as often as it is the
right one. With that the lengths of right and wrong choices are equally distributed too. The place of the right
choice and the wording of the question are dealt out evenly.

**What was selected.** Relations as a whole, never single items: six first ones (kind of, part of, used for, found
where, who does what, opposites) went because SmolLM2-135M-Instruct had 85 % or more of their items of both splits
right before any training. Five went to make room after a trial run: four in which it had gained little or nothing
(living or not, bigger or smaller than a shoebox, solid or liquid or gas, class of animal) and one with few items
(summer or winter). The held-out accuracy over all 26 relations of that trial had risen from 56 to 82 %, so the
choice among them does not make the effect. Ambiguous facts were replaced by reading them, not by scoring them.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, TypedDict

from lsr_scale.data.embedded import check_split, read_table

Split = Literal["train", "heldout"]
HELDOUT_SHARE = 0.27
MAX_CHOICES = 4
MAX_COMPARISONS: dict[Split, int] = {"train": 20, "heldout": 8}


class Row(TypedDict):
    """One multiple-choice item; `answer` is the index of the right choice, `relation` what is asked about."""

    id: str
    question: str
    choices: list[str]
    answer: int
    relation: str


@dataclass(frozen=True)
class Table:
    """What `commonsense.yaml` says of one relation; its head explains the keys."""

    questions: list[str]
    facts: dict[str, list[str]] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    levels: list[list[str]] = field(default_factory=list)
    chains: list[list[str]] = field(default_factory=list)
    overlaps: list[list[str]] = field(default_factory=list)
    num_choices: int = 0

    def __post_init__(self) -> None:
        if self.facts:
            object.__setattr__(self, "answers", list(self.facts))
        if not self.num_choices:
            object.__setattr__(self, "num_choices", min(MAX_CHOICES, len(self.answers)))


@dataclass(frozen=True)
class Fact:
    """A subject and its one right answer; a comparison has the second entity in `other`."""

    subject: str
    answer: str
    other: str = ""


def rows(split: Split) -> list[Row]:
    """Return all rows of a split, one from each relation in turn, so that any first n are a balanced sample.

    Args:
        split: `"train"` or `"heldout"`.

    Raises:
        UserError: There is no such split.
    """
    check_split("builtin:commonsense", split)
    by_relation = [_relation_rows(relation, split) for relation in tables()]
    turns = range(max(len(of_one) for of_one in by_relation))
    return [of_one[turn] for turn in turns for of_one in by_relation if turn < len(of_one)]


def shuffled(training_rows: Sequence[Row], seed: int) -> list[Row]:
    """Return copies of the rows in which another choice, drawn at random, is marked as the right one: a control.

    Every answer is then marked about as often as before, and for the wrong question: what training on these rows
    gains is not knowledge.
    """
    rng = random.Random(seed)
    control = []
    for row in training_rows:
        step = rng.randrange(1, len(row["choices"]))
        answer = (row["answer"] + step) % len(row["choices"])
        control.append(Row({**row, "choices": list(row["choices"]), "answer": answer}))
    return control


@cache
def tables() -> dict[str, Table]:
    """Return the tables of facts, by relation."""
    return {relation: Table(**entry) for relation, entry in read_table("commonsense.yaml").items()}


def facts(relation: str, split: Split) -> list[Fact]:
    """Return the facts of one relation that belong to a split, in an order that follows neither answer nor table."""
    table = tables()[relation]
    if not table.facts:
        return _comparisons(relation, table, split)
    split_of = _split_of(relation, list(table.facts.values()))
    chosen = [
        Fact(subject, answer)
        for answer, subjects in table.facts.items()
        for subject in subjects
        if split_of[subject] == split
    ]
    return sorted(chosen, key=lambda fact: _digest(relation, fact.subject))


def true_answers(relation: str, fact: Fact) -> set[str]:
    """Return the answer of a fact with every other answer of the relation that may not be offered as a wrong one."""
    overlaps = tables()[relation].overlaps
    return {fact.answer}.union(*(group for group in overlaps if fact.answer in group))


def _digest(*parts: str) -> str:
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


def _split_of(relation: str, groups: list[list[str]]) -> dict[str, Split]:
    """Send the same share of every group to the held-out split; groups too small for that share it between them."""
    split_of: dict[str, Split] = {}
    owed = 0.5
    for group in sorted(groups, key=lambda group: _digest(relation, *group)):
        if len(group) >= 3:
            num_heldout = round(HELDOUT_SHARE * len(group))
        else:
            owed += HELDOUT_SHARE * len(group)
            num_heldout = int(owed)
            owed -= num_heldout
        ordered = sorted(group, key=lambda subject: _digest(relation, subject))
        split_of |= {subject: "heldout" if i < num_heldout else "train" for i, subject in enumerate(ordered)}
    return split_of


def _comparisons(relation: str, table: Table, split: Split) -> list[Fact]:
    """Pair the entities of a split, (greater, lesser), and ask for every second pair the other way round."""
    split_of = _split_of(relation, table.levels or [[chain[0] for chain in table.chains]])
    levels = [[entity for entity in level if split_of[entity] == split] for level in table.levels]
    chains = [[[entry] for entry in chain] for chain in table.chains if split_of[chain[0]] == split]
    pairs = [
        (greater, lesser)
        for order in [levels, *chains]
        for i, level in enumerate(order)
        for above in order[i + 1 :]
        for lesser in level
        for greater in above
    ]
    pairs.sort(key=lambda pair: _digest(relation, *pair))
    exceeds, falls_short = table.answers
    return [
        Fact(greater, exceeds, lesser) if i % 2 else Fact(lesser, falls_short, greater)
        for i, (greater, lesser) in enumerate(pairs[: MAX_COMPARISONS[split]])
    ]


def _relation_rows(relation: str, split: Split) -> list[Row]:
    table = tables()[relation]
    chosen = facts(relation, split)
    num_choices = table.num_choices
    rng = random.Random(_digest(relation, split))
    wrong = _wrong_choices(relation, chosen, num_choices - 1, rng)
    places: list[int] = []
    while len(places) < len(chosen):
        places += rng.sample(range(num_choices), num_choices)
    asked: Counter[str] = Counter()
    made: list[Row] = []
    for i, (fact, others, place) in enumerate(zip(chosen, wrong, places[: len(chosen)], strict=True)):
        # The wordings go round among the facts of one answer: were they dealt out in order of the rows, a wording could
        # give the answer away wherever answers alternate.
        turn = asked[fact.answer] + table.answers.index(fact.answer)
        asked[fact.answer] += 1
        question = table.questions[turn % len(table.questions)].format(s=fact.subject, t=fact.other)
        choices = [*others[:place], fact.answer, *others[place:]]
        made.append(
            Row(id=f"{relation}-{split}-{i}", question=question, choices=choices, answer=place, relation=relation)
        )
    return made


def _wrong_choices(relation: str, chosen: list[Fact], num_wrong: int, rng: random.Random) -> list[list[str]]:
    """Give every fact wrong choices out of the other facts' answers, each answer used `num_wrong` times."""
    true = [true_answers(relation, fact) for fact in chosen]
    for _ in range(1000):
        wrong: list[list[str]] = [[] for _ in chosen]
        for _ in range(num_wrong):
            allowed = [
                [j for j, other in enumerate(chosen) if other.answer not in true[i] and other.answer not in wrong[i]]
                for i in range(len(chosen))
            ]
            column = _permutation(allowed, rng)
            if column is None:
                break
            for i, j in enumerate(column):
                wrong[i].append(chosen[j].answer)
        else:
            return wrong
    raise RuntimeError(f"{relation}: the facts allow no balanced wrong choices; add facts or take away overlaps")


def _permutation(allowed: list[list[int]], rng: random.Random) -> list[int] | None:
    """Return a random permutation p with `p[i] in allowed[i]` for all i, by Kuhn's augmenting paths, or None."""
    row_of: dict[int, int] = {}

    def place(i: int, tried: set[int]) -> bool:
        for j in rng.sample(allowed[i], len(allowed[i])):
            if j not in tried:
                tried.add(j)
                if j not in row_of or place(row_of[j], tried):
                    row_of[j] = i
                    return True
        return False

    if not all(place(i, set()) for i in rng.sample(range(len(allowed)), len(allowed))):
        return None
    column_of = {i: j for j, i in row_of.items()}
    return [column_of[i] for i in range(len(allowed))]
