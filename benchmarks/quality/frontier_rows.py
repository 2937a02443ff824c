"""The rows of the frontier: which adapters have which number of parameters, on both models, and their rates.

A size is named by SmolLM2's number of parameters; on another model it is the same share of LoRA r=8's there. A row is
within `TOLERANCE` of its size (a test counts them). Below LoRA r=1 on all seven linears (305,280 on SmolLM2) LoRA has
two rows or more: on all linears of fewer layers (the last ones), and on fewer linears of all layers, with the query or
the output among them. PEFT's TinyLoRA takes only bases that are not quantized.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks.models import LINEARS, SMOLLM2

SIZES = {
    "5k": 5_000,
    "20k": 20_000,
    "60k": 60_000,
    "150k": 150_000,
    "300k": 300_000,
    "600k": 600_000,
    "1.2m": 1_200_000,
    "2.4m": 2_400_000,
}
TOLERANCE = 0.16
LORA_8 = {"smollm2": 2_442_240, "qwen": 4_399_104}  # parameters of LoRA r=8 on the seven linears
MODELS = {"smollm2": SMOLLM2, "qwen": "Qwen/Qwen2.5-Coder-0.5B-Instruct"}
MODEL_NAMES = {"smollm2": "SmolLM2-135M", "qwen": "Qwen2.5-Coder-0.5B-Instruct"}  # on pages
NUM_LAYERS = {"smollm2": 30, "qwen": 24}
HIDDEN_SIZE = {"smollm2": 576, "qwen": 896}

# four points a row; where the best is the first or the last one, others beyond it follow (`frontier.points_of`)
RATES = {
    "lora": (2e-3, 4e-3, 8e-3, 1.6e-2),
    "lora_xs": (1e-3, 2e-3, 4e-3, 8e-3),
    "slora": (2e-3, 4e-3, 8e-3, 1.6e-2),
    "vera": (4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "tinylora": (1e-3, 4e-3, 1.6e-2, 6.4e-2),
    "krona": (2e-3, 4e-3, 8e-3, 1.6e-2),
    "kron_lora": (4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "lsr": (2e-3, 4e-3, 8e-3, 1.6e-2),
}
PRO_RATES = (3e-5, 1e-4, 3e-4, 1e-3)  # LoRA-Pro's are those of full fine-tuning
UNFUSED = ("krona", "tinylora", "vera")  # no low-rank pair: slower by far, in shared steps of their own


@dataclasses.dataclass(frozen=True)
class AdapterRow:
    """One adapter of the comparison: its method, its options (alpha by the method's rule among them), its optimizer."""

    method: str
    options: Mapping[str, Any]
    optimizer: str | None = None  # training.optim, None for AdamW

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates that it is first tuned over."""
        return PRO_RATES if self.optimizer == "lora_pro" else RATES[self.method]

    def takes(self, base: str) -> bool:
        """Whether it can be trained on a base that is held so."""
        return base == "none" or self.method != "tinylora"

    @property
    def is_fused(self) -> bool:
        """Whether its training takes the fused layers."""
        return self.method not in UNFUSED

    def section(self) -> dict[str, Any]:
        """Return a run's section `adapter`."""
        return {"method": self.method, "target_modules": LINEARS, **self.options}


def refused(rows: Mapping[str, AdapterRow], base: str) -> str:
    """Return a line that names the rows that a base does not take, and why; nothing where it takes all."""
    names = [name for name, row in rows.items() if not row.takes(base)]
    why = f"PEFT's TinyLoRA takes no base in {base}, only one that is not quantized (--base none)"
    return f"not run, as {why}: {', '.join(names)}" if names else ""


def _last(model: str, number: int) -> dict[str, Any]:
    return {"layers_to_transform": list(range(NUM_LAYERS[model] - number, NUM_LAYERS[model]))}


def _lora(rank: int = 1, **where: Any) -> AdapterRow:
    return AdapterRow("lora", {"rank": rank, "alpha": 2.0 * rank, **where})


def _lsr(rank: int, terms: int, **where: Any) -> AdapterRow:
    return AdapterRow("lsr", {"rank": rank, "separation_rank": terms, "alpha": 2.0 * rank, **where})


def _kron_lora(rank: int, left_in: int, left_out: int, **where: Any) -> AdapterRow:
    sizes = {"rank": rank, "left_in": left_in, "left_out": left_out}
    return AdapterRow("kron_lora", {**sizes, "alpha": 4.0 * rank, "dropout": 0.0, **where})


def _square(method: str, rank: int, **options: Any) -> AdapterRow:
    return AdapterRow(method, {"rank": rank, "alpha": 2.0 * rank, **options})


def _between(rank: int) -> dict[str, AdapterRow]:
    """Return the rows that train a matrix `[rank, rank]` a module between frozen ones: LoRA-XS and IntTune."""
    return {
        "lora_xs": _square("lora_xs", rank),
        "inttune": _square("slora", rank, init="nystrom", train="middle"),
    }


def _vera(rank: int, *targets: str) -> AdapterRow:
    return AdapterRow("vera", {"rank": rank, **({"target_modules": list(targets)} if targets else {})})


def _tinylora(rank: int, length: int) -> AdapterRow:
    return AdapterRow("tinylora", {"rank": rank, "u": length})


# better starts and optimizers, of the rows and at the sizes below; rows are called "lsr_8_5+gradient"
VARIANTS: dict[str, tuple[dict[str, Any], str | None]] = {
    "gradient": ({"init": "gradient"}, None),
    "rite": ({}, "lora_rite"),
    "pro": ({}, "lora_pro"),
    "plus": ({}, "lora_plus"),
    "gradient_rite": ({"init": "gradient"}, "lora_rite"),
}
VARIED = {"60k": ("lora_modules", "kron_lora", "lsr_2_2"), "300k": ("lora", "kron_lora", "lsr_8_5")}


def _variants(size: str, rows: Mapping[str, AdapterRow]) -> dict[str, AdapterRow]:
    """Return a size's rows with other starts and optimizers; LoRA+ is of LoRA's two factors."""
    return {
        f"{name}+{variant}": dataclasses.replace(row, options={**row.options, **options}, optimizer=optimizer)
        for name, row in rows.items()
        if name in VARIED.get(size, ())
        for variant, (options, optimizer) in VARIANTS.items()
        if optimizer != "lora_plus" or row.method == "lora"
    }


def _smollm2() -> dict[str, dict[str, AdapterRow]]:
    last = lambda number: _last("smollm2", number)  # noqa: E731
    query_value: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
    value: dict[str, Any] = {"target_modules": ["v_proj"]}
    output: dict[str, Any] = {"target_modules": ["v_proj", "o_proj"]}
    return {
        "5k": {
            **_between(5),
            "xs_output": _square("lora_xs", 9, **output),
            "tinylora": _tinylora(8, 24),
            "lora_modules": _lora(**value, **last(7)),
            "lora_output": _lora(**output, **last(3)),
            "kron_modules": _kron_lora(1, 8, 8, **value),
            "lsr_1_1": _lsr(1, 1, **last(7)),
            "lsr_modules": _lsr(1, 1, **output),
        },
        "20k": {
            **_between(10),
            "xs_output": _square("lora_xs", 18, **output),
            "vera": _vera(480, "v_proj"),
            "tinylora": _tinylora(16, 95),
            "lora_layers": _lora(**last(2)),
            "lora_modules": _lora(**value, **last(26)),
            "lora_output": _lora(**output, **last(10)),
            "krona": AdapterRow("krona", value),
            "kron_lora": _kron_lora(1, 4, 16, **last(10)),
            "lsr_1_1": _lsr(1, 1),
            "lsr_modules": _lsr(1, 4, **output),
        },
        "60k": {
            **_between(17),
            "xs_output": _square("lora_xs", 32, **output),
            "vera": _vera(600, "q_proj", "v_proj"),
            "lora_layers": _lora(**last(6)),
            "lora_modules": _lora(**query_value),
            "lora_output": _lora(**output),
            "krona": AdapterRow("krona", query_value),
            "kron_lora": _kron_lora(1, 4, 16),
            "lsr_2_2": _lsr(2, 2),
            "lsr_8_1": _lsr(8, 1),
        },
        "150k": {
            **_between(27),
            "xs_output": _square("lora_xs", 50, **output),
            "vera": _vera(576, "q_proj", "k_proj", "v_proj", "o_proj", "down_proj"),
            "lora_layers": _lora(**last(15)),
            "lora_modules": _lora(target_modules=["q_proj", "k_proj", "v_proj", "down_proj"]),
            "lora_output": _lora(target_modules=["k_proj", "v_proj", "o_proj", "down_proj"]),
            "kron_lora": _kron_lora(3, 4, 16),
            "lsr_2_5": _lsr(2, 5),
            "lsr_4_3": _lsr(4, 3),
        },
        "300k": {
            **_between(38),
            "vera": _vera(688),
            "lora": _lora(1),
            "slora": _square("slora", 1),
            "krona": AdapterRow("krona", {}),
            "kron_lora": _kron_lora(6, 4, 16),
            "lsr_4_7": _lsr(4, 7),
            "lsr_8_5": _lsr(8, 5),
        },
        "600k": {
            **_between(54),
            "lora": _lora(2),
            "slora": _square("slora", 2),
            "kron_lora": _kron_lora(12, 4, 16),
            "lsr_16_7": _lsr(16, 7),
            "lsr_32_5": _lsr(32, 5),
        },
        "1.2m": {
            **_between(76),
            "lora": _lora(4),
            "slora": _square("slora", 4),
            "kron_lora": _kron_lora(24, 16, 4),
            "lsr_16_14": _lsr(16, 14),
            "lsr_64_7": _lsr(64, 7),
        },
        "2.4m": {
            **_between(107),
            "lora": _lora(8),
            "slora": _square("slora", 8),
            "kron_lora": _kron_lora(32, 4, 4),
            "lsr_16_27": _lsr(16, 27),
            "lsr_64_14": _lsr(64, 14),
        },
    }


def _qwen() -> dict[str, dict[str, AdapterRow]]:
    last = lambda number: _last("qwen", number)  # noqa: E731
    return {
        "20k": {
            **_between(15),
            "vera": _vera(240, "q_proj", "v_proj"),
            "lora_layers": _lora(target_modules=["q_proj", "v_proj", "down_proj"], **last(4)),
            "lora_modules": _lora(target_modules=["q_proj", "v_proj"], **last(13)),
            "kron_lora": _kron_lora(1, 4, 64, **last(8)),
            "lsr_2_1": _lsr(2, 1),
        },
        "60k": {
            **_between(25),
            "vera": _vera(312, "q_proj", "k_proj", "v_proj", "o_proj", "down_proj"),
            "lora_layers": _lora(**last(5)),
            "lora_modules": _lora(target_modules=["q_proj", "v_proj", "o_proj"]),
            "kron_lora": _kron_lora(1, 4, 8),
            "lsr_2_3": _lsr(2, 3),
            "lsr_16_1": _lsr(16, 1),
        },
        "150k": {
            **_between(40),
            "lora_layers": _lora(**last(12)),
            "lora_modules": _lora(target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]),
            "kron_lora": _kron_lora(2, 4, 4),
            "lsr_4_6": _lsr(4, 6),
            "lsr_16_3": _lsr(16, 3),
        },
        "600k": {
            **_between(80),
            "lora": _lora(2),
            "slora": _square("slora", 2),
            "kron_lora": _kron_lora(8, 4, 4),
            "lsr_16_11": _lsr(16, 11),
            "lsr_32_8": _lsr(32, 8),
        },
    }


# by model and size
ROWS: dict[str, dict[str, dict[str, AdapterRow]]] = {
    "smollm2": {size: {**rows, **_variants(size, rows)} for size, rows in _smollm2().items()},
    "qwen": _qwen(),
}


def target(model: str, size: str) -> float:
    """Return how many parameters a size is on a model."""
    return SIZES[size] * LORA_8[model] / LORA_8["smollm2"]
