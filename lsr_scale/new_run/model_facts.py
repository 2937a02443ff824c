"""What a model is, from its configuration alone: which linear layers an adapter goes to, and how large it is."""

import dataclasses
import re
from typing import Literal

from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers.pytorch_utils import Conv1D

from lsr_scale.model import Quantization, builtin, load_config, meta_model, own_quantization
from lsr_scale.model.known_configs import known_config
from lsr_scale.model.names import local_folder

_IN_LAYER = re.compile(r"\.\d+\.")


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What was found.

    Attributes:
        name: As it was given.
        targets: Names of the linear layers in every block, or "all-linear" where nothing is known of the model.
        num_parameters: Of the base, None where nothing is known.
        is_small_encoder: An encoder, which is not quantized as a rule.
        quantization: In what its weights are quantized already; None where they are not, or nothing is known.
        line: What is to be said of it.
    """

    name: str
    targets: list[str] | str
    num_parameters: int | None
    is_small_encoder: bool
    quantization: Quantization | None
    line: str


def look_at_model(name: str, task: Literal["causal_lm", "seq_cls"]) -> ModelFacts:
    """Read a model's configuration where it is on this machine or known to this package.

    Raises:
        UserError: for a folder that holds no model, a name that none can have, or a model that cannot do the task or
            that others than bitsandbytes quantized.
    """
    here = name.startswith(builtin.PREFIX) or local_folder(name) is not None
    cached = not here and isinstance(try_to_load_from_cache(name, "config.json"), str)
    if not (here or cached or known_config(name) is not None):
        return ModelFacts(name, "all-linear", None, False, None, f"{name}: not on this machine, so nobody looked at it")
    config = load_config(name)
    quantization = own_quantization(config, name)
    model = meta_model(config, task)
    targets = linear_names(model)
    count = sum(parameter.numel() for parameter in model.parameters())
    encoder = task == "seq_cls" and config.model_type not in _CAUSAL
    architecture = (config.architectures or [config.model_type])[0]
    line = f"{name}: {architecture}, {count / 1e6:,.0f} M parameters; linear layers of a block: {', '.join(targets)}"
    return ModelFacts(name, targets or "all-linear", count, encoder, quantization, line)


def linear_names(model: nn.Module) -> list[str]:
    """Return the names of the linear layers in a model's blocks, without those that others outside of blocks share."""
    inside: dict[str, None] = {}
    outside: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            name = path.rpartition(".")[2]
            if _IN_LAYER.search(path):
                inside[name] = None
            else:
                outside.add(name)
    return [name for name in inside if name not in outside and not name.isdigit()]


def _causal_types() -> set[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    return set(CAUSAL) - set(MASKED)


_CAUSAL = _causal_types()
