"""What a library raises over a setting of a run becomes an error that names the setting: the one place for that.

The libraries check little of what they are given, and late: an optimizer that is not installed, arguments of a schedule
that it does not take. Their messages are kept; which setting they mean follows from the module that raised them, from
the innermost call outwards. What no setting explains is a bug, and stays an exception.
"""

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch

from lsr_scale.config import RunConfig
from lsr_scale.config.training import DEFAULTS, RENAMED, defaults_of, training_model
from lsr_scale.errors import UserError

_OPTIMIZER = (
    "optim",
    "optim_args",
    "optim_target_modules",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
)
_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio")
_COMPILE = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
_LOADER = (
    *("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers", "accelerator_config"),
    *("dataloader_multiprocessing_context", "dataloader_pin_memory", "dataloader_drop_last"),
)

# Who raises (module.function, or the exception's own name), and which settings it was given; the innermost call counts.
_READERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"torch\._inductor\..*|torch\._dynamo\.(backends|exc)\..*|torch\.(compile|_Torch\w+\..*)|.*Dynamo\w+.*", _COMPILE),
    (r"transformers\.optimization\..*|torch\.optim\.lr_scheduler\..*|.*\.(create_scheduler|get_scheduler)", _SCHEDULE),
    (r"transformers\.trainer_optimizer\..*|torch\.optim\..*|bitsandbytes\.optim\..*", _OPTIMIZER),
    (r".*\.(create_optimizer|get_optimizer_cls_and_kwargs|get_optimizer_group)", _OPTIMIZER),
    (r"transformers\.integrations\.integration_utils\..*|.*\.get_reporting_integration_callbacks", ("report_to",)),
    (r".*liger.*", ("use_liger_kernel", "liger_kernel_config")),
    (r".*neftune.*", ("neftune_noise_alpha",)),
    (
        r".*\.(\w*gradient_checkpointing\w*)|torch\.utils\.checkpoint\..*",
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", "gradient_checkpointing"),
    ),
    (r"transformers\.debug_utils\..*", ("debug",)),
    (r".*(Accelerator|accelerator_)[cC]onfig.*|.*\.create_accelerator_and_postprocess", ("accelerator_config",)),
    (r"accelerate\.(accelerator|data_loader|utils\.dataclasses)\..*", ("accelerator_config", "ddp_backend")),
    (r"torch\.utils\.data\..*|multiprocessing\..*", _LOADER),
    (r".*\._determine_best_metric", ("metric_for_best_model", "greater_is_better")),
    (r"huggingface_hub\..*|httpx\..*|.*\.(init_hf_repo|push_to_hub)", ("push_to_hub", "hub_model_id")),
    (r"trl\..*activation_offload.*", ("activation_offloading",)),
)
# What the machine does, or another process: not over a setting.
_OF_THE_MACHINE = re.compile(
    r"CUDA error|CUBLAS_|CUDNN_|NCCL|gloo|out of memory|allocate|bad_alloc|Connection|No space left|PytorchStream|"
    r"inline_container|iostream",
    re.IGNORECASE,
)
_OVER_VALUES = (
    *(ValueError, TypeError, ImportError, LookupError, AttributeError, NotImplementedError, ArithmeticError),
    *(AssertionError, RuntimeError, FileNotFoundError, IsADirectoryError, NotADirectoryError),
)
_NOT_OVER_VALUES = (UserError, MemoryError, torch.OutOfMemoryError, torch.distributed.DistError)
# whose exceptions are of no such kind
_LIBRARIES = ("httpx", "huggingface_hub", "torch._dynamo", "torch._inductor")
_REMEDIES = {
    "report_to": "install it, or set report_to to none",
    "optim": "install what it needs, or set optim to adamw_torch_fused",
    "push_to_hub": "log in with hf auth login, or set it to false",
}


@contextmanager
def naming_settings(run: RunConfig) -> Iterator[None]:
    """Raise what a library raises over a setting of `training` as a UserError that names the setting.

    Goes around what makes the trainer's arguments, makes the trainer, and trains.

    Raises:
        UserError: naming the settings, with the library's words.
    """
    try:
        yield
    except Exception as error:
        of_a_library = type(error).__module__.startswith(_LIBRARIES)
        if not of_a_library and (
            not isinstance(error, _OVER_VALUES)
            or isinstance(error, _NOT_OVER_VALUES)
            or _OF_THE_MACHINE.search(str(error))
        ):
            raise
        meant = _settings_meant(run, error)
        if not meant:
            raise
        words = " ".join(str(error).split())[:300]
        if not words or isinstance(error, LookupError | AttributeError):  # a bare name
            words = f"{type(error).__name__}: {words}"
        settings = ", ".join(_described(name, value) for name, value in meant.items())
        remedies = [_REMEDIES[n] for n in meant if n in _REMEDIES and (n != "optim" or "install" in words.lower())]
        remedy = remedies[0] if remedies else "correct it, or leave it out"
        raise UserError(f"{settings}: {words}; {remedy}") from error


def _described(name: str, value: Any) -> str:
    described = f"training.{name}" if isinstance(value, bool) else f"training.{name} {value!r:.80}"
    return f"{described} (or {RENAMED[name]})" if name in RENAMED else described


def _settings_meant(run: RunConfig, error: BaseException) -> dict[str, Any]:
    """Return the settings that an exception is about, by who raised it and by what it says."""
    callers = [*_callers(error.__traceback__), f"{type(error).__module__}.{type(error).__qualname__}"]
    in_step = any(name.endswith("._run_epoch") for name in callers)
    given = {name: value for name, value in run.training.items() if value != _default(run, name)}
    # by its words: a setting's name, or a text that one was set to
    said = str(error)
    mentioned = {n: v for n, v in given.items() if re.search(rf"\b{n}\b", said) or _is_quoted(v, said)}
    # within a step much is called by what a setting chose, such as every layer by torch's checkpointing
    for caller in reversed(callers[-5:] if in_step else callers):
        if caller.startswith("lsr_scale."):
            continue
        for pattern, names in _READERS:
            if re.fullmatch(pattern, caller):
                meant = {n: v for n, v in given.items() if n in names}
                return meant if meant or in_step else {names[0]: run.training.get(names[0])}
    if isinstance(error, OSError) or (in_step and not mentioned):
        return mentioned
    return mentioned or _unexplained(callers, given)


def _unexplained(callers: list[str], given: dict[str, Any]) -> dict[str, Any]:
    """Return all that a run sets of a library's fields, where a library refuses some before the first step."""
    if callers[-2].startswith("lsr_scale."):
        return {}  # a bug of ours
    return {name: value for name, value in given.items() if name not in DEFAULTS}


def _is_quoted(value: Any, said: str) -> bool:
    return isinstance(value, str) and len(value) > 3 and value in said


def _callers(trace: TracebackType | None) -> Iterator[str]:
    """Yield module.function of each call, the outermost first."""
    for frame, _ in traceback.walk_tb(trace):
        yield f"{frame.f_globals.get('__name__', '')}.{frame.f_code.co_qualname}"


def _default(run: RunConfig, name: str) -> Any:
    task, method = run.model.task, run.training["method"]
    ours = defaults_of(task, method)
    field = training_model(task, method).model_fields.get(name)
    return ours.get(name, field.default if field else None)
