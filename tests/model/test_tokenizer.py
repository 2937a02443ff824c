"""Tokenizers: the padding token, the chat template, and what is said when one is missing."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lsr_scale.errors import UserError
from lsr_scale.model import load_tokenizer
from tests.helpers.tiny_models import tiny_llama


def _tokenizer(folder, tokens, **special):
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=special.get("unk_token")))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return str(folder)


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({"eos_token": "</s>", "pad_token": "[PAD]"}, "[PAD]"),
        ({"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}, "[PAD]"),
        ({"eos_token": "</s>", "pad_token": "</s>"}, "[PAD]"),
        ({"eos_token": "[PAD]", "unk_token": "<unk>"}, "<unk>"),
    ],
)
def test_the_padding_token_is_never_the_end_token_where_another_is_free(tmp_path, special, expected):
    name = _tokenizer(tmp_path, ["<unk>", "<s>", "</s>", "[PAD]", "word"], **special)
    tokenizer = load_tokenizer(name)
    assert tokenizer.pad_token == expected
    assert len(tokenizer) == 5


def test_padding_falls_back_to_the_end_token_aloud_and_to_an_error(tmp_path, caplog):
    assert load_tokenizer(_tokenizer(tmp_path, ["</s>", "word"], eos_token="</s>")).pad_token == "</s>"
    assert "no token but the end token" in caplog.text
    with pytest.raises(UserError, match="neither a padding nor an end token"):
        load_tokenizer(_tokenizer(tmp_path / "other", ["a", "word"]))
    assert load_tokenizer(str(tmp_path / "other"), eos_token="word").pad_token == "word"  # as it advises


def test_an_end_token_of_the_run_is_not_its_padding(tmp_path):
    name = _tokenizer(tmp_path, ["<unk>", "</s>", "[PAD]"], eos_token="</s>", pad_token="[PAD]", unk_token="<unk>")
    tokenizer = load_tokenizer(name, eos_token="[PAD]")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("[PAD]", "<unk>")


def test_a_chat_template_file_replaces_the_tokenizers_own(tmp_path):
    name = _tokenizer(tmp_path, ["<unk>", "</s>", "word"], eos_token="</s>", unk_token="<unk>")
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m['content'] }}!{% endfor %}")
    tokenizer = load_tokenizer(name, chat_template=file)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "word"}], tokenize=False) == "word!"
    file.write_text("{% for m in messages %}\n{{ m['content' }}{% endfor %}")
    with pytest.raises(UserError, match=r"mine\.jinja', line 2: not a valid Jinja template"):
        load_tokenizer(name, chat_template=file)
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(name, chat_template=tmp_path / "none.jinja")


def test_a_model_folder_without_a_tokenizer_says_so(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no tokenizer in this folder"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("value", [{}, {"a": 0}, "512", [1]])
def test_a_longest_length_that_is_no_number_is_refused(tmp_path, value):
    name = _tokenizer(tmp_path, ["<unk>", "</s>", "[PAD]"], eos_token="</s>", pad_token="[PAD]", unk_token="<unk>")
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"model_max_length": value}))
    with pytest.raises(UserError, match="model_max_length: expected a number of tokens") as error:
        load_tokenizer(name)
    assert "remove that line" in str(error.value)
    file.write_text(json.dumps({key: kept for key, kept in settings.items() if key != "model_max_length"}))
    load_tokenizer(name)
