"""A trained adapter leaves in the formats that other programs load: LoRA, small factors, a merged model, GGUF."""

from lsr_scale.exporting.folder import export, merge
from lsr_scale.exporting.source import AdapterSource, open_adapter

__all__ = ["AdapterSource", "export", "merge", "open_adapter"]
