"""The tokenizer of a model, with a padding token fit for training and, if wanted, another chat template."""

import logging
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lsr_scale.errors import UserError
from lsr_scale.model.base import load_config
from lsr_scale.model.names import NAME_FORMS, explained, resolve
from lsr_scale.paths import user_path

logger = logging.getLogger(__name__)

# Tokens that published vocabularies hold for padding, or that no text becomes, best first.
PAD_CANDIDATES = (
    *("<|finetune_right_pad_id|>", "<|finetune_right_pad|>", "<pad>", "[PAD]", "<|pad|>", "<|PAD_TOKEN|>"),
    *("<unk>", "<|endoftext|>", "[control_8]", "<|reserved_special_token_0|>", "<|vision_pad|>"),
)


def load_tokenizer(
    name: str, *, revision: str | None = None, chat_template: str | Path | None = None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model.

    The padding token is the tokenizer's own unless that is missing or the end token: a model padded with its end token
    never learns to end where a loss mask is made from the padding token. Then it is one that the vocabulary holds and
    no text becomes (`PAD_CANDIDATES`), so no embedding is added; failing that the end token, with a warning.

    Args:
        name: Hub name, local folder, or `builtin:` name.
        revision: Commit, branch or tag on the hub.
        chat_template: A file with a Jinja chat template in place of the tokenizer's own.

    Raises:
        UserError: if there is no tokenizer, no token to pad with, or no such template file.
    """
    path = resolve(name)
    if (Path(path) / "config.json").is_file():
        load_config(name, revision)  # which Transformers asks for the kind of tokenizer: its faults are told as its own
    with explained(name, revision):
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
        except (OSError, ImportError, UserError):
            raise
        except Exception as error:  # tokenizers raises plain ones for a file that it cannot read
            files = {file.name for file in Path(path).glob("*")} if Path(path).is_dir() else set()
            if files and not files & {"tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json"}:
                raise UserError(
                    f"model.name {name!r}: there is no tokenizer in this folder (tokenizer.json or the like); "
                    "copy the tokenizer files of the model into it"
                ) from error
            raise UserError(
                f"model.name {name!r}: its tokenizer cannot be read ({str(error)[:300]}); expected {NAME_FORMS}"
            ) from error
    _set_pad_token(tokenizer, name)
    if chat_template is not None:
        tokenizer.chat_template = _read_template(user_path(chat_template, "model.chat_template"))
    return tokenizer


def _set_pad_token(tokenizer: Any, name: str) -> None:
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    used = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    vocabulary = tokenizer.get_vocab()
    for token in (*PAD_CANDIDATES, tokenizer.unk_token):
        if token is not None and vocabulary.get(token, tokenizer.eos_token_id) not in used:
            tokenizer.pad_token = token
            return
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.name {name!r}: its tokenizer has neither a padding nor an end token to pad with; set pad_token in "
            "the tokenizer_config.json of a local copy"
        )
    tokenizer.pad_token = tokenizer.eos_token
    logger.warning(
        "%s: no token but the end token %r is free for padding; losses are masked by position, so the end is still "
        "learned, but set pad_token in tokenizer_config.json if you know a better one",
        name,
        tokenizer.eos_token,
    )


def _read_template(file: Path) -> str:
    import jinja2
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        template = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"model.chat_template {str(file)!r}: cannot be read ({error}); give a Jinja file") from error
    try:
        _compile_jinja_template(template)
    except jinja2.TemplateError as error:
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise UserError(f"model.chat_template {str(file)!r}{line}: not a valid Jinja template ({error})") from error
    return template
