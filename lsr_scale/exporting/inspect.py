"""What is in an adapter: shapes, ranks, size, and the spectrum and condition of every factor and update.

An update's singular values come from its exact pair: `up down = Q_u (R_u R_d^T) Q_d^T` by two thin QR, so those of the
small core are its own. A factor that is a stack of S matrices (the terms of a Kronecker sum) is taken as the matrix
`[S, elements of a term]`: by Van Loan's rearrangement its rank says how many of the terms count. Everything is computed
in float64 on factors as they lie in the file; a condition beyond 1e7 is float32's rounding.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lsr_scale.exporting.base_factors import with_base_factors
from lsr_scale.exporting.source import AdapterSource, describe_file, open_adapter
from lsr_scale.run.plots import check_picture_place, picture_text, save_figure
from lsr_scale.units import byte_size

# of an update without a pair, whose singular values take a dense SVD
MAX_DENSE_ELEMENTS = 2**21


def inspect_adapter(path: str | Path) -> dict[str, Any]:
    """Return what is in the adapter of a run folder or of an adapter folder, as JSON holds it.

    Returns:
        `method`, `base`, `parameters`, `bytes`, `options`, and `modules`: by name its `shape` `[out, in]`, the `rank`
        of its pair (null where there is none), `scaling`, the `update`'s and every factor's singular values (largest
        first), `norm` (Frobenius), `condition` (largest over smallest; null where that is not finite) and
        `effective_rank` (Roy and Vetterli 2007: the exponential of the singular values' entropy).

    Raises:
        UserError: if there is no adapter, or it is damaged.
    """
    source = with_base_factors(open_adapter(path))
    size = describe_file(source.folder / "adapter_model.safetensors")
    parameters = source.num_parameters()
    fully_trained = {name: list(value.shape) for name, value in source.extra.items()}
    factor_bytes = size["tensors"] - sum(value.numel() * value.element_size() for value in source.extra.values())
    described, named = source.base or {}, source.config.base_model_name_or_path
    return {
        "folder": str(source.folder),
        "method": source.method,
        "base": source.run.model.name if source.run else described.get("name") or named,
        "base_quantization": described.get("quantization"),
        "parameters": parameters,
        "bytes": size,
        "bits_per_parameter": round(8 * factor_bytes / parameters, 2),
        "options": _options(source),
        "trained_whole": fully_trained,
        "modules": {name: _module(source, name) for name in sorted(source.modules, key=_natural)},
    }


def _options(source: AdapterSource) -> dict[str, Any]:
    """Return the plain values of a configuration, less what is off; PEFT's own methods' under this package's names."""
    config = source.config
    if source.method == "lokr":
        options = {"rank": config.r, "alpha": config.alpha, "decompose_factor": config.decompose_factor}
        return options | ({"decompose_both": True} if config.decompose_both else {})
    if source.method == "lora":
        return {"rank": config.r, "alpha": config.lora_alpha} | ({"use_rslora": True} if config.use_rslora else {})
    names = [name for name, value in vars(config).items() if type(value) in (int, float, str) or value is True]
    skipped = {"inference_mode", "base_model_name_or_path", "revision", "task_type", "peft_version", "dropout"}
    return {name: getattr(config, name) for name in names if name not in skipped}


def _module(source: AdapterSource, name: str) -> dict[str, Any]:
    factors = {factor: _spectrum(value) for factor, value in source.modules[name].items()}
    if source.is_low_rank:
        down, up = (matrix.double() for matrix in source.pair(name))
        shape, rank = [up.shape[0], down.shape[1]], down.shape[0]
        core = torch.linalg.qr(up, mode="r").R @ torch.linalg.qr(down.T, mode="r").R.T
        update = _spectrum(core) | {"shape": shape}
    else:
        delta = source.delta(name)
        shape, rank = list(delta.shape), None
        update = _spectrum(delta) if delta.numel() <= MAX_DENSE_ELEMENTS else None
    return {"shape": shape, "rank": rank, "scaling": source.scaling(name), "update": update, "factors": factors}


def _spectrum(value: Tensor) -> dict[str, Any]:
    matrix = value.double()
    values = torch.linalg.svdvals(matrix.flatten(1)) if matrix.dim() > 1 else matrix.abs().sort(descending=True).values
    shares = values / values.sum()
    condition = float(values[0] / values[-1]) if values[-1] > 0 else math.inf
    entropy = -torch.special.xlogy(shares, shares).sum()
    return {
        "shape": list(value.shape),
        "norm": float(values.norm()),
        "condition": condition if math.isfinite(condition) else None,
        "effective_rank": float(entropy.exp()) if values[0] > 0 else 0.0,
        "singular_values": values.tolist(),
    }


def _natural(name: str) -> list[Any]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def kinds(report: dict[str, Any]) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    """Return the modules that differ only in a layer's number, as `(number, module)`, by their name with `*` for it."""
    by_kind: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for name, module in report["modules"].items():
        number = re.search(r"\.(\d+)\.", name)
        kind = re.sub(r"\.\d+\.", ".*.", name, count=1)
        by_kind.setdefault(kind, []).append((int(number[1]) if number else 0, module))
    return by_kind


def short_names(names: list[str]) -> dict[str, str]:
    """Return the shortest end of each name, from a dot on, that tells it from the others."""
    shortest = {}
    for name in names:
        parts = name.split(".")
        ends = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        shortest[name] = next(end for end in ends if sum(f".{other}".endswith(f".{end}") for other in names) == 1)
    return shortest


def render(report: dict[str, Any], whole: bool = True) -> Group:
    """Return a report for a person, to be printed by a rich console: medians over the layers.

    Args:
        report: What is in the adapter.
        whole: The table of the factors too; else the updates alone, a screen.
    """
    size = report["bytes"]
    summary = Table.grid(padding=(0, 2))
    options = ", ".join(f"{name} {value}" for name, value in report["options"].items())
    for name, text in (
        ("adapter", f"{report['method']} ({options})"),
        ("of", f"{report['base'] or 'an unknown base'}, held in {report['base_quantization'] or 'unknown'}"),
        ("parameters", f"{report['parameters']:,} in {len(report['modules'])} linear layers"),
        (
            "file",
            f"{byte_size(size['file'])}, {report['bits_per_parameter']:g} bits a parameter",
        ),
        *([("fully trained", ", ".join(report["trained_whole"]))] if report["trained_whole"] else []),
    ):
        summary.add_row(Text(name, style="bold"), Text(text))
    grouped = kinds(report)
    names = short_names(list(grouped))
    style: dict[str, Any] = {
        "title_justify": "left",
        "box": box.SIMPLE_HEAD,
        "pad_edge": False,
        "padding": (0, 1, 0, 0),
    }
    updates, factors = (Table(title=f"{what}, median over the layers", **style) for what in ("Updates", "Factors"))
    columns = ("linear", "n", "shape", "rank", "norm", "largest", "eff. rank", "condition", "worst")
    for column in columns:
        updates.add_column(column, justify="left" if column == "linear" else "right", no_wrap=True)
    for column in ("linear", "factor", "shape", "norm", "eff. rank", "condition", "worst"):
        factors.add_column(column, justify="left" if column in ("linear", "factor") else "right", no_wrap=True)
    for kind, members in grouped.items():
        modules = [module for _, module in members]
        first, spectra = modules[0], [module["update"] for module in modules if module["update"] is not None]
        updates.add_row(
            names[kind],
            str(len(modules)),
            _shape(first["shape"]),
            ", ".join(map(str, sorted({m["rank"] or min(m["shape"]) for m in modules}))),
            *_columns(spectra, largest=True),
        )
        for index, (factor, held) in enumerate(first["factors"].items()):
            spectra = [module["factors"][factor] for module in modules if factor in module["factors"]]
            factors.add_row("" if index else names[kind], factor, _shape(held["shape"]), *_columns(spectra))
        factors.add_section()
    notes = []
    if any(module["update"] is None for _, members in grouped.items() for _, module in members):
        notes.append(Text(f"updates of full rank and more than {MAX_DENSE_ELEMENTS:,} elements: no spectrum of theirs"))
    return Group(summary, updates, *([factors] if whole else []), *notes)


def _columns(spectra: list[dict[str, Any]], largest: bool = False) -> list[str]:
    if not spectra:
        return [""] * (4 + largest)
    conditions = [math.inf if spectrum["condition"] is None else spectrum["condition"] for spectrum in spectra]
    cells = [_median([spectrum["norm"] for spectrum in spectra])]
    cells += [_median([spectrum["singular_values"][0] for spectrum in spectra])] if largest else []
    cells += [_median([spectrum["effective_rank"] for spectrum in spectra]), _median(conditions), max(conditions)]
    return [_number(value) for value in cells]


def _shape(shape: list[int]) -> str:
    return "x".join(map(str, shape))


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _number(value: float) -> str:
    return "singular" if math.isinf(value) else f"{value:.3g}"


def check_place(picture: Path) -> None:
    """Raise a UserError if a picture would take the place of something else than an earlier one of ours."""
    check_picture_place(picture, "--png")


def draw(report: dict[str, Any], picture: Path) -> None:
    """Draw a report as a PNG: spectra of the updates, their norms and effective ranks by layer, factors' conditions.

    Raises:
        UserError: if something else lies there, or the picture cannot be written.
    """
    check_place(picture)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    grouped = kinds(report)
    names = short_names(list(grouped))
    figure, panels = pyplot.subplots(2, 2, figsize=(12, 8), dpi=120)
    (spectra, norms), (ranks, conditions) = panels
    positions: list[str] = []
    for index, (kind, members) in enumerate(grouped.items()):
        color = f"C{index % 10}"
        style = {"color": color, "linestyle": ("-", "--", ":")[index // 10 % 3]}
        held = [(number, module["update"]) for number, module in members if module["update"] is not None]
        lines = [u["singular_values"] for _, u in held if u["norm"] > 0]
        if lines:
            shared = min(map(len, lines))
            columns = [sorted(line[place] / line[0] for line in lines) for place in range(shared)]
            places = range(1, shared + 1)
            spectra.plot(places, [column[len(column) // 2] for column in columns], label=names[kind], **style)
            spectra.fill_between(places, [c[0] for c in columns], [c[-1] for c in columns], color=color, alpha=0.06)
        if held:
            numbers = [number for number, _ in held]
            marked = {**style, "marker": "o", "markersize": 2.5, "linewidth": 1}
            norms.plot(numbers, [update["norm"] for _, update in held], label=names[kind], **marked)
            ranks.plot(numbers, [update["effective_rank"] for _, update in held], label=names[kind], **marked)
        for factor in members[0][1]["factors"]:
            if factor not in positions:
                positions.append(factor)
            values = [m["factors"][factor]["condition"] for _, m in members if factor in m["factors"]]
            points = [value for value in values if value is not None]
            place = positions.index(factor) + (index - (len(grouped) - 1) / 2) * 0.8 / len(grouped)
            if points:
                conditions.plot([place] * len(points), points, "_", color=color, markersize=7, alpha=0.7)
    spectra.set(title="singular values of the updates: median layer, all layers shaded", xlabel="place")
    spectra.set_ylabel("of the largest")
    norms.set(title="size of the updates", xlabel="layer", ylabel="Frobenius norm")
    ranks.set(title="effective rank of the updates", xlabel="layer", ylabel="exp(entropy of singular values)")
    conditions.set(title="condition of the factors, a stroke a layer", ylabel="largest over smallest singular value")
    conditions.set_xticks(range(len(positions)), positions)
    for axes in (spectra, conditions):
        if axes.lines:
            axes.set_yscale("log")
    for axes in (*panels[0], *panels[1]):
        axes.grid(alpha=0.3)
        if not axes.lines:
            axes.text(0.5, 0.5, "no update to draw", ha="center", transform=axes.transAxes)
    base = f" of {report['base']}" if report["base"] else ""
    figure.suptitle(picture_text(f"{report['method']} adapter{base}: {report['parameters']:,} parameters"))
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    if norms.lines:
        figure.legend(*norms.get_legend_handles_labels(), loc="lower center", ncols=min(8, len(norms.lines)))
    save_figure(figure, picture)
