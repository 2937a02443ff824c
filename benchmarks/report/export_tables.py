"""Tables of what exports lose, out of the results of `export_losses.py` and `llama_cpp_agreement.py`."""

import json
from pathlib import Path
from typing import Any

from benchmarks.report.markdown import grid

LLAMA_CPP = {
    "base": "the base's own GGUF (Q4_1), no adapter",
    "adapter": "the same with our adapter",
    "adapter, float32": "our adapter on that GGUF in float32",
    "wrong order": "a control: q's and k's rows not in llama.cpp's order",
}


def read(path: Path) -> dict[str, Any]:
    """Return a result."""
    return json.loads(path.read_text(encoding="utf-8"))


def _accuracy(case: dict[str, Any]) -> dict[str, Any]:
    (only,) = case["agreement"]["accuracy"].values()
    return only


def losses(run: dict[str, Any]) -> str:
    """Return what each form loses."""
    head = ["export", "bytes", "of 16 bits", "logits, relative error"]
    head += ["of what the adapter changes", "same next token", "right", "answered otherwise"]
    rows = []
    for name, case in run["cases"].items():
        facts, agreement, accuracy = case["facts"], case["agreement"], _accuracy(case)
        size = facts.get("bytes of tensors", facts.get("bytes of the file"))
        share = facts.get("tensors, of the 16-bit factors'")
        rows.append([name, f"{size:,}", "" if share is None else f"{share:.3f}", f"{agreement['relative_error']:.1e}"])
        rows[-1] += [f"{100 * agreement[key]:.3g} %" for key in ("share_of_effect", "same_next_token")]
        rows[-1] += [f"{100 * accuracy['exported']:.1f} %", str(accuracy["answered_otherwise"])]
    first = next(iter(run["cases"].values()))
    first_accuracy = _accuracy(first)
    text = (
        f"{run['config']['results']['steps']} steps on {run['config']['results']['model'].partition(':')[2]} in "
        f"{run['config']['quantization'].upper()}; {first_accuracy['questions']} held-out questions, "
        f"{100 * first_accuracy['trained']:.1f} % right as trained:"
    )
    return f"{text}\n\n{grid(head, rows)}"


def llama_cpp(run: dict[str, Any]) -> str:
    """Return how far llama.cpp's logits and answers are from ours."""
    cases = {name: case for name, case in run["cases"].items() if name != "what the adapter changes"}
    rows = [
        [LLAMA_CPP.get(name, name), f"{case['relative_error']:.1e}"]
        + [f"{100 * case[key]:.1f} %" for key in ("next_token", "choice")]
        for name, case in cases.items()
    ]
    some = next(iter(cases.values()))
    text = (
        f"llama-cpp-python {run['config']['llama_cpp_python']}, {some['rows']} rows, {some['positions']:,} positions:"
    )
    return f"{text}\n\n{grid(['in llama.cpp', 'logits, relative error', 'same next token', 'same answer'], rows)}"


def sections(results: Path) -> list[str]:
    """Return the part of RESULTS.md on exports."""
    parts = ["## Exports"]
    for name, table, command in (
        ("losses-*.json", losses, "interop/export_losses.py"),
        ("llama-cpp-*.json", llama_cpp, "interop/llama_cpp_agreement.py"),
    ):
        for path in sorted(results.glob(name)):
            parts += [f"`{results.name}/{path.name}` (`benchmarks/{command}`). {table(read(path))}"]
    return parts if len(parts) > 1 else []
