"""How long and how fast is learned: epochs, rows a step, the optimizer, its rate, decay and clipping."""

from lsr_scale.config.training.subject import Subject

ROWS_PER_STEP = 2**20  # at most

OPTIMIZATION = Subject(
    defaults={
        "seed": 42,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 8,
        "optim": "adamw_torch_fused",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,  # below 1: a share of all steps
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    },
    bounds={
        "seed": {"ge": 0, "lt": 2**32},
        "data_seed": {"ge": 0, "lt": 2**32},
        "num_train_epochs": {"gt": 0, "le": 100_000},
        "max_steps": {"le": 10**9},
        "per_device_train_batch_size": {"ge": 1, "le": 65_536},
        "per_device_eval_batch_size": {"ge": 1, "le": 65_536},
        "gradient_accumulation_steps": {"ge": 1, "le": 65_536},
        "learning_rate": {"ge": 0, "le": 1e6},
        "warmup_steps": {"ge": 0, "le": 10**9},
        "warmup_ratio": {"ge": 0, "le": 1},
        "weight_decay": {"ge": 0, "le": 1e6},
        "adam_beta1": {"ge": 0, "lt": 1},
        "adam_beta2": {"ge": 0, "lt": 1},
        "adam_epsilon": {"gt": 0, "le": 1},
        "max_grad_norm": {"ge": 0, "le": 1e12},
        "neftune_noise_alpha": {"ge": 0, "le": 1e6},
        "label_smoothing_factor": {"ge": 0, "le": 1},
    },
)
