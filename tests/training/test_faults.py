"""What happens to a run from outside: SIGTERM, a batch whose loss is not finite, kills, and a rank that dies."""

import contextlib
import io
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from trl import SFTTrainer

import lsr_scale.run.train
from lsr_scale import UserError, cli, distributed
from lsr_scale.config import dump_yaml
from lsr_scale.errors import LOST_PEER
from lsr_scale.run.folder import RunFolder
from lsr_scale.run.metrics import read_metrics
from lsr_scale.training.callbacks import signals, watchdog
from lsr_scale.training.checkpoint.manifest import damage
from tests.helpers.launch import LAUNCHERS, PATHS, QUICK_START, ROOT, launch
from tests.helpers.ports import held_port
from tests.helpers.ranks import COMMAND, Rank, run_ranks
from tests.helpers.tiny_models import two_processes
from tests.helpers.tiny_runs import do, factors, metrics, same, save_llama, tiny_run
from tests.training.test_resume import arrange_stop, config_file


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    save_llama(folder / "model")
    tiny_run(folder)
    return folder


def test_sigterm_saves_at_the_end_of_the_step_and_the_run_resumes(place, tmp_path, monkeypatch, capfd):
    file = config_file(place, tmp_path)
    # a step's log comes after its end, so the signal is heeded at the end of the fourth
    arrange_stop(monkeypatch, 3, signal.SIGTERM)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["train", file]) == 143
    assert "lsr-scale: ended by SIGTERM after step 4" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    folder = RunFolder(tmp_path / "run")
    assert [path.name for path in folder.checkpoints()] == ["checkpoint-2", "checkpoint-4"]
    assert not folder.adapter.exists()
    assert cli.main(["train", file, "--resume", "auto"]) == 0
    whole = do(tiny_run(place, **UNDISTURBED, training={"output_dir": str(tmp_path / "whole")}))
    assert same(factors(whole), factors(folder))


def test_a_second_ctrl_c_ends_the_run_at_once(place, tmp_path, monkeypatch, capfd):
    file = config_file(place, tmp_path)
    interrupt = signals.StopOnSignal.on_step_end

    def twice(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return interrupt(self, args, state, control, **kwargs)

    monkeypatch.setattr(signals.StopOnSignal, "on_step_end", twice)
    assert cli.main(["train", file]) == 130
    captured = capfd.readouterr()
    assert "lsr-scale: interrupted; where a checkpoint was saved" in captured.err
    assert [path.name for path in RunFolder(tmp_path / "run").checkpoints()] == ["checkpoint-2"]


def test_ctrl_c_that_a_library_swallows_before_training_is_heeded(place, tmp_path, monkeypatch, capfd):
    class Unhashable:
        def __reduce__(self):
            os.kill(os.getpid(), signal.SIGINT)  # while datasets hashes what rows are mapped with, under a bare except

    read, seen = lsr_scale.run.train.read_data, []

    def reading(*arguments):
        data = read(*arguments)
        data.train.map(lambda row, other: row, fn_kwargs={"other": Unhashable()})
        seen.append(data)
        return data

    monkeypatch.setattr(lsr_scale.run.train, "read_data", reading)
    assert cli.main(["train", config_file(place, tmp_path)]) == 130
    assert "lsr-scale: interrupted" in capfd.readouterr().err
    assert seen, "it was swallowed"
    assert not (tmp_path / "run").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class _Interrupting(io.RawIOBase):
    """A screen on which Ctrl-C comes in the midst of a line."""

    def __init__(self, line):
        self.line, self.text = line, b""

    def writable(self):
        return True

    def write(self, data):
        self.text += bytes(data)
        if self.line is not None and self.line in self.text:
            self.line = None
            os.kill(os.getpid(), signal.SIGINT)
        return len(data)


def test_ctrl_c_in_the_midst_of_a_line_is_heeded_at_the_steps_end(place, tmp_path, monkeypatch, capfd):
    screen = _Interrupting(b"step 3/6")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(screen, buffer_size=1), write_through=True))
    assert cli.main(["train", config_file(place, tmp_path)]) == 130
    assert "lsr-scale: ended by Ctrl-C after step 4, a checkpoint is saved in" in capfd.readouterr().err
    assert screen.line is None
    said = screen.text.decode().splitlines()
    assert "interrupted: a checkpoint is saved, then the run ends; once more ends it at once" in said, (
        "a line of its own"
    )
    assert [path.name for path in RunFolder(tmp_path / "run").checkpoints()][-1] == "checkpoint-4"


@pytest.mark.parametrize(
    "start", [["-m", "lsr_scale", "train"], [str(ROOT / "launch" / "train.py")]], ids=["command", "launch"]
)
def test_ctrl_c_while_the_libraries_are_imported_is_said_in_words(tmp_path, start):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")  # as it comes in the midst of an import
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{PATHS}"}
    done = subprocess.run(
        [sys.executable, *start, "--config", "smollm2_lsr"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.strip().splitlines()[-1], done.stdout) == (130, "lsr-scale: interrupted", "")


def test_a_program_that_imports_the_package_hears_of_ctrl_c_itself(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{PATHS}"}
    program = "try:\n    import lsr_scale\nexcept KeyboardInterrupt:\n    print('mine')"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "mine"


def test_a_signal_after_the_last_step_is_not_forgotten(place, tmp_path, monkeypatch, capfd):
    file = config_file(place, tmp_path)
    arrange_stop(monkeypatch, 6, signal.SIGINT)  # in the log after it
    assert cli.main(["train", file]) == 130
    assert (
        "ended by Ctrl-C after the last step: training is complete, the adapter is saved in" in capfd.readouterr().err
    )
    folder = RunFolder(tmp_path / "run")
    assert folder.adapter.is_dir()
    assert not folder.results.exists()
    assert cli.main(["train", file, "--resume", "auto"]) == 0
    assert folder.results.exists()


UNDISTURBED = {"adapter": {"method": "kron_lora", "rank": 4, "left_out": 4, "dropout": 0.2}}


def poison(monkeypatch, steps):
    """Make the loss of these steps infinite."""
    compute = SFTTrainer.compute_loss

    def poisoned(self, model, inputs, *args, **kwargs):
        result = compute(self, model, inputs, *args, **kwargs)
        if model.training and self.state.global_step + 1 in steps:
            return (result[0] * math.inf, *result[1:]) if isinstance(result, tuple) else result * math.inf
        return result

    monkeypatch.setattr(SFTTrainer, "compute_loss", poisoned)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_batch_that_is_skipped_counts_for_nothing(place, tmp_path, monkeypatch, accumulation):
    poison(monkeypatch, {2})
    training = {
        "output_dir": str(tmp_path),
        "on_nonfinite": "skip",
        "fused": "off",  # the loss that is poisoned is TRL's
        "gradient_accumulation_steps": accumulation,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim": "sgd",
        "save_steps": 1,
    }
    done = do(tiny_run(place, training=training, eval={"tasks": []}))
    rows = metrics(done)
    assert len(rows) == 6 // accumulation
    assert rows[1]["loss"] == 0
    assert rows[1]["grad_norm"] == 0
    assert same(factors(done, "checkpoint-1"), factors(done, "checkpoint-2")), "no gradient, no step"
    assert not same(factors(done, "checkpoint-2"), factors(done, "checkpoint-3"))
    lines = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2] * accumulation
    noted = [row for line in lines for row in line["rows"]]
    assert len(set(noted)) == 2 * accumulation, "every micro-batch has rows of its own"


@pytest.fixture
def start_ranks():
    """Return a function that starts two processes by themselves, as on two hosts, each with a GPU if there are two."""
    started = []
    ports = contextlib.ExitStack()

    def start(file, *options, module=COMMAND):
        meeting = {"WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "OMP_NUM_THREADS": 1}
        meeting |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports.enter_context(held_port())}
        for rank in range(2):
            own = {"CUDA_VISIBLE_DEVICES": rank} if torch.cuda.is_available() else {}
            started.append(Rank([module, "--config", file, *options], {**meeting, **own, "RANK": rank}))
        return started[-2:]

    yield start
    for rank in started:
        rank.kill()
        rank.communicate()
    ports.close()


def endless_run(place, tmp_path, save_steps):
    """Return the folder and the file of a run of a million steps."""
    folder, file = RunFolder(tmp_path / "run"), tmp_path / "run.yaml"
    training = {"output_dir": str(folder.path), "max_steps": 1_000_000, "save_steps": save_steps, "fused": "off"}
    file.write_text(dump_yaml(tiny_run(place, training=training, eval={"tasks": []})))
    return folder, file


def wait_until(true, ranks=()):
    """Wait as long as it takes, but no longer than these processes live."""
    while not true():
        assert all(rank.poll() is None for rank in ranks), [rank.communicate() for rank in ranks]
        time.sleep(0.02)


def wait_for_steps(folder, more_than, ranks):
    """Return the steps recorded once there are more than so many."""
    wait_until(lambda: len(read_metrics(folder.metrics)) > more_than, ranks)
    return len(read_metrics(folder.metrics))


@pytest.mark.slow
@two_processes
def test_ranks_started_one_by_one_meet_and_end_together(place, tmp_path, start_ranks):
    folder, file = endless_run(place, tmp_path, save_steps=20)

    ranks = start_ranks(file)
    wait_for_steps(folder, 3, ranks)
    ranks[1].send_signal(signal.SIGTERM)
    said = [rank.communicate() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [143, 143], said
    assert "lsr-scale: ended by SIGTERM after step" in said[0][1]
    steps = len(metrics(folder))
    assert damage(folder.path / f"checkpoint-{steps}") is None

    ranks = start_ranks(file, "--resume", "auto")
    wait_for_steps(folder, steps + 2, ranks)
    ranks[1].kill()
    ranks[1].communicate()
    out, err = ranks[0].communicate()
    # gloo fails; with NCCL it is ended from outside
    assert ranks[0].returncode == (-signal.SIGKILL if torch.cuda.is_available() else 2), err
    assert f"resuming from {folder.path}/checkpoint-{steps}" in out
    assert "lsr-scale: another process of the run ended or cannot be reached" in err
    assert "Traceback" not in err


@pytest.mark.slow
@two_processes
def test_a_process_that_waits_for_one_that_ended_ends_too(place, tmp_path, start_ranks):
    _, file = endless_run(place, tmp_path, save_steps=20)
    ranks = start_ranks(file, module="tests.ranks.waiting_rank")
    wait_until((tmp_path / "waits").exists, ranks)  # and would for ever
    ranks[0].terminate()
    wait_until((tmp_path / "told").exists, ranks)  # to end after the step
    ranks[1].kill()
    ranks[1].communicate()
    _, err = ranks[0].communicate()
    assert ranks[0].returncode == -signal.SIGKILL, err
    assert err.strip() == f"lsr-scale: {LOST_PEER}"


def test_who_is_no_process_of_this_host_or_another_one_by_now_is_not_waited_for():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    since = watchdog.start_time(child.pid)
    assert watchdog.Process("here", child.pid, since).is_alive_on("here")
    assert not watchdog.Process("there", child.pid, since).is_alive_on("here")
    assert not watchdog.Process("here", child.pid, str(int(since) - 1)).is_alive_on("here")
    assert not watchdog.Process("here", 2**22 + 1, None).is_alive_on("here"), "where there is no /proc"
    child.kill()
    wait_until(lambda: watchdog.start_time(child.pid) is None)  # before its launcher asks after it
    child.wait()
    assert watchdog.start_time(child.pid) is None


def test_a_port_that_another_run_has_is_reported(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        places = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in {**places, "OMP_NUM_THREADS": str(torch.get_num_threads())}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"127.0.0.1:{port} is taken, most likely by another run on this host"):
            distributed.start(use_deepspeed=False, timeout_s=2)


def test_a_rank_whose_peer_never_comes_says_so(monkeypatch):
    with held_port() as port:
        places = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in {**places, "OMP_NUM_THREADS": str(torch.get_num_threads())}.items():
            monkeypatch.setenv(name, value)
        said = f"process 0 of 2 did not meet the others at 127.0.0.1:{port} within 1 s: see"
        with pytest.raises(UserError, match=said):
            distributed.start(use_deepspeed=False, timeout_s=1)


MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # as every launcher sets it


@pytest.mark.parametrize(("local", "count", "backend"), [("1", 1, None), ("3", 2, "nccl")])
def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch, local, count, backend):
    given = {"RANK": local, "WORLD_SIZE": "4", "LOCAL_RANK": local, "LSR_SCALE_BACKEND": backend, **MEETING}
    for name, value in given.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    found = f"process {local} is number {int(local) + 1} of this host, which has {count} GPU"
    with pytest.raises(UserError, match=found + r"s?: start one process a GPU \(--num_gpus"):
        distributed.start(use_deepspeed=False)


def test_a_process_that_is_not_told_its_gpu_of_several_is_refused(monkeypatch):
    given = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": None, "LSR_SCALE_BACKEND": None, **MEETING}
    for name, value in given.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="process 1 of 2: LOCAL_RANK is not set, and this host has 2 GPUs; set it"):
        distributed.start(use_deepspeed=False)


def test_what_keeps_processes_from_communicating_is_reported(monkeypatch):
    places = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LSR_SCALE_BACKEND": "gloo", **MEETING}
    for name, value in {**places, "OMP_NUM_THREADS": str(torch.get_num_threads())}.items():
        monkeypatch.setenv(name, value)

    def fail(*_, **__):
        raise torch.distributed.DistBackendError("error in: utils.cpp:94\nLast error:\nDuplicate GPU detected: rank 0")

    monkeypatch.setattr(torch.distributed, "init_process_group", fail)
    said = r"process 0 of 2: gloo does not start among the processes: [^;]*Duplicate GPU detected: rank 0$"
    with pytest.raises(UserError, match=said):
        distributed.start(use_deepspeed=False)


@pytest.mark.parametrize(("backend", "asked"), [("gloo", None), ("nccl", "1")])
def test_several_processes_share_a_gpu_by_gloo_or_where_nccl_is_asked_to(monkeypatch, backend, asked):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("NCCL_MULTI_RANK_GPU_ENABLE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if asked:
        with pytest.raises(UserError, match="NCCL_MULTI_RANK_GPU_ENABLE=1"):
            distributed._own_gpu(backend)
        monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", asked)  # the advice, followed
    assert distributed._own_gpu(backend) == 1
    assert os.environ["LOCAL_RANK"] == "1"


@pytest.mark.slow
@two_processes
def test_what_the_deepspeed_command_started_ends_with_it(place, tmp_path):
    folder, file = endless_run(place, tmp_path, save_steps=1_000_000)
    environment = {**os.environ, **QUICK_START, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}
    pipe, log = subprocess.DEVNULL, tmp_path / "said"
    with log.open("w") as said, held_port() as port:
        launcher = [sys.executable, *LAUNCHERS["deepspeed"], port, "--module"]
        words = [*launcher, "lsr_scale.launch", "--config", file]
        command = subprocess.Popen(
            list(map(str, words)), stdin=pipe, stdout=said, stderr=said, env=environment, start_new_session=True
        )
        try:
            wait_for_steps(folder, 3, [command])
            command.terminate()  # it alone; it does not tell those that it started
            command.wait()
            wait_until(lambda: "ended by SIGTERM after step" in log.read_text())  # what a rank does last
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(command.pid, signal.SIGKILL)
    (saved,) = folder.checkpoints()
    assert damage(saved) is None
    assert not (folder.path / ".lock").exists()


@pytest.mark.slow
@two_processes
def test_the_failing_rank_speaks_first_and_ends_the_run(place, tmp_path):
    # not fused: the loss that is poisoned is TRL's
    run = tiny_run(place, training={"output_dir": str(tmp_path / "run"), "fused": "off"}, eval={"tasks": []})
    (tmp_path / "run.yaml").write_text(dump_yaml(run))
    script = ROOT / "tests/ranks/poisoned_rank.py"
    status, out, err = launch("torchrun", script, "--config", tmp_path / "run.yaml")
    assert status != 0
    lines = [*out.splitlines(), *err.splitlines()]
    said = [line for line in lines if "lsr-scale: " in line]
    assert "lsr-scale: rank 1: training diverged: the loss is inf at step 2, on rows [" in said[0]
    before = lines[: lines.index(said[0])]  # then torchrun speaks
    assert [line for line in before if re.search(r"warn|deprecat|examples/s|\[rank", line, re.I)] == []
    (line,) = (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()
    assert json.loads(line)["process"] == 1


BAD_GRADIENTS = {
    "gradient-ddp": (None, "adamw_torch_fused"),
    "gradient-zero0": ("zero0", "adamw_torch_fused"),
    "gradient-zero1": ("zero1", "adamw_torch"),
    "gradient-zero2": ("zero2", "adamw_torch_fused"),
}


@pytest.fixture(scope="module")
def skipped(place, tmp_path_factory):
    """Train a step under each ZeRO stage on two ranks, the second of which has a bad batch; and as it is defined."""
    where, stages = tmp_path_factory.mktemp("skipped"), ("zero0", "zero2", "zero3")
    common = {"lr_scheduler_type": "constant", "warmup_steps": 0, "optim": "sgd", "max_grad_norm": 0.0, "max_steps": 1}
    common |= {"save_strategy": "no", "on_nonfinite": "skip", "learning_rate": 1.0}
    common |= {"fused": "off"}  # the loss that is poisoned is TRL's

    def run(name, **sections):
        training = {"output_dir": str(where / name), **common, **sections.pop("training", {})}
        return tiny_run(place, training=training, eval={"tasks": []}, **sections)

    files = []
    for stage in stages:
        files.append(where / f"{stage}.yaml")
        files[-1].write_text(dump_yaml(run(stage, deepspeed={"config": stage})))
    for name, (engine, optim) in BAD_GRADIENTS.items():
        training = {"optim": optim, "weight_decay": 0.1, "max_grad_norm": 1.0}
        text = dump_yaml(run(name, deepspeed={"config": engine}, training=training))
        files.append(where / f"{name}.yaml")
        files[-1].write_text(text)
    status, out, err = run_ranks("tests.ranks.two_ranks_skipping", *files)
    assert status == 0, out + err
    # one process has both batches in turn; of what the second one adds to the sum of the losses, nothing counts
    compute = SFTTrainer.compute_loss

    def without_the_second(self, *args, **kwargs):
        loss = compute(self, *args, **kwargs)
        return loss * 0 if self.micro_step == 1 else loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SFTTrainer, "compute_loss", without_the_second)
        do(run("defined", training={"gradient_accumulation_steps": 2}))
    do(run("both", training={"gradient_accumulation_steps": 2}))
    do(run("neither", training={"gradient_accumulation_steps": 2, "learning_rate": 0.0}))
    return where


@pytest.mark.slow
@two_processes
@pytest.mark.parametrize("stage", ["zero0", "zero2", "zero3"])
def test_a_bad_batch_of_one_rank_adds_nothing_and_the_others_weigh_what_they_did(skipped, stage):
    flat = lambda name: torch.cat([t.flatten() for _, t in sorted(factors(RunFolder(skipped / name)).items())])  # noqa: E731
    found, defined, both, neither = (flat(name) for name in (stage, "defined", "both", "neither"))
    moved = (defined - neither).norm()
    assert moved > 1e-3 * neither.norm()
    assert (both - defined).norm() > 0.1 * moved, "the bad batch would have mattered"
    assert (found - defined).norm() <= 1e-6 * defined.norm()
    assert (found - defined).norm() <= 1e-4 * moved
    (line,) = [json.loads(line) for line in (skipped / stage / "nonfinite.jsonl").read_text().splitlines()]
    assert (line["process"], line["step"], line["loss"], len(line["rows"])) == (1, 1, "nan", 2)
    assert len(line["input_ids"]) == 2


@pytest.mark.slow
@two_processes
@pytest.mark.parametrize("name", list(BAD_GRADIENTS))
def test_a_gradient_of_one_rank_that_is_not_finite_leaves_the_step_out_on_all(skipped, name):
    assert same(factors(RunFolder(skipped / name)), factors(RunFolder(skipped / "neither")))
    (line,) = [json.loads(line) for line in (skipped / name / "nonfinite.jsonl").read_text().splitlines()]
    assert line == {"step": 1, "gradient_norm": line["gradient_norm"]}, "once, and no row is blamed"
