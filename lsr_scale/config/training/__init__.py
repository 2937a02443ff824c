"""The `training` section: our defaults, the fields that are ours, and the rest as TRL and transformers declare them.

Any field of the method's class in TRL, such as `trl.SFTConfig` (`model.task: causal_lm`), or of
`transformers.TrainingArguments` (`seq_cls`) is taken by its own name and checked against the dataclass of the installed
version, so nothing here has to follow their releases.

What is ours is told by subject, a file each, as a `Subject`: `optimization`, `compute` (memory too), `guards`, `saving`
(logging too), `evaluation`, `rows`, `completions` (GRPO and preferences), `processes`, `loading`; `fields` joins them.
`section` makes the section's model and checks a section by it, `arguments` gives one to the trainer, `yaml_types` says
how a dataclass's field is written in YAML.
"""

from lsr_scale.config.training.arguments import training_arguments_class, training_kwargs
from lsr_scale.config.training.compute import LINEAR_GROUPS, RENAMED, checkpoints_layers, wants_fused
from lsr_scale.config.training.evaluation import (
    EVALUATED,
    STEERED_SCHEDULES,
    EarlyStopping,
    compared_by,
    evaluated,
    lower_is_better,
)
from lsr_scale.config.training.fields import DEFAULTS, OWNED, TASK_DEFAULTS, defaults_of, not_to_set, own_fields
from lsr_scale.config.training.rows import longest_row
from lsr_scale.config.training.section import check_training, training_model
from lsr_scale.config.training.subject import Task
from lsr_scale.config.training.yaml_types import Flag, yaml_type

__all__ = [
    "DEFAULTS",
    "EVALUATED",
    "LINEAR_GROUPS",
    "OWNED",
    "RENAMED",
    "STEERED_SCHEDULES",
    "TASK_DEFAULTS",
    "EarlyStopping",
    "Flag",
    "Task",
    "check_training",
    "checkpoints_layers",
    "compared_by",
    "defaults_of",
    "evaluated",
    "longest_row",
    "lower_is_better",
    "not_to_set",
    "own_fields",
    "training_arguments_class",
    "training_kwargs",
    "training_model",
    "wants_fused",
    "yaml_type",
]
