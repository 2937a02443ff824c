"""A trainer whose checkpoints fit any number of processes and any engine, and appear complete or not at all.

    checkpoint-N/adapter_model.safetensors, adapter_config.json, base.json    the adapter, as PEFT saves it
    checkpoint-N/training_state.safetensors    float32 masters and the optimizer's tensors, unsharded, by parameter name
    checkpoint-N/training_state.json           the optimizer's and the schedule's numbers, each process's random state
    checkpoint-N/trainer_state.json            transformers' own: the step, with it the position in the data, and tokens
    checkpoint-N/manifest.json                 every file's size and SHA-256, written last

The loop is transformers'; `Resumable` goes before `Trainer` or a subclass of it among a class's bases.
"""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import RandomSampler, SequentialSampler
from transformers import Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler

from lsr_scale import distributed, files
from lsr_scale.adapters.save_and_load import write_adapter
from lsr_scale.data.order import WholeSteps
from lsr_scale.errors import UserError
from lsr_scale.run.folder import STATE, TENSORS, RunFolder
from lsr_scale.screen import print_line
from lsr_scale.training.callbacks.early_stopping import early_stopping_of
from lsr_scale.training.callbacks.signals import StopOnSignal
from lsr_scale.training.checkpoint import rotate, trained_state
from lsr_scale.training.checkpoint.manifest import write_manifest

_Base: Any = Trainer


class Resumable(_Base):
    """Saving checkpoints and resuming from them, for `Trainer`."""

    first_num_processes = 0  # that the run began with
    _order: Any = None
    _saved_step = -1
    _resumed_at = 0
    # tokens are counted by one of these: TRL, for all processes; a method, for this one; the state, by itself
    _total_train_tokens = 0
    _tokens = _logged_tokens = 0

    @property
    def rows_per_step(self) -> int:
        """Rows in a step of the optimizer, over all processes and micro-batches."""
        return self._train_batch_size * self.args.gradient_accumulation_steps * distributed.world_size()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return the order of the rows, the same for any number of processes."""
        order = super()._get_train_sampler(train_dataset)
        if not isinstance(order, RandomSampler | SequentialSampler | LengthGroupedSampler):
            self._order = order
            return order  # a stream, prompts, or an order made for so many processes, which `select.fit` checks
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        self._order = WholeSteps(order, self.rows_per_step, seed, self.args.dataloader_drop_last)
        return self._order

    def get_train_dataloader(self) -> Any:
        """Return the loader of the rows; those that `WholeSteps` repeats count as any others."""
        loader = super().get_train_dataloader()
        if hasattr(loader, "_drop_last"):  # accelerate would leave them out of what it gathers in the last step
            loader._drop_last = True
        return loader

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate with none of training's random numbers: a run that stops at a rung is as if it had not."""
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            return super().evaluation_loop(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint to a temporary folder and rename it; every process takes part, the main one writes."""
        self.store_flos()
        self._saved_step = self.state.global_step
        target = self._folder_of(self.state.global_step)
        tensors, scalars = trained_state.collect(self)
        self.state.num_input_tokens_seen = self._num_tokens()
        states = distributed.gather([_random_state()])
        best = self.state.best_global_step
        if best:
            folder = target.with_name(f"checkpoint-{best}")
            if best == self.state.global_step or folder.exists():
                self.state.best_model_checkpoint = str(folder)
        problem = None
        if distributed.is_main():
            try:
                self._write(target, tensors, scalars, states)
            except UserError as error:
                problem = str(error)
        problem = distributed.broadcast(problem)
        if problem is not None:
            raise UserError(str(problem))
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))
        if distributed.is_main():
            keep = {self.state.global_step, *([best] if best else [])}
            rotate.rotate(RunFolder(target.parent), self.args.save_total_limit, keep)

    def _write(self, target: Path, tensors: dict[str, torch.Tensor], scalars: dict[str, Any], states: list) -> None:
        temporary = files.temporary_path(target)
        files.remove_stale_temporaries(target)
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                saved = self.state.stateful_callbacks
                name = type(callback).__name__
                if isinstance(saved.get(name), list):  # none of a callback that a run has only since it resumed
                    saved[name].append(callback.state())
                else:
                    saved[name] = callback.state()
        content = {
            "step": self.state.global_step,
            "num_processes": distributed.world_size(),
            "first_num_processes": self.first_num_processes or distributed.world_size(),
            "rows_per_step": self.rows_per_step,
            "optimizer": trained_state.optimizer_name(self),
            "scalars": scalars,
            "groups": trained_state.parameter_groups(self),
            "scheduler": self.lr_scheduler.state_dict(),
            "random": states,
        }
        try:
            temporary.mkdir(parents=True)
            write_adapter(self.accelerator.unwrap_model(self.model), temporary, target)
            save_file(tensors, temporary / TENSORS)
            (temporary / STATE).write_text(json.dumps(content), encoding="utf-8")
            self.state.save_to_json(str(temporary / "trainer_state.json"))
            write_manifest(temporary)
            if moved := rotate.rename_other(target):
                print_line(f"note: {target} was no checkpoint of that step: it is renamed to {moved.name}")
            files.replace_folder(temporary, target, {path.name for path in temporary.iterdir()})
            files.fsync(target.parent)
        except Exception as error:
            files.remove(temporary)
            system = files.system_error(error)
            if system is not None:
                raise files.cannot_write(target, system) from error
            raise

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the optimizer without empty groups, which some engines drop: so its groups are the same with any."""
        optimizer = super().create_optimizer(*args, **kwargs)
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Set up the engine as if nothing were resumed, then load the checkpoint into it."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            content = json.loads((folder / STATE).read_text(encoding="utf-8"))
            optimizer = trained_state.optimizer_name(self)
            if content["optimizer"] != optimizer:
                raise UserError(
                    f"--resume {folder}: saved with the optimizer {content['optimizer']}, this run has {optimizer}; "
                    "set training.optim as it was"
                )
            self.first_num_processes = content["first_num_processes"]
            try:
                trained_state.restore(self, load_file(folder / TENSORS), content["scalars"])
                trained_state.restore_groups(self, content["groups"])
                trained_state.restore_schedule(self, content["scheduler"])
            except (KeyError, TypeError, ValueError, IndexError, AttributeError, SafetensorError) as error:
                raise UserError(
                    f"--resume {folder}: {TENSORS} and {STATE} do not hold the state of this run's optimizer and "
                    f"schedule ({type(error).__name__}: {str(error)[:200]}); resume from another checkpoint"
                ) from error
        return prepared

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Return the epochs done and the steps of the next; all epochs where a checkpoint is of a run's last step."""
        done = super()._init_training_state(*args, **kwargs)
        if hasattr(self._order, "set_epoch"):
            # where processes share batches, accelerate's loader that skips the first ones does not set its epoch
            self._order.set_epoch(done[0])
        self._count_tokens_from(self.state.num_input_tokens_seen)
        self._resumed_at = self.state.global_step  # the oldest supported transformers has no such attribute
        early = early_stopping_of(self)
        stopped_early = early is not None and early.was_over(self.state)
        stop = self._stop()
        stop.paused = stop.is_due(self.state)
        finished = self.state.global_step >= self.state.max_steps or stopped_early or stop.paused
        return (math.ceil(self.state.num_train_epochs), 0) if finished else done

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        """End training; a run that ended early then has a checkpoint of its last step, also beside a best one."""
        if not self._stop().ended_early():
            return super()._finalize_training(trial, *args, **kwargs)
        step = self.state.global_step
        resumed_there = step == self._resumed_at and self._folder_of(step).is_dir()
        if self._saved_step != step and not resumed_there:
            self._save_checkpoint(self.model, trial)
        best, self.state.best_model_checkpoint = self.state.best_model_checkpoint, None
        try:
            return super()._finalize_training(trial, *args, **kwargs)
        finally:
            self.state.best_model_checkpoint = best

    def _num_tokens(self) -> int:
        """Return how many tokens all processes trained on; two of the counts lag behind, or are 0."""
        own = sum(distributed.gather([self._tokens]))
        return max(own, self._total_train_tokens, self.state.num_input_tokens_seen)

    def _count_tokens_from(self, number: int) -> None:
        """Count on from what the processes had trained on when the checkpoint was saved."""
        self._total_train_tokens = number  # of all processes
        self._tokens = self._logged_tokens = number if distributed.is_main() else 0

    def _stop(self) -> StopOnSignal:
        """Return the callback that ends training early, one that never does where the trainer has none."""
        found = (one for one in self.callback_handler.callbacks if isinstance(one, StopOnSignal))
        return next(found, StopOnSignal())

    def _folder_of(self, step: int) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{step}"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing: `_prepare_for_training` loads it, once the engine is ready."""

    def _load_best_model(self) -> None:
        trained_state.restore_parameters(self, load_file(Path(self.state.best_model_checkpoint) / TENSORS))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore this process's random state; where the number of processes is another, keep the new one."""
        if checkpoint is None:
            return
        content = json.loads((Path(checkpoint) / STATE).read_text(encoding="utf-8"))
        states = content["random"]
        if len(states) == distributed.world_size():
            _set_random_state(states[distributed.rank()])


def _random_state() -> dict[str, Any]:
    """Return the state of this process's random number generators, as JSON holds it."""
    name, keys, *rest = numpy.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [name, numpy.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
