"""What an adapter's options are called elsewhere: for messages about one that is unknown here, in YAML as in code."""

from collections.abc import Iterable

from lsr_scale.errors import UserError, did_you_mean

# Names from PEFT, axolotl and LLaMA-Factory, and what they are called here.
ELSEWHERE: dict[str, str] = {
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
    "lora_target_linear": "target_modules: all-linear",
    "lora_modules_to_save": "modules_to_save",
    "additional_target": "modules_to_save",
    "init_lora_weights": "init",
    "finetuning_type": "method",
    "peft_type": "method",
}


class UnknownOptionError(UserError, TypeError):
    """An option that a method does not have; a TypeError too, which a call with an unknown keyword raises anywhere."""


def name_here(name: str, known: Iterable[str]) -> str:
    """Return what an unknown option is called here, or the known names nearest to it."""
    return f"here it is {ELSEWHERE[name]}" if name in ELSEWHERE else did_you_mean(name, known)
