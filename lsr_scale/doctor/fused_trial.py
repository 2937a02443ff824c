"""Is this machine fit for a run: versions, hardware, which fast paths are on and why others are not, what is known bad.

Every line is a `Finding`: "ok", a "note" that costs nothing or only speed, or "bad", which breaks a run or spoils its
result and comes with a remedy. What can be tried in a moment is tried (4- and 8-bit layers, their gradients, writing to
the cache) rather than concluded. Nothing is downloaded.
"""

import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import tomllib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import nn

from lsr_scale import distributed
from lsr_scale.config import RunConfig
from lsr_scale.errors import UserError
from lsr_scale.layers.frozen_linear import dequantize, freeze_quantized
from lsr_scale.model import builtin
from lsr_scale.screen import Screen

GIB = 2**30
Status = Literal["ok", "note", "bad"]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    group: str
    name: str
    found: str
    status: Status = "ok"
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that was found."""

    findings: list[Finding]

    @property
    def exit_code(self) -> int:
        """1 if anything is known to be bad, else 0."""
        return int(any(finding.status == "bad" for finding in self.findings))

    def to_json(self) -> str:
        """Return the report as a JSON document."""
        return json.dumps({"ok": self.exit_code == 0, "findings": [asdict(f) for f in self.findings]}, indent=2)


def doctor(run: RunConfig | None = None) -> Report:
    """Look at this machine; takes some seconds, as it imports everything that a run needs.

    Args:
        run: What it is to be fit for: a layer of its model is tried with its adapter. None: layers of a small model.
    """
    trials = functools.partial(fast_paths, run)
    groups: list[Callable[[], Iterator[Finding]]] = [versions, hardware, trials, helpers, surroundings]
    return Report([finding for group in groups for finding in group()])


def render(report: Report) -> Group:
    """Return the report for a person, to be printed by a rich console."""
    colors = {"ok": "green", "note": "yellow", "bad": "bold red"}
    tables: list[Any] = []
    for group in dict.fromkeys(finding.group for finding in report.findings):
        table = Table.grid(padding=(0, 2))
        for finding in report.findings:
            if finding.group == group:
                text = Text(finding.found)
                if finding.remedy:
                    text.append(f"\n-> {finding.remedy}", style=colors[finding.status])
                table.add_row(Text(finding.status, style=colors[finding.status]), finding.name, text)
        tables += [Text(group, style="bold"), table, Text()]
    bad = sum(finding.status == "bad" for finding in report.findings)
    verdict = f"{bad} known problem{'s' if bad > 1 else ''}, see above" if bad else "nothing known to be bad"
    return Group(*tables, Text(verdict, style="bold red" if bad else "bold green"))


# versions


def requirements() -> tuple[SpecifierSet, list[Requirement]]:
    """Return the Python versions and packages that this package asks for: installed, or from its checkout."""
    try:
        metadata = importlib.metadata.metadata("lsr_scale")
        python, texts = metadata["Requires-Python"], importlib.metadata.requires("lsr_scale") or []
    except importlib.metadata.PackageNotFoundError:
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        python, texts = project["requires-python"], project["dependencies"]
    found = [Requirement(text) for text in texts]
    return SpecifierSet(python or ""), [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]


def versions() -> Iterator[Finding]:
    """Check Python and every package against its range, and that the large ones import."""
    python, needed = requirements()
    version = platform.python_version()
    fine = Finding("versions", "python", version)
    yield fine if version in python else Finding("versions", "python", version, "bad", f"use Python {python}")
    for requirement in needed:
        yield check_version(requirement, installed_version(requirement.name))
    for name in ("trl", "deepspeed", "datasets", "bitsandbytes"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                importlib.import_module(name)
            except Exception as error:
                text = " ".join(str(error).split())[:200]
                remedy = f"pip install --force-reinstall {name}, with the versions above"
                yield Finding("versions", f"import {name}", f"{type(error).__name__}: {text}", "bad", remedy)


def installed_version(name: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_version(requirement: Requirement, version: str | None) -> Finding:
    """Compare an installed version with what is asked for."""
    command = f'pip install "{requirement}"'
    if version is None:
        return Finding("versions", requirement.name, "not installed", "bad", command)
    if not requirement.specifier.contains(version, prereleases=True):
        found = f"{version}, but {requirement.specifier} is supported"
        return Finding("versions", requirement.name, found, "bad", command)
    return Finding("versions", requirement.name, version)


# hardware


def hardware() -> Iterator[Finding]:
    """Tell processor, memory and GPUs, and whether torch can use them."""
    import psutil

    cores = distributed.num_cores()
    memory = psutil.virtual_memory()
    yield Finding("hardware", "CPU", f"{platform.machine()}, {cores} cores usable, {torch.get_num_threads()} threads")
    yield Finding("hardware", "memory", f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free")
    driver = _driver()
    yield check_torch_build(torch.version.cuda, driver, torch.cuda.is_available())
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}"
        found = f"{properties.name}, compute capability {capability}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        if properties.major < 8:
            remedy = "it has no bfloat16: set model.dtype: float16"
            yield Finding("hardware", f"GPU {index}", found, "note", remedy)
        else:
            yield Finding("hardware", f"GPU {index}", f"{found}, bfloat16")


def _driver() -> str | None:
    """Return the NVIDIA driver's version, "?" for a driver that does not tell, None without one."""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
            return output.split("\n")[0].strip() or "?"
        except (OSError, subprocess.SubprocessError):
            pass
    return "?" if Path("/dev/nvidiactl").exists() else None


def check_torch_build(cuda: str | None, driver: str | None, usable: bool) -> Finding:
    """Judge whether torch's build goes with the machine.

    Args:
        cuda: The CUDA version that torch was built for, None for a CPU build.
        driver: The NVIDIA driver's version, None if there is no GPU.
        usable: Whether torch can use a GPU.
    """
    build = f"built for CUDA {cuda}" if cuda else "a build for CPUs"
    if driver and not cuda:
        remedy = "install a build of torch for CUDA (see pytorch.org); the GPU is not used"
        return Finding("hardware", "torch", f"{build}, with an NVIDIA driver {driver}", "bad", remedy)
    if driver and not usable:
        remedy = "torch cannot use the GPU: update the driver, or install a torch built for an older CUDA"
        return Finding("hardware", "torch", f"{build}, driver {driver}", "bad", remedy)
    if cuda and not driver:
        remedy = "no GPU here: pip install torch --index-url https://download.pytorch.org/whl/cpu is 4 GB smaller"
        return Finding("hardware", "torch", f"{build}, no GPU", "note", remedy)
    return Finding("hardware", "torch", f"{build}, driver {driver}" if driver else f"{build}, no GPU")


# fast paths


def fast_paths(run: RunConfig | None = None) -> Iterator[Finding]:
    """Tell which fast paths are on, and try the quantized layers on every device that a run would use."""
    group, gpu = "fast paths", torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    if run is None or run.model.task != "causal_lm":
        # kernels take other tiles for more columns than 64, of which q, k and v have three times their rank
        for rank in (4, 64):
            yield try_fused(device, _small_trial(rank))
            if not gpu:
                break
    else:
        yield try_fused(device, _trial_of(run))
    triton = installed_version("triton")
    if gpu and triton is None:
        remedy = "pip install triton; without it the fused layers' kernels, and TRL's head, run as plain torch, slowly"
        yield Finding(group, "triton", "not installed", "note", remedy)
    else:
        yield Finding(group, "triton", f"{triton or 'not installed'}{'' if gpu else ' (only GPUs use it)'}")
    flash = installed_version("flash-attn")
    yield Finding(group, "attention", f"PyTorch's SDPA; flash-attn {flash or 'not installed (not needed)'}")
    devices = ["cpu", *(["cuda"] if gpu else [])]
    for device in devices:
        for kind in ("nf4", "int8"):
            yield try_quantized(kind, torch.device(device))
    if _has_avx512_bf16():
        yield Finding(group, "AVX512-BF16", "bitsandbytes' eval-mode repacking, which stops gradients, is switched off")


@dataclass(frozen=True)
class Trial:
    """A layer that is tried, and its adapter.

    Attributes:
        config: Of its model.
        section: `quantization`, `double_quantization` and `dtype` of its base, as a run names them.
        adapter: PEFT's configuration.
        words: What it is, for a person.
    """

    config: Any
    section: dict[str, Any]
    adapter: Any
    words: str


def _small_trial(rank: int) -> Trial:
    from transformers import LlamaConfig

    from lsr_scale.adapters import peft_config

    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "vocab_size": 512}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    method, options = ("lsr", {"separation_rank": 4}) if rank <= 16 else ("lora", {})
    adapter = peft_config(method, {"target_modules": "all-linear", "rank": rank, **options}, "CAUSAL_LM")
    section = {"quantization": "nf4", "double_quantization": True, "dtype": "bfloat16"}
    return Trial(LlamaConfig(**sizes, **heads), section, adapter, f"a trial layer (rank {rank})")


def _trial_of(run: RunConfig) -> Trial:
    """Return one layer of a run's model with the run's adapter."""
    from lsr_scale.adapters import peft_config
    from lsr_scale.model import load_config

    config: Any = load_config(run.model.name, run.model.revision)
    config = type(config).from_dict(
        config.to_dict() | {"vocab_size": 512, "pad_token_id": None, "num_hidden_layers": 1}
    )
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    section = {name: getattr(run.model, name) for name in ("quantization", "double_quantization", "dtype")}
    options = {name: value for name, value in run.adapter.options.items() if not name.startswith("layers_")}
    adapter = peft_config(run.adapter.method, options, "CAUSAL_LM")
    return Trial(config, section, adapter, f"a layer of {run.model.name} with the run's {run.adapter.method}")


def try_fused(device: torch.device, trial: Trial) -> Finding:
    """Run one adapted layer fused and unfused, and compare the loss and every factor's gradient."""
    layers = "LLaMA, Mistral, Qwen2 and Qwen3 layers"
    if device.type == "cpu":
        return Finding("fast paths", "fused layers", f"on a GPU {layers} run as one function each; here unfused")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            worst, how = _fused_against_unfused(device, trial)
    except Exception as error:
        text = " ".join(f"{trial.words}: {type(error).__name__}: {error}".split())[:200]
        if isinstance(error, ValueError):  # of PEFT's, which finds none of the modules in one layer, or ours
            return Finding("fast paths", "fused layers", f"not tried: {text}", "note")
        return Finding(
            "fast paths", "fused layers", text, "bad", "report it, with the output of lsr-scale doctor --json"
        )
    found = f"{layers}; {how}; {trial.words} differs from unfused by {worst:.1%} ({trial.section['dtype']} rounding)"
    if worst > 0.05:
        return Finding("fast paths", "fused layers", found, "bad", "more than rounding explains: report it")
    return Finding("fast paths", "fused layers", found)


def _fused_against_unfused(device: torch.device, trial: Trial) -> tuple[float, str]:
    """Return the largest relative difference among loss and gradients, and how it was computed, in words."""
    from peft import get_peft_model

    from lsr_scale.fused import fuse
    from lsr_scale.kernels.attention import Sequences, choose_backend
    from lsr_scale.model import DTYPES, head_modules, quantization_config, skeleton
    from lsr_scale.model.random_weights import random_base

    dtype = DTYPES[trial.section["dtype"]]
    empty = skeleton(trial.config, dtype=dtype)
    quantizer = quantization_config(
        trial.section["quantization"], trial.section["double_quantization"], dtype, head_modules(empty)
    )
    found, report = [], None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        base = random_base(empty, quantizer, device)
        freeze_quantized(base)  # as a run does it
        model: Any = get_peft_model(base, trial.adapter).train()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:  # not at its start, where one side is zero
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
        ids = torch.randint(512, (2, 64), device=device)
        for fused in (False, True):
            report = fuse(model) if fused else None
            torch.manual_seed(1)  # for dropout
            model.zero_grad()
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            found.append([loss.detach().float(), *(p.grad.flatten() for p in model.parameters() if p.grad is not None)])
    # a gradient much smaller than the others is the rest of sums that cancel, which roundings move by any share of it
    floor = 0.1 * max(float(gradient.norm()) for gradient in found[0][1:])
    worst = max(float((a - b).norm()) / max(float(b.norm()), floor) for b, a in zip(*found, strict=True))
    if report is None or not report.fused:
        return worst, str(report)
    config = trial.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q = torch.empty(1, 64, config.num_attention_heads, head_dim, dtype=dtype, device=device)
    return worst, f"attention by {choose_backend(q, q[:, :, : config.num_key_value_heads], Sequences(scale=1.0))}"


def _has_avx512_bf16() -> bool:
    from bitsandbytes.functional import has_avx512bf16

    return has_avx512bf16()


def try_quantized(kind: str, device: torch.device) -> Finding:
    """Quantize a small layer, run it in eval mode and then backward: the weight stays, the gradient is right."""
    import bitsandbytes as bnb

    name = f"{kind} on {device.type}"
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            dense = torch.randn(96, 128, dtype=torch.bfloat16)
            x = torch.randn(4, 128, dtype=torch.bfloat16, device=device)
        model = nn.Sequential(_quantized_layer(bnb, kind, dense).to(device))
        freeze_quantized(model)
        layer: Any = model[0]
        stored = layer.weight.data.clone()
        model.eval()(x)
        if not torch.equal(layer.weight.data, stored):
            return Finding("fast paths", name, "an eval-mode forward changed the stored weight", "bad", _REINSTALL)
        x.requires_grad_()
        model.train()(x).sum().backward()
        weight = dequantize(layer, torch.bfloat16)
        error = ((weight.float().cpu() - dense.float()).norm() / dense.float().norm()).item()
        assert x.grad is not None
        expected = weight.float().sum(0)
        wrong = ((x.grad[0].float() - expected).norm() / expected.norm()).item()
        limit = {"nf4": 0.15, "int8": 0.02}[kind]
        if error > limit or wrong > 0.05:
            found = f"weight error {error:.3f} (expected below {limit}), gradient error {wrong:.3f} (below 0.05)"
            return Finding("fast paths", name, found, "bad", _REINSTALL)
    except Exception as error:
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return Finding("fast paths", name, found, "bad", _REINSTALL)
    return Finding("fast paths", name, f"works; weights keep {100 * (1 - error):.1f} %, gradients are right")


_REINSTALL = 'pip install --force-reinstall --no-deps "bitsandbytes>=0.50,<0.51"'


def _quantized_layer(bnb: Any, kind: str, dense: torch.Tensor) -> nn.Module:
    out_features, in_features = dense.shape
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(dense.clone(), has_fp16_weights=False, requires_grad=False)
    else:
        layer = bnb.nn.Linear4bit(in_features, out_features, bias=False, compute_dtype=dense.dtype, quant_type=kind)
        layer.weight = bnb.nn.Params4bit(dense.clone(), requires_grad=False, quant_type=kind, module=layer)
    return layer


# DeepSpeed and the built-in model


def helpers() -> Iterator[Finding]:
    """Tell what several processes need, and where the built-in model is."""
    where = "GPUs: NCCL" if torch.cuda.is_available() else "CPUs: gloo"
    yield Finding("helpers", "DeepSpeed", f"several processes talk over {where}; nothing is compiled")
    name = next(iter(builtin.MODELS))
    packaged = builtin.MODELS[name]
    if importlib.util.find_spec(packaged.package) is None:
        yield Finding("helpers", f"model {name}", "its package is not installed", "note", packaged.install_command)
    else:
        converted = builtin.folder_of(name).is_dir()
        yield Finding("helpers", f"model {name}", "converted" if converted else "installed; converted on first use")


# surroundings


def surroundings() -> Iterator[Finding]:
    """Check disks, caches and environment variables."""
    try:
        yield check_folder("model cache", builtin.cache_folder())
    except UserError as error:
        yield Finding("surroundings", "model cache", str(error), "note", "set LSR_SCALE_CACHE")
    yield check_folder("working folder", Path.cwd())
    hub = Path(os.path.expanduser(os.environ.get("HF_HOME") or "~/.cache/huggingface"))
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    yield check_folder("hub cache", hub)
    yield Finding("surroundings", "hub", "offline (HF_HUB_OFFLINE)" if offline else "models are fetched when needed")
    if importlib.util.find_spec("kernels") is not None and not torch.cuda.is_available() and _has_avx512_bf16():
        yield check_kernels(offline)
    torchao = installed_version("torchao")
    if torchao is not None:
        yield check_torchao(torchao)
    if os.environ.get("WORLD_SIZE", "1") != "1" and "TORCHELASTIC_RUN_ID" not in os.environ:
        remedy = "unset WORLD_SIZE RANK LOCAL_RANK: a run started by hand would wait for other processes"
        yield Finding("surroundings", "WORLD_SIZE", f"is {os.environ['WORLD_SIZE']} in this shell", "bad", remedy)
    accelerator = os.environ.get("DS_ACCELERATOR")
    if accelerator and accelerator != ("cuda" if torch.cuda.is_available() else "cpu"):
        remedy = "unset DS_ACCELERATOR"
        yield Finding("surroundings", "DS_ACCELERATOR", f"is {accelerator}, not this machine's", "bad", remedy)


def check_kernels(offline: bool) -> Finding:
    """Judge the package `kernels` on a CPU with AVX512-BF16, where importing bitsandbytes makes it ask the hub."""
    if offline:
        return Finding("surroundings", "kernels", "installed; the hub is not asked while offline")
    found = "installed: on this CPU importing bitsandbytes asks the hub for a kernel that training never uses"
    remedy = "pip uninstall kernels, or set HF_HUB_OFFLINE=1: without a network every start waits for it"
    return Finding("surroundings", "kernels", found, "bad", remedy)


def check_torchao(version: str) -> Finding:
    """Judge torchao, of which PEFT refuses old versions with an error as soon as an adapter is made."""
    if version in SpecifierSet("<0.16"):
        remedy = "pip uninstall torchao (nothing here uses it), or pip install 'torchao>=0.16'"
        return Finding("surroundings", "torchao", f"{version}: PEFT raises an error over it", "bad", remedy)
    return Finding("surroundings", "torchao", version)


def check_folder(name: str, folder: Path) -> Finding:
    """Tell the free space of a folder that a run writes to, and whether it can."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        remedy = {"model cache": "set LSR_SCALE_CACHE", "hub cache": "set HF_HOME"}.get(
            name, "change to another folder"
        )
        found = f"{folder}: cannot be written ({error.strerror})"
        return Finding("surroundings", name, found, "bad" if name == "working folder" else "note", remedy)
    free = shutil.disk_usage(place).free / GIB
    found = f"{folder}, {free:.1f} GiB free"
    if free < 1:
        return Finding("surroundings", name, found, "bad", "free at least 1 GiB")
    return Finding("surroundings", name, found)


if __name__ == "__main__":
    _report = doctor()
    Screen().print(render(_report))
    sys.exit(_report.exit_code)
