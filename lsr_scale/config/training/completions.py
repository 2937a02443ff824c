"""Numbers of the preference methods and of GRPO; their defaults and own fields are in `lsr_scale.config.methods`."""

from lsr_scale.config.training.subject import Subject

COMPLETIONS = Subject(
    bounds={
        "max_prompt_length": {"ge": 1, "le": 2**24},
        "max_completion_length": {"ge": 1, "le": 2**24},
        "num_generations": {"ge": 2, "le": 65_536},
        "num_generations_eval": {"ge": 1, "le": 65_536},
        "num_iterations": {"ge": 1, "le": 65_536},
        "steps_per_generation": {"ge": 1, "le": 65_536},
        "generation_batch_size": {"ge": 1, "le": 2**20},
        "temperature": {"gt": 0, "le": 100},
        "top_p": {"gt": 0, "le": 1},
        "top_k": {"ge": 0, "le": 10**9},
        "min_p": {"ge": 0, "le": 1},
        "repetition_penalty": {"ge": 0.01, "le": 100},
        "beta": {"ge": 0, "le": 1e6},
        "epsilon": {"gt": 0, "le": 1e6},
        "epsilon_high": {"gt": 0, "le": 1e6},
        "delta": {"gt": 1, "le": 1e6},  # at 1 and below no ratio above 1 has a gradient
        "top_entropy_quantile": {"gt": 0, "le": 1},
        "entropy_coef": {"ge": -1e6, "le": 1e6},
        "label_smoothing": {"ge": 0, "lt": 0.5},  # at a half both completions are preferred alike
        "ld_alpha": {"ge": 0, "le": 1},
        "desirable_weight": {"ge": 0, "le": 1e6},
        "undesirable_weight": {"ge": 0, "le": 1e6},
    },
)
