"""Folders of models and of adapters."""

import json
import os
import pickle
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.chaos.place import CODE, NASTY, Planted, change_json, damage, odd_file, pick, shape, try_set
from tests.chaos.runner import Case

WEIGHTS = "model.safetensors"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    """Return a safetensors file's header and the bytes behind it."""
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write_with_header(file: Path, header: Any, rest: bytes) -> None:
    """Write a safetensors file with this header."""
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + rest)


# Models


@shape(6)
def model_settings(place: Path, chance: random.Random) -> Case:
    """Values in config.json of a wrong kind or size: refused by whatever needs them."""
    file = place / "model/config.json"
    content = json.loads(file.read_text())
    key = pick(
        chance,
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "intermediate_size",
        "num_key_value_heads",
    )
    content[key] = (
        pick(chance, 0, -1, 10**12, 2**63, "x", None, [1], {}, 1.5, True, "48")
        if key != "num_key_value_heads"
        else pick(chance, 0, -1, "x", [1], 3, 10**12)
    )
    file.write_text(json.dumps(content))
    return try_set(
        pick(chance, "plan", "train"), "eval.tasks=[]", expect="either" if content[key] is None else "refused"
    )


@shape(4)
def model_layers(place: Path, chance: random.Random) -> Case:
    """More of everything than any model has, found before it is built."""
    change_json(
        place / "model/config.json",
        chance,
        [100_000, 10**7, 10**9],
        ["num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size", "intermediate_size"],
    )
    words = ["model.random_weights=true"] if chance.random() < 0.5 else []
    command = pick(chance, "plan", "train")
    if json.loads((place / "model/config.json").read_text())["vocab_size"] == 10**7:
        command = "plan"  # its two embeddings have 960 million parameters, which train, if slowly
    return try_set(command, "eval.tasks=[]", *words, expect="either")


@shape(5)
def model_hostile(place: Path, chance: random.Random) -> Case:
    """Any key of config.json, any value."""
    change_json(place / "model/config.json", chance, NASTY)
    return try_set(pick(chance, "plan", "preview", "train"), "eval.tasks=[]", "training.max_steps=1", expect="either")


@shape(5)
def model_files(place: Path, chance: random.Random) -> Case:
    """Files of a model that are none, damaged, or not there."""
    name = pick(
        chance,
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        WEIGHTS,
        "generation_config.json",
        "chat_template.jinja",
    )
    file = place / "model" / name
    if pick(chance, True, True, False):
        odd_file(file, chance)
    else:
        damage(file, chance)
    command = pick(chance, "train", "preview") if name != WEIGHTS else "train"
    return try_set(command, "eval.tasks=[]", expect="either")


@shape(5)
def model_tokenizer(place: Path, chance: random.Random) -> Case:
    file = place / "model" / pick(chance, "tokenizer.json", "tokenizer_config.json")
    content = json.loads(file.read_text())
    target = content
    while (
        isinstance(target, dict)
        and chance.random() < 0.6
        and any(isinstance(value, dict) and value for value in target.values())
    ):
        target = chance.choice([value for value in target.values() if isinstance(value, dict) and value])
    target[chance.choice(list(target))] = chance.choice(NASTY)
    file.write_text(json.dumps(content))
    return try_set("preview", expect="either")


@shape(4)
def model_weights(place: Path, chance: random.Random) -> Case:
    """Weights that lead out of the folder, or are a program: never loaded."""
    folder = place / "model"
    weights = load_file(folder / WEIGHTS)
    kind = pick(chance, "pickle", "pickle", "index", "index", "link", "torch", "shapes", "dtype", "missing")
    says: tuple[str, ...] = ()
    if kind in ("pickle", "torch"):
        (folder / WEIGHTS).unlink()
        file = folder / "pytorch_model.bin"
        file.write_bytes(pickle.dumps(Planted())) if kind == "pickle" else torch.save(weights, file)
        says = ("safetensors",)
    elif kind == "index":
        (folder / WEIGHTS).rename(place / "outside.safetensors")
        name = pick(
            chance,
            "../outside.safetensors",
            str(place / "outside.safetensors"),
            "/dev/zero",
            "a\0b",
            "",
            ".",
            3,
            None,
            "x/../../outside.safetensors",
        )
        (folder / f"{WEIGHTS}.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": {key: name for key in weights}})
        )
    elif kind == "link":
        (folder / WEIGHTS).rename(place / "outside.safetensors")
        link = folder / pick(chance, WEIGHTS, "model-00001-of-00001.safetensors")
        link.symlink_to("../outside.safetensors")
        if link.name != WEIGHTS:
            (folder / f"{WEIGHTS}.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": {key: link.name for key in weights}})
            )
    else:
        changed = {
            "shapes": {name: tensor[:-1].clone() for name, tensor in weights.items()},
            "dtype": {name: tensor.to(torch.int32) for name, tensor in weights.items()},
            "missing": dict(list(weights.items())[::2]),
        }[kind]
        save_file(changed, folder / WEIGHTS, metadata={"format": "pt"})
    return try_set("train", "eval.tasks=[]", says=says, expect="either" if kind == "link" else "refused")


@shape(3)
def model_quantized(place: Path, chance: random.Random) -> Case:
    """A base that is quantized already, or says so, under another setting."""
    method = pick(
        chance,
        "gptq",
        "awq",
        "fp8",
        "hqq",
        "eetq",
        "compressed-tensors",
        "bitsandbytes",
        "nothing",
        None,
        3,
        "mxfp4",
        "torchao",
        "quanto",
        "aqlm",
    )
    extra = pick(
        chance,
        {},
        {"bits": 4},
        {"bits": "x", "group_size": -3},
        {"load_in_4bit": True, "load_in_8bit": True},
        {"modules_to_not_convert": 3},
    )
    file = place / "model/config.json"
    file.write_text(
        json.dumps(
            json.loads(file.read_text())
            | {
                "quantization_config": pick(
                    chance, {"quant_method": method, **extra}, {"quant_method": method, **extra}, [], "x", 3
                )
            }
        )
    )
    return try_set(
        pick(chance, "train", "plan"),
        f"model.quantization={pick(chance, 'nf4', 'none', 'int8')}",
        "eval.tasks=[]",
        expect="either",
    )


@shape(3)
def model_code(place: Path, chance: random.Random) -> Case:
    """A model that brings its own code."""
    file = place / "model/config.json"
    content = json.loads(file.read_text())
    (place / "model/modeling_own.py").write_text(f"{CODE}\nclass Own: pass\n")
    for name, folder_file in (("auto_map", file), ("auto_map", place / "model/tokenizer_config.json")):
        content = json.loads(folder_file.read_text())
        content[name] = {key: "modeling_own.Own" for key in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}
        content |= {"model_type": "own", "tokenizer_class": "OwnTokenizer"} if chance.random() < 0.6 else {}
        folder_file.write_text(json.dumps(content))
    return try_set(pick(chance, "plan", "preview", "train"), "eval.tasks=[]", expect="either")


# Adapters


def _try_adapter(chance: random.Random, folder: str, expect: Any = "either", *commands: list[str]) -> Case:
    words = pick(
        chance, *(commands or (["inspect", folder, "--json"], ["inspect", folder],
        ["export", folder, "--to", "lora", "--out", "new", "--base", "model"],
                               ["export", folder, "--to", "merged", "--out", "new", "--base", "model", "--no-verify"],
                               ["merge", folder, folder, "--out", "new"]))
    )  # fmt: skip
    return Case(words, expect=expect, writes=("new", f"{folder}/spectra.png"))


@shape(6)
def adapter_settings(place: Path, chance: random.Random) -> Case:
    """Any key of adapter_config.json, any value: whole or refused, quickly."""
    folder = pick(chance, "done/adapter", "lora", "adapter")
    values = [
        *NASTY,
        {"(a+)+$": 4},
        {"^(([a-z])+.)+[A-Z]([a-z])+$": 4},
        {"(x+x+)+y": 1},
        {".*": 1e300},
        {"q_proj": -1},
        {"q_proj": 10**12},
        "(.*)*$",
        "(a|a)*b",
    ]
    change_json(place / folder / ADAPTER_CONFIG, chance, values)
    return _try_adapter(chance, folder)


@shape(4)
def adapter_numbers(place: Path, chance: random.Random) -> Case:
    """Numbers that make an update of nothing or of infinity."""
    folder = pick(chance, "done/adapter", "lora")
    value = pick(chance, float("nan"), float("inf"), float("-inf"), 1e308, -1e308, 1e39)
    keys = ["alpha"] if folder == "done/adapter" else ["lora_alpha"]
    change_json(place / folder / ADAPTER_CONFIG, chance, [value], keys)
    commands = [
        ["inspect", folder, "--json"],
        ["export", folder, "--to", "lora", "--out", "new", "--base", "model"],
        ["merge", folder, "--out", "new"],
    ]
    if folder == "done/adapter":
        commands += [["generate", "done", "--prompt", "a", "--max-new-tokens", "2"], ["eval", "done"]]
    return _try_adapter(chance, folder, "refused", *commands)


@shape(4)
def adapter_factors(place: Path, chance: random.Random) -> Case:
    """Factors that are not finite, not floating, or not of their shapes."""
    folder = pick(chance, "done/adapter", "lora")
    file = place / folder / ADAPTER_WEIGHTS
    tensors = load_file(file)
    name = chance.choice(list(tensors))
    kind = pick(chance, "nan", "inf", "int", "complex", "bool", "shape", "empty", "fewer", "more", "name", "flat")
    first = tensors[name]
    if kind in ("nan", "inf"):
        first.view(-1)[chance.randrange(first.numel())] = float(kind)
    elif kind == "fewer":
        del tensors[name]
    elif kind == "more":
        tensors[name + ".x"] = first.clone()
    elif kind == "name":
        tensors[pick(chance, "x", "", "\x1b[2J", "[/x]", "x" * 9999, "a/../b", "../x")] = tensors.pop(name)
    else:
        tensors[name] = {
            "int": first.to(torch.int64), "bool": first > 0, "complex": first.to(torch.complex64),
            "shape": torch.cat([first, first]), "empty": first[:0], "flat": first.flatten()
        }[kind].contiguous()  # fmt: skip
    save_file(tensors, file)
    commands = [
        ["inspect", folder, "--json"],
        ["export", folder, "--to", "lora", "--out", "new", "--base", "model"],
        ["merge", folder, "--out", "new"],
    ]
    if folder == "done/adapter":
        commands += [
            ["generate", "done", "--prompt", "a", "--max-new-tokens", "2"],
            ["eval", "done"],
            ["train", "run.yaml", "--set", "adapter.start_from=done"],
        ]
    case = _try_adapter(chance, folder, "refused", *commands)
    case.writes = (*case.writes, "out")
    return case


@shape(4)
def adapter_header(place: Path, chance: random.Random) -> Case:
    """A safetensors header that lies."""
    folder = pick(chance, "done/adapter", "lora", "adapter")
    file = place / folder / ADAPTER_WEIGHTS
    header, rest = header_of(file)
    name = chance.choice([key for key in header if key != "__metadata__"])
    lies = ({"data_offsets": [0, 10**15]}, {"data_offsets": [-5, 3]}, {"data_offsets": [3, 0]},
            {"shape": [10**9, 10**9]}, {"shape": [-1]}, {"dtype": "F99"}, {"dtype": "U8"},
            {"shape": "x"}, {"data_offsets": None}, {"shape": []}, {"dtype": "F16"})  # fmt: skip
    change = pick(chance, *(lie for lie in lies if header[name] | lie != header[name]))  # F16 is none of what is F16
    header[name] = header[name] | change if chance.random() < 0.8 else pick(chance, None, [], "x", 3)
    write_with_header(file, header, rest)
    return _try_adapter(chance, folder, "refused")


@shape(4)
def adapter_files(place: Path, chance: random.Random) -> Case:
    folder = pick(chance, "done/adapter", "lora", "adapter")
    file = place / folder / pick(chance, ADAPTER_WEIGHTS, ADAPTER_CONFIG, "base.json")
    kind = odd_file(file, chance) if chance.random() < 0.5 else damage(file, chance)
    return _try_adapter(chance, folder, "refused" if kind and file.name != "base.json" else "either")


@shape(2)
def adapter_base(place: Path, chance: random.Random) -> Case:
    folder = pick(chance, "done/adapter", "lora", "adapter")
    change_json(place / folder / "base.json", chance, NASTY)
    return _try_adapter(chance, folder)


@shape(2)
def adapter_program(place: Path, chance: random.Random) -> Case:
    """Pickles in the place of factors: never loaded."""
    (place / "lora" / ADAPTER_WEIGHTS).unlink()
    (place / "lora/adapter_model.bin").write_bytes(pickle.dumps(Planted()))
    return _try_adapter(chance, "lora", "refused")


@shape(2)
def adapter_started(place: Path, chance: random.Random) -> Case:
    """adapter.init_lora_weights of PEFT that change the base: refused or right, never compared with a changed base."""
    file = place / "lora" / ADAPTER_CONFIG
    way = pick(
        chance,
        "pissa",
        "pissa_niter_4",
        "olora",
        "loftq",
        "corda",
        "eva",
        "orthogonal",
        "gaussian",
        "lora_ga",
        "x",
        3,
        None,
    )
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": way}))
    return _try_adapter(chance, "lora", "either", ["export", "lora", "--to", "merged", "--out", "new", "--base",
        "model"], ["merge", "lora", "--out", "new"],
                        ["export", "lora", "--to", "lora", "--out", "new", "--base", "model"])  # fmt: skip


@shape(2)
def adapter_links(place: Path, chance: random.Random) -> Case:
    """An adapter behind links, or whose folder holds itself."""
    kind = pick(chance, "link", "circle", "file")
    if kind == "link":
        shutil.move(place / "lora" / ADAPTER_WEIGHTS, place / "outside.safetensors")
        os.symlink("../outside.safetensors", place / "lora" / ADAPTER_WEIGHTS)
    elif kind == "circle":
        os.symlink("../lora", place / "lora/adapter")
    else:
        shutil.rmtree(place / "lora")
        (place / "lora").write_text("x")
    return _try_adapter(chance, "lora", "refused" if kind == "file" else "either")
