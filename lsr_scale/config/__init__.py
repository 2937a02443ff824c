"""The run as a YAML file describes it, checked before anything is loaded."""

from lsr_scale.config.deepspeed import engine_config, offloads_parameters, unused_in_stage_3
from lsr_scale.config.run import (
    EvalSection,
    RunConfig,
    dump_yaml,
    json_schema,
    load_run,
    run_from_dict,
    training_arguments,
)

__all__ = [
    "EvalSection",
    "RunConfig",
    "dump_yaml",
    "engine_config",
    "json_schema",
    "load_run",
    "offloads_parameters",
    "run_from_dict",
    "training_arguments",
    "unused_in_stage_3",
]
