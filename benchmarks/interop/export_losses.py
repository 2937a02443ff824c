"""What does each export of a trained adapter weigh, and what does it lose in logits and in accuracy?

    lsr-scale train configs/smollm2_lsr.yaml --set training.max_steps=40 --set training.output_dir=runs/short
    python -m benchmarks.interop.export_losses runs/short --limit 195 --out benchmarks/results/export/NAME.json

Every form is exported, loaded by PEFT or Transformers and compared with the adapter on the base of its training, in
float32: the logits of the prompts that `--verify` uses, and the answers to the run's tasks (`export.verify`).
"""

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.command_line import new_file, script_parser

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "adapter, 16 bits": ("adapter", {"bits": 16}),
    "adapter, 8 bits": ("adapter", {"bits": 8}),
    "adapter, 4 bits": ("adapter", {"bits": 4}),
    "lora, float32": ("lora", {}),
    "lora, bfloat16": ("lora", {"dtype": "bfloat16"}),
    "lora, float32, --max-rank 8": ("lora", {"max_rank": 8}),
    "merged, bfloat16": ("merged", {}),
    "merged, NF4 again": ("merged", {"dtype": "nf4"}),
    "gguf --merged, float16": ("gguf", {"merged": True}),
    "gguf --merged, q8_0": ("gguf", {"merged": True, "dtype": "q8_0"}),
}


def main(arguments: list[str] | None = None) -> int:
    """Export, compare and write the result after every form."""
    parser = script_parser(__doc__)
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("--tasks", nargs="+", help="the run's own by default")
    parser.add_argument("--limit", type=int, default=195, help="questions of each task")
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--out", type=new_file, required=True, help="the JSON to write; must not exist yet")
    args = parser.parse_args(arguments)
    from lsr_scale import config, files
    from lsr_scale.exporting import export, open_adapter
    from lsr_scale.exporting.verify import Reference, questions_of

    torch.set_num_threads(1)
    changes = [f"eval.limit={args.limit}", *([f"eval.tasks={args.tasks}"] if args.tasks else [])]
    source = open_adapter(args.run)
    source = dataclasses.replace(source, run=config.load_run(Path(args.run) / "config.yaml", changes))
    reference = Reference(source, tasks=questions_of(source, args.limit))
    described = {"method": source.method, "quantization": (source.base or {}).get("quantization"), "limit": args.limit}
    described |= {"tasks": list(reference.tasks), "parameters": source.num_parameters(), "results": source.results}
    cases: dict[str, Any] = {}
    for form in args.forms:
        kind, options = FORMS[form]
        with tempfile.TemporaryDirectory(prefix="export-losses-") as place:
            folder = Path(place) / "out"
            facts = export(args.run, kind, folder, verify=False, say=lambda text: None, **options)
            whole = kind == "merged" or bool(options.get("merged"))
            agreement = reference.of_model(folder) if whole else reference.of_adapter(folder)
            sizes = {file.suffix[1:]: file.stat().st_size for file in folder.iterdir() if file.stat().st_size > 2**16}
        cases[form] = {"facts": facts, "file_bytes": sizes, "agreement": dataclasses.asdict(agreement)}
        print(f"{form}: {agreement.line()}; {agreement.accuracy_lines()}", flush=True)
        files.write_json(args.out, {"env": files.environment(), "config": described, "cases": cases})
    return 0


if __name__ == "__main__":
    sys.exit(main())
