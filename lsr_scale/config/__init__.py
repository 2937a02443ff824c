"""The run as a YAML file describes it, checked before anything is loaded."""

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
    "json_schema",
    "load_run",
    "run_from_dict",
    "training_arguments",
]
