"""Several processes: what DeepSpeed and the launcher decide."""

from lsr_scale.config.training.subject import Subject

_NO_FSDP = "sharding is DeepSpeed's: set deepspeed.config to zero3"

PROCESSES = Subject(
    bounds={
        "ddp_timeout": {"ge": 1, "le": 10**7},
        "ddp_bucket_cap_mb": {"ge": 1, "le": 10**6},
    },
    owned={
        "deepspeed": "set deepspeed.config",
        "local_rank": "the launcher passes it: deepspeed --module lsr_scale.launch, or torchrun -m lsr_scale.launch",
        "fsdp": _NO_FSDP,
        "fsdp_config": _NO_FSDP,
        "parallelism_config": "it cannot be written in YAML, and tensor parallelism cannot split a quantized layer",
    },
)
