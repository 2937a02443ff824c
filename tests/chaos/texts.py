"""Run files, `--set`, options of the command line, surroundings and numbers."""

import json
import random
from pathlib import Path

from tests.chaos.place import CODE, NASTY, RUN, odd_file, pick, shape, try_run, try_set, with_value
from tests.chaos.runner import Case

MARKUP = ["[bold]x[/bold]", "[/x]", "[red", "[link=https://x]y[/link]", "[/]", "x[b]", "[[x]]", "\\[x]", ":smile:"]


# Run files


@shape(8)
def yaml_tags(place: Path, chance: random.Random) -> Case:
    tag = pick(
        chance, "!!int foo", "!!int ''", "!!int 1:30", "!!int 0b12", "!!float x", "!!float 1.2.3", "!!bool maybe",
        "!!null x", "!!binary '%%'", "!!binary 'aGk'", "!!timestamp x", "!!timestamp 2024-99-99", "!!set {a, b}",
        "!!omap [a]", "!!pairs [a]", "!!str [a]", "!!seq {a: 1}", "!!map [a]", "!!map x", "!foo x", "!<tag:x,1:y> z",
        "!!merge x", "!!value =", "!!yaml x", "! [1", "!!python/none", "!!int [1]", "!!float {a: 1}", "!!timestamp 1",
        f'!!python/object/apply:eval ["{CODE}"]', f'!!python/object/new:eval ["{CODE}"]', "!!python/name:os.system",
        "!!python/module:os", "!!python/tuple [1]", "!!python/int 3", "!!python/str x", "!!python/object:os.x {}",
    )  # fmt: skip
    return try_run("config", with_value(tag, chance), place)


@shape(4)
def yaml_depth(place: Path, chance: random.Random) -> Case:
    depth = pick(chance, 60, 300, 1200, 20_000)
    raw = pick(
        chance, "[" * depth + "]" * depth, "[" * depth, "{a: " * depth + "1" + "}" * depth, "{" * depth,
        "- " * depth + "x", "? " * depth + "x", "\n" + "\n".join(" " * (3 + i) + "a:" for i in range(min(depth, 2000))),
        '"' + "\\" * depth, "&a " * depth + "x", "!x " * depth,
    )  # fmt: skip
    return try_run("config", with_value(raw, chance), place)


@shape(4)
def yaml_digits(place: Path, chance: random.Random) -> Case:
    count = pick(chance, 400, 5000, 200_000)
    raw = pick(chance, "9" * count, "-" + "9" * count, "0x" + "f" * count, "0o" + "7" * count, "1" + "0" * count,
               "0." + "9" * count + "e5000", "1e" + "9" * count, "." + "9" * count + "x", "x" * count)  # fmt: skip
    key = pick(chance, "training.seed", "adapter.rank", "model.num_labels", "training.learning_rate", "eval.limit")
    if chance.random() < 0.4:
        return try_set("config", f"{key}={raw}")
    section, _, name = key.partition(".")
    return try_run("config", RUN.replace(f"{section}:\n", f"{section}:\n  {name}: {raw}\n", 1), place)


@shape(4)
def yaml_laughs(place: Path, chance: random.Random) -> Case:
    depth, fan = pick(chance, 9, 20, 40), pick(chance, 5, 9)
    kind = pick(chance, "list", "map", "merge", "merges")
    lines = ["x0: &x0 [lol]" if kind == "list" else "x0: &x0 {lol: 1}"]
    for level in range(1, depth):
        names = [f"*x{level - 1}"] * fan
        if kind == "list":
            lines.append(f"x{level}: &x{level} [{', '.join(names)}]")
        elif kind == "map":
            lines.append(f"x{level}: &x{level} {{{', '.join(f'k{i}: {name}' for i, name in enumerate(names))}}}")
        elif kind == "merge":
            lines.append(f"x{level}: &x{level} {{<<: [{', '.join(names)}], k{level}: {names[0]}}}")
        else:
            lines.append(f"x{level}: &x{level} {{<<: [{', '.join(names)}]}}")
    return try_run("config", "\n".join(lines) + "\n" + with_value(f"*x{depth - 1}", chance), place)


@shape(4)
def yaml_keys(place: Path, chance: random.Random) -> Case:
    """Keys that stand twice, merges of what is no mapping, keys that are no names, aliases that are not there."""
    text = pick(
        chance, RUN + "model: {name: y}\n", RUN.replace("  rank: 4\n", "  rank: 4\n  'rank': 5\n"),
        RUN.replace("  rank: 4\n", '  rank: 4\n  "rank": 4\n'), RUN + "<<: 3\n", RUN + "<<: [1, 2]\n", RUN + "<<: x\n",
        RUN + "<<: [[a]]\n", RUN + "<<: {nothing: 1}\n", RUN + "? [a, b]\n: 1\n", RUN + "? {a: 1}\n: 1\n",
        RUN + "1: 2\n",
        RUN + "null: 2\n", RUN + "1.5: 2\n", RUN + "true: 2\n", RUN + ".nan: 1\n", RUN + "'': 1\n", RUN + "*a : 1\n",
        RUN.replace("rank: 4", "rank: *r"), RUN.replace("rank: 4", "rank: &r *r"), RUN + "...\n---\nmodel: 1\n",
        RUN + "%YAML 1.1\n", "%YAML 9.9\n---\n" + RUN + "x: 1", "%TAG ! x:\n---\n" + RUN + "x: !y 1", RUN + "@x: 1\n",
        RUN.replace("data:", "data: &d\n  <<: *d", 1), RUN + "2024-01-01: 1\n", RUN + "~: 1\n", RUN + "!!int x: 1\n",
    )  # fmt: skip
    return try_run("config", text, place)


@shape(4)
def yaml_bytes(place: Path, chance: random.Random) -> Case:
    plain = RUN.encode()
    at = chance.randrange(len(plain))
    content, expect = pick(
        chance, (plain[:at] + b"\0" + plain[at:], "refused"), (plain.replace(b"  rank", b"\trank"), "refused"),
        (plain.replace(b"name: model", b"name: m\xf6del"), "refused"), (RUN.encode("utf-16"), "refused"),
        (RUN.encode("utf-32"), "refused"), (plain[:at] + b"\x1b[2J" + plain[at:], "refused"),
        (plain.replace(b"name: model", b'name: "\\ud800"'), "refused"), (b"\xef\xbb\xbf" + plain, "answered"),
        (plain.replace(b"\n", b"\r\n"), "answered"), (plain.replace(b"\n", b"\r"), "either"),
        (plain.replace(b"name: model", b'name: "\\0"'), "refused"),
        (plain.replace(b"name: model", b'name: "\\x1b[2J"'), "refused"),
        (plain.replace(b"name: model", b"name: \xc2\x85x"), "either"), (plain + b"\xff", "refused"),
        (plain.replace(b"name: model", "name: mod\u202eel".encode()), "refused"),
        (b"#" * 3_000_000 + b"\n" + plain, "either"),
        (plain.replace(b"rank: 4", b"rank: \xd9\xa4"), "refused"), (plain[:at], "either"),
    )  # fmt: skip
    return try_run("plan", content, place, expect=expect)


@shape(4)
def yaml_kinds(place: Path, chance: random.Random) -> Case:
    odd_file(place / "odd.yaml", chance)
    command = pick(chance, "config", "preview", "plan", "train")
    return Case(
        [command, pick(chance, "odd.yaml", "./odd.yaml", "model", ".", "/dev/null", "/dev/zero", "/proc/self/mem")]
    )


@shape(4)
def yaml_markup(place: Path, chance: random.Random) -> Case:
    """What rich would take for markup is shown as it stands, and nothing steers the terminal."""
    name = pick(chance, *MARKUP)
    key = pick(chance, "model.name", "data.train.0", "adapter.start_from", "training.output_dir", "model.revision")
    said = lambda out, err: "" if name in out + err else f"{name} is not shown as it stands"  # noqa: E731
    if key == "model.name":
        (place / "model").rename(place / name.replace("/", "_"))
        name = name.replace("/", "_")
        return try_set(pick(chance, "preview", "plan"), f"model.name={json.dumps('./' + name)}", expect="answered")
    if key == "data.train.0":
        name = name.replace("/", "_") + ".jsonl"
        (place / "rows.jsonl").rename(place / name)
        return try_set("preview", f"data.train=[{json.dumps('./' + name)}]", expect="answered")
    return try_set(pick(chance, "plan", "config", "preview"), f"adapter.nothing={json.dumps(name)}",
        f"{key}={json.dumps(name)}",
                   check=said if key == "adapter.start_from" else None, expect="refused")  # fmt: skip


@shape(4)
def yaml_many(place: Path, chance: random.Random) -> Case:
    """Many problems at once, with long names: the first are shown, the rest is counted."""
    length = pick(chance, 3, 60, 5000)
    keys = [f"{'k' * length}{index}" for index in range(pick(chance, 9, 40, 3000))]
    section = pick(chance, "adapter", "training", "model", "data", "eval")
    lines = "".join(f"  {key}: {pick(chance, '1', 'x' * length, '[a, {b: c}]')}\n" for key in keys)
    text = (
        RUN.replace(f"{section}:\n", f"{section}:\n{lines}", 1)
        if chance.random() < 0.7
        else RUN + lines.replace("  ", "")
    )
    return try_run("config", text, place)


INTEGERS = ["adapter.rank", "adapter.separation_rank", "training.per_device_train_batch_size", "training.seed",
            "training.gradient_accumulation_steps", "eval.limit", "eval.batch_tokens",
            "training.save_total_limit"]  # fmt: skip
NUMBERS = ["training.learning_rate", "training.weight_decay", "training.warmup_steps", "training.num_train_epochs",
           "training.max_grad_norm", "adapter.alpha", "adapter.dropout", "training.condition_tolerance",
           "training.compute_tolerance"]  # fmt: skip
TEXTS = [
    "model.name",
    "model.revision",
    "adapter.method",
    "training.optim",
    "training.lr_scheduler_type",
    "adapter.init",
]
LISTS = ["data.train", "data.validation", "eval.tasks"]


@shape(10)
def set_kinds(place: Path, chance: random.Random) -> Case:
    """A value of another kind than the setting's."""
    wrong = {
        "integers": ["x", "1.5", "true", "[1]", "{a: 1}", "'3'", ".nan", "-1", "1e400", "2024-01-01", "0b1", '"\\0"'],
        "numbers": [
            "x",
            "true",
            "[1]",
            "{a: 1}",
            "'3'",
            ".nan",
            ".inf",
            "-.inf",
            "-1e308",
            "1e400",
            "1:30",
            '"\\ud800"',
        ],
        "texts": ["3", "true", "[a]", "{a: b}", '""', "1.5", ".nan", "[[[[]]]]", "{}"],
        "lists": [
            "x",
            "3",
            "{a: b}",
            "[3]",
            "[[a]]",
            "[{}]",
            "[{path: 3}]",
            "[{path: ''}]",
            "[null]",
            "true",
            "[{path: [a]}]",
        ],
    }
    kind = pick(chance, *wrong)
    keys = {"integers": INTEGERS, "numbers": NUMBERS, "texts": TEXTS, "lists": LISTS}[kind]
    return try_set("config", f"{pick(chance, *keys)}={pick(chance, *wrong[kind])}")


@shape(8)
def set_places(place: Path, chance: random.Random) -> Case:
    """Assignments whose path, or whose text, makes no sense."""
    assignment = pick(
        chance, "", "=", "=1", "a", ".a=1", "a.=1", "a..b=1", "adapter.rank.x=1", "adapter.rank.0=1", "data.train.x=1",
        "data.train.1=x", "data.train.-2=x", f"data.train.{'9' * 5000}=x", "data.train.0.0=1", "model.name.x.y=1",
        "adapter.target_modules.9=x", "data.train.\u0663=x", "a." * 50_000 + "b=1", "x" * 100_000 + "=1", "model=[",
        "model.name={", "model.name='", 'model.name="\\x"', "model.name=*x", "model.name=!!int foo", "adapter.rank=\t4",
        "adapter.rank=4\n5", "model.name=\0", "\0=1", "[bold]=1", "model.na me=x", "MODEL.NAME=x", "model/name=x",
        "model.name=a: b", "model:name=x", "training.optim_args=[[[", "eval.tasks.0.limit=0", "data=", "adapter=",
        "model=3",
        "model.name=--- a\n--- b", "adapter.rank=${RANK}", "adapter.rank=$(id)", "adapter.rank=4;", "adapter=null",
        "data.train=",
    )  # fmt: skip
    return try_set("config", assignment, check=lambda out, err: "" if len(err) < 1600 else "not shortened")


@shape(4)
def set_hostile(place: Path, chance: random.Random) -> Case:
    """Any setting, any value of any kind, by `config` or `plan`."""
    from lsr_scale.config.training import training_model

    keys = [
        *INTEGERS,
        *NUMBERS,
        *TEXTS,
        *LISTS,
        *(f"training.{name}" for name in training_model("causal_lm").model_fields),
    ]
    value = json.dumps(chance.choice(NASTY))
    return try_set(pick(chance, "config", "plan", "preview"), f"{pick(chance, *keys)}={value}", expect="either")


# Numbers


@shape(8)
def numbers_absurd(place: Path, chance: random.Random) -> Case:
    assignment = pick(
        chance, "training.per_device_train_batch_size=10000000", "training.gradient_accumulation_steps=10000000",
        "training.max_steps=1e30", "training.max_steps=1000000000000000000000000000000", "adapter.rank=1000000000000",
        "adapter.separation_rank=1000000000000", "adapter.alpha=1e308", "training.learning_rate=1e308",
        "training.num_train_epochs=1e300", "training.max_length=1000000000000", "eval.batch_tokens=1000000000000000",
        "training.weight_decay=1e300", "training.max_grad_norm=1e300", "training.warmup_steps=1e300",
        "training.per_device_eval_batch_size=1000000000", "training.seed=18446744073709551616",
        "training.save_total_limit=1000000000000000000000", "training.dataloader_num_workers=1000000",
        "training.logging_steps=1e300", "training.save_steps=1e300", "data.train.0.limit=1000000000000000000000",
        "eval.limit=1000000000000000000000000", "training.dataset_num_proc=1000000", "training.ddp_timeout=1e20",
        "training.dataloader_prefetch_factor=1000000000000", "training.eval_accumulation_steps=1000000000000000000000",
        "adapter.rank=2147483648", "adapter.rank_pattern={q_proj: 100000000000000}",
        "adapter.alpha_pattern={q_proj: 1e300}",
        "adapter.alpha=-1e300", "training.dataloader_num_workers=-3", "training.torch_empty_cache_steps=-1",
        "training.eval_delay=1e300", "training.neftune_noise_alpha=1e300", "training.label_smoothing_factor=1e10",
        "training.adam_beta1=1e10", "training.adam_epsilon=1e300", "training.adam_beta2=-1",
        "training.dataset_num_proc=-1",
    )  # fmt: skip
    return try_set(pick(chance, "config", "train"), assignment)


@shape(2)
def numbers_labels(place: Path, chance: random.Random) -> Case:
    count = pick(chance, 10**12, 10**30, 2**31, 2**63)
    command = pick(chance, "config", "plan", "train")
    return try_set(command, f"model.num_labels={count}", base="classifier.yaml")


@shape(6)
def numbers_options(place: Path, chance: random.Random) -> Case:
    words = pick(
        chance, ["eval", "done", "--limit", "1e3"], ["eval", "done", "--limit", "\u0663"],
        ["eval", "done", "--limit", "9" * 5000],
        ["eval", "done", "--limit", ""], ["generate", "done", "--prompt", "a", "--max-new-tokens", "1" + "0" * 12],
        ["generate", "done", "--prompt", "a", "--max-new-tokens", "9" * 5000],
        ["plan", "run.yaml", "--gpus", "1" + "0" * 30],
        ["plan", "run.yaml", "--card-gib", "nan"], ["plan", "run.yaml", "--card-gib", "1e400"],
        ["plan", "run.yaml", "--card-gib", "9" * 5000], ["plan", "run.yaml", "--card-gib", "1e300"],
        ["preview", "run.yaml", "--samples", "1" + "0" * 30], ["preview", "run.yaml", "--samples", "\u00b2"],
        ["plan", "run.yaml", "--budget", "4Q"], ["plan", "run.yaml", "--budget", "1e400"],
        ["plan", "run.yaml", "--budget", "-3"],
        ["plan", "run.yaml", "--budget", "9" * 5000], ["plan", "run.yaml", "--budget", "nan"],
        ["plan", "run.yaml", "--budget", "0M"],
        ["plan", "run.yaml", "--budget", "\u0663M"], ["plan", "run.yaml", "--budget", "x" * 5000],
        ["merge", "lora", "lora", "--out", "new", "--weights", "nan", "1"],
        ["merge", "lora", "--out", "new", "--weights", "inf"],
        ["merge", "lora", "--out", "new", "--weights", "1e308"],
        ["merge", "lora", "lora", "--out", "new", "--weights", "1"],
        ["merge", "lora", "--out", "new", "--weights", "x"],
        ["export", "done", "--to", "lora", "--out", "new", "--max-rank", "0"],
        ["export", "done", "--to", "adapter", "--out", "new", "--bits", "5"], ["eval", "done", "--limit", "+5"],
        ["export", "done", "--to", "lora", "--out", "new", "--dtype", "float8"], ["eval", "done", "--limit", "0x10"],
        ["export", "done", "--to", "lora", "--out", "new", "--dtype", "x" * 5000], ["eval", "done", "--limit", "1_000"],
    )  # fmt: skip
    return Case(words)


# Options


@shape(4)
def options_short(place: Path, chance: random.Random) -> Case:
    """Parts of an option's name are not taken for it."""
    words = pick(
        chance, ["train", "run.yaml", "--o"], ["train", "run.yaml", "--over"], ["train", "run.yaml", "--res", "auto"],
        ["train", "--conf", "run.yaml"], ["train", "run.yaml", "--q"], ["plan", "run.yaml", "--js"],
        ["plan", "run.yaml", "--gpu", "2"],
        ["config", "run.yaml", "--se", "adapter.rank=2"], ["eval", "done", "--lim", "2"], ["eval", "done", "--base"],
        ["export", "done", "--to", "lora", "--ou", "new"],
        ["export", "done", "--to", "lora", "--out", "new", "--no-ver"],
        ["inspect", "done", "--jso"], ["merge", "lora", "--out", "new", "--weight", "1"], ["doctor", "--js"], ["--he"],
        ["preview", "run.yaml", "--sample", "1"], ["generate", "done", "--pro", "x"],
        ["generate", "done", "--prompt", "x", "--max", "3"],
        ["config", "--json"], ["train", "run.yaml", "--local", "0"], ["train", "run.yaml", "--deb"],
    )  # fmt: skip
    return Case(words)


@shape(6)
def options_twice(place: Path, chance: random.Random) -> Case:
    """An option that takes one value and stands twice; --set of one setting to two values is said."""
    words = pick(
        chance, ["config", "--config", "classifier.yaml", "--config", "run.yaml"],
        ["config", "run.yaml", "--config", "classifier.yaml"],
        ["plan", "--config", "run.yaml", "--config", "run.yaml"], ["plan", "run.yaml", "--gpus", "1", "--gpus", "2"],
        ["train", "run.yaml", "--resume", "auto", "--resume", "stopped/checkpoint-2"],
        ["eval", "done", "--limit", "1", "--limit", "2"],
        ["export", "done", "--to", "lora", "--to", "adapter", "--out", "new"],
        ["generate", "done", "--prompt", "a", "--prompt", "b"],
        ["export", "done", "--to", "lora", "--out", "new", "--out", "new2"],
        ["train", "run.yaml", "--resume", "auto", "--overwrite"],
        ["export", "done", "--to", "lora", "--out", "new", "--verify", "--no-verify"],
        ["preview", "run.yaml", "--samples", "1", "--samples", "2"],
        ["merge", "lora", "--out", "new", "--weights", "1", "--weights", "2"],
        ["inspect", "done", "--png", "a.png", "--png", "b.png"],
        ["eval", "done", "--tasks", "questions.jsonl", "--tasks", "rows.jsonl"],
        ["plan", "--budget", "1k", "--budget", "2k", "run.yaml"],
        ["config", "run.yaml", "classifier.yaml"], ["eval", "done", "done"],
        ["plan", "run.yaml", "--model", "x", "--budget", "1k"],
    )  # fmt: skip
    return Case(words)


@shape(6)
def options_idle(place: Path, chance: random.Random) -> Case:
    """An option that the command would pass over."""
    lora = ["export", "done", "--to", "lora", "--out", "new"]
    packed = ["export", "done", "--to", "adapter", "--out", "new"]
    whole = ["export", "done", "--to", "merged", "--out", "new"]
    gguf = ["export", "done", "--to", "gguf", "--out", "new"]
    words = pick(
        chance, [*lora, "--bits", "8"], [*lora, "--bits", "4"], [*lora, "--merged"], [*lora, "--base-gguf", "x.gguf"],
        [*packed, "--max-rank", "4"], [*packed, "--dtype", "float16"], [*packed, "--merged"],
        [*packed, "--base-gguf", "x"],
        [*whole, "--max-rank", "2"], [*whole, "--bits", "8"], [*whole, "--merged"], [*whole, "--base-gguf", "x.gguf"],
        [*gguf, "--bits", "4"], [*gguf, "--base-gguf", "x.gguf"], [*gguf, "--merged", "--max-rank", "2"],
        [*lora, "--dtype", "nf4"],
        ["plan", "run.yaml", "--budget", "4k", "--card-gib", "24"],
        ["plan", "run.yaml", "--budget", "4k", "--gpus", "2"],
        ["plan", "run.yaml", "--model", "model"], ["config", "run.yaml", "--json-schema"],
        ["config", "--json-schema", "--set", "a=1"],
        ["config"], ["config", "--set", "model.name=x"],
        ["plan", "--budget", "4k", "--model", "model", "--set", "adapter.rank=3"],
        [*lora, "--dtype", "q8_0"], [*gguf, "--dtype", "nf4"], [*gguf, "--dtype", "q8_0"],
    )  # fmt: skip
    return Case(words)


@shape(6)
def options_paths(place: Path, chance: random.Random) -> Case:
    """Paths of other worlds, and paths that no system takes."""
    path = pick(
        chance, "s3://bucket/x", "gs://b/x", "hf://datasets/x", "https://x.org/y", "file:///tmp/x", "${HOME}/x",
        "$HOME/x", "~nosuchuser/x",
        "a\0b", "", " ", "x" * 5000, "/".join("x" * 200 for _ in range(60)), "/dev/null", "/proc/self/x",
        "%USERPROFILE%\\x",
        "run.yaml/x", "\n", "x\ny", "\x1b[2J", "-", "--", "{HOME}", "$(pwd)/x", "`pwd`", "azure://x", "hdfs://a/b",
        "dbfs:/x/y",
    )  # fmt: skip
    words = pick(
        chance, ["train", "run.yaml", "--set", f"training.output_dir={json.dumps(path)}"],
        ["export", "done", "--to", "adapter", "--out", path],
        ["config", path], ["eval", path], ["inspect", path], ["inspect", "done", "--png", path],
        ["merge", "lora", "--out", path],
        ["generate", path, "--prompt", "x"], ["export", path, "--to", "lora", "--out", "new"], ["train", path],
        ["train", "run.yaml", "--resume", path], ["preview", "run.yaml", "--set", f"data.train=[{json.dumps(path)}]"],
        ["preview", "run.yaml", "--set", f"model.name={json.dumps(path)}"],
        ["plan", "run.yaml", "--set", f"model.name={json.dumps(path)}"],
        ["train", "run.yaml", "--set", f"eval.tasks=[{json.dumps(path)}]"], ["eval", "done", "--tasks", path],
        ["train", "run.yaml", "--set", f"adapter.start_from={json.dumps(path)}"],
        ["export", "done", "--to", "lora", "--out", "new", "--base", path],
        ["preview", "run.yaml", "--set", f"model.chat_template={json.dumps(path)}"],
        ["config", "run.yaml", "--set", f"deepspeed.config={json.dumps(path)}"],
    )  # fmt: skip
    if path == "{HOME}":  # without a $ no shell would fill it in: a name as any other
        return Case(words, expect="either", writes=(path, f"{path}.lock"))
    return Case(words)


# Surroundings


@shape(6)
def environment_streams(place: Path, chance: random.Random) -> Case:
    """What is written to cannot hold everything, or is not there."""
    stream = pick(chance, "ascii", "closed", "latin-1")
    (place / "r\u00f6ws.jsonl").write_text(
        '{"prompt": "\u00fc \u4f60", "completion": " \U0001f600"}\n', encoding="utf-8"
    )
    words, expect = pick(
        chance, (["preview", "run.yaml", "--set", "data.train=[r\u00f6ws.jsonl]"], "answered"),
        (["plan", "run.yaml"], "answered"),
        (["config", "run.yaml", "--set", "training.run_name=\u4f60"], "answered"),
        (["inspect", "done", "--json"], "answered"),
        (["config", "n\u00f6.yaml"], "refused"), (["plan", "run.yaml", "--json"], "answered"),
        (["config", "--json-schema"], "answered"),
        (["generate", "done", "--prompt", "\u4f60", "--max-new-tokens", "3"], "answered"),
        (["config", "run.yaml", "--set", "x=1"], "refused"),
        (["--help"], "answered"), (["config"], "refused"), (["nothing"], "refused"), (["train", "--help"], "answered"),
    )  # fmt: skip
    return Case(words, expect=expect, stream=stream)


@shape(4)
def environment_variables(place: Path, chance: random.Random) -> Case:
    """Variables that are empty, odd or not there: an answer all the same, or a refusal that names them."""
    name, value = pick(
        chance, ("COLUMNS", "0"), ("COLUMNS", "-3"), ("COLUMNS", "x"), ("COLUMNS", "1"), ("COLUMNS", "9" * 30),
        ("LINES", "0"), ("TERM", ""),
        ("TERM", "dumb"), ("TERM", "\x1b"), ("HOME", None), ("HOME", ""), ("HOME", "/nowhere"), ("USER", None),
        ("LANG", "xx"),
        ("NO_COLOR", "1"), ("FORCE_COLOR", ""), ("TMPDIR", "/nowhere"), ("PWD", "/nowhere"), ("LC_ALL", "C"),
        ("TZ", "x/y"),
    )  # fmt: skip
    words = pick(
        chance, ["plan", "run.yaml"], ["preview", "run.yaml"], ["config", "run.yaml"], ["inspect", "done", "--json"]
    )
    return Case(words, expect="answered", environment={name: value})


@shape(4)
def environment_launcher(place: Path, chance: random.Random) -> Case:
    name = pick(
        chance,
        "WORLD_SIZE",
        "RANK",
        "LOCAL_RANK",
        "MASTER_PORT",
        "LOCAL_WORLD_SIZE",
        "OMP_NUM_THREADS",
        "DS_ACCELERATOR",
    )
    value = pick(chance, "", "x", "-1", "1.5", "9" * 30, " ", "0x2", "\u0663")
    return Case(["plan", "run.yaml"], expect="either", environment={name: value})


@shape(2)
def environment_home(place: Path, chance: random.Random) -> Case:
    path = pick(chance, "~/x.yaml", "~nosuchuser/x.yaml", "~root/nothing.yaml")
    return Case([pick(chance, "config", "plan"), path], environment={"HOME": pick(chance, None, "", "/nowhere")})
