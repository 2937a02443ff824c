"""Runs that are at work at the same time in one process and share training steps; each is an ordinary run.

A run has a thread, which is no more than a coroutine: one thread has the turn at a time, the others wait. The main
thread hands the turn out, place by place. A run keeps it until it meets the others in a training step, or ends. When
all that are left have met, the main thread does the joint step, and goes round again. So what happens, and in which
order, does not depend on how long anything takes.
"""

import contextvars
import ctypes
import gc
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor

from lsr_scale.sweeping.process_state import ProcessState
from lsr_scale.training.callbacks.signals import Signals
from lsr_scale.training.steps.joint import Member
from lsr_scale.training.steps.meeting import Meet

# the main thread is not woken by a signal that the system gave to another one
_LISTENS_EVERY_S = 0.1

Start = Callable[[Meet], Any]  # does a run, which calls `meet` in each of its training steps
Step = Callable[[list[Member]], Sequence[Tensor]]  # does a joint step, and returns the loss of each member


@dataclass(frozen=True)
class Ended:
    """How a run ended: with a value, or with an error."""

    start: Start
    value: Any = None
    error: BaseException | None = None


def fewer(error: Exception, together: int) -> int:
    """Return how many share a step after one of `together` failed: half where memory ran out, else none.

    So what cannot be computed together is computed alone, and what fails then is the error of one run.
    """
    return together // 2 if isinstance(error, torch.OutOfMemoryError) else 1


class Places:
    """Where runs are at work at the same time, for whom the main thread does joint steps.

        places = Places(JointStep(base, run).run, size=8)
        places.work(functools.partial(next, iter(starts), None), ended=print)

    Attributes:
        size: How many runs are at work at the same time, at most; runs under way go on where it is lowered.
        most: How many share a step at most. Others follow in a step of their own.
    """

    def __init__(
        self,
        step: Step,
        size: int,
        signals: Signals | None = None,
        failed: Callable[[Exception, int], int] = fewer,
    ) -> None:
        """Take what is done together.

        Args:
            step: Does a joint step. What it raises for one member alone is raised in that member's run.
            size: See the class.
            signals: After one is received nothing more is started; the runs end by themselves (`StopOnSignal`).
            failed: Told what a step of several members raised, and of how many; returns how many share a step from
                then on. The members' gradients are dropped, and the step is done again, by fewer.
        """
        self.step, self.size, self.most = step, size, size
        self.signals, self.failed = signals or Signals(), failed
        self._turn: _Place | None = None  # who has it; None: the main thread
        self._back: SimpleQueue[None] = SimpleQueue()  # a message for each turn that ends
        self._places: dict[int, _Place] = {}
        self._closing = False

    def work(self, next_start: Callable[[], Start | None], ended: Callable[[Ended], None]) -> None:
        """Do runs until none is at work and none is to start.

        The process's random state, and accelerate's, are each run's own, and afterwards as they were.

        Args:
            next_start: Called where a place is free: returns what runs there, None if there is nothing now. It is asked
                again once a run has ended.
            ended: Told of each run that has ended, before its place is filled. Both are called on this thread.

        Raises:
            BaseException: what is raised on this thread, such as KeyboardInterrupt; all runs have ended by then, by
                KeyboardInterrupt wherever they were.
        """
        before = ProcessState.current()
        try:
            while True:
                self._fill(next_start)
                if not self._places:
                    return
                if not self._hand_round(ended):
                    self._step(list(self._places.values()))
        finally:
            self._close()
            before.restore()

    def _fill(self, next_start: Callable[[], Start | None]) -> None:
        """Put runs into free places."""
        for number in range(self.size):
            if number in self._places or len(self._places) >= self.size:
                continue
            if self.signals.received or (start := next_start()) is None:
                break
            self._places[number] = _Place(self, number, start)
        self._places = dict(sorted(self._places.items()))

    def _hand_round(self, ended: Callable[[Ended], None]) -> bool:
        """Give each run the turn until it meets or ends; return whether any has ended."""
        any_ended = False
        for number, place in list(self._places.items()):
            if place.member is not None:
                continue
            self._give_turn(place)
            if place.is_done:
                place.thread.join()
                del self._places[number]
                any_ended = True
                ended(Ended(place.start, place.value, place.error))
        return any_ended

    def _give_turn(self, place: "_Place") -> None:
        """Let a run go on, and wait until it meets or ends."""
        mine = ProcessState.current()
        (place.state or mine.of_new_trainer()).restore()
        self._turn = place
        place.go_on()
        while self._turn is place:
            with suppress(Empty):
                self._back.get(timeout=_LISTENS_EVERY_S)
        place.state = ProcessState.current()
        mine.restore()

    def _step(self, places: "list[_Place]") -> None:
        """Do the joint step of all who have met, by as many at once as may be."""
        while places:
            number = -(-len(places) // -(-len(places) // self.most))  # as even as may be
            part, members = places[:number], [place.member for place in places[:number] if place.member is not None]
            losses, error = self._try(members)
            if error is not None and len(part) > 1:
                self.most = max(1, min(self.failed(error, len(part)), len(part) - 1))
                continue
            for place, loss in zip(part, losses or [None] * len(part), strict=True):
                place.member, place.loss, place.failure = None, loss, error
            places = places[number:]

    def _try(self, members: list[Member]) -> tuple[Sequence[Tensor] | None, Exception | None]:
        """Do a step; return the losses, or the error, after which the members are as they were."""
        error = None
        try:
            return self.step(members), None
        except Exception as raised:
            error = raised
        # not within the handler: until its end the frames hold what the step had allocated
        traceback.clear_frames(error.__traceback__)
        for member in members:
            member.gradient = None
            for parameter in member.model.parameters():
                parameter.grad = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None, error

    def _hand_back(self) -> None:
        """End the turn of the run that has it; on its thread."""
        self._turn = None
        self._back.put(None)

    def _close(self) -> None:
        """End all runs: by KeyboardInterrupt in the one that has the turn, and in those that wait, one by one."""
        self._closing = True
        while self._places:
            place = self._turn or next(iter(self._places.values()))  # first the one that runs
            try:
                while place.thread.is_alive():
                    if self._turn is place:
                        place.interrupt()
                    self._turn = place
                    place.go_on()  # it waits, or has not been woken yet
                    while place.thread.is_alive():
                        place.thread.join(_LISTENS_EVERY_S)
                self._places = {n: one for n, one in self._places.items() if one is not place}
            except KeyboardInterrupt:
                continue  # again, while it is ending
        self._turn, self._closing = None, False


class _Place:
    """One run at work, and what it and the main thread tell each other. Only who has the turn touches it."""

    def __init__(self, places: Places, number: int, start: Start) -> None:
        self.places, self.start = places, start
        self.member: Member | None = None  # waits for the joint step with it
        self.loss: Tensor | None = None
        self.failure: BaseException | None = None
        self.is_done, self.value = False, None
        self.error: BaseException | None = None
        self.state: ProcessState | None = None
        self._wake: SimpleQueue[None] = SimpleQueue()
        on_device = _same_device()
        work = contextvars.copy_context().run
        # a daemon: should a run not end, the process does
        self.thread = threading.Thread(target=work, args=(self._work, on_device), name=f"place {number}", daemon=True)

    def go_on(self) -> None:
        """Wake the run, which has been given the turn; on the main thread."""
        if self.thread.ident is None:
            self.thread.start()
        else:
            self._wake.put(None)

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt in the run, wherever it is; on the main thread."""
        identity, error = ctypes.c_ulong(self.thread.ident or 0), ctypes.py_object(KeyboardInterrupt)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(identity, error)

    def meet(self, member: Member) -> Tensor:
        """Take part in a joint step, and return the loss; on the run's thread.

        Raises:
            Exception: what a step of this member alone raised.
            KeyboardInterrupt: where all runs are to end.
        """
        if self.places._closing:
            raise KeyboardInterrupt
        self.member = member
        self.places._hand_back()
        while self.places._turn is not self:
            self._wake.get()
        if self.places._closing:
            raise KeyboardInterrupt
        failure, loss, self.failure, self.loss = self.failure, self.loss, None, None
        if failure is not None:
            raise failure
        assert loss is not None
        return loss

    def _work(self, on_device: Callable[[], Any]) -> None:
        try:
            with on_device():
                self.value = self.start(self.meet)
        except BaseException as error:
            self.error = error
            traceback.clear_frames(error.__traceback__)  # they hold the model
        finally:
            self.is_done = True
            self.places._hand_back()


def _same_device() -> Callable[[], Any]:
    """Return a context that gives another thread the GPU and the stream that this one has."""
    if not torch.cuda.is_available():
        device = stream = None
    else:
        device, stream = torch.cuda.current_device(), torch.cuda.current_stream()

    @contextmanager
    def on_device() -> Iterator[None]:
        if device is None:
            yield
            return
        torch.cuda.set_device(device)
        with torch.cuda.stream(stream):
            yield

    return on_device
