"""Tokenizers for chat templates: byte-level as LLaMA 3's and Qwen's, SentencePiece-like as LLaMA 2's and Mistral's."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import trl
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.helpers.smollm2 import smollm2_tokenizer
from tests.helpers.tiny_runs import TOOLS

OWN = Path(__file__).parents[1] / "data" / "chat_templates"
TRL = Path(trl.__file__).parent / "chat_templates"

# special tokens that templates write, by family
CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA_3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")
GEMMA = ("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>")
MISTRAL = (
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)

# how LLaMA 3's and, nearly, Qwen's tokenizers split a text before they join bytes
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def template_text(name: str) -> str:
    """Return a template of ours or of TRL's folder by its name."""
    folder = OWN if (OWN / f"{name}.jinja").is_file() else TRL
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")


def byte_level(special: tuple[str, ...], **named: str) -> Any:
    """Return SmolLM2's tokenizer with LLaMA 3's words and other special tokens, such as bos_token=..."""
    tokenizer = copy.deepcopy(smollm2_tokenizer())
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    for name, token in named.items():
        setattr(tokenizer, name, token)
    return tokenizer


@functools.cache
def _sentencepiece_core() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(TOOLS, trainer)
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    for byte in range(256):  # what is no piece is its bytes
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    content["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    return json.dumps(content)


def sentencepiece(special: tuple[str, ...] = (), **named: str) -> Any:
    """Return a small tokenizer whose pieces begin with a space, and fall back to bytes.

    Without special tokens as LLaMA 2's, which puts a space in front of every text; with some as Mistral's since v0.3,
    which does so at the beginning alone.
    """
    core = Tokenizer.from_str(_sentencepiece_core())
    if special:
        core.normalizer = None  # pyright: ignore
        core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        **named,
    )
