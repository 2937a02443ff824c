"""What is logged and saved, when and to where."""

from lsr_scale.config.training.subject import Subject

SAVING = Subject(
    defaults={
        "save_as_lora": False,
        "logging_steps": 10,
        "logging_nan_inf_filter": False,  # would wait for the GPU at every step; on_nonfinite looks instead
        "save_strategy": "steps",
        "save_steps": 0.1,  # below 1: a share of all steps
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,  # the progress line is ours
    },
    bounds={
        "logging_steps": {"gt": 0, "le": 10**9},
        "save_steps": {"gt": 0, "le": 10**9},
        "save_total_limit": {"ge": 1, "le": 10**9},
    },
    own={
        "save_as_lora": (
            bool,
            "Save beside adapter/ the same update as PEFT's LoRA, exactly: adapter_lora/, which loads without "
            "lsr_scale.",
        ),
    },
    owned={
        "resume_from_checkpoint": "resuming belongs to the command, not to the run: lsr-scale train --resume auto",
        "include_num_input_tokens_seen": "tokens are counted and logged in any case: leave it out",
        "hub_token": "a run folder holds a copy of its configuration: log in with `hf auth login`, or set HF_TOKEN",
    },
)
