"""What would make factored adapters fit more at LoRA's size? A sweep of named variants on SmolLM2, by held-out loss.

    python -m benchmarks.quality.variants --data DATA_FOLDER --out benchmarks/results/variants --jobs 6

Each variant gives every linear a pair (down, up) and differs in what of it trains, how it starts and what layers share:

    lora     dense pairs: LoRA
    lsr      LSR-Adapt; `left_out`/`left_in` choose the split, "heads" puts the boundary between attention heads
    kron     Kron-LoRA with `terms` of them summed
    full     sums of `terms` Kronecker products in place of a pair, of full rank: KronA where it is one
    train_down: false    only `up` trains, `down` stays as it started (LoRA-FA, arXiv 2308.03303; 2402.16842)
    start: gradient      `down` starts as the top right singular vectors of the weight's gradient over 512 rows (as in
                         LoRA-GA, arXiv 2407.05000), for `lsr` as the nearest sum of Kronecker products
    shared               names of factors that all layers have in common
    up_rate              what `up`'s rate is over `down`'s (LoRA+, arXiv 2402.12354)

Training rows of the five tasks of `commonsense.py`, one epoch of 128 rows a step, a tenth held out by hash. The measure
is the loss of held-out right answers in nats a token: far less noisy than accuracy. A setting is a file of its own.
"""

import hashlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.command_line import script_parser
from benchmarks.models import LINEARS, SMOLLM2
from benchmarks.quality import parametrization
from benchmarks.quality.parametrization import PairedLinear, encoded, evaluate, padded, run
from lsr_scale.adapters.methods.kron_lora import KronLora, KronLoraConfig
from lsr_scale.adapters.methods.krona import Krona, KronaConfig
from lsr_scale.adapters.methods.lsr import Lsr, LsrConfig

TASKS = ("arc_easy", "arc_challenge", "openbookqa", "piqa", "winogrande")
BATCH = 128
GRADIENT_ROWS = 512
LENGTH = 48  # tokens; what is longer, a tenth of the rows, loses its beginning
HEAD = 64  # SmolLM2's


def kron_fit(matrices: Tensor, left: tuple[int, int], terms: int) -> tuple[Tensor, Tensor, float]:
    """Return the nearest sums of Kronecker products and the share of the squares that they hold.

    By the singular vectors of the rearranged matrix (Van Loan and Pitsianis, 1993).

    Args:
        matrices: `[L, M m, N n]`.
        left: `(M, N)`.
        terms: How many products.

    Returns:
        Factors `[L, terms, M, N]` and `[L, terms, m, n]`, of equal norms, and the share, a mean over L.
    """
    rows, columns = matrices.shape[1] // left[0], matrices.shape[2] // left[1]
    split = matrices.view(-1, left[0], rows, left[1], columns).transpose(2, 3)  # [L, M, N, m, n]
    u, s, v = torch.linalg.svd(split.flatten(3).flatten(1, 2), full_matrices=False)
    root = s[:, :terms].sqrt()
    lefts = (u[:, :, :terms] * root[:, None]).mT.reshape(-1, terms, *left)
    rights = (v[:, :terms] * root[..., None]).reshape(-1, terms, rows, columns)
    return lefts, rights, float((s[:, :terms].square().sum(1) / s.square().sum(1)).mean())


class Variant(parametrization.Trainee):
    """A model whose linears of one kind have their factors in stacks, one a layer or one for all."""

    length = LENGTH

    def __init__(self, model: nn.Module, setting: dict[str, Any], seed: int, gradients: dict[str, Tensor]) -> None:
        """Draw the factors of a setting.

        Args:
            model: Its adapted linears are `PairedLinear`.
            setting: See the module's text.
            seed: Of what is drawn.
            gradients: For `start: gradient`, by kind, the weights' `[L, out, in]`.
        """
        self.model, self.setting = model, setting
        torch.manual_seed(seed)
        kinds: dict[str, list[PairedLinear]] = {}
        for name, module in model.named_modules():
            if isinstance(module, PairedLinear):
                kinds.setdefault(name.rsplit(".", 1)[-1], []).append(module)
        self.kinds: list[tuple[list[PairedLinear], dict[str, Tensor], Any, float]] = []
        self.parameters, self.rate_ratios, self.captured_shares = [], [], []
        device = next(model.parameters()).device
        for kind, modules in kinds.items():
            factors, method, scaling = self._drawn(kind, modules, gradients.get(kind))
            for name, value in factors.items():
                shared = name in setting.get("shared", ())
                trains = not (name.split("_")[0] == "down" and not setting.get("train_down", True))
                value = (value[:1] if shared else value).to(device).contiguous()
                factors[name] = value.requires_grad_(trains)
                if trains:
                    self.parameters.append(factors[name])
                    self.rate_ratios.append(setting.get("up_rate", 1.0) if name.startswith("up") else 1.0)
            self.kinds.append((modules, factors, method, scaling))
        self.num_parameters = sum(p.numel() for p in self.parameters)

    def _drawn(self, kind: str, modules: list[PairedLinear], gradient: Tensor | None) -> tuple[dict, Any, float]:
        setting, count = self.setting, len(modules)
        size_in, size_out = modules[0].in_features, modules[0].out_features
        rank = setting["rank"]
        wanted = None
        if setting.get("start") == "gradient":
            assert gradient is not None
            tried = min(rank + 8, size_in, size_out)
            wanted = torch.svd_lowrank(gradient.float(), tried, niter=8)[2][..., :rank].mT.cpu()  # rows of norm 1
        if setting["form"] == "lora":
            down = torch.empty(count, rank, size_in)
            nn.init.kaiming_uniform_(down[0], a=math.sqrt(5))
            bound = 1 / math.sqrt(size_in)
            down = torch.empty_like(down).uniform_(-bound, bound) if wanted is None else wanted / math.sqrt(3)
            return {"down": down, "up": torch.zeros(count, size_out, rank)}, None, setting["alpha"] / rank
        config: Any
        if setting["form"] == "full":
            shapes = Krona.parameter_shapes(size_in, size_out, KronaConfig())
            left = torch.empty(count, setting["terms"], *shapes["left"])
            bound = 1 / math.sqrt(left.shape[-1])  # KronA's own start
            right = torch.zeros(count, setting["terms"], *shapes["right"])
            return {"left": left.uniform_(-bound, bound), "right": right}, "full", setting["alpha"]
        if setting["form"] == "kron":
            config = KronLoraConfig(rank=rank, left_in=2, left_out=16, alpha=setting["alpha"])
            method: Any = KronLora
        else:
            lefts: dict[str, Any] = {name: setting.get(name) for name in ("left_in", "left_out")}
            for name, size in (("left_in", size_in), ("left_out", size_out)):
                if lefts[name] == "heads":  # of a size that is made of heads
                    is_heads = kind in (("o_proj",) if name == "left_in" else ("q_proj", "k_proj", "v_proj"))
                    lefts[name] = size // HEAD if is_heads else None
            config = LsrConfig(rank=rank, separation_rank=setting["terms"], alpha=setting["alpha"], **lefts)
            method = Lsr
        terms = setting.get("terms", 1) if setting["form"] == "kron" else 1
        drawn = []
        for _ in range(count * terms):
            params = {k: torch.empty(s) for k, s in method.parameter_shapes(size_in, size_out, config).items()}
            method.init_parameters(params, config)
            drawn.append(params)
        factors = {name: torch.stack([params[name] for params in drawn]) for name in drawn[0]}
        if setting["form"] == "kron":
            named = {"left": "up_scale", "right_up": "up_right", "right_down": "down_right"}
            return (
                {named[k]: v.view(count, terms, *v.shape[1:]) for k, v in factors.items()},
                "kron",
                config.scaling,
            )
        if wanted is not None:
            shape = factors["down_left"].shape
            left, right, share = kron_fit(wanted, (shape[2], shape[3]), shape[1])
            norm = (wanted.square().sum((1, 2)) / _norm_squared(left, right)) ** 0.25
            factors["down_left"], factors["down_right"] = left * _as(norm, left), right * _as(norm, right)
            self.captured_shares.append(share)
        return factors, method, config.scaling

    def set_pairs(self) -> None:
        """Materialize every kind's factors and hand each layer its pair."""
        for modules, factors, method, scaling in self.kinds:
            if method is None:
                down, up = factors["down"], factors["up"]
            elif method == "full":
                delta = torch.einsum("ltab,ltcd->lacbd", factors["left"], factors["right"])
                up = delta.flatten(3).flatten(1, 2)
                down = torch.eye(up.shape[-1], device=up.device)[None]
            elif method == "kron":
                # a term's pair, then the terms' side by side
                factors_of_kron = {
                    "left": factors["up_scale"],
                    "right_up": factors["up_right"],
                    "right_down": factors["down_right"],
                }
                down, up = KronLora.materialize(factors_of_kron)
                down, up = down.flatten(1, 2), up.movedim(1, 2).flatten(2)
            else:
                down, up = method.materialize(factors)
            count = len(modules)
            downs, ups = (m.bfloat16().expand(count, -1, -1).unbind() for m in (down, up * scaling))
            for module, down_of_it, up_of_it in zip(modules, downs, ups, strict=True):
                module.pair = down_of_it, up_of_it


def _norm_squared(left: Tensor, right: Tensor) -> Tensor:
    """Return the squared norms of sums of Kronecker products, `[L]`."""
    grams = [torch.einsum("lsab,ltab->lst", factor, factor) for factor in (left, right)]
    return (grams[0] * grams[1]).sum((1, 2))


def _as(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *(1 for _ in like.shape[1:]))


def weight_gradients(model: nn.Module, train: list) -> dict[str, Tensor]:
    """Return the gradients of the adapted weights over the first rows, by kind, `[L, out, in]`."""
    named = [(n.rsplit(".", 1)[-1], m) for n, m in model.named_modules() if isinstance(m, PairedLinear)]
    for _, module in named:
        module.pair = None
        module.weight.requires_grad_(True)
    device = next(model.parameters()).device
    for first in range(0, min(GRADIENT_ROWS, len(train)), BATCH):
        ids, labels = padded(train[first : first + BATCH], device, LENGTH)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
    by_kind: dict[str, list[Tensor]] = {}
    for kind, module in named:
        assert module.weight.grad is not None
        by_kind.setdefault(kind, []).append(module.weight.grad)
        module.weight.grad = None
        module.weight.requires_grad_(False)
    return {kind: torch.stack(values) for kind, values in by_kind.items()}


def lsr(rank: int, terms: int, **more: Any) -> dict[str, Any]:
    """Return a setting of LSR-Adapt."""
    return {"form": "lsr", "rank": rank, "terms": terms, "alpha": 2.0 * rank, **more}


def lora(rank: int, **more: Any) -> dict[str, Any]:
    """Return a setting of LoRA."""
    return {"form": "lora", "rank": rank, "alpha": 2.0 * rank, **more}


GRADIENT = {"start": "gradient"}
UP_ONLY = {"train_down": False}
HEADS = {"left_in": "heads", "left_out": "heads"}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora_2": lora(2),
    "lora_8": lora(8),
    "lsr_4": lsr(4, 16),
    "lsr_16": lsr(16, 16),
    "lsr_4_gradient": lsr(4, 16, **GRADIENT),
    "lora_4_up": lora(4, **UP_ONLY),
    "lsr_16_up": lsr(16, 16, **UP_ONLY),
    "lora_4_shared_down": lora(4, shared=["down"]),
    "lsr_16_shared_down": lsr(16, 16, shared=["down_left", "down_right"]),
    "lsr_4_heads": lsr(4, 16, **HEADS),
    "lsr_64_4": lsr(64, 4),
    "lora_2_gradient": lora(2, **GRADIENT),
    "lsr_16_up_gradient": lsr(16, 16, **UP_ONLY, **GRADIENT),
    "kron_8": {"form": "kron", "rank": 8, "terms": 1, "alpha": 32.0},
    "kron_2x4": {"form": "kron", "rank": 2, "terms": 4, "alpha": 8.0},
    "lsr_4_up_rate": lsr(4, 16, up_rate=4.0),
    "lora_2_up_rate": lora(2, up_rate=4.0),
    "lsr_8_shared_right": lsr(8, 32, shared=["down_right", "up_right"]),
    "lsr_16_8": lsr(16, 8),
    "lsr_2": lsr(2, 22),
    "lora_4_up_gradient": lora(4, **UP_ONLY, **GRADIENT),
    "lora_1": lora(1),
    "krona_1": {"form": "full", "rank": None, "terms": 1, "alpha": 1.0},
    "krona_2": {"form": "full", "rank": None, "terms": 2, "alpha": 1.0},
    "krona_4": {"form": "full", "rank": None, "terms": 4, "alpha": 1.0},
}
RATES = (8e-3, 4e-3, 1.6e-2)


def settings(names: list[str]) -> dict[str, dict[str, Any]]:
    """Return the settings by the stem of their file, all variants at one rate before the next rate."""
    return {f"{name}-{rate:g}": {**VARIANTS[name], "lr": rate, "variant": name} for rate in RATES for name in names}


def table(results: Path) -> str:
    """Return the Markdown table of a folder of results: the held-out loss of each variant by learning rate."""
    measured = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))]
    rates = sorted({row["lr"] for row in measured if "lr" in row})
    head = ["", "parameters", *(f"lr {rate:g}" for rate in rates)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for name in VARIANTS:
        rows = {row["lr"]: row for row in measured if row.get("variant") == name}
        losses = {rate: row["held_out_loss"] for rate, row in rows.items() if "held_out_loss" in row}
        if losses:
            cells = [f"{losses[rate]:.3f}" if rate in losses else "" for rate in rates]
            best = rates.index(min(losses, key=lambda rate: losses[rate]))
            cells[best] = f"**{cells[best]}**"
            count = next(row["trainable_parameters"] for row in rows.values() if "trainable_parameters" in row)
            lines.append(f"| {name} | {count:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Start the workers, or be one; return the exit status."""
    parser = script_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, a file a setting")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--part", type=int, help="be the worker of this number")
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds after which nothing is started")
    parser.add_argument("--limit", type=int, help="train and score on the first so many rows: is it wired up?")
    args = parser.parse_args()
    if args.part is None:
        words = [sys.executable, "-m", "benchmarks.quality.variants", *sys.argv[1:]]
        started = [subprocess.Popen([*words, "--part", str(part)]) for part in range(args.jobs)]
        return max(process.wait() for process in started)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lsr_scale import files
    from lsr_scale.model.builtin import ensure_converted

    began = time.monotonic()
    folder = ensure_converted(SMOLLM2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.to(device).eval().requires_grad_(False)
    train, held_out = encoded(tokenizer, args.data, TASKS, LENGTH)
    # the tasks mixed, the same for all workers
    train.sort(key=lambda row: hashlib.sha1(str(row).encode()).digest())
    train, held_out = train[: args.limit], held_out[: args.limit]
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in LINEARS:
            module.__class__ = PairedLinear
    gradients = weight_gradients(model, train)
    mine = [item for i, item in enumerate(settings(args.variants).items()) if i % args.jobs == args.part]
    for name, setting in mine:
        path = args.out / f"{name}.json"
        if path.is_file() or time.monotonic() - began > args.time_limit:
            continue
        try:
            trainee = Variant(model, setting, 0, gradients)
            result = run(trainee, setting, train, held_out, 1.0, 0, min(BATCH, len(train)))
            result["held_share"] = (
                sum(trainee.captured_shares) / len(trainee.captured_shares) if trainee.captured_shares else None
            )
        except torch.OutOfMemoryError as error:
            # says nothing about the setting
            raise SystemExit(f"{name}: out of memory with --jobs {args.jobs}; use fewer") from error
        except RuntimeError as error:
            result = {**setting, "error": str(error)[:300]}
        files.write_json(path, {**result, "env": files.environment()})
        shown = ("trainable_parameters", "train_loss_last_fifth", "held_out_loss", "error")
        print(name, {key: result[key] for key in shown if key in result}, flush=True)
    if args.part == 0 and not (args.out / "zero_shot.json").is_file():
        files.write_json(args.out / "zero_shot.json", evaluate(Variant(model, lora(1), 0, {}), held_out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
