"""A run's end token, padding and chat template belong to its folder: train, preview, generate, eval, every export."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from lsr_scale import cli
from lsr_scale.config import dump_yaml
from lsr_scale.data.formats import build_dataset, load_source
from lsr_scale.data.labels import find_labels
from lsr_scale.data.preview import preview
from lsr_scale.data.tokenizer_setup import prepare_tokenizer, row_check
from lsr_scale.errors import UserError
from lsr_scale.exporting import export
from lsr_scale.exporting.merged import write_merged
from lsr_scale.exporting.source import open_adapter
from lsr_scale.exporting.verify import Reference, base_section
from lsr_scale.generation.decoder import Decoder
from lsr_scale.generation.sampling import Sampling
from lsr_scale.model.tokenizer import (
    appended_ids,
    end_tokens,
    load_tokenizer,
    read_tokenizer,
    same_state,
    save_tokenizer,
    tokenizer_of,
    without_appended,
)
from lsr_scale.run.generate import complete
from lsr_scale.run.load import load_run_model
from lsr_scale.scoring.scorer import encode_pairs
from lsr_scale.training import assembly
from lsr_scale.training.run_data import read_data
from tests.helpers.tiny_runs import byte_tokenizer, completions, do, save_llama, tiny_run, write_rows

TURN = "{{ m.role }}\n{{ m.content }}<|assistant|>\n"
TEMPLATE = "{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
CHAT = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a saw cuts wood"}]}] * 4
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def fast(template=None, **special):
    """Return the tests' tokenizer with a post-processor and special tokens of its own."""
    core = Tokenizer.from_str(byte_tokenizer().to_str())
    if template:
        words = [(word, core.token_to_id(word)) for word in ("<s>", "</s>")]
        pair = template.replace("$A", "$A $B")
        core.post_processor = processors.TemplateProcessing(single=template, pair=pair, special_tokens=words)
    return PreTrainedTokenizerFast(tokenizer_object=core, **{**SPECIAL, **special})


def described(name, task="causal_lm", chat_template=None, **training):
    """Return what of a run `tokenizer_of` looks at."""
    model = SimpleNamespace(name=str(name), revision=None, chat_template=chat_template, task=task)
    return SimpleNamespace(model=model, training=training)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with an end token and a chat template of its own, whose template file is gone since."""
    place = tmp_path_factory.mktemp("own")
    save_llama(place / "model")
    (place / "own.jinja").write_text(TEMPLATE)
    write_rows(place / "rows.jsonl", CHAT)
    run = tiny_run(
        place,
        model={"name": str(place / "model"), "chat_template": str(place / "own.jinja"), "quantization": "none"},
        training={"eos_token": "<|assistant|>", "save_strategy": "no", "max_steps": 1},
        eval={"tasks": []},
    )
    folder = do(run)
    (place / "own.jinja").unlink()
    return folder


def test_a_finished_run_keeps_its_end_token_and_template_when_the_file_is_gone(finished):
    model, tokenizer, _ = load_run_model(finished.path)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|assistant|>", "<pad>")
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.apply_chat_template(CHAT[0]["messages"][:1], tokenize=False).startswith("user\nhi<|assistant|>")
    end = tokenizer.eos_token_id
    asked = {}

    class Asked(Decoder):
        def generate(self, *args, **options):
            asked.update(options)
            return super().generate(*args, **options)

    complete(model, tokenizer, CHAT[0]["messages"][:1], Sampling(max_new_tokens=2), decoder=Asked(model))
    assert asked["eos_token_id"] == [end, 2], "the run's end token, and the one at which the base stopped anyway"


def test_generation_stops_at_the_runs_end_token(finished):
    model, tokenizer, _ = load_run_model(finished.path)
    end = tokenizer.eos_token_id
    head = model.get_output_embeddings()
    torch.nn.init.zeros_(head.weight)
    bias = torch.zeros(head.weight.shape[0], dtype=head.weight.dtype)
    head.bias = torch.nn.Parameter(bias.index_fill(0, torch.tensor([end]), 9.0))
    ids = tokenizer("a saw", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=20, do_sample=False, eos_token_id=end_tokens(tokenizer, 2))
    assert out.shape[1] == ids["input_ids"].shape[1] + 1
    assert complete(model, tokenizer, "a saw").text == ""


@pytest.mark.parametrize("kind", ["adapter", "lora", "merged"])
def test_every_export_carries_the_runs_tokenizer(finished, tmp_path, kind):
    export(finished.path, kind, tmp_path / "out", verify=False, say=lambda text: None)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template) == ("<|assistant|>", "<pad>", TEMPLATE)
    if kind == "merged":
        end = tokenizer.eos_token_id
        assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == end
        assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [end, 2]
        again = tmp_path / "again"  # an exported adapter, exported once more, has it still
        export(finished.path, "adapter", tmp_path / "adapter", verify=False, say=lambda text: None)
        base = str(finished.path.parent / "model")
        export(tmp_path / "adapter", "merged", again, verify=False, base=base, say=lambda text: None)
        assert AutoTokenizer.from_pretrained(again).chat_template == TEMPLATE


def test_a_gguf_says_the_runs_end_token_and_template(finished, tmp_path):
    export(finished.path, "gguf", tmp_path / "out", verify=False, say=lambda text: None)
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    end = read_tokenizer(finished.tokenizer).eos_token_id
    assert reader.get_field("tokenizer.ggml.eos_token_id").contents() == end
    assert reader.get_field("tokenizer.chat_template").contents() == TEMPLATE


def test_the_check_of_an_export_uses_the_runs_tokenizer(finished):
    source = open_adapter(finished.path)
    assert Reference(source).tokenizer.eos_token == "<|assistant|>"


def test_a_merged_model_whose_run_changed_nothing_keeps_the_bases_files(tmp_path):
    save_llama(tmp_path / "model")
    run = tiny_run(
        tmp_path,
        model={"name": str(tmp_path / "model"), "quantization": "none"},
        training={"save_strategy": "no", "max_steps": 1},
        eval={"tasks": []},
    )
    folder = do(run)
    source = open_adapter(folder.path)
    (tmp_path / "out").mkdir()
    write_merged(tmp_path / "out", source, base_section(source, None), "float32", {})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_a_base_that_merging_does_not_find_is_named(finished, tmp_path):
    source = open_adapter(finished.path)
    with pytest.raises(UserError, match=r"model\.name 'gone-for-good': it is not on this machine"):
        write_merged(tmp_path, source, base_section(source, "gone-for-good"), "float32", {})


@pytest.mark.parametrize("linked", [False, True])
def test_a_resumed_run_keeps_the_tokenizer_that_it_began_with(tmp_path, capsys, linked):
    save_llama(tmp_path / "model")
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    write_rows(tmp_path / "rows.jsonl", CHAT)
    sections = {
        "model": {
            "chat_template": str(tmp_path / "own.jinja"),
            "quantization": "none",
            "name": str(tmp_path / "model"),
        },
        "training": {"max_steps": 1, "save_steps": 1},
        "eval": {"tasks": []},
    }
    folder = do(tiny_run(tmp_path, **sections))
    (tmp_path / "own.jinja").unlink()
    if linked:  # the checkpoint lies on another disk; the run is where the link is
        (tmp_path / "elsewhere").mkdir()
        (folder.path / "checkpoint-1").rename(tmp_path / "elsewhere" / "checkpoint-1")
        (folder.path / "checkpoint-1").symlink_to(tmp_path / "elsewhere" / "checkpoint-1")
    sections["training"]["max_steps"] = 2
    from lsr_scale.run.train import train

    train(tiny_run(tmp_path, **sections), resume="auto")
    assert f"it resumes with those in {folder.tokenizer}" in capsys.readouterr().out
    assert read_tokenizer(folder.tokenizer).chat_template == TEMPLATE


def test_a_tokenizer_is_saved_beside_what_somebody_put_into_its_folder(tmp_path):
    for name in ("notes.txt", "tokenizer.json"):  # the latter a half of an earlier one
        (tmp_path / "tokenizer").mkdir(exist_ok=True)
        (tmp_path / "tokenizer" / name).write_text("mine")
    save_tokenizer(fast(), tmp_path / "tokenizer")
    assert same_state(read_tokenizer(tmp_path / "tokenizer"), fast())
    assert (tmp_path / "tokenizer" / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_a_full_disk_under_a_tokenizer_is_told_with_its_folder(tmp_path):
    tokenizer = fast()

    def full(folder):
        Path(folder).mkdir()
        raise Exception("No space left on device (os error 28)")  # what tokenizers raises

    tokenizer.save_pretrained = full
    with pytest.raises(UserError, match=r"tokenizer: cannot be written: No space left on device; free some space"):
        save_tokenizer(tokenizer, tmp_path / "tokenizer")
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_keeps_the_end_token_that_it_began_with(tmp_path, capsys):
    save_llama(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", completions(4))
    sections = {"model": {"quantization": "none"}, "eval": {"tasks": []}}
    folder = do(tiny_run(tmp_path, training={"max_steps": 1, "save_steps": 1}, **sections))
    changed = tiny_run(tmp_path, training={"max_steps": 2, "save_steps": 1, "eos_token": "<|assistant|>"}, **sections)
    data = read_data(changed, folder.checkpoints()[-1], print)
    trainer: Any = assembly.build_trainer(changed, folder, data=data)
    assert f"it resumes with those in {folder.tokenizer}" in capsys.readouterr().out
    (row, *_) = trainer.train_dataset
    assert row["input_ids"][-1] == read_tokenizer(folder.tokenizer).convert_tokens_to_ids("</s>")
    assert trainer.processing_class.eos_token == "</s>"


ONLY = (
    "line 1: the chat template's generation prompt is not what begins the assistant's turns; put {% generation %} and"
)


def test_a_template_whose_assistants_tokens_cannot_be_told_is_refused_with_what_to_do(tmp_path, capsys):
    save_llama(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", CHAT)
    template = tmp_path / "own.jinja"
    other_prompt = TEMPLATE.replace("assistant\n{% endif %}", "so:{% endif %}")
    template.write_text(other_prompt)
    model = {"name": str(tmp_path / "model"), "chat_template": str(template), "quantization": "none"}
    training = {
        "eos_token": "<|assistant|>",
        "max_steps": 1,
        "save_strategy": "no",
        "output_dir": str(tmp_path / "run"),
    }
    run = tiny_run(tmp_path, model=model, training=training, eval={"tasks": []})
    (tmp_path / "run.yaml").write_text(dump_yaml(run))
    for command in ("preview", "train"):
        assert cli.main([command, str(tmp_path / "run.yaml")]) == 2
        assert ONLY in capsys.readouterr().err
    every = ["--set", "training.assistant_only_loss=false"]  # as it says
    assert cli.main(["preview", str(tmp_path / "run.yaml"), *every]) == 0
    assert "\n> user\n> hi<|assistant|>" in capsys.readouterr().out
    end = "{{ m.content }}<|assistant|>"  # as it says, for the assistant alone
    within = f"{{% generation %}}{end}{{% endgeneration %}}"
    marked = f"{{% if m.role == 'assistant' %}}{within}{{% else %}}{end}{{% endif %}}"
    template.write_text(other_prompt.replace(end, marked))
    assert cli.main(["preview", str(tmp_path / "run.yaml")]) == 0
    assert "<|assistant|>assistant\n> a saw cuts wood<|assistant|>\n" in capsys.readouterr().out
    assert cli.main(["train", str(tmp_path / "run.yaml"), "--overwrite"]) == 0
    with pytest.raises(UserError, match=r"assistant_only_loss: the data is text .*, no conversations; leave it out"):
        prepare_tokenizer(fast(), "text", assistant_only=True)


def test_the_runs_end_token_serves_a_tokenizer_that_has_none(tmp_path):
    fast(eos_token=None).save_pretrained(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", completions(2))
    dataset, kind = build_dataset([rows])
    with pytest.raises(UserError, match=r"no end-of-sequence token.*set training\.eos_token to one of its tokens"):
        preview(dataset, kind, tokenizer_of(described(tmp_path)))
    training = {"eos_token": "</s>"}  # as both say
    tokenizer = tokenizer_of(described(tmp_path, **training))
    assert preview(dataset, kind, tokenizer, training=training).samples[0][-1].text == "</s>"
    with pytest.raises(UserError, match=r"training\.eos_token: '<s/>' is no token of .*did you mean '<s>'"):
        load_tokenizer(str(tmp_path), eos_token="<s/>")


@pytest.mark.parametrize(
    ("template", "first", "added"),
    [("<s> $A </s>", 1, ["</s>"]), ("$A </s>", 0, ["</s>"]), ("<s> $A", 1, []), (None, 0, [])],
)
def test_what_a_tokenizer_appends_is_left_away_once_and_said(tmp_path, template, first, added):
    fast(template).save_pretrained(tmp_path)
    told = []
    tokenizer = tokenizer_of(described(tmp_path), say=told.append)
    bare = tokenizer.encode("a saw", add_special_tokens=False)
    assert tokenizer.encode("a saw") == [1] * first + bare
    assert appended_ids(tokenizer) == []
    assert appended_ids(fast(template)) == [2] * len(added)
    assert len(told) == len(added)
    assert all("appends </s> to every text by itself; in this run it does not" in text for text in told)
    classifies = tokenizer_of(described(tmp_path, task="seq_cls"), say=told.append)
    assert appended_ids(classifies) == [2] * len(added), "a classifier's tokenizer stays as it is"
    save_tokenizer(tokenizer, tmp_path / "saved")
    assert same_state(tokenizer_of(described(tmp_path), tmp_path / "saved"), tokenizer)


def test_a_bert_like_post_processor_keeps_its_first_token_only():
    core = Tokenizer.from_str(byte_tokenizer().to_str())
    core.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL)
    bare = tokenizer.encode("a saw", add_special_tokens=False)
    assert without_appended(tokenizer, lambda text: None).encode("a saw") == [1, *bare]
    assert tokenizer.encode("a saw") == [1, *bare, 2], "the one given stays as it is"


def test_scores_look_at_the_same_tokens_whatever_the_tokenizer_appends():
    pairs = [("what is a saw?", " wood"), ("", " wood"), ("a saw ", "cuts wood")]
    for with_it, without in (("<s> $A </s>", "<s> $A"), ("$A </s>", None)):
        assert encode_pairs(fast(with_it), pairs) == encode_pairs(fast(without), pairs)
    assert all(targets and 2 not in targets for _, targets in encode_pairs(fast("<s> $A </s>"), pairs))


def test_training_sees_one_end_token_where_the_tokenizer_appends_one(tmp_path):
    fast("<s> $A </s>").save_pretrained(tmp_path)
    dataset, kind = build_dataset([write_rows(tmp_path / "rows.jsonl", completions(2))])
    (sample, _) = preview(dataset, kind, tokenizer_of(described(tmp_path), say=lambda text: None)).samples
    assert [token.text for token in sample].count("</s>") == 1
    assert sample[-1].text == "</s>"
    assert [token.supervised for token in sample[:4]] == [False] * 4


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ message.content }}", "'message' is undefined"),
        ("{{ messages[9].content }}", "has no element 9"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ messages | nosuch }}", "No filter named 'nosuch'"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
    ],
)
def test_a_template_that_fails_names_the_row_before_anything_is_loaded(tmp_path, template, message):
    tokenizer = fast()
    tokenizer.chat_template = template
    source = write_rows(tmp_path / "rows.jsonl", CHAT)
    with pytest.raises(
        UserError, match=rf"rows\.jsonl, line 1: the chat template fails .*{message}.*set model\.chat_template"
    ):
        build_dataset([source], check=row_check(tokenizer))
    with pytest.raises(UserError, match="the chat template fails on this conversation"):
        complete(SimpleNamespace(), tokenizer, CHAT[0]["messages"][:1])


def test_a_template_that_refuses_one_row_names_that_one(tmp_path):
    tokenizer = fast()
    tokenizer.chat_template = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    tokenizer.chat_template += "{% for m in messages %}{{ m.content }}{% endfor %}"
    bad = {"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]}
    with pytest.raises(UserError, match=r"rows\.jsonl, line 3: .*user first"):
        build_dataset([write_rows(tmp_path / "rows.jsonl", [*CHAT[:2], bad])], check=row_check(tokenizer))
    good = {"prompt": CHAT[0]["messages"][:1], "completion": CHAT[0]["messages"][1:]}
    build_dataset([write_rows(tmp_path / "more.jsonl", [good])], check=row_check(tokenizer))


def test_a_name_that_nothing_defines_is_told(tmp_path):
    tokenizer = fast(bos_token=None)
    tokenizer.chat_template = (
        "{{ bos_token }}{% if tools %}t{% endif %}{% if nosuch is defined %}n{% endif %}{{ sytem_prompt }}"
        "{% for m in messages %}{{ m.rolle }}{{ m.content }}</s>{% endfor %}"
    )
    dataset, kind = build_dataset([write_rows(tmp_path / "rows.jsonl", CHAT)])
    notes = [note for note in preview(dataset, kind, tokenizer, 1).notes if "nothing defines" in note]
    assert [note.partition("'")[2].partition("'")[0] for note in notes] == ["sytem_prompt", "rolle"]
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}{{ m.content }}</s>{% endfor %}"  # corrected
    assert not any("nothing defines" in note for note in preview(dataset, kind, tokenizer, 1).notes)


def test_labels_that_have_no_output_are_named_by_line(tmp_path):
    rows = [{"sentence": "a", "label": 1.0}, {"sentence": "b", "label": 2}]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        UserError, match=r"rows\.jsonl, line 2: has the label 2, but model\.num_labels is 2: .* from 0 to 1"
    ):
        build_dataset([source], labels=find_labels([load_source(source)], None, 2))
    for mended in (3, 1):  # set num_labels, or 1 for scores
        labels = find_labels([load_source(source)], None, mended)
        assert list(build_dataset([source], labels=labels)[0]["label"]) == [1, 2]


def test_a_damaged_tokenizer_is_refused_in_words(tmp_path):
    save_llama(tmp_path)
    for damage in ('{"version": "1.0"}', "[]", "{", '{"model": {"type": "BPE", "vocab": 3}}', "[" * 100_000, ""):
        (tmp_path / "tokenizer.json").write_text(damage)
        with pytest.raises(UserError, match="tokenizer"):
            load_tokenizer(str(tmp_path))
    save_llama(tmp_path)
    for damage in ("{", "[]", '{"tokenizer_class": 3}', '{"tokenizer_class": "LlamaTokenizer", "eos_token": [1]}'):
        (tmp_path / "tokenizer_config.json").write_text(damage)
        with pytest.raises(UserError, match="tokenizer"):
            load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [(r"a\nAnswer:", "a\nAnswer:"), (r"print('\\n')", r"print('\n')"), ("a\nb", "a\nb"), (r"\t and \x", r"\t and \x")],
)
def test_a_typed_backslash_n_is_a_new_line(typed, meant):
    assert cli.parser().parse_args(["generate", "run", "--prompt", typed]).prompt == meant


def test_quiet_logging_is_not_needed_for_what_is_told(tmp_path, caplog):
    fast("$A </s>").save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        tokenizer_of(described(tmp_path))
    assert "to every text by itself" in caplog.text
