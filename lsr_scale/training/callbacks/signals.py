"""Ending a run early: at SIGTERM or Ctrl-C with a checkpoint, and when another of its processes ended (`watchdog`)."""

import math
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lsr_scale import distributed
from lsr_scale.errors import LOST_PEER
from lsr_scale.training.callbacks import watchdog


class Terminated(Exception):  # noqa: N818
    """A signal came; the run saved what it had and ended there.

    Attributes:
        status: The exit status, by the signal.
    """

    def __init__(
        self, number: int, when: str, what_next: str = "the same command with --resume auto resumes it"
    ) -> None:
        """Take the signal, what was done of the run and where it lies, and what is left to do."""
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        super().__init__(f"ended by {name} {when}; {what_next}")
        self.status = 128 + number


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Raise Ctrl-C's KeyboardInterrupt at the end where a library within swallowed it: datasets has a bare except."""
    before, came = signal.getsignal(signal.SIGINT), False
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield
        return

    def handle(number: int, frame: Any) -> None:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


class Signals:
    """SIGTERM and Ctrl-C to this process, which its runs heed at the end of a step.

    Attributes:
        received: The first signal, 0 if there was none.
    """

    received = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals within; outside they end the process at once, as there is nothing to save."""
        process = os.getpid()

        def handle(number: int, frame: Any) -> None:
            # a loader's worker has this handler too
            by_hand = number == signal.SIGINT and os.getpid() == process
            if by_hand and self.received:
                raise KeyboardInterrupt
            self.received = self.received or number  # printed at the step's end: here a line may be half printed

        try:
            before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread, as in a notebook's server: no handler can be set
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class StopOnSignal(TrainerCallback):
    """Saves a checkpoint at the end of the step in which SIGTERM or Ctrl-C came to any process, and ends training.

    With several GPUs that is two steps later: by then every process knows of it without waiting.

    The `deepspeed` command does not pass the signal on: it ends, while its processes would train on. Its end counts as
    SIGTERM.

    Training can be stopped in the same way after a given step, to be resumed by whoever wanted that.

    Attributes:
        signals: What this process received.
        stopped: The signal that stopped training before its last step, 0 if none did.
        paused: Training stopped after the step that was given, which is not its last.
    """

    def __init__(
        self,
        say: Callable[[str], None] = lambda text: None,
        signals: Signals | None = None,
        after_step: float | None = None,
    ) -> None:
        """Take what it depends on.

        Args:
            say: Told that the first signal was heard.
            signals: Whose `listening` is entered elsewhere, for several runs of this process; its own by default.
            after_step: After which training stops in any case, once it is evaluated; below 1: a share of all steps.
        """
        self.say = say
        self.signals, self.after_step = signals or Signals(), after_step
        self.stopped, self.paused = 0, False
        self.announced = False
        self.largest = distributed.DelayedMax()
        self.runner = _deepspeed_runner()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Agree with the other processes, which the signal reaches in different steps."""
        if self.signals.received == signal.SIGINT and not self.announced:
            self.announced = True
            self.say("interrupted: a checkpoint is saved, then the run ends; once more ends it at once")
        received = self.largest.reduce(self._received())
        self.stopped = received if state.global_step < state.max_steps else 0  # after the last step nothing is stopped
        self.paused = self.is_due(state)
        if self.ended_early():
            control.should_save = control.should_training_stop = True
        if self.paused and not _is_evaluated_at_end_of_epoch(args, state):
            control.should_evaluate = control.should_evaluate or args.eval_strategy != "no"

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave out what is due at an epoch's end where training ended within it."""
        epoch = state.epoch or 0.0
        if self.ended_early() and abs(epoch - round(epoch)) > 1e-6:
            control.should_evaluate = control.should_save = False

    def ended_early(self) -> bool:
        """Tell whether training stopped before its last step, with a checkpoint."""
        return bool(self.stopped) or self.paused

    def is_due(self, state: TrainerState) -> bool:
        """Tell whether training is to stop where it is now."""
        if self.after_step is None:
            return False
        after = self.after_step if self.after_step >= 1 else math.ceil(self.after_step * state.max_steps)
        return after <= state.global_step < state.max_steps

    def late_signal(self) -> int:
        """Return the signal that any process received too late to stop training, 0 if none; a collective."""
        return self.largest.reduce(self._received(), wait=True)

    def _received(self) -> int:
        runner_ended = self.runner is not None and _parent(os.getppid()) != self.runner
        return self.signals.received or (signal.SIGTERM if runner_ended else 0)


@contextmanager
def end_with_peers() -> Iterator[None]:
    """End this process some seconds after another process of the run on this host has ended; see `watchdog`.

    Every process of the run must enter this, and wait for the others after it: one that is gone within has failed.
    """
    me = watchdog.Process(socket.gethostname(), os.getpid(), watchdog.start_time(os.getpid()))
    peers = [peer for peer in distributed.gather([me]) if peer.is_alive_on(me.host) and peer != me]
    if not peers:
        yield
        return
    who = f"rank {distributed.rank()}: " if distributed.rank() else ""
    words = [f"lsr-scale: {who}{LOST_PEER}", *(f"{peer.pid}:{peer.started}" for peer in peers)]
    # a session of its own: Ctrl-C is not for it
    with subprocess.Popen([sys.executable, "-I", watchdog.__file__, *words], stdin=PIPE, start_new_session=True) as dog:
        try:
            yield
        finally:
            dog.communicate(b"over")


def _is_evaluated_at_end_of_epoch(args: TrainingArguments, state: TrainerState) -> bool:
    """Tell whether an epoch ends with this step, after which the run is evaluated anyway."""
    epoch = state.epoch or 0.0
    return args.eval_strategy == "epoch" and abs(epoch - round(epoch)) < 1e-6


def _parent(process: int) -> int | None:
    """Return the parent of a process, None where /proc does not tell."""
    fields = watchdog.stat_fields(process)
    return None if fields is None else int(fields[1])


def _deepspeed_runner() -> int | None:
    """Return the process of the `deepspeed` command on this host, by which its launcher started this one, or None."""
    launcher = os.getppid()
    runner = _parent(launcher)
    try:
        names = [Path(f"/proc/{process}/cmdline").read_bytes() for process in (launcher, runner)]
    except OSError:
        return None
    return runner if b"deepspeed.launcher.launch" in names[0] and b"deepspeed" in names[1] else None
