"""The rows of a run of GRPO: how they become prompts, and what is refused before its model is loaded."""

from collections.abc import Callable
from typing import Any

from lsr_scale import distributed
from lsr_scale.config import RunConfig
from lsr_scale.config.rewards import is_file, rewards_of
from lsr_scale.data.answered_prompts import PromptForm, prompt_ids
from lsr_scale.data.rows import RowError
from lsr_scale.errors import UserError
from lsr_scale.rewards.shipped import unreadable
from lsr_scale.units import amount


def prompt_form(run: RunConfig, tokenizer: Any) -> PromptForm:
    """Return how a run's rows become prompts: questions in the chat template, where the tokenizer has one."""
    own = any(is_file(reward.name) for reward in rewards_of(run.training))
    return PromptForm(bool(tokenizer.chat_template), run.data.instruction, own)


def prompt_check(run: RunConfig, tokenizer: Any) -> Callable[[dict[str, Any]], None]:
    """Return what is asked of every row: that its rewards can read its answer, and that its prompt is not too long.

    It raises a RowError.
    """
    names = [reward.name for reward in rewards_of(run.training)]
    longest = run.training["max_prompt_length"]

    def check(record: dict[str, Any]) -> None:
        for name in names:
            if (problem := unreadable(name, record)) is not None:
                raise RowError(problem)
        if isinstance(record["prompt"], list) and not tokenizer.chat_template:
            return  # told once, for all rows
        try:
            tokens = len(prompt_ids(tokenizer, record["prompt"]))
        except UserError as error:
            raise RowError(str(error)) from None
        if tokens > longest:
            raise RowError(
                f"the prompt has {tokens:,} tokens, and training.max_prompt_length is {longest:,}; raise it, or "
                "shorten the prompt"
            )
        if not tokens:
            raise RowError("the prompt has no tokens; write some text")

    return check


def check_number(run: RunConfig, number: int) -> None:
    """Refuse fewer rows than the prompts of one generation, of which TRL would make no step.

    Raises:
        UserError: with both numbers.
    """
    training = run.training
    steps = training.get("steps_per_generation") or training["gradient_accumulation_steps"]
    completions = training.get("generation_batch_size")
    completions = completions or training["per_device_train_batch_size"] * steps * distributed.world_size()
    if number < (prompts := completions // training["num_generations"]):
        raise UserError(
            f"data.train: {amount(number, 'row')}, fewer than the {prompts:,} prompts that completions are generated "
            "for at a time; add rows, or lower training.gradient_accumulation_steps or per_device_train_batch_size"
        )
