"""The training methods (`training.method`), as far as a run's file goes: a line each in `METHODS`.

What trains a method is a file of its name in `lsr_scale/training/methods/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lsr_scale.config.rewards import AnyReward


@dataclass(frozen=True)
class TrainingMethod:
    """What a run's file may say under a method.

    Attributes:
        arguments: TRL's class of its trainer's arguments, by its name below `trl`.
        rows: The kinds of rows that it is trained on, `lsr_scale.data.formats.Kind`.
        defaults: What a run of it gets where its file says nothing, beside `training.DEFAULTS`.
        has_reference: It compares the model with what it began as, see `lsr_scale.training.reference`.
        sequences: How many of a row a step's forward pass has.
        evaluated: What an evaluation during training finds, without the `eval_` before each.
        objective: Which of these tells the better of two evaluations, where the run names none.
        scaled_by: Fields that the objective is defined by: runs that differ in one cannot be compared by it.
        unused: Fields of the class that have no effect here, with what to do instead.
        own: Fields that the class does not have, whose defaults are in `defaults`: type and description.
        choices: The values of fields that the class declares as any text, or as a list of any.
        filled: Fields that null is no value of here, though the class declares it.
    """

    arguments: str
    rows: tuple[str, ...]
    defaults: dict[str, Any] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    has_reference: bool = False
    sequences: int = 1
    evaluated: tuple[str, ...] = ("loss", "mean_token_accuracy", "entropy")
    objective: str = "loss"
    scaled_by: tuple[str, ...] = ()
    own: dict[str, tuple[Any, str]] = field(default_factory=dict)
    choices: dict[str, tuple[str, ...]] = field(default_factory=dict)
    filled: tuple[str, ...] = ()

    @property
    def class_name(self) -> str:
        """The name of the class of arguments, such as SFTConfig."""
        return self.arguments.rpartition(".")[2]

    @property
    def module(self) -> str:
        """The module of the class of arguments, below `trl`."""
        return self.arguments.rpartition(".")[0]


_SFT = {
    "max_length": 1024,
    "packing": False,
    "assistant_only_loss": None,  # null: wherever rows are conversations
}

_PREFERENCES = {"max_length": 1024, "learning_rate": 1e-4, "beta": 0.1}
_REFERENCE = "the reference is the base with the adapter off, or the adapter that start_from names, frozen"
_NO_REFERENCE: dict[str, str] = {
    **dict.fromkeys(("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), _REFERENCE),
    **dict.fromkeys(
        ("precompute_ref_log_probs", "precompute_ref_batch_size"),
        "the reference is computed in every step: leave it out",
    ),
}
_REWARDS = ("loss", "rewards/margins")
_NO_PADDING_FREE = {"padding_free": "TRL has none for DPO at present: leave it out"}
_OF_ORPO = {
    "is_encoder_decoder": "the model itself says so: leave it out",
    "max_completion_length": "it is for encoders and decoders: set max_length",
    "padding_value": "the tokenizer's padding token is used: leave it out",
    "generate_during_eval": "set eval.prompts",
}
_NO_TOOLS = "completions are texts, judged by training.reward: leave it out"
_GRPO = TrainingMethod(
    "trainer.grpo_config.GRPOConfig",
    ("prompts", "chat_prompts"),
    {
        "reward": [],
        "max_prompt_length": 512,
        "max_completion_length": 256,
        "learning_rate": 1e-4,
        "num_generations": 8,
    },
    {
        **_NO_REFERENCE,
        **dict.fromkeys(("max_tool_calling_iterations", "log_multimodal"), _NO_TOOLS),
        **dict.fromkeys(
            ("log_completions", "num_completions_to_print", "log_unique_prompts", "log_completions_hub_repo"),
            "some completions of each logging step are in completions.jsonl of the run's folder: leave it out",
        ),
        "reward_weights": "give each reward its weight: reward: [{name: length, weight: 0.2}]",
        "cast_lm_head_to_fp32": "it casts what all of the model shares: set model.dtype: float32",
        "remove_unused_columns": "rewards read the rows' columns: leave it out",
        "use_transformers_paged": "set use_transformers_continuous_batching",
        "vllm_importance_sampling_cap": "set vllm_importance_sampling_clip_max",
    },
    has_reference=True,
    evaluated=("loss", "reward", "kl", "entropy"),
    objective="reward",  # the loss is of advantages, whose mean over a group is 0
    scaled_by=("reward",),
    own={
        "reward": (
            list[AnyReward],
            "What a completion is worth, the sum of: exact_answer, multiple_choice, {name: regex, pattern: ...}, "
            "length, file.py:function; each a name, or {name: ..., weight: ...}.",
        ),
        "max_prompt_length": (int, "The longest prompt in tokens; a row with a longer one is refused, and named."),
    },
    choices={
        "loss_type": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
        "importance_sampling_level": ("token", "sequence"),
        "scale_rewards": ("group", "batch", "none"),
        "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    },
    filled=("max_completion_length", "num_generations"),
)
_OF_DPO = {
    "loss_type": (
        *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
        *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
    ),
    "f_divergence_type": ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
}

METHODS: dict[str, TrainingMethod] = {
    "sft": TrainingMethod(
        "trainer.sft_config.SFTConfig",
        ("prompt_completion", "chat_prompt_completion", "messages", "text"),
        _SFT,
        scaled_by=("loss_type", "assistant_only_loss", "completion_only_loss", "label_smoothing_factor"),
    ),
    "dpo": TrainingMethod(
        "trainer.dpo_config.DPOConfig",
        ("preference", "chat_preference"),
        _PREFERENCES,
        _NO_REFERENCE | _NO_PADDING_FREE,
        has_reference=True,
        sequences=2,
        evaluated=(*_REWARDS, "rewards/accuracies", "mean_token_accuracy", "entropy"),
        scaled_by=(
            *("loss_type", "beta", "label_smoothing", "loss_weights", "ld_alpha", "f_divergence_type", "discopop_tau"),
        ),
        choices=_OF_DPO,
    ),
    "kto": TrainingMethod(
        "trainer.kto_config.KTOConfig",
        ("unpaired", "chat_unpaired"),
        _PREFERENCES,
        _NO_REFERENCE,
        has_reference=True,
        evaluated=(*_REWARDS, "kl", "entropy"),
        scaled_by=("loss_type", "beta", "desirable_weight", "undesirable_weight"),
    ),
    "orpo": TrainingMethod(
        "experimental.orpo.orpo_config.ORPOConfig",
        ("preference", "chat_preference"),
        _PREFERENCES,
        _OF_ORPO,
        sequences=2,
        evaluated=(*_REWARDS, "rewards/accuracies", "nll_loss"),
        scaled_by=("beta",),
    ),
    "grpo": _GRPO,
}


def low_rate_note(training: Mapping[str, Any]) -> str | None:
    """Return what is to be known of a run of GRPO with the default rate, which is safe and learns little; else None."""
    default = _GRPO.defaults["learning_rate"]
    if training["method"] != "grpo" or training["learning_rate"] != default:
        return None
    return (
        f"training.learning_rate is {default:g}, the default of grpo, and wherever it was tuned the best one was "
        "higher, the more so the smaller the adapter; try several times as much (GUIDE: Reinforcement has the rates)"
    )


def method_of(training: Any) -> str:
    """Return the method that a run's training section names, as written; the default where it names none that is."""
    name = training.get("method", "sft") if isinstance(training, dict) else "sft"
    return name if isinstance(name, str) and name in METHODS else "sft"
