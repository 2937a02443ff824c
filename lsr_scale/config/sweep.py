"""The `sweep:` section: which values of a run its trials change, and the trials' names. Nothing of a run is read here.

The trials are the product of `list`, `grid` and `random`, of those that are there.
"""

import itertools
import math
import random as randoms
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from lsr_scale.config.messages import Problem, raise_problems
from lsr_scale.config.sections import Section

MAX_TRIALS = 2_000
Changes = dict[str, Any]  # values of a run by dotted keys

_DRAWN_DIGITS = 4  # of a number that is drawn: it is to be read, and written again
_LONGEST_NAME = 80  # of a folder, which has longer ones below it
_NAME = re.compile(r"\w[\w.=,+@-]*")
# what people call them
_SHORT = {
    "training.learning_rate": "lr",
    "training.num_train_epochs": "epochs",
    "training.lr_scheduler_type": "schedule",
}

# what no trial may change, by the beginning of a key: all trials are trained on one base, each on one process
_FIXED = {
    "model": "the trials of a sweep share one base, which is loaded once; for another one, make a sweep of its own",
    "deepspeed": "a trial is trained by one process; set it for the whole sweep, outside of the section sweep",
    "sweep": "a sweep has no sweeps in it; name the values themselves, such as training.learning_rate",
    "training.output_dir": "a trial's folder is trials/NAME in the sweep's; name trials in list, and set the sweep's "
    "folder outside of the section sweep",
}


def _keys(value: Any) -> Any:
    """Refuse what is no dotted key of a run, or one that no trial may change."""
    if not isinstance(value, dict):
        return value
    problems = []
    for key in value:
        if not isinstance(key, str) or not all(key.split(".")):
            problems.append(Problem((key,), "expected a dotted key of the run, such as training.learning_rate"))
            continue
        beginnings = dict.fromkeys(".".join(key.split(".")[:end]) for end in (1, 2))
        problems += [Problem((key,), _FIXED[one]) for one in beginnings if one in _FIXED]
    raise_problems(problems)
    return value


Keyed = BeforeValidator(_keys)


class Drawn(Section):
    """How a value is drawn: one of these."""

    log_uniform: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        None, description="[least, most]: its logarithm is uniform."
    )
    uniform: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        None, description="[least, most]."
    )
    integers: Annotated[list[int], Field(min_length=2, max_length=2)] | None = Field(
        None, description="[least, most], both among them."
    )
    choices: Annotated[list[Any], Field(min_length=1)] | None = Field(None, description="One of these values.")

    @model_validator(mode="after")
    def _check(self) -> "Drawn":
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            names = ", ".join(type(self).model_fields)
            raise ValueError(f"expected one of {names}, got {' and '.join(given) or 'none'}")
        bounds = self.log_uniform or self.uniform or self.integers
        if bounds and bounds[0] >= bounds[1]:
            raise ValueError(f"{given[0]}: expected [least, most], got {bounds}")
        if self.log_uniform and self.log_uniform[0] <= 0:
            raise ValueError(f"log_uniform: expected numbers above 0, got {self.log_uniform}; take uniform")
        return self

    def draw(self, source: randoms.Random) -> Any:
        """Return a value."""
        if self.choices is not None:
            return source.choice(self.choices)
        if self.integers is not None:
            return source.randint(*self.integers)
        if self.log_uniform is not None:
            least, most = map(math.log, self.log_uniform)
            value = math.exp(source.uniform(least, most))
        else:
            value = source.uniform(*(self.uniform or ()))
        return float(f"{value:.{_DRAWN_DIGITS}g}")


def _drawn(value: Any) -> Any:
    return {"choices": value} if isinstance(value, list) else value


class RandomSection(Section):
    """Values that are drawn, the same ones for the same seed."""

    trials: int = Field(ge=1, le=MAX_TRIALS, description="How many are drawn; no two are equal.")
    seed: int = Field(0, ge=0, lt=2**32, description="Of the draws; a run's own is training.seed.")
    values: Annotated[
        dict[str, Annotated[Drawn, BeforeValidator(_drawn, json_schema_input_type=list[Any] | Drawn)]], Keyed
    ] = Field(min_length=1, description="By dotted key: log_uniform, uniform or integers: [least, most], or a list.")


class StopSection(Section):
    """Successive halving: at each of some steps only the best trials go on."""

    metric: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="What is compared, of the last evaluation: by default eval_loss, of GRPO eval_reward."
    )
    after: float = Field(0.2, gt=0, lt=1, description="The share of a trial's steps after which it is first compared.")
    keep: float = Field(
        0.5, gt=0, lt=1, description="The share of the trials that go on; next at after / keep, and so on."
    )

    def rungs(self) -> list[float]:
        """Return the shares of a trial's steps after which trials are compared."""
        shares = (self.after / self.keep**index for index in itertools.count())
        return list(itertools.takewhile(lambda share: share < 1 - 1e-9, shares))


def _named(value: Any) -> Any:
    """Refuse names that no folder should have, or that stand twice, also where a file system takes `A` for `a`."""
    problems, names = [], {}
    for index, entry in enumerate(value if isinstance(value, list) else ()):
        name = entry.get("name") if isinstance(entry, dict) else None
        if name is None:
            continue
        place = (index, "name")
        if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
            words = (
                f"expected a folder's name of letters, digits and . _ = , + @ -, up to {_LONGEST_NAME}, got {name!r}"
            )
            quotes = "" if isinstance(name, str) else f"; put it in quotes: '{name}'"
            problems.append(Problem(place, words + quotes))
        elif (before := names.setdefault(name.lower(), index)) != index:
            problems.append(Problem(place, f"is the name of entry {before} too: {name!r}; name each trial once"))
    raise_problems(problems)
    return value


# the class below has a field called list
_Entry = Annotated[dict[str, Any], Field(min_length=1), Keyed]
_Entries = Annotated[list[_Entry], BeforeValidator(_named, json_schema_input_type=list[dict[str, Any]])]
_Grid = Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], Keyed]


class SweepSection(Section):
    """Which trials a sweep has, how many are trained at once, and which are stopped."""

    grid: _Grid = Field({}, description="Values by dotted key; their product.")
    list: _Entries = Field([], description="A mapping of dotted keys a trial, its name beside them.")
    random: RandomSection | None = Field(None, description="Values that are drawn.")
    together: Literal["auto"] | Annotated[int, Field(ge=1, le=MAX_TRIALS)] = Field(
        "auto", description="How many trials share a step; auto takes as many as fit and pay."
    )
    stop: StopSection | None = Field(None, description="Successive halving: the best go on.")

    @model_validator(mode="after")
    def _check(self) -> "SweepSection":
        if not self.grid and not self.list and self.random is None:
            raise_problems(
                [Problem((), "names no trials; add grid: {training.learning_rate: [1e-3, 2e-3]}, list or random")]
            )
        sources = {"grid": set(self.grid), "random": set(self.random.values if self.random else ())}
        sources["list"] = {key for entry in self.list for key in entry if key != "name"}
        problems = [
            Problem((second,), f"{key} is in {first} too; keep one of them")
            for first, second in itertools.combinations(sources, 2)
            for key in sorted(sources[first] & sources[second])
        ]
        raise_problems(problems)
        if (number := self.num_trials()) > MAX_TRIALS:
            raise ValueError(f"has {number:,} trials; expected at most {MAX_TRIALS:,}; random takes some of them")
        return self

    def num_trials(self) -> int:
        """Return how many trials there are."""
        return (
            math.prod(map(len, self.grid.values()))
            * max(1, len(self.list))
            * (self.random.trials if self.random else 1)
        )


def changes_of(section: SweepSection) -> dict[str, Changes]:
    """Return what each trial changes, by its name; a name tells of the trial's own changes only, so it stays.

    Raises:
        ValueError: if two trials are equal, or random has fewer different values than trials.
    """
    found: dict[str, Changes] = {}
    grid = [dict(zip(section.grid, values, strict=True)) for values in itertools.product(*section.grid.values())]
    parts = section.list or [{}], grid, _draws(section.random) if section.random else [{}]
    taken: set[str] = set()
    for entry, point, drawn in itertools.product(*parts):
        changes = {**{key: value for key, value in entry.items() if key != "name"}, **point, **drawn}
        described = {**point, **drawn} if "name" in entry else changes
        name = _unused(_name(entry.get("name"), described), taken)
        if equal := next((other for other, before in found.items() if before == changes), None):
            raise ValueError(f"two trials are equal: {equal}{_of(changes)}; remove one")
        found[name] = changes
    return found


def _of(changes: Changes) -> str:
    text = ", ".join(f"{key}: {value!r:.40}" for key, value in changes.items())
    return f" ({text})" if text else ""


def _draws(section: RandomSection) -> list[Changes]:
    """Return different draws."""
    source, found = randoms.Random(section.seed), []
    for _ in range(20 * section.trials + 1_000):
        drawn = {key: how.draw(source) for key, how in section.values.items()}
        if drawn not in found:
            found.append(drawn)
        if len(found) == section.trials:
            return found
    raise ValueError(f"random: trials: is {section.trials}, but only {len(found)} that differ were drawn; lower it")


def _name(given: str | None, changes: Changes) -> str:
    """Return a trial's name: what was given, and what it changes in short."""
    last = [key.rpartition(".")[2] for key in changes]
    words = [given] if given else []
    for key, value in changes.items():
        end = key.rpartition(".")[2]
        short = _SHORT.get(key) or (end if last.count(end) == 1 else key)
        words.append(f"{short}={_value_text(value)}")
    name = re.sub(r"[^\w.=,+@-]+", "_", ",".join(words)).lstrip(".-=,+@_")
    return name[:_LONGEST_NAME].rstrip(".,") or "trial"


def _value_text(value: Any) -> str:
    """Return a value as part of a name: numbers as they are, the stems of paths, a section's own values."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        if isinstance(value.get("path"), str):
            return _value_text(value["path"])
        return "-".join(
            part for key, item in value.items() for part in ([] if key == "method" else [key]) + [_value_text(item)]
        )
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "+".join(map(_value_text, value))
    text = str(value)
    return PurePath(text).stem if "/" in text else text


def _unused(name: str, taken: set[str]) -> str:
    """Return a name that no other trial has, also where a file system takes `A` for `a`, and mark it taken."""
    candidates = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    free = next(candidate for candidate in candidates if candidate.lower() not in taken)
    taken.add(free.lower())
    return free
