"""The losses of short runs as they were at a release: what changes no behaviour changes none of them.

    python -m tests.golden_losses             compare with the file of this kind of device, bit for bit
    python -m tests.golden_losses --write     take what is computed now as the new release's

Bits are equal on one machine and set of versions only; `test_golden_losses.py` allows what another CPU rounds.
"""

import argparse
import gc
import json
import platform
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.helpers.tiny_runs import (
    completions,
    do,
    labelled,
    metrics,
    save_classifier,
    save_llama,
    tiny_run,
    write_rows,
)

FOLDER = Path(__file__).parent / "golden"
METHODS = ("lsr", "kron_lora", "lora")
BASES = ("none", "nf4", "int8")
FUSED = {"training": {"fused": "on"}}
CASES: dict[str, dict[str, Any]] = {
    **{
        f"{method}, {base}": {"model": {"quantization": base}, "adapter": {"method": method}}
        for method in METHODS
        for base in BASES
    },
    "krona, nf4": {"adapter": {"method": "krona"}},
    "kadaptation, nf4": {"adapter": {"method": "kadaptation", "phm_dim": 4}},
    **{f"{method}, nf4, fused": {"adapter": {"method": method}, **FUSED} for method in METHODS},
    "lsr, nf4, fused, packed": {"training": {"fused": "on", "packing": True, "max_length": 40}},
    "lsr, nf4, fused, recomputed": {"training": {"fused": "on", "memory": "save"}},
    "lsr, nf4, accumulated": {"training": {"gradient_accumulation_steps": 3}},
    "lora, none, classifier": {
        "model": {"quantization": "none", "task": "seq_cls", "num_labels": 2},
        "adapter": {"method": "lora", "target_modules": ["query", "value"]},
        "eval": {"tasks": []},
    },
}
if torch.cuda.is_available():  # CPUs round bfloat16 each in its own way
    CASES["lsr, nf4, fused, bfloat16"] = {"model": {"dtype": "bfloat16"}, **FUSED}


def losses(name: str, folder: Path) -> list[float]:
    """Return the loss of every step of a case, all in float32.

    Args:
        name: Of the case.
        folder: For its model, data and run.
    """
    sections = {section: dict(values) for section, values in CASES[name].items()}
    if sections.get("model", {}).get("task") == "seq_cls":
        save_classifier(folder / "model", "bert")
        rows = labelled(12)
    else:
        save_llama(folder / "model", num_hidden_layers=2)
        rows = completions(12)
        sections["eval"] = {"tasks": []}
    write_rows(folder / "rows.jsonl", rows)
    if sections.get("adapter", {}).get("method") == "lsr":
        del sections["adapter"]  # as in `tiny_run`
    model = {"name": str(folder / "model"), "dtype": "float32", **sections.pop("model", {})}
    training = {"save_strategy": "no", "full_determinism": torch.cuda.is_available(), **sections.pop("training", {})}
    run = tiny_run(folder, model=model, training=training, **sections)
    return [row["loss"] for row in metrics(do(run)) if "loss" in row]


def all_losses(names: Any = tuple(CASES)) -> dict[str, list[float]]:
    """Return the losses of some cases by name."""
    found = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = losses(name, Path(folder))
        gc.collect()
    return found


def file() -> Path:
    """Return where the losses of this kind of device are kept."""
    return FOLDER / ("gpu.json" if torch.cuda.is_available() else "cpu.json")


def main(arguments: list[str] | None = None) -> int:
    """Compare, or write; return 1 where something differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args(arguments).write
    computed = all_losses()
    if write:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
        made_with = {"torch": torch.__version__, "transformers": transformers.__version__, "device": device}
        FOLDER.mkdir(exist_ok=True)
        file().write_text(json.dumps({"made_with": made_with, "losses": computed}, indent=1) + "\n", encoding="utf-8")
        return 0
    golden = json.loads(file().read_text(encoding="utf-8"))["losses"]
    different = [name for name in golden | computed if golden.get(name) != computed.get(name)]
    for name in different:
        print(f"{name}: {computed.get(name)}, not {golden.get(name)}")
    print(f"{len(computed) - len(different)} of {len(computed)} cases are equal bit for bit")
    return int(bool(different))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
