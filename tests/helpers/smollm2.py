"""SmolLM2's real tokenizer for tests, from the package that carries the embedded default model."""

from functools import cache

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lsr_scale.model import builtin


@cache
def smollm2_tokenizer() -> PreTrainedTokenizerBase:
    """Return the tokenizer (shared: copy it before changing it), or skip the test where the package is missing."""
    file = builtin.local_gguf("builtin:smollm2-135m-instruct")
    if file is None:
        pytest.skip("SmolLM2's tokenizer is not here: python -m lsr_scale.model")
    from transformers import AutoTokenizer

    with builtin.quick_reader():
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


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
