"""The tokenizer of a run: its end token, padding and chat template, the same in training, generation and every export.

It is made from the base's once, when a run begins, and is in the run folder from then on.
"""

import copy
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lsr_scale import files
from lsr_scale.errors import UserError, did_you_mean
from lsr_scale.model.architecture import load_config
from lsr_scale.model.load_errors import explain_load_errors
from lsr_scale.model.names import NAME_FORMS, resolve
from lsr_scale.paths import is_special_file, user_path

logger = logging.getLogger(__name__)

# Tokens of published vocabularies for padding, or that no text is encoded to, best first.
PAD_CANDIDATES = (
    *("<|finetune_right_pad_id|>", "<|finetune_right_pad|>", "<pad>", "[PAD]", "<|pad|>", "<|PAD_TOKEN|>"),
    *("<unk>", "<|endoftext|>", "[control_8]", "<|reserved_special_token_0|>", "<|vision_pad|>"),
)
# what `save_pretrained` of tokenizers of all kinds writes, and what published models have beside it
_FILES = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|chat_template\.jinja|(merges|vocab)\.txt|"
    r"(tokenizer|spm|spm_char|spiece|sentencepiece(\.bpe)?)\.model(\.v[0-9]+)?"
)


def tokenizer_of(
    run: Any, saved: Path | None = None, say: Callable[[str], None] = logger.warning
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a run.

    Args:
        run: The run (`RunConfig`).
        saved: Folder of the run's saved tokenizer, if there is one: a resumed run has the one that it began with,
            even if the base's files or the chat template have changed since. None makes it from the base's.
        say: Called with a line about what was changed.

    Raises:
        UserError: as `load_tokenizer` does.
    """
    if saved is not None and has_tokenizer(saved):
        return read_tokenizer(saved)
    tokenizer = load_tokenizer(
        run.model.name,
        revision=run.model.revision,
        chat_template=run.model.chat_template,
        eos_token=run.training.get("eos_token"),
    )
    return without_appended(tokenizer, say) if run.model.task == "causal_lm" else tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a tokenizer was saved in a folder."""
    return (folder / "tokenizer_config.json").is_file()


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return a tokenizer as it was saved.

    Raises:
        UserError: if there is none that can be read.
    """
    return _read(str(folder), None, str(folder))


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer into a folder of its own, which appears complete or not at all; an existing one stays."""
    if has_tokenizer(folder):
        return
    aside = files.temporary_path(folder)
    files.remove_stale_temporaries(folder)
    try:
        tokenizer.save_pretrained(aside)
        files.replace_folder(aside, folder, {path.name for path in aside.iterdir()})
    except Exception as error:  # that of tokenizers has the system's as text
        files.remove(aside)
        system = files.system_error(error)
        if system is not None:
            raise files.cannot_write(folder, system) from error
        raise


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a saved tokenizer's files into a folder that holds other files too."""
    for file in tokenizer_files(source):
        shutil.copyfile(file, target / file.name)


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files of a folder, such as a model's or an adapter's, that are part of the tokenizer."""
    return sorted(file for file in folder.glob("*") if file.is_file() and _FILES.fullmatch(file.name))


def same_state(one: Any, other: Any) -> bool:
    """Tell whether two tokenizers of one vocabulary have the same special tokens, chat template and additions."""
    names = ("bos_token", "eos_token", "pad_token", "chat_template")
    return [getattr(one, name) for name in names] == [getattr(other, name) for name in names] and (
        appended_ids(one) == appended_ids(other)
    )


def end_tokens(tokenizer: Any, others: int | list[int] | None) -> list[int]:
    """Return the ids at which generation stops: the tokenizer's end token, and those that the model stops at anyway."""
    listed = [others] if isinstance(others, int) else list(others or ())
    return list(dict.fromkeys([tokenizer.eos_token_id, *listed] if tokenizer.eos_token_id is not None else listed))


def render_chat(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    """Return a conversation rendered by the chat template.

    Raises:
        UserError: if the template fails, by its own raise_exception or otherwise.
    """
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program, and may raise anything
        raise UserError(
            f"the chat template fails on this conversation ({str(error)[:200] or type(error).__name__}); write it as "
            "the template wants it, or set model.chat_template to another Jinja file"
        ) from error


def undefined_names(tokenizer: Any, messages: list[dict[str, Any]]) -> list[str]:
    """Return the undefined names that a chat template prints, which become empty: misspelt ones.

    Special tokens that the tokenizer does not have are left out: templates are written for several.
    """
    import jinja2
    from transformers.utils.chat_template_utils import _compile_jinja_template

    names: list[str] = []

    class Recorded(jinja2.Undefined):
        def __str__(self) -> str:
            names.append(str(self._undefined_name))
            return ""

    environment: Any = _compile_jinja_template(tokenizer.get_chat_template(None)).environment
    environment.undefined, usual = Recorded, environment.undefined
    try:
        render_chat(tokenizer, messages, add_generation_prompt=True)
    finally:
        environment.undefined = usual
    return [name for name in dict.fromkeys(names) if not name.endswith("_token")]


def appended_ids(tokenizer: Any) -> list[int]:
    """Return the token ids that a tokenizer appends to every text by itself: none, for most."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a")
    start = next((i for i in range(len(full)) if bare and full[i : i + len(bare)] == bare), len(full))
    return full[start + len(bare) :]


def without_appended(tokenizer: Any, say: Callable[[str], None] = logger.warning) -> Any:
    """Return a tokenizer that appends nothing to a text, as a language model needs.

    With an end token after every prompt nothing could be continued or scored, and training, which appends one end token
    itself, would have two.
    """
    appended = appended_ids(tokenizer)
    if not appended:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    if getattr(tokenizer, "add_eos_token", False):
        tokenizer.add_eos_token = False
    if appended_ids(tokenizer):
        _append_nothing(tokenizer, len(appended))
    words = tokenizer.convert_ids_to_tokens(appended)
    if appended_ids(tokenizer):
        raise UserError(
            f"model.name {tokenizer.name_or_path!r}: its tokenizer appends {words} to every text, so nothing could be "
            "continued or scored; set add_eos_token to false in the tokenizer_config.json of a local copy"
        )
    say(
        f"the tokenizer appends {' '.join(words)} to every text by itself; in this run it does not: training appends "
        "one end token, scoring and generation none"
    )
    return tokenizer


def _append_nothing(tokenizer: Any, num: int) -> None:
    """Have a fast tokenizer's post-processor append no special tokens; those that it prepends stay."""
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    content = json.loads(backend.to_str())
    steps = [content["post_processor"]] if content["post_processor"] else []
    steps = [inner for step in steps for inner in step.get("processors", [step])]
    for step in steps:
        if step["type"] == "TemplateProcessing":
            for form in ("single", "pair"):
                while step[form] and "SpecialToken" in step[form][-1]:
                    step[form].pop()
    if len(steps) == 1 and steps[0]["type"] in ("BertProcessing", "RobertaProcessing"):
        word, number = steps[0]["cls"]
        special = {"id": word, "ids": [number], "tokens": [word]}
        one, two = ({"Sequence": {"id": part, "type_id": 0}} for part in "AB")
        first = {"SpecialToken": {"id": word, "type_id": 0}}
        template = {"type": "TemplateProcessing", "single": [first, one], "pair": [first, one, two]}
        content["post_processor"] = template | {"special_tokens": {word: special}}
    backend.post_processor = Tokenizer.from_str(json.dumps(content)).post_processor


def load_tokenizer(
    name: str,
    *,
    revision: str | None = None,
    chat_template: str | Path | None = None,
    eos_token: str | None = None,
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model.

    The padding token is the tokenizer's own unless that is missing or the end token: a model padded with its end token
    never learns to end where a loss mask is made from the padding token. Then it is one that the vocabulary holds and
    no text becomes (`PAD_CANDIDATES`), so no embedding is added; failing that the end token, with a warning.

    Args:
        name: Hub name, local folder, or `builtin:` name.
        revision: Commit, branch or tag on the hub.
        chat_template: A file with a Jinja chat template in place of the tokenizer's own.
        eos_token: The end token in place of the tokenizer's own (`training.eos_token`).

    Raises:
        UserError: if there is no tokenizer, no token to pad with, no such end token, or no such template file.
    """
    path = resolve(name)
    if (Path(path) / "config.json").is_file():
        load_config(name, revision)  # Transformers reads the tokenizer's class from it: its errors are reported first
    tokenizer: Any = _read(path, revision, name)
    if eos_token is not None:
        vocabulary = tokenizer.get_vocab()
        if eos_token not in vocabulary:
            near = did_you_mean(eos_token, tokenizer.all_special_tokens)
            raise UserError(f"training.eos_token: {eos_token!r} is no token of {name}; {near}")
        tokenizer.eos_token = eos_token
    _set_pad_token(tokenizer, name)
    if chat_template is not None:
        tokenizer.chat_template = _read_template(user_path(chat_template, "model.chat_template"))
    return tokenizer


def _read(path: str, revision: str | None, name: str) -> PreTrainedTokenizerBase:
    with explain_load_errors(name, revision):
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
            if not isinstance(tokenizer.model_max_length, int | float):
                raise UserError(
                    f"model.name {name!r}: tokenizer_config.json: model_max_length: expected a number of tokens, got "
                    f"{str(tokenizer.model_max_length)[:80]!r}; correct it in a local copy, or remove that line"
                )
            return tokenizer
        except (OSError, ImportError, UserError):
            raise
        except Exception as error:  # tokenizers raises a plain Exception for a file that it cannot read
            present = {file.name for file in Path(path).glob("*")} if Path(path).is_dir() else set()
            if present and not present & {"tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json"}:
                raise UserError(
                    f"model.name {name!r}: there is no tokenizer in this folder (tokenizer.json or the like); "
                    "copy the tokenizer files of the model into it"
                ) from error
            raise UserError(
                f"model.name {name!r}: its tokenizer cannot be read ({str(error)[:300]}); expected {NAME_FORMS}"
            ) from error


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
            "the tokenizer_config.json of a local copy, or training.eos_token to one of its tokens"
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

    if is_special_file(file):
        raise UserError(f"model.chat_template {str(file)!r}: a pipe or a device; give a Jinja file")
    try:
        template = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"model.chat_template {str(file)!r}: cannot be read ({error}); give a Jinja file") from error
    try:
        _compile_jinja_template(template)
    except (jinja2.TemplateError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise UserError(f"model.chat_template {str(file)!r}{line}: not a valid Jinja template ({error})") from error
    return template
