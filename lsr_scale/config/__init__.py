"""The run as a YAML file describes it, checked before anything is loaded."""

from lsr_scale.config.deepspeed import (
    OF_TRAINING,
    engine_config,
    offloads_optimizer,
    offloads_parameters,
    without_effect,
)
from lsr_scale.config.difference import difference
from lsr_scale.config.run import (
    EvalSection,
    RunConfig,
    dump_yaml,
    json_schema,
    load_run,
    plain,
    run_from_dict,
    training_arguments,
    with_overrides,
)

__all__ = [
    "OF_TRAINING",
    "EvalSection",
    "RunConfig",
    "difference",
    "dump_yaml",
    "engine_config",
    "json_schema",
    "load_run",
    "offloads_optimizer",
    "offloads_parameters",
    "plain",
    "run_from_dict",
    "training_arguments",
    "with_overrides",
    "without_effect",
]
