"""A sweep in this process: its base is loaded once, its trials are trained one after the other or together."""

import gc
import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from lsr_scale import files
from lsr_scale.config import RunConfig
from lsr_scale.config.trials import Sweep, TrialPlan
from lsr_scale.errors import UserError, first_line
from lsr_scale.fused.cuda_graphs import describe_captures
from lsr_scale.run.train import train
from lsr_scale.scoring.scorer import EncodesOnce
from lsr_scale.screen import keeping_live_line
from lsr_scale.sweeping import scores
from lsr_scale.sweeping.bases import Bases
from lsr_scale.sweeping.board import Board, Watch
from lsr_scale.sweeping.folder import SweepFolder, SweepState, TrialState, Worker
from lsr_scale.sweeping.pages import draw_trials
from lsr_scale.sweeping.places import Ended, Places
from lsr_scale.sweeping.process_state import short_collections
from lsr_scale.sweeping.table import write_table
from lsr_scale.sweeping.together import choose
from lsr_scale.sweeping.workers import num_workers
from lsr_scale.training.callbacks.signals import Signals, Terminated
from lsr_scale.training.shared import Shared
from lsr_scale.training.steps.joint import JointStep
from lsr_scale.training.steps.sharing import own_fallback_reason, runs_fused
from lsr_scale.training.trainers import ignore_library_warnings
from lsr_scale.training.trial_rows import TrialRows
from lsr_scale.training.trial_starts import TrialStarts
from lsr_scale.units import amount

logger = logging.getLogger(__name__)

_POLL_S = 0.5  # between looks at what other workers have done
_DIVERGED = "training diverged: "  # as `nonfinite` begins


@dataclass(frozen=True)
class TrialStart:
    """Does one trial, as far as it is to go now, when it is called."""

    driver: "Driver"
    plan: TrialPlan
    state: TrialState

    def __call__(self, meet: Any = None) -> None:
        """Train: alone, or in joint steps by `meet`."""
        driver, name = self.driver, self.plan.name
        folder = driver.folder.trial(name)
        rungs = driver.sweep.section.stop.rungs() if driver.sweep.section.stop else []
        is_lost = folder.has_adapter() and not folder.own_checkpoints()  # killed, with nothing to resume from
        overwrite = self.state.overwrite or (is_lost and not folder.results.is_file())
        if folder.results.is_file() and not overwrite:
            return  # killed after its end, before the sweep knew of it
        shared = Shared(
            base=driver.bases.copy,
            meet=meet,
            signals=driver.signals,
            say=driver.board.of_trial(name),
            callbacks=(Watch(driver.board, name, self._begun),),
            rows=driver.rows,
            starts=driver.starts,
            encode=driver.encode,
        )
        train(
            driver.run_of(self.plan),
            name,
            resume=None if overwrite else "auto",
            overwrite=overwrite,
            quiet=True,
            shared=shared,
            stop_after_step=rungs[self.state.rung] if self.state.rung < len(rungs) else None,
        )

    def _begun(self, model: Any) -> None:
        """Keep what only the model tells, and its folder only once it has finished."""
        self.state.results["trainable_parameters"] = model.get_nb_trainable_parameters()[0]
        if not self.state.overwrite:
            return
        with self.driver.folder.updating() as state:
            state.trials[self.plan.name].overwrite = False


class Driver:
    """Trains a sweep's trials in this process, those that it claims of the sweep's folder."""

    def __init__(self, sweep: Sweep, folder: SweepFolder, board: Board, pages: bool = True) -> None:
        sweep = _with_dtype(sweep, folder.read().dtype)
        self.sweep, self.folder, self.board, self.pages = sweep, folder, board, pages
        self.plans = {trial.name: trial for trial in sweep.trials}
        self.worker, self.signals = Worker(folder, board.say), Signals()
        self.bases, self.rows, self.starts = Bases(board.say), TrialRows(), TrialStarts()
        self.encode = EncodesOnce()
        self.finished: set[str] = set()  # trials that this process brought to their end
        self._under_way: list[str] = []
        # those that cannot run fused share no step with those that can, and would run unfused with them
        self._is_fused = {one.name: runs_fused(one.run, torch.cuda.is_available()) for one in sweep.trials}
        self._is_alone = {one.name: own_fallback_reason(one.run) is not None for one in sweep.trials}
        self._shared: tuple[int, Any] | None = None
        self._holds_ended = False  # memory of trials that have ended

    def work(self) -> None:
        """Train until no trial is left that this process could train.

        Raises:
            UserError: where the base cannot be loaded.
            Terminated: if a signal came; what was under way has saved a checkpoint.
        """
        with (
            self.worker.joined(),
            ignore_library_warnings(),
            self.signals.listening(),
            keeping_live_line(),
            short_collections(),
        ):
            try:
                while not self.signals.received:
                    self._train_all()
                    if self.signals.received or not self.worker.may_come():
                        break
                    time.sleep(_POLL_S)
                if self.pages and not self.signals.received:
                    draw_trials(self.folder, [name for name in self.plans if name in self.finished], self.board.say)
            finally:
                self.board.clear()
                self._free_ended()
        if self.signals.received:
            state = self.folder.read()
            done = sum(trial.has_ended for trial in state.trials.values())
            raise Terminated(
                self.signals.received,
                f"with {done} of {amount(len(state.trials), 'trial')} done, in {self.folder.path}",
            )

    def run_of(self, plan: TrialPlan) -> RunConfig:
        """Return a trial's run, in its folder."""
        training = {**plan.run.training, "output_dir": str(self.folder.trial(plan.name).path)}
        return plan.run.model_copy(update={"training": training})

    def _train_all(self) -> None:
        """Train what there is to claim now: first those that share steps, the others in this thread."""
        number, step = self._together()
        if number > 1:
            places, before = Places(step.run, number, self.signals), step.captures
            places.work(lambda: self.next_start(lambda name: not self._is_alone[name]), self._ended_in_place)
            if step.captures != before:
                self.board.say(describe_captures(*step.captures))
        # others that can be claimed by then, such as after a rung, share steps in the next round
        wanted = self._is_alone.__getitem__ if number > 1 else lambda name: True
        while not self.signals.received and (start := self.next_start(wanted)) is not None:
            self.ended(start, _error_of(start))

    def _ended_in_place(self, end: Ended) -> None:
        assert isinstance(end.start, TrialStart)
        self.ended(end.start, end.error)

    def _together(self) -> tuple[int, Any]:
        """Return how many trials share a step, decided once, and what does the step."""
        if self._shared is None:
            share = [self.plans[name] for name in share_of(self.worker.look(), num_workers())]
            choice = choose(self.sweep, share, self.bases, self.rows)
            if choice.why:
                self.board.say(f"note: {choice.why}")
            run = self.sweep.trials[0].run
            step = JointStep(self.bases.of(run), run, self.board.say) if choice.number > 1 else None
            fused = run.training["fused"]
            if step is not None and (fused == "off" or (fused == "auto" and not torch.cuda.is_available())):
                said = "entropy and mean_token_accuracy are those of evaluations alone"
                self.board.say(f"note: steps that trials share log loss, norm and speed: {said}")
            self._shared = choice.number, step
        return self._shared

    def next_start(self, wanted: Callable[[str], bool]) -> TrialStart | None:
        """Return the next trial of this process, of those that are wanted, None where there is none at the moment."""
        self._free_ended()
        kinds = {self._is_fused[name] for name in self._under_way}
        trial = self.worker.claim(lambda name: wanted(name) and (not kinds or self._is_fused[name] in kinds))
        if trial is None:
            return None
        self._under_way.append(trial.name)
        self.board.begin(trial, self.folder.read())
        return TrialStart(self, self.plans[trial.name], trial)

    def _free_ended(self) -> None:
        """Free the memory of trials that have ended, once for a step: the collector looks at those under way too."""
        if self._holds_ended:
            self._holds_ended = False
            _free_memory()

    def ended(self, start: TrialStart, error: BaseException | None) -> None:
        """Record how a trial ended, or that it paused or was interrupted.

        Raises:
            KeyboardInterrupt: where that is how it ended.
        """
        self._under_way.remove(start.plan.name)
        with self.folder.updating() as state:
            trial = state.trials[start.plan.name]
            trial.worker = None
            trial.results |= start.state.results
            self._settle(trial, state.scored_by, error)
        write_table(self.folder, state)
        if trial.status == "finished":
            self.finished.add(trial.name)
        if not isinstance(error, Terminated | KeyboardInterrupt):
            self.board.end(trial, state)
        self._holds_ended = True
        if error is not None and not isinstance(error, Exception):
            raise error

    def _settle(self, trial: TrialState, metric: str, error: BaseException | None) -> None:
        """Note what came of a trial."""
        done, _ = self.board.steps.get(trial.name, (0, 0))  # steps are logged now and then
        folder = self.folder.trial(trial.name)
        if error is None and folder.results.is_file():
            trial.status, trial.overwrite, trial.error = "finished", False, None
            trial.results = scores.results_of(folder, metric)
            trial.score = scores.score_of(trial.results, metric)
        elif error is None:
            trial.status = "paused"
            trial.score = scores.newest_score(folder, metric)
            trial.rung_scores = [*trial.rung_scores[: trial.rung], trial.score]
            trial.results = {**trial.results, "steps": max(done, scores.steps_of(folder))}
        elif isinstance(error, Terminated) or not isinstance(error, Exception):
            trial.status = "pending"
        else:
            trial.status = "diverged" if str(error).startswith(_DIVERGED) else "failed"
            trial.score, trial.error = None, _words(error)
            trial.results = {**trial.results, "steps": max(done, scores.steps_of(folder))}
            if not isinstance(error, UserError | torch.OutOfMemoryError) and files.system_error(error) is None:
                logger.error("trial %s", trial.name, exc_info=error)


def share_of(state: SweepState, num_processes: int) -> list[str]:
    """Return the pending trials that are one process's share of a sweep: all that others have begun count too."""
    left = [trial.name for trial in state.trials.values() if not trial.has_ended]
    pending = [name for name in left if state.trials[name].status == "pending"]
    return pending[: -(-len(left) // num_processes)]


def _with_dtype(sweep: Sweep, dtype: str) -> Sweep:
    """Return a sweep whose trials name their dtype: this one where it is auto."""

    def named(trial: TrialPlan) -> TrialPlan:
        return replace(trial, run=trial.run.with_model(dtype=dtype)) if trial.run.model.dtype == "auto" else trial

    return replace(sweep, trials=[named(trial) for trial in sweep.trials])


def _error_of(start: Callable[[], None]) -> BaseException | None:
    """Do it, and return what it raised, without the frames that would hold a model."""
    try:
        start()
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        return error
    return None


def _words(error: Exception) -> str:
    """Return an error in a line."""
    words = first_line(error).removeprefix(_DIVERGED)
    return words if isinstance(error, UserError) else f"{type(error).__name__}: {words}"


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
