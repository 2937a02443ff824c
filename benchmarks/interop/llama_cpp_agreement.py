"""Does llama.cpp compute the adapted model that we trained? Next tokens and multiple-choice scores, row by row.

    pip install llama-cpp-python          # compiles for a few minutes
    lsr-scale train configs/smollm2_lsr.yaml --set training.max_steps=40 --set training.output_dir=runs/short
    python -m benchmarks.interop.llama_cpp_agreement runs/short --tasks builtin:commonsense DATA/arc_easy --limit 60 \\
        --out benchmarks/results/export/NAME.json

Each export is loaded by llama.cpp on the CPU (float32 KV cache) and compared with ours in float32:

base             the GGUF that SmolLM2's package carries (Q4_1), no adapter: what llama.cpp's own 8-bit arithmetic costs
adapter          `--to gguf` on that file; ours: the same file dequantized by Transformers, the adapter on it
adapter, float32 the same on the file dequantized by llama.cpp, so that little but the adapter can differ
wrong order      a control: q's and k's rows left in Transformers' order, which has to disagree
merged           `--to gguf --merged` in float32, float16 and q8_0; ours: the adapter on the base of its training

`next_token` is the share of positions of the rows (context and right answer) with the same most likely token,
`choice` the share of rows with the same most likely answer; `relative_error` is of the logits (Frobenius).
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.command_line import new_file, script_parser
from benchmarks.models import SMOLLM2


class LlamaCpp:
    """A GGUF model in llama.cpp, an adapter on it at choice."""

    def __init__(self, model: Path, adapter: Path | None = None) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self.model = llama_cpp.Llama(
            str(model),
            lora_path=str(adapter) if adapter else None,
            **dict(n_ctx=512, n_batch=512, n_threads=1, n_threads_batch=1, n_gpu_layers=0, verbose=False),
            **dict(logits_all=True, type_k=0, type_v=0),  # a float32 cache
        )

    def logits(self, ids: list[int]) -> np.ndarray:
        """Return the logits `[tokens, vocabulary]`."""
        self.model.reset()
        self.model.eval(ids)
        return self.model.scores[: len(ids)].copy()


def dequantized(model: Path, out: Path) -> Path:
    """Return a GGUF model in float32, written by llama.cpp itself."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = 0, True, 1
    assert llama_cpp.llama_model_quantize(str(model).encode(), str(out).encode(), params) == 0
    return out


def in_transformers_order(adapter: Path, out: Path) -> Path:
    """Return a copy of a GGUF adapter whose q and k rows are not in llama.cpp's order: what the export must not do."""
    import gguf

    from lsr_scale.exporting.gguf_file import from_rotary_order

    reader = gguf.GGUFReader(adapter)
    writer = gguf.GGUFWriter(out, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != gguf.Keys.General.ARCHITECTURE:
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        value = np.array(tensor.data)
        for part, heads in (("attn_q", 9), ("attn_k", 3)):
            if f".{part}.weight.lora_b" in tensor.name:
                value = from_rotary_order(torch.from_numpy(value), heads).numpy()
        writer.add_tensor(tensor.name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@dataclass(frozen=True)
class Reading:
    """What a model makes of the rows."""

    scores: list[list[float]]  # log-likelihoods, by row and choice
    logits: list[np.ndarray]  # of context and right answer, by row, [tokens, vocabulary]


def read(model: Callable[[list[int]], np.ndarray], rows: list[Any], answers: list[int]) -> Reading:
    """Return what a model makes of rows of (context, answer) token ids; `answers` says which answer is right."""
    scores, of_right = [], []
    for row, right in zip(rows, answers, strict=True):
        scores.append([])
        for index, (context, answer) in enumerate(row):
            logits = model(context + answer)
            values = torch.from_numpy(logits[len(context) - 1 : -1]).log_softmax(-1)
            scores[-1].append(float(values.gather(1, torch.tensor(answer)[:, None]).sum()))
            if index == right:
                of_right.append(logits)
    return Reading(scores, of_right)


def ours(model: Any) -> Callable[[list[int]], np.ndarray]:
    """Return a Transformers model as a function of token ids."""
    model.eval()

    @torch.no_grad()
    def logits(ids: list[int]) -> np.ndarray:
        return model(torch.tensor([ids])).logits[0].numpy()

    return logits


def compared(got: Reading, wanted: Reading, answers: list[int]) -> dict[str, Any]:
    """Return how far two models agree; positions are those of context and right answer."""
    pairs = list(zip(got.logits, wanted.logits, strict=True))
    same = np.concatenate([a.argmax(-1) == b.argmax(-1) for a, b in pairs])
    difference = sum(float(np.square(a - b, dtype=np.float64).sum()) for a, b in pairs)
    size = sum(float(np.square(b, dtype=np.float64).sum()) for _, b in pairs)
    theirs, own = (np.array([np.argmax(row) for row in reading.scores]) for reading in (got, wanted))
    moved = [abs(x - y) for a, b in zip(got.scores, wanted.scores, strict=True) for x, y in zip(a, b, strict=True)]
    return {
        "rows": len(answers),
        "positions": len(same),
        "next_token": float(same.mean()),
        "choice": float((theirs == own).mean()),
        "relative_error": (difference / size) ** 0.5,
        "log_likelihood_difference": {"median": float(np.median(moved)), "largest": max(moved)},
        "accuracy": float((theirs == answers).mean()),
        "our_accuracy": float((own == answers).mean()),
    }


def main(arguments: list[str] | None = None) -> int:
    """Export, load, compare and write the result."""
    parser = script_parser(__doc__)
    parser.add_argument("run", help=f"a run of {SMOLLM2}")
    parser.add_argument("--tasks", nargs="+", default=["builtin:commonsense"], help="multiple-choice tasks, or folders")
    parser.add_argument("--limit", type=int, default=60, help="rows of each task")
    parser.add_argument("--out", type=new_file, required=True, help="the JSON to write; must not exist yet")
    args = parser.parse_args(arguments)
    try:
        import llama_cpp  # pyright: ignore[reportMissingImports]
    except ImportError:
        parser.error("llama.cpp is not here; run: pip install llama-cpp-python")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, GgufConfig

    from lsr_scale import config, files
    from lsr_scale.adapters.save_and_load import load_adapter
    from lsr_scale.exporting import export, open_adapter
    from lsr_scale.exporting.verify import base_section, in_float32
    from lsr_scale.model import builtin, load_base, load_tokenizer
    from lsr_scale.run import evaluate
    from lsr_scale.scoring.scorer import encode_pairs

    torch.set_num_threads(1)
    source = open_adapter(args.run)
    run = config.load_run(Path(args.run) / "config.yaml", [f"eval.tasks={args.tasks}", f"eval.limit={args.limit}"])
    if run.model.name != SMOLLM2:
        parser.error(f"expected a run of {SMOLLM2}, which is a GGUF to begin with; got one of {run.model.name}")
    examples = [example for items in evaluate.load_tasks(run.eval).values() for example in items]
    tokenizer = load_tokenizer(SMOLLM2)
    rows = [encode_pairs(tokenizer, list(zip(e.contexts, e.continuations, strict=True))) for e in examples]
    answers = [example.answer for example in examples]
    agreements: dict[str, Any] = {}

    def check(case: str, theirs: LlamaCpp, wanted: Reading) -> None:
        began = time.perf_counter()
        agreements[case] = compared(read(theirs.logits, rows, answers), wanted, answers)
        print(f"{case}: {agreements[case]} ({time.perf_counter() - began:.0f} s)", flush=True)

    published = builtin.gguf_file(SMOLLM2)
    with tempfile.TemporaryDirectory(prefix="llama-cpp-") as place:
        work = Path(place)
        quiet: dict[str, Any] = {"verify": False, "say": lambda text: None}
        export(args.run, "lora", work / "lora", **quiet)
        export(args.run, "gguf", work / "gguf", **quiet)
        adapter = work / "gguf" / "adapter.gguf"
        base: Any = AutoModelForCausalLM.from_pretrained(
            published.parent,
            gguf_file=published.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        plain = read(ours(base), rows, answers)
        check("base", LlamaCpp(published), plain)
        adapted = read(ours(PeftModel.from_pretrained(base, str(work / "lora"))), rows, answers)
        agreements["what the adapter changes"] = compared(adapted, plain, answers)
        print(agreements["what the adapter changes"], flush=True)
        check("adapter", LlamaCpp(published, adapter), adapted)
        whole = dequantized(published, work / "float32.gguf")
        check("adapter, float32", LlamaCpp(whole, adapter), adapted)
        check("wrong order", LlamaCpp(whole, in_transformers_order(adapter, work / "wrong.gguf")), adapted)
        model, _ = load_adapter(in_float32(load_base(**base_section(source, None))), source.folder)
        trained = read(ours(model), rows, answers)
        for dtype in ("float32", "float16", "q8_0"):
            export(args.run, "gguf", work / dtype, merged=True, dtype=dtype, **quiet)
            check(f"merged, {dtype}", LlamaCpp(work / dtype / "model.gguf"), trained)
    described = {
        "tasks": [Path(task).name for task in args.tasks],
        "limit": args.limit,
        "llama_cpp_python": llama_cpp.__version__,
    }
    described |= {"method": source.method, "quantization": run.model.quantization, "results": source.results}
    files.write_json(args.out, {"env": files.environment(), "config": described, "cases": agreements})
    return 0


if __name__ == "__main__":
    sys.exit(main())
