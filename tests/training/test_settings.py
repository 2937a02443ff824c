"""What the libraries raise over a setting, in set-up and in steps: the setting is named, and a bug stays a bug."""

import pytest
from trl import SFTTrainer

from lsr_scale import UserError, cli
from lsr_scale.config import dump_yaml
from tests.helpers.tiny_runs import completions, do, save_llama, tiny_run, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    save_llama(folder / "model")
    write_rows(folder / "held-out.jsonl", completions(2))
    tiny_run(folder)
    return folder


def run_in(place, folder, **training):
    training = {"output_dir": str(folder), "fused": "off", "save_strategy": "no", "max_steps": 2, **training}
    return tiny_run(place, model={"quantization": "none"}, training=training, eval={"tasks": []})


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"optim": "galore_adamw"}, "training.optim 'galore_adamw': You need to install `galore_torch`"),
        ({"optim": "schedule_free_adamw"}, "training.optim 'schedule_free_adamw': You need to install `schedulefree`"),
        ({"optim": "adamw_torch_npu_fused"}, "training.optim 'adamw_torch_npu_fused': Trainer failed to import"),
        ({"optim": "sgd", "optim_args": "nonsense"}, "training.optim_args 'nonsense': not enough values"),
        ({"optim": "sgd", "optim_args": "momentum=-1"}, "training.optim 'sgd', training.optim_args 'momentum=-1': "),
        ({"lr_scheduler_kwargs": {"nonsense": 1}}, "training.lr_scheduler_kwargs {'nonsense': 1}: get_cosine_schedule"),
        ({"lr_scheduler_kwargs": {"num_cycles": "many"}}, "training.lr_scheduler_kwargs {'num_cycles': 'many'}: "),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "training.lr_scheduler_type 'warmup_stable_decay': get_wsd"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "training.lr_scheduler_type 'cosine_with_min_lr': One of min_lr"),
        ({"use_liger_kernel": True}, "training.use_liger_kernel: You have set `use_liger_kernel` to `True` but"),
        ({"gradient_checkpointing_kwargs": {"nonsense": 1}}, "training.gradient_checkpointing_kwargs {'nonsense': 1}"),
        ({"activation_checkpointing_kwargs": {"odd": 1}}, "gradient_checkpointing_kwargs {'odd': 1} (or activation_ch"),
        ({"accelerator_config": {"nonsense": 1}}, "training.accelerator_config {'nonsense': 1}: "),
        ({"accelerator_config": "nonsense.json"}, "training.accelerator_config 'nonsense.json': "),
        ({"report_to": "nonsense"}, "training.report_to: 'nonsense': "),
        ({"torch_compile": True, "torch_compile_backend": "nonsense"}, "training.torch_compile_backend 'nonsense'"),
        ({"torch_compile": True, "torch_compile_mode": "nonsense"}, "training.torch_compile_mode 'nonsense'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_setting_that_a_library_refuses_is_named(place, tmp_path, training, words):
    with pytest.raises(UserError) as refused:
        do(run_in(place, tmp_path, **training))
    assert words in str(refused.value)
    assert len(str(refused.value)) < 600


def test_its_advice_works(place, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(dump_yaml(run_in(place, tmp_path / "run", optim="galore_adamw")))
    assert cli.main(["train", str(file)]) == 2
    assert "; install what it needs, or set optim to adamw_torch_fused" in capsys.readouterr().err
    assert cli.main(["train", str(file), "--set", "training.optim=adamw_torch_fused", "--overwrite"]) == 0


def test_an_integer_for_adam_is_a_number(place, tmp_path):
    assert do(run_in(place, tmp_path, adam_beta1=0)).adapter.is_dir()


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"max_steps": 10**30}, "training.max_steps: expected a number between"),
        ({"max_steps": 10**12}, "training.max_steps: expected a number <= 1000000000, got 1000000000000"),
        ({"num_train_epochs": 1e300}, "training.num_train_epochs: expected a number between"),
        ({"num_train_epochs": 1e7}, "training.num_train_epochs: expected a number <= 100000, got 10000000.0"),
        ({"per_device_train_batch_size": 10**7}, "training.per_device_train_batch_size: expected a number <= 65536"),
        ({"gradient_accumulation_steps": 10**7}, "training.gradient_accumulation_steps: expected a number <= 65536"),
        ({"per_device_train_batch_size": 65_536, "gradient_accumulation_steps": 17}, "is 1,114,112 rows a step"),
        ({"max_length": 10**12}, "training.max_length: expected a number <= 16777216"),
        ({"save_steps": 10**14}, "training.save_steps: expected a number <= 1000000000"),
        ({"dataloader_num_workers": 10**7}, "training.dataloader_num_workers: expected a number <= 1024"),
        ({"ddp_timeout": 10**14}, "training.ddp_timeout: expected a number <= 10000000"),
        ({"adam_beta2": 1.0}, "training.adam_beta2: expected a number < 1"),
        ({"gradient_checkpointing_kwargs": "no"}, "gradient_checkpointing_kwargs: expected a mapping, such as {key"),
        ({"lr_scheduler_kwargs": "power=2"}, "lr_scheduler_kwargs: expected a mapping, such as {key: value}, got"),
        ({"logging_steps": 1e14}, "training.logging_steps: expected a number <= 1000000000"),
        ({"max_grad_norm": 1e14}, "training.max_grad_norm: expected a number <= "),
    ],
    ids=str,
)  # fmt: skip
def test_absurd_values_are_refused_before_anything_is_done(place, tmp_path, training, words):
    with pytest.raises(UserError) as refused:
        run_in(place, tmp_path, **training)
    assert words in str(refused.value)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal access"), KeyError("of our own making")])
def test_a_bug_or_the_machine_is_not_taken_for_a_setting(place, tmp_path, monkeypatch, error):
    step = SFTTrainer.training_step

    def fails(self, *args, **kwargs):
        if self.state.global_step == 1:
            raise error
        return step(self, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "training_step", fails)
    with pytest.raises(type(error)) as raised:
        do(run_in(place, tmp_path, optim="sgd", optim_args="momentum=0.9"))
    assert raised.value is error


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_an_optimizer_that_updates_within_the_backward_pass_cannot_leave_steps_out(place, tmp_path, optim):
    with pytest.raises(UserError, match=f"training.on_nonfinite: skip leaves out a step .* {optim} updates each"):
        run_in(place, tmp_path, on_nonfinite="skip", optim=optim)
    run_in(place, tmp_path, on_nonfinite="stop", optim=optim)
