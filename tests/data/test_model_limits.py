"""Data that a model has no embeddings or positions for is refused before loading; what is left undone is said."""

import shlex

import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    GPTJConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from lsr_scale.adapters import coverage
from lsr_scale.data.formats import build_dataset
from lsr_scale.data.model_limits import check_model_limits, num_positions, stated_length
from lsr_scale.errors import UserError
from lsr_scale.generation.sampling import Sampling
from lsr_scale.model import load_base
from lsr_scale.run import evaluate
from lsr_scale.run.generate import complete
from lsr_scale.run.train import train
from lsr_scale.scoring import scorer
from lsr_scale.training import assembly
from tests.helpers.programs import run_program
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.tiny_runs import (
    byte_tokenizer,
    completions,
    do,
    labelled,
    save_classifier,
    save_llama,
    tiny_run,
    write_rows,
)

NONE = {"quantization": "none", "dtype": "float32"}


def save_small(folder, rows):
    """Save a tiny LLaMA of so many embeddings with the tokenizer of 300 tokens."""
    tiny_llama(vocab_size=rows).save_pretrained(folder)
    special = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), **special).save_pretrained(folder)
    return folder


@pytest.fixture
def not_loaded(monkeypatch):
    """Fail where a base would be loaded."""

    def refuse(*args, **options):
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(assembly, "load_base_for", refuse)


@pytest.mark.usefixtures("not_loaded")
def test_token_ids_beyond_the_embedding_are_refused_and_the_advice_works(tmp_path, monkeypatch):
    save_small(tmp_path / "model", 290)
    run = tiny_run(tmp_path, model={"name": str(tmp_path / "model"), **NONE}, eval={"tasks": []})
    with pytest.raises(UserError, match=r"data\.train: row \d+ has the token id 29\d.*has 290 rows") as error:
        do(run)
    command = shlex.split(str(error.value).splitlines()[-1])
    assert command[:2] == ["python", "-c"]
    assert run_program(command[2], tmp_path, *command[3:]).returncode == 0
    monkeypatch.undo()
    assert do(run).results.exists()


@pytest.mark.usefixtures("not_loaded")
def test_a_validation_set_is_looked_at_too(tmp_path):
    save_small(tmp_path / "model", 290)
    plain = [{"prompt": "x", "completion": "y"}] * 4
    data = {
        "train": [write_rows(tmp_path / "plain.jsonl", plain)],
        "validation": [write_rows(tmp_path / "more.jsonl", completions())],
    }
    run = tiny_run(tmp_path, model={"name": str(tmp_path / "model"), **NONE}, data=data, eval={"tasks": []})
    with pytest.raises(UserError, match=r"data\.validation: row \d+ has the token id"):
        do(run)


@pytest.mark.usefixtures("not_loaded")
def test_a_padding_token_beyond_the_embedding_is_refused(tmp_path):
    save_small(tmp_path / "model", 300)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), eos_token="</s>")
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    tokenizer.save_pretrained(tmp_path / "model")
    run = tiny_run(tmp_path, model={"name": str(tmp_path / "model"), **NONE})
    with pytest.raises(
        UserError, match=r"padding token '<added>' has the id 300, but the model's embedding has 300 rows"
    ):
        do(run)


@pytest.mark.usefixtures("not_loaded")
def test_rows_longer_than_the_models_positions_are_refused_and_the_advice_works(tmp_path, monkeypatch):
    config = GPT2Config(n_embd=48, n_layer=1, n_head=4, vocab_size=304, n_positions=16)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    special = dict(eos_token="</s>", pad_token="<pad>")
    PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), **special).save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "two", "completion": " four" * 20}] * 4)
    sections = dict(
        model={"name": str(tmp_path / "model"), **NONE},
        adapter={"method": "lsr", "rank": 4, "separation_rank": 2, "target_modules": ["c_attn"]},
        data={"train": [str(tmp_path / "rows.jsonl")]},
    )
    write_rows(tmp_path / "questions.jsonl", [])
    with pytest.raises(UserError, match=r"row 1 has \d+ tokens, but .* has 16 positions; set training\.max_length: 16"):
        do(tiny_run(tmp_path, **sections, eval={"tasks": []}))
    monkeypatch.undo()
    assert do(tiny_run(tmp_path, **sections, training={"max_length": 16}, eval={"tasks": []})).results.exists()


def test_tools_take_positions_too(tmp_path):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=304, n_positions=16, name_or_path="small")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = "{{ tools }}{% for message in messages %}{{ message.content }}{% endfor %}"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {"messages": turns, "tools": [{"name": "saw", "description": "cuts wood"}]}
    dataset, kind = build_dataset([write_rows(tmp_path / "rows.jsonl", [row])])
    with pytest.raises(UserError, match=r"row 1 has \d+ tokens, but small has 16 positions"):
        check_model_limits(
            {"train": dataset},
            kind,
            tokenizer,
            config,
            {"method": "sft", "max_length": None},
            lambda: AutoModelForCausalLM.from_config(config),
        )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=32), 32),
        (OPTConfig(hidden_size=16, num_hidden_layers=1, ffn_dim=16, num_attention_heads=2, word_embed_proj_dim=16,
                   vocab_size=64, max_position_embeddings=32), 32),
        (GPTJConfig(n_embd=16, n_layer=1, n_head=2, rotary_dim=4, vocab_size=64, n_positions=32), 32),
        (MixtralConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                       num_key_value_heads=1, vocab_size=64, max_position_embeddings=32, num_local_experts=2), None),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)  # fmt: skip
def test_the_number_of_positions_is_the_longest_row_that_a_forward_takes(config, expected):
    model = AutoModelForCausalLM.from_config(config).eval()
    assert num_positions(model) == expected
    model(torch.ones(1, 32, dtype=torch.long))
    if expected:
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.ones(1, 33, dtype=torch.long))


@pytest.mark.parametrize(("kind", "expected"), [(BertConfig, 32), (RobertaConfig, 30)])
def test_the_number_of_positions_of_an_encoder(kind, expected):
    config = kind(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
                  max_position_embeddings=32, pad_token_id=1)  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config).eval()
    assert num_positions(model) == expected
    model(torch.full((1, expected), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, expected + 1), 5))


def test_a_question_or_prompt_with_ids_beyond_the_embedding_is_refused(tmp_path):
    folder = save_small(tmp_path / "model", 290)
    model = load_base(str(folder), device=torch.device("cpu"), **NONE)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    examples = evaluate.load_tasks(tiny_run(tmp_path).eval)
    with pytest.raises(UserError, match=r"scoring: a question has the token id 29\d"):
        scorer.score(model, tokenizer, next(iter(examples.values())))
    with pytest.raises(UserError, match=r"--prompt has the token id 29\d"):
        complete(model, tokenizer, "a knife cuts bread, a saw cuts wood, a ladle serves soup, a mop cleans")


@pytest.mark.parametrize("positions", ["table", "rope"])
def test_generation_ends_where_the_models_positions_do(positions):
    small = dict(vocab_size=300, max_position_embeddings=12)
    model = tiny_llama(**small)
    if positions == "table":
        sizes = dict(vocab_size=300, n_embd=16, n_layer=1, n_head=2)
        model = AutoModelForCausalLM.from_config(GPT2Config(n_positions=12, eos_token_id=None, **sizes))
    model.generation_config.eos_token_id = None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), pad_token="<pad>")
    said = []
    complete(model, tokenizer, "kmpt", Sampling(max_new_tokens=100_000), say=said.append)
    length = len(tokenizer.encode("kmpt"))
    assert said == [f"stopped after {12 - length} of 100,000 new tokens: the model is made for 12 in all"]
    complete(model, tokenizer, "kmpt", Sampling(max_new_tokens=12 - length), say=said.append)
    assert len(said) == 1, "nothing was cut"
    with pytest.raises(UserError, match=r"--prompt: has \d+ tokens, but the model has 12 positions; shorten it"):
        complete(model, tokenizer, "kmpt" * 12)
    if positions == "rope":
        model.config.rope_parameters["factor"] = 4.0
        assert stated_length(model.config) == 48
        complete(model, tokenizer, "kmpt" * 4, Sampling(max_new_tokens=2))
        # RoPE allows what is longer than a model states, for a run that trained on such rows
        complete(model, tokenizer, "kmpt" * 12, Sampling(max_new_tokens=2), context=100)


def test_modules_neither_quantized_nor_adapted_are_noted_with_their_share(tmp_path):
    config = MixtralConfig(hidden_size=48, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=2, vocab_size=96, num_local_experts=4)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    options = {"method": "lsr", "rank": 4, "separation_rank": 2, "target_modules": "all-linear"}
    run = tiny_run(tmp_path, model={"name": str(tmp_path), "quantization": "nf4"}, adapter=options)
    base = assembly.load_base_for(run.model, 0)
    share = sum(p.numel() for n, p in base.named_parameters() if ".experts." in n) / base.num_parameters()
    model, _ = assembly.adapt(run, base)
    quantized, adapted = coverage.coverage_notes(model, "nf4", "all-linear", "bfloat16")
    assert "experts.gate_up_proj" in quantized
    assert "bfloat16, not nf4" in quantized
    assert "not adapted" in adapted
    assert f"({100 * share:.2g} %" in adapted or share > 0.5
    assert coverage.coverage_notes(model, "none", ["q_proj"], "bfloat16") == []


def test_a_model_quantized_and_adapted_as_asked_has_no_note(tmp_path):
    save_llama(tmp_path / "model")
    run = tiny_run(tmp_path, adapter={"method": "lsr", "rank": 4, "separation_rank": 2, "target_modules": "all-linear"})
    model, _ = assembly.adapt(run, assembly.load_base_for(run.model, 0))
    assert coverage.coverage_notes(model, "nf4", "all-linear", "bfloat16") == []


def test_a_head_that_starts_at_random_is_noted(tmp_path, capsys):
    save_classifier(tmp_path / "model", "roberta")
    rows = write_rows(
        tmp_path / "pairs.jsonl", [{"sentence1": "a knife", "sentence2": "a saw", "label": i % 2} for i in range(4)]
    )
    run = tiny_run(
        tmp_path,
        model={"name": str(tmp_path / "model"), "task": "seq_cls", "num_labels": 2, **NONE},
        adapter={"method": "lsr", "rank": 4, "separation_rank": 2, "target_modules": ["query", "value"]},
        data={"train": [rows]},
        eval={"tasks": []},
    )
    train(run)
    assert "note: " in capsys.readouterr().out.split("has no weights for classifier.")[0].splitlines()[-1]


def test_a_model_without_activation_checkpointing_trains_and_says_so(tmp_path, capsys):
    folder = save_classifier(tmp_path / "model", "bert")
    sizes = dict(embedding_size=48, hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4)
    words = AutoConfig.from_pretrained(folder).vocab_size
    albert = AlbertConfig(vocab_size=words, max_position_embeddings=64, pad_token_id=0, **sizes)
    AutoModelForSequenceClassification.from_config(albert).save_pretrained(folder)
    run = tiny_run(
        tmp_path,
        model={"name": str(folder), "task": "seq_cls", "num_labels": 2, **NONE},
        adapter={"method": "lsr", "rank": 4, "separation_rank": 2, "target_modules": ["query", "value"]},
        data={"train": [write_rows(tmp_path / "pairs.jsonl", labelled(4))]},
        eval={"tasks": []},
    )
    assert train(run).results.exists()
    assert "albert models have no activation checkpointing: all activations are kept" in capsys.readouterr().out
