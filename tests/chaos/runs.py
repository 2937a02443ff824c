"""Runs that are started, resumed, overwritten and read; exports, and banks of adapters."""

import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from lsr_scale.adapters import peft_config
from lsr_scale.adapters.bank import AdapterBank
from tests.chaos.place import NASTY, Planted, change_json, damage, odd_file, pick, shape, try_set
from tests.chaos.runner import Case
from tests.helpers.tiny_models import tiny_llama

RESUME = ["train", "stopped.yaml", "--resume", "auto"]
IN_RUN = ("stopped", "stopped.old", "stopped.lock")


# Training


@shape(4)
def train_foreign(place: Path, chance: random.Random) -> Case:
    """A folder of the user's own is no run: refused where names of a run stand in it, and left as it is in any case."""
    target = pick(chance, "project", "project", ".", "deep/..", "model", "project/eval")
    (place / "deep").mkdir()
    if chance.random() < 0.3:
        (place / "project/checkpoint-7").mkdir()
    words = ["train", "run.yaml", "--set", f"training.output_dir={target}", "--set", "eval.tasks=[]"]
    words += pick(chance, ["--overwrite"], ["--resume", "auto"], [])
    if target in ("model", "project/eval"):
        mine = tuple(str(path.relative_to(place)) for path in (place / target).iterdir())
        return Case(words, expect="either", writes=(target,), kept=mine)
    return Case(words)


@shape(6)
def train_overwrite(place: Path, chance: random.Random) -> Case:
    """A run that cannot start leaves the one that it was to take the place of."""
    change = pick(
        chance, "training.optim=galore_adamw", "training.optim=adamw_apex_fused", "training.optim=lomo",
        "training.optim_args=x", "training.adam_beta1=3.0", "training.adam_beta2=-1.0",
        'training.lr_scheduler_kwargs={"nothing": 1}', "training.use_liger_kernel=true",
        'training.accelerator_config={"nothing": 1}', "model.name=nothing/here", "training.optim_args=a=b",
        "data.train=[nothing.jsonl]", "adapter.target_modules=[x_proj]", "adapter.rank=1000",
        "training.dataloader_prefetch_factor=3", "training.optim=schedule_free_adamw",
        "training.lr_scheduler_type=reduce_lr_on_plateau", "training.lr_scheduler_type=cosine_with_min_lr",
        "training.report_to=wandb", "training.push_to_hub=true", "eval.tasks=[nothing.jsonl]",
        "training.eos_token=nothing", "training.torch_compile_backend=nothing", "model.chat_template=nothing.jinja",
        "training.deepspeed=x", "training.hub_strategy=x", "adapter.left_in=7",
        "training.load_best_model_at_end=true", "training.metric_for_best_model=x", "training.adam_epsilon=-1.0",
        "training.optim=rmsprop", "training.label_names=[x]",
        "adapter.start_from=nothing", "training.ignore_data_skip=x", "training.save_steps=0", "training.max_steps=-5",
        "training.learning_rate=nan",
    )  # fmt: skip
    if change.endswith(("rmsprop", "plateau", "=[x]")):  # these do start
        return Case(["train", "run.yaml", "--set", change, "--set", "eval.tasks=[]"], expect="either", writes=("out",))
    return Case(
        ["train", "run.yaml", "--set", "training.output_dir=done", "--set", change, "--overwrite"],
        writes=("done.old", "done.lock"),
    )


@shape(4)
def train_settings(place: Path, chance: random.Random) -> Case:
    """Any setting of the training section, any value that its kind takes."""
    from lsr_scale.config.training import training_model

    fields = training_model("causal_lm").model_fields
    name = chance.choice(
        [name for name in fields if name not in ("max_steps", "output_dir", "logging_dir", "report_to")]
    )
    value = pick(chance, True, 1, 0.5, "x", {"a": 1}, ["x"], {}, [], "auto", 0, "no", "steps", "epoch", 2, -1)
    return try_set(
        "train",
        f"training.{name}={json.dumps(value)}",
        "training.max_steps=1",
        "eval.tasks=[]",
        expect="either",
        writes=("out", "trainer_output", "runs"),
    )


@shape(2)
def train_adapters(place: Path, chance: random.Random) -> Case:
    """Options of the adapter that the model cannot have."""
    change = pick(
        chance, "adapter.target_modules=q_proj", "adapter.target_modules='(.*)*q_proj$'", "adapter.target_modules='('",
        "adapter.target_modules=[]", "adapter.modules_to_save=[nothing]",
        "adapter.target_modules=''", "adapter.target_modules=[lm_head]", "adapter.rank_pattern={x_proj: 2}",
        "adapter.rank_pattern={'(a+)+$': 2}", "adapter.left_in=5", "adapter.alpha=-1e30",
        "adapter.target_modules=['']", "adapter.target_modules=[model]", "adapter.target_modules='^((a|a)*)*$'",
        "adapter.layers_to_transform=[99]", "adapter.target_modules=[norm]",
        "adapter.target_modules='([a-z]+)*[0-9]q'", "adapter.separation_rank=100000",
        "adapter.target_modules=[q_proj, q_porj]", "adapter.exclude_modules=[q_proj, v_proj]",
    )  # fmt: skip
    return try_set("train", change, "eval.tasks=[]", expect="either")


# Resuming


@shape(5)
def resume_checkpoints(place: Path, chance: random.Random) -> Case:
    """Checkpoints renamed, copied or exchanged: what disagrees is passed over, in words, and the run ends well."""
    kind = pick(
        chance,
        "renamed",
        "copied",
        "exchanged",
        "link",
        "dangling",
        "file",
        "future",
        "huge",
        "negative",
        "empty",
        "leading",
    )
    run = place / "stopped"
    newest = run / "checkpoint-4"
    if kind == "renamed":
        newest.rename(run / "checkpoint-5")
    elif kind == "copied":
        shutil.copytree(run / "checkpoint-2", run / pick(chance, "checkpoint-6", "checkpoint-5"))
    elif kind == "exchanged":
        newest.rename(run / "aside")
        (run / "checkpoint-2").rename(newest)
        (run / "aside").rename(run / "checkpoint-2")
    elif kind == "link":
        newest.rename(place / "elsewhere")
        newest.symlink_to("../elsewhere")
    elif kind == "dangling":
        (run / "checkpoint-6").symlink_to("nowhere")
    elif kind == "file":
        (run / "checkpoint-6").write_text("x")
    elif kind == "future":
        os.utime(run / "checkpoint-2", (2**33, 2**33))
    elif kind == "huge":
        shutil.copytree(newest, run / f"checkpoint-{'9' * 200}")
    elif kind == "negative":
        shutil.copytree(
            newest, run / pick(chance, "checkpoint--4", "checkpoint-x", "checkpoint-4.5", "checkpoint-\u0664")
        )
    elif kind == "empty":
        (run / "checkpoint-6").mkdir()
    else:
        shutil.copytree(run / "checkpoint-2", run / "checkpoint-0006")

    def check(out: str, err: str) -> str:
        results = place / "stopped/results.json"
        steps = json.loads(results.read_text())["steps"] if results.is_file() else None
        return "" if steps in (None, 6) else f"ended at step {steps}"

    return Case(RESUME, expect="either", writes=IN_RUN, check=check)


@shape(5)
def resume_files(place: Path, chance: random.Random) -> Case:
    """Files of a run and of its checkpoints that are damaged, odd or of other kinds."""
    names = [
        "trainer_state.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "adapter_model.safetensors",
        "adapter_config.json",
        "training_args.bin",
    ]
    there = [f"checkpoint-4/{name}" for name in names if (place / "stopped/checkpoint-4" / name).exists()]
    there += [
        name
        for name in ("metrics.jsonl", "config.yaml", "env.json", "eval/questions-before.jsonl")
        if (place / "stopped" / name).exists()
    ]
    there += [
        str(path.relative_to(place / "stopped"))
        for path in (place / "stopped/checkpoint-4").iterdir()
        if path.name not in names and path.is_file()
    ]
    file = place / "stopped" / chance.choice(there)
    kind = pick(chance, "odd", "damage", "damage", "pickle", "keys")
    if kind == "odd":
        odd_file(file, chance)
    elif kind == "pickle" and file.suffix in (".pt", ".pth", ".bin"):
        file.write_bytes(pickle.dumps(Planted()))
    elif kind == "keys" and file.suffix == ".json":
        change_json(file, chance, NASTY)
    else:
        damage(file, chance)
    return Case(RESUME, expect="either", writes=IN_RUN)


@shape(2)
def resume_metrics(place: Path, chance: random.Random) -> Case:
    """A line of metrics.jsonl that is broken does not take the others along."""
    file = place / "stopped/metrics.jsonl"
    rows = [line for line in file.read_text().splitlines() if json.loads(line)["step"] <= 4]
    broken = pick(
        chance,
        "{",
        "[]",
        "3",
        "null",
        "{}",
        '{"step": "x"}',
        '{"step": null, "loss": 1}',
        "\0\0",
        '{"step": 1e999}',
        "[" * 9999,
    )
    file.write_text("\n".join([broken, *rows]) + "\n")

    def check(out: str, err: str) -> str:
        lines = file.read_text().splitlines()
        return "" if all(row in lines for row in rows) else "rows of metrics.jsonl are gone"

    return Case(RESUME, expect="either", writes=IN_RUN, check=check)


@shape(2)
def resume_links(place: Path, chance: random.Random) -> Case:
    """Links in a run's folder do not lead its writes elsewhere."""
    name = pick(chance, ".lock", ".lock", "metrics.jsonl", "results.json", "config.yaml", "adapter", "eval", "loss.png")
    target = place / "stopped" / name
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    (place / "mine").mkdir()
    (place / "mine/notes.txt").write_text("mine")
    target.symlink_to("../mine" if name in ("adapter", "eval") else "../notes.txt")
    return Case(pick(chance, RESUME, ["train", "stopped.yaml", "--overwrite"]), expect="either", writes=IN_RUN)


@shape(3)
def resume_named(place: Path, chance: random.Random) -> Case:
    """--resume of what is no checkpoint, or another run's."""
    path = pick(
        chance,
        "nothing",
        "stopped",
        "model",
        "stopped/config.yaml",
        "done",
        "project",
        "stopped/checkpoint-99",
        "stopped/checkpoint-4/..",
        "done/adapter",
        "lora",
        "",
        "~nosuchuser",
        "a\0b",
        "/dev/zero",
    )
    return Case(["train", "stopped.yaml", "--resume", path])


# Reading runs


@shape(4)
def run_settings(place: Path, chance: random.Random) -> Case:
    """A run's own config.yaml, changed."""
    file = place / "done/config.yaml"
    lines = file.read_text().splitlines()
    number = chance.randrange(len(lines))
    key = lines[number].partition(":")[0]
    value = pick(chance, "x", "[", "!!int foo", "9" * 5000, "{a: 1}", "null", "*x", ".nan", "[/x]", "-1", "1e30")
    lines[number] = f"{key}: {value}"
    file.write_text("\n".join(lines))
    words = pick(
        chance,
        ["generate", "done", "--prompt", "a", "--max-new-tokens", "2"],
        ["eval", "done", "--limit", "1"],
        ["inspect", "done", "--json"],
    )
    return Case(words, expect="either", writes=("done/eval", "done/results.json", "done/.lock"))


@shape(3)
def run_files(place: Path, chance: random.Random) -> Case:
    """Files of a finished run that are odd: scores are printed, whatever cannot be written."""
    name = pick(
        chance,
        "results.json",
        "eval/questions-eval-adapter.jsonl",
        "eval",
        "eval",
        "spectra.png",
        "metrics.jsonl",
        "env.json",
    )
    target = place / "done" / name
    if target.is_dir():
        shutil.rmtree(target)
    kind = odd_file(target, chance)
    words = (
        pick(chance, ["eval", "done", "--limit", "2"], ["eval", "done", "--limit", "2", "--json"])
        if name != "spectra.png"
        else ["inspect", "done"]
    )

    def printed(out: str, err: str) -> str:
        return "" if "questions" in out or name == "spectra.png" else f"no table, under a {kind}"

    return Case(
        words,
        expect="either",
        writes=("done/eval", "done/results.json", "done/.lock", "done/spectra.png"),
        check=printed,
    )


@shape(2)
def run_pictures(place: Path, chance: random.Random) -> Case:
    """A file that is no picture of ours is not drawn over."""
    target = pick(
        chance,
        "notes.txt",
        "run.yaml",
        "project/results.json",
        "done/config.yaml",
        "model",
        "nowhere/x.png",
        "/dev/full",
        "project",
        "photo.png",
    )
    if target == "photo.png":
        (place / target).write_bytes(b"\x89PNG\r\n\x1a\n" + chance.randbytes(200))
    if target == "nowhere/x.png":  # folders on the way are made, as those of --out are
        return Case(["inspect", "done", "--png", target], expect="answered", writes=("nowhere",))
    return Case(["inspect", "done", "--png", target])


@shape(2)
def run_prompts(place: Path, chance: random.Random) -> Case:
    prompt, expect = pick(
        chance, ("", "refused"), ("\ud800", "refused"), ("a\0b", "either"), ("x" * 20_000, "either"),
        ("[/x]", "answered"), ("\x1b[2J", "answered"), ("</s>" * 50, "either"),
        (" ", "either"), ("\n", "either"), ("a " * 200, "either"), ("\u4f60\U0001f600", "answered"),
        ("<pad>", "either"), ("e\u0301\u202e", "answered"),
    )  # fmt: skip
    words = ["--chat"] if chance.random() < 0.4 else []
    if words and not prompt:  # a turn without words is continued all the same: the chat template frames it
        expect = "answered"
    return Case(
        ["generate", "done", "--prompt", prompt, "--max-new-tokens", pick(chance, "1", "4", "500"), *words],
        expect=expect,
    )


# Exports


@shape(5)
def export_targets(place: Path, chance: random.Random) -> Case:
    """Places where something is already, or that lie in what is exported."""
    target = pick(
        chance,
        "project",
        "notes.txt",
        "done",
        "done/adapter",
        "lora",
        "model",
        ".",
        "nowhere-link",
        "/dev/null",
        "",
        "/proc/x",
        "project/eval",
        "notes.txt/x",
    )
    if target == "nowhere-link":
        (place / target).symlink_to("nowhere/at/all")
    words = pick(
        chance,
        ["export", "done", "--to", "lora"],
        ["export", "done", "--to", "adapter"],
        ["merge", "lora", "lora"],
        ["export", "done", "--to", "gguf"],
        ["export", "done", "--to", "merged"],
    )
    return Case([*words, "--out", target])


@shape(3)
def export_ranges(place: Path, chance: random.Random) -> Case:
    """Values that a format cannot hold are not written."""
    folder = pick(chance, "done/adapter", "lora")
    file = place / folder / "adapter_model.safetensors"
    tensors = load_file(file)
    value = pick(chance, 1e6, 1e10, 1e30)
    for name in tensors:
        tensors[name] = tensors[name].float().fill_(value)
    save_file(tensors, file)
    words = pick(chance, ["export", folder, "--to", "lora", "--dtype", "float16"],
        ["merge", folder, "--dtype", "float16"],
                 ["export", folder, "--to", "merged", "--dtype", "float16", "--base", "model"])  # fmt: skip
    return Case([*words, "--out", "new"])


@shape(2)
def export_left_overs(place: Path, chance: random.Random) -> Case:
    """What a killed export left is removed by the next; what others are writing is not."""
    dead = place / ".new.4194999.part"
    dead.mkdir()
    (dead / "adapter_model.safetensors").write_bytes(b"x" * 100)
    gone = lambda out, err: "left over" if dead.exists() else ""  # noqa: E731
    return Case(
        ["export", "done", "--to", "adapter", "--out", "new", "--no-verify"],
        expect="answered",
        writes=("new", dead.name),
        check=gone,
    )


@shape(2)
def export_mixed(place: Path, chance: random.Random) -> Case:
    """Sums of what does not go together."""
    words = pick(
        chance,
        ["lora", "done/adapter", "--weights", "1"],
        ["lora", "model"],
        ["lora", "nothing"],
        ["lora", "project"],
        ["encoder", "lora"],
        ["lora", "lora", "--max-rank", "9" * 30],
    )
    return Case(
        ["merge", *words, "--out", "new"], expect="either" if "--max-rank" in words else "refused", writes=("new",)
    )


# Banks


@shape(4)
def bank_adapters(place: Path, chance: random.Random) -> Case:
    """Adapters that a bank must not take."""
    source = place / "banked"
    shutil.copytree(place / "done/adapter", source / "a")
    file = source / "a/adapter_model.safetensors"
    tensors = load_file(file)
    kind = pick(chance, "int", "bool", "complex", "nan", "inf", "alpha", "name", "link", "second", "config", "damage")
    name, expect = "a", "either" if kind in ("damage", "config") else "refused"
    if kind in ("int", "bool", "complex"):
        dtype = {"int": torch.int32, "bool": torch.bool, "complex": torch.complex64}[kind]
        save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, file)
    elif kind in ("nan", "inf"):
        save_file({key: tensor.fill_(float(kind)) for key, tensor in tensors.items()}, file)
    elif kind == "alpha":
        change_json(
            source / "a/adapter_config.json", chance, [1e308, float("nan"), float("inf"), "x", None, -1e39], ["alpha"]
        )
        if json.loads((source / "a/adapter_config.json").read_bytes())["alpha"] is None:  # the method's own
            expect = "answered"
    elif kind == "name":
        name = pick(
            chance,
            "../done/adapter",
            str(place / "done/adapter"),
            "",
            ".",
            "..",
            "a/../a",
            "a\0b",
            "x",
            "a/",
            "~nosuchuser",
        )
    elif kind == "link":
        (source / "b").symlink_to("../done/adapter")
        name = "b"
    elif kind == "config":
        change_json(
            source / "a/adapter_config.json", chance, ["x", [], {}, -1, 10**30], ["rank", "peft_type", "target_modules"]
        )
    elif kind == "damage":
        damage(file, chance)

    def call() -> None:
        options = {"rank": 4, "separation_rank": 2, "target_modules": ["q_proj", "v_proj"]}
        model: Any = get_peft_model(tiny_llama(vocab_size=304), peft_config("lsr", options, "CAUSAL_LM"))
        bank = AdapterBank(model, source, memory_gib=1e-3)
        if kind == "second":
            AdapterBank(model, source, memory_gib=1e-3)
        bank.load(name)

    return Case(call=call, expect=expect)
