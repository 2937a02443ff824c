"""`training.save_as_lora`: a finished run's adapter as PEFT's LoRA, beside it."""

import json
from typing import Any

import torch
from safetensors import SafetensorError

from lsr_scale import files
from lsr_scale.adapters.card import CARD_NAME
from lsr_scale.adapters.read import ADAPTER_FILES, BASE_NAME
from lsr_scale.exporting.base_factors import with_base_factors
from lsr_scale.exporting.card import write_card
from lsr_scale.exporting.pairs import metadata_of, write_lora
from lsr_scale.exporting.source import open_adapter
from lsr_scale.run.folder import RunFolder


def save_as_lora(folder: RunFolder, model: Any) -> None:
    """Write `adapter_lora/` of a run from its `adapter/`: the exact pairs in float32; complete or not at all.

    Args:
        folder: The run's.
        model: The trained one: factors that are made of its base's weights are not in the adapter's file.

    Raises:
        UserError: if an update is not finite, or the folder cannot be written.
    """
    source, target = with_base_factors(open_adapter(folder.path), model=model), folder.lora
    temporary = files.temporary_path(target)
    files.remove_stale_temporaries(target)
    try:
        temporary.mkdir()
        pairs = {name: source.pair(name) for name in source.modules}
        write_lora(temporary, pairs, source, torch.float32, metadata_of(source, "lora"))
        (temporary / BASE_NAME).write_text(json.dumps(source.base, indent=1) + "\n", encoding="utf-8")
        ranks = sorted({down.shape[0] for down, _ in pairs.values()})
        write_card(temporary, source, "lora", {"ranks": ", ".join(map(str, ranks))}, target)
        files.apply_umask(temporary)
        files.replace_folder(temporary, target, (*ADAPTER_FILES, CARD_NAME))
    except (OSError, SafetensorError) as error:
        raise files.cannot_write(target, error) from error
    finally:
        files.remove(temporary)
