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
    "lsr_70k": AdapterRow("lsr", {"rank": 2, "separation_rank": 2, "alpha": 4.0}),
    "tinylora": AdapterRow("tinylora", {"rank": 8, "u": 60}),
}
SIZES = {
    **{"lora_8": LORA_8["qwen"], "lora_1": LORA_8["qwen"] / 8, "lsr_10k": 10_000, "lsr_60k": 60_000},
    **{"lsr_70k": 70_000, "lsr_300k": 300_000, "lora_xs": 60_000, "kron_lora": 70_000, "tinylora": 10_000},
}
TOLERANCE = 0.05
REFERENCE = "lora_8"  # what the others are compared with
LAST = 5  # steps whose mean chooses a rate

# Three points a row, a factor of three apart; where the best is the first or the last, the next beyond it follows. The
# middle of SFT is a third of what was best on SmolLM2 at the row's share of LoRA r=8's parameters (frontier), which was
# the highest that this model took; that of GRPO is about a quarter of it, which for LoRA r=8 is what is usual.
# TinyLoRA's are guesses.
_MIDDLES = {
    "grpo": {
        **{"lora_8": 3e-4, "lora_1": 6e-4, "lsr_10k": 4.5e-3, "lsr_60k": 2.4e-3, "lsr_70k": 2.4e-3},
        **{"lsr_300k": 1.2e-3, "lora_xs": 3e-4, "kron_lora": 2.4e-3, "tinylora": 3e-3},
    },
    "sft": {
        **{"lora_8": 1.5e-3, "lora_1": 3e-3, "lsr_10k": 2e-2, "lsr_60k": 1e-2, "lsr_70k": 1e-2},
        **{"lsr_300k": 5e-3, "lora_xs": 1.5e-3, "kron_lora": 1e-2, "tinylora": 1e-2},
    },
}
RATES = {
    training: {row: tuple(float(f"{at / 3 * 3**i:.4g}") for i in range(3)) for row, at in middles.items()}
    for training, middles in _MIDDLES.items()
}
