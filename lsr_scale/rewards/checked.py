"""A reward as GRPO's trainer calls it: for all completions of a batch at once, where what is no reward ends the run."""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lsr_scale.config.rewards import Reward, is_file, rewards_of
from lsr_scale.errors import UserError, quoted
from lsr_scale.rewards import shipped
from lsr_scale.rewards.user_file import in_words, line_of, load_function, split_reference, taken_names

ROW = "row"  # the column that tells where a prompt's row stands: "file, line 12"
# what a function is given beside its rows' columns, by TRL's trainer
GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
_MOST = 1e12  # of a reward: the squares of a group's are summed in float32


class CheckedReward:
    """A reward of a run; its `__name__` is what the metrics call it."""

    def __init__(self, reward: Reward, most_tokens: int, name: str | None = None) -> None:
        """Take a reward, and load its function where it is a user's own.

        Args:
            reward: The reward.
            most_tokens: `max_completion_length`.
            name: What the metrics call it; by default its name, a function's own where it is a user's.

        Raises:
            UserError: if its file cannot be loaded.
        """
        self.reward, self.most_tokens = reward, most_tokens
        self.file: Path | None = None
        self.function: Callable[..., Any] | None = None
        if is_file(reward.name):
            reference = split_reference(reward.name)
            assert reference is not None, "the run was checked"
            self.file, function = reference
            self.function = load_function(self.file, function)
            name = name or function
        self.__name__ = name or reward.name

    def check_columns(self, columns: Sequence[str], where: str) -> None:
        """Refuse a function that must be given what rows do not have.

        Args:
            columns: Of the rows as they are trained on.
            where: What the rows are, such as data.train.

        Raises:
            UserError: with what it is given.
        """
        if self.function is None:
            return
        needed, _ = taken_names(self.function)
        given = [*GIVEN, *(name for name in columns if name != "prompt")]
        if missing := sorted(needed.difference(given)):
            raise UserError(
                f"training.reward: {self.reward.name} must be given {', '.join(missing)}, which the rows of {where} do "
                f"not have; by name it is given {', '.join(given)}"
            )

    def __call__(self, *, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **given: Any) -> Any:
        """Return a reward a completion.

        Raises:
            UserError: where one is no finite number, there are too few or too many, or the function raises.
        """
        if self.function is not None:
            values = self._of_user(completions=completions, completion_ids=completion_ids, **given)
        else:
            values = [
                self._of_one(index, text_of(completion), len(ids), given)
                for index, (completion, ids) in enumerate(zip(completions, completion_ids, strict=True))
            ]
        return [self._checked(value, index, given) for index, value in enumerate(values)]

    def _of_one(self, index: int, completion: str, num_tokens: int, given: dict[str, Any]) -> float:
        name = self.reward.name
        if name == "regex":
            return shipped.regex(completion, self.reward.pattern or "")
        if name == "length":
            tokens = self.reward.tokens or math.ceil(0.8 * self.most_tokens)
            return shipped.length(num_tokens, tokens, self.most_tokens)
        answer = given["answer"][index]
        if name == "exact_answer":
            return shipped.exact_answer(completion, answer)
        return shipped.multiple_choice(completion, answer, given["choices"][index])

    def _of_user(self, **given: Any) -> list[Any]:
        """Call a user's function once for all; where it raises, a completion at a time to find the one."""
        assert self.function is not None
        assert self.file is not None
        num = len(given["completions"])
        try:
            values = self._call(given)
        except (Exception, SystemExit) as error:
            index = self._raising(given, num)
            batch = "the batch that begins with " if index is None else ""
            raise UserError(
                f"training.reward: {self.reward.name}{line_of(error, self.file)} raises {in_words(error)} for "
                f"{batch}{self._place(given, index or 0)}; mend it, and resume with --resume auto"
            ) from error
        values = list(values) if _is_sequence(values) else values
        if not isinstance(values, list) or len(values) != num:
            found = f"{len(values)}" if isinstance(values, list) else " ".join(quoted(values).split())
            raise UserError(
                f"training.reward: {self.reward.name} returned {found}, where {num} rewards were expected, one a "
                f"completion (the first one of {self._place(given, 0)}); return a list of numbers"
            )
        return values

    def _raising(self, given: dict[str, Any], num: int) -> int | None:
        """Return the first completion that a function raises for by itself; None where it does so for none."""
        for index in range(num):
            one = {key: [v[index]] if isinstance(v, list) and len(v) == num else v for key, v in given.items()}
            try:
                self._call(one)
            except (Exception, SystemExit):
                return index
        return None

    def _call(self, given: dict[str, Any]) -> Any:
        """Call a user's function with what it takes: lists of its own, and no way to set the draws of completions."""
        assert self.function is not None
        _, taken = taken_names(self.function)
        own = {key: list(v) if isinstance(v, list) else v for key, v in given.items() if taken is None or key in taken}
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices):
            return self.function(**own)

    def _checked(self, value: Any, index: int, given: dict[str, Any]) -> float:
        if hasattr(value, "item") and getattr(value, "shape", None) == ():
            value = value.item()  # a number of torch's or NumPy's
        number: Any = value
        if isinstance(value, numbers.Real) and -_MOST <= number <= _MOST:
            return float(number)
        raise UserError(
            f"training.reward: {self.reward.name} returned {quoted(value)} for a completion of "
            f"{self._place(given, index)}, where a finite number is expected, of 1e12 at most; mend it, and resume "
            "with --resume auto"
        )

    def _place(self, given: dict[str, Any], index: int) -> str:
        """Return where the row of a completion stands, with its prompt's beginning."""
        rows = given.get(ROW)
        place = rows[index] if rows and rows[index] else f"completion {index + 1} of the batch"
        prompts = given.get("prompts") or [""]
        return f"{place} (prompt {text_of(prompts[index]).strip()[:60]!r})"


def checked_rewards(training: Mapping[str, Any]) -> list[CheckedReward]:
    """Return the rewards of a checked `training` section, each under a name of its own.

    Raises:
        UserError: if a file cannot be loaded.
    """
    found: list[CheckedReward] = []
    for reward in rewards_of(training):
        one = CheckedReward(reward, training["max_completion_length"])
        alike = sum(other.__name__.partition("-")[0] == one.__name__ for other in found)
        one.__name__ += f"-{alike + 1}" if alike else ""
        found.append(one)
    return found


def _is_sequence(values: Any) -> bool:
    return isinstance(values, list | tuple) or getattr(values, "ndim", 0) == 1  # of NumPy's or torch's


def text_of(message: Any) -> str:
    """Return the text of a prompt or completion, which a conversation has in its last turn."""
    return message if isinstance(message, str) else str(message[-1].get("content") or "")
