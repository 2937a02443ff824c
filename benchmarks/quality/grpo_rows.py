"""The adapters that GRPO is tried with on Qwen2.5-Coder-0.5B, their numbers of parameters and their rates.

Sizes are those on this model: LoRA r=8 on the seven linears has 4,399,104 parameters, and two percent of that are
87,982. A row is within `TOLERANCE` of its size (a test counts them). PEFT's TinyLoRA takes only bases that are not
quantized.
"""

from benchmarks.quality.frontier_rows import LORA_8, AdapterRow

TRAININGS = ("grpo", "sft")
ROWS = {
    "lora_8": AdapterRow("lora", {"rank": 8, "alpha": 16.0}),
    "lsr_60k": AdapterRow("lsr", {"rank": 6, "separation_rank": 1, "alpha": 12.0}),
    "lora_1": AdapterRow("lora", {"rank": 1, "alpha": 2.0}),
    "lsr_10k": AdapterRow(
        "lsr", {"rank": 1, "separation_rank": 1, "alpha": 2.0, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    ),
    "lsr_300k": AdapterRow("lsr", {"rank": 16, "separation_rank": 3, "alpha": 32.0}),
    "lora_xs": AdapterRow("lora_xs", {"rank": 19, "alpha": 38.0}),
    "kron_lora": AdapterRow("kron_lora", {"rank": 1, "left_in": 8, "left_out": 16, "alpha": 4.0, "dropout": 0.0}),
    "tinylora": AdapterRow("tinylora", {"rank": 8, "u": 60}),
}
SIZES = {
    **{"lora_8": LORA_8["qwen"], "lora_1": LORA_8["qwen"] / 8, "lsr_10k": 10_000, "lsr_60k": 60_000},
    **{"lsr_300k": 300_000, "lora_xs": 60_000, "kron_lora": 70_000, "tinylora": 10_000},
}
TOLERANCE = 0.05
REFERENCE = "lora_8"  # what the others are compared with

# three points a method and training, a factor of three apart, guessed and not measured; where the best is the first or
# the last, the next beyond it follows
RATES = {
    "grpo": {
        "lora": (1e-4, 3e-4, 9e-4),
        "lsr": (3e-4, 9e-4, 2.7e-3),
        "lora_xs": (3e-4, 9e-4, 2.7e-3),
        "kron_lora": (6e-4, 1.8e-3, 5.4e-3),
        "tinylora": (1e-3, 3e-3, 9e-3),
    },
    "sft": {
        "lora": (5e-4, 1.5e-3, 4.5e-3),
        "lsr": (1e-3, 3e-3, 9e-3),
        "lora_xs": (1e-3, 3e-3, 9e-3),
        "kron_lora": (2e-3, 6e-3, 1.8e-2),
        "tinylora": (3e-3, 9e-3, 2.7e-2),
    },
}
