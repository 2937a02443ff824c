"""What a run does when a signal tells it to end, and when another of its processes has ended (`watchdog`)."""

import os
import signal
import socket
import subprocess
import sys
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

    def __init__(self, number: int, when: str) -> None:
        """Take the signal, and what was done of the run and where it lies."""
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        super().__init__(f"ended by {name} {when}; the same command with --resume auto goes on")
        self.status = 128 + number


class StopOnSignal(TrainerCallback):
    """Saves a checkpoint at the end of the step in which SIGTERM or Ctrl-C came to any process, and ends training.

    With several GPUs that is two steps later: by then the processes know of each other without waiting.

    The `deepspeed` command does not pass the signal on: it ends, and what it started would train on. Its end is taken
    for SIGTERM.

    Attributes:
        came: The signal that came to this process first, 0 if none did.
        stopped: The signal for which training ended before its end, 0 if it did not.
    """

    def __init__(self, say: Callable[[str], None] = lambda text: None) -> None:
        self.say = say
        self.came = self.stopped = 0
        self.told = False
        self.largest = distributed.Largest()
        self.runner = _deepspeed_runner()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Agree with the other processes, for the signal reaches them in different steps."""
        if self.came == signal.SIGINT and not self.told:
            self.told = True
            self.say("interrupted: a checkpoint is saved, then the run ends; once more ends it at once")
        came = self.largest.ask(self._came())
        self.stopped = came if state.global_step < state.max_steps else 0  # after the last step nothing is stopped
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave out what is due at an epoch's end where training ended within it."""
        epoch = state.epoch or 0.0
        if self.stopped and abs(epoch - round(epoch)) > 1e-6:
            control.should_evaluate = control.should_save = False

    def late_signal(self) -> int:
        """Return the signal that came to any process too late to end training, 0 if none did; every one must ask."""
        return self.largest.ask(self._came(), wait=True)

    def _came(self) -> int:
        alone = self.runner is not None and _parent(os.getppid()) != self.runner
        return self.came or (signal.SIGTERM if alone else 0)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals as a request here; outside they end the process at once, as there is nothing to save."""
        process = os.getpid()

        def ask(number: int, frame: Any) -> None:
            # a loader's worker has this handler too
            by_hand = number == signal.SIGINT and os.getpid() == process
            if by_hand and self.came:
                raise KeyboardInterrupt
            self.came = self.came or number  # said at the step's end: here the screen may be in the midst of a line

        try:
            before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread, as in a notebook's server: the signals are not ours
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def end_with_peers() -> Iterator[None]:
    """End this process some seconds after another process of the run on this host has ended; see `watchdog`.

    Every process of the run must come here, and meet the others after it: who is here no more has ended.
    """
    me = watchdog.Seen(socket.gethostname(), os.getpid(), watchdog.started(os.getpid()))
    seen = [other for other in distributed.gather([me]) if other.is_alive_on(me.host) and other != me]
    if not seen:
        yield
        return
    who = f"rank {distributed.rank()}: " if distributed.rank() else ""
    words = [f"lsr-scale: {who}{LOST_PEER}", *(f"{other.process}:{other.started}" for other in seen)]
    # a session of its own: Ctrl-C is not for it
    with subprocess.Popen([sys.executable, "-I", watchdog.__file__, *words], stdin=PIPE, start_new_session=True) as out:
        try:
            yield
        finally:
            out.communicate(b"over")


def _parent(process: int) -> int | None:
    """Return the parent of a process, None where the system does not tell."""
    fields = watchdog.fields_of(process)
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
