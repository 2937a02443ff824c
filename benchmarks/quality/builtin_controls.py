"""Is the gain on the embedded set real? The demo's run over seeds, beside three controls.

    python -m benchmarks.quality.builtin_controls --untouched DATA/arc_easy --out benchmarks/results/controls/NAME.json

real         the shipped configuration                       held-out accuracy should rise
shuffled     every training answer replaced by a wrong one   should not rise
no question  the held-out choices scored alone               should stay near chance, before and after
untouched    a task that was not trained on                  should not collapse

Each row says its command-line equivalent.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.command_line import new_file, script_parser
from lsr_scale import config, files
from lsr_scale.data import commonsense
from lsr_scale.run import evaluate
from lsr_scale.run.train import train

CONFIG = Path("configs/smollm2_lsr.yaml")


def one_run(folder: Path, seed: int, changes: list[str]) -> dict[str, Any]:
    """Train the shipped configuration with changes, and return its results."""
    overrides = [f"training.output_dir={folder}", f"training.seed={seed}", *changes]
    done = train(config.load_run(CONFIG, overrides), overwrite=True, quiet=True)
    results = files.read_json(done.results, "results")
    return {"seed": seed, "command": command(overrides), **results}


def command(overrides: list[str]) -> str:
    """Return what a person types for the same."""
    return " ".join(["lsr-scale train", str(CONFIG), *(f"--set '{change}'" for change in overrides)])


def main() -> None:
    """Run everything and write the JSON."""
    parser = script_parser(__doc__)
    parser.add_argument("--untouched", default="arc_easy", help="a multiple-choice task that is not trained on")
    parser.add_argument("--untouched-limit", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=new_file, required=True, help="the JSON to write; must not exist yet")
    parser.add_argument("--work", type=Path, default=None, help="where the runs go; a temporary folder by default")
    args = parser.parse_args()

    work = args.work or Path(tempfile.mkdtemp())
    rows: list[dict[str, Any]] = []

    def add_row(kind: str, row: dict[str, Any]) -> None:
        rows.append({"kind": kind, **row})
        print(json.dumps(rows[-1]), flush=True)
        files.write_json(args.out, {"env": files.environment(), "rows": rows})

    for seed in range(args.seeds):
        run = work / f"real-{seed}"
        everything = ["eval.limit=195"]
        add_row("real", one_run(run, seed, everything))
        shuffled = work / f"shuffled-{seed}.jsonl"
        shuffled.parent.mkdir(parents=True, exist_ok=True)
        wrong = commonsense.shuffled(commonsense.rows("train"), seed)
        shuffled.write_text("".join(json.dumps(row) + "\n" for row in wrong))
        add_row("shuffled", one_run(work / f"shuffled-{seed}", seed, [*everything, f"data.train=[{shuffled}]"]))
        for base_only in (True, False):
            if base_only and seed:
                continue
            add_row("no question", {"seed": seed, **evaluate.evaluate_run(run, None, 195, base_only, True)})
            add_row(
                "untouched",
                {"seed": seed, **evaluate.evaluate_run(run, [args.untouched], args.untouched_limit, base_only)},
            )


if __name__ == "__main__":
    main()
