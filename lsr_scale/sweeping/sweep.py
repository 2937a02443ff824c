"""A sweep from its first line on the screen to a folder with the best trial named."""

from collections.abc import Sequence

from lsr_scale.config.trials import Sweep
from lsr_scale.errors import UserError
from lsr_scale.screen import print_line
from lsr_scale.sweeping import plots, workers
from lsr_scale.sweeping.board import Board, score_text
from lsr_scale.sweeping.driver import Driver
from lsr_scale.sweeping.folder import SweepFolder
from lsr_scale.sweeping.pages import draw_trials
from lsr_scale.sweeping.start import begin
from lsr_scale.sweeping.table import again, best_of, write_table
from lsr_scale.training.callbacks.signals import Signals, Terminated
from lsr_scale.training.compute import check_machine
from lsr_scale.units import amount


def run_sweep(
    sweep: Sweep,
    name: str = "run",
    resume: str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    gpus: int | None = None,
    command: Sequence[str] = (),
    pages: bool = True,
) -> SweepFolder:
    """Train all trials of a sweep on one loading of their base, and leave a folder that a person can read.

    Args:
        sweep: The sweep.
        name: Stem for the folder under `runs/` where the run names none.
        resume: "auto" to go on with the sweep in that folder: what finished is kept, what was under way resumes.
        overwrite: Start again in a folder that holds a sweep.
        quiet: Print the results only.
        gpus: Deal the trials out over so many processes with a GPU each; None trains here.
        command: The arguments of `lsr-scale sweep` by which those processes are started.
        pages: Draw the pictures and the pages of trials.

    Returns:
        The sweep's folder (`SweepFolder`).

    Raises:
        UserError: for what a user can fix, of the sweep as a whole; what a single trial meets is in its row.
        Terminated: if a signal ended the sweep.
    """

    def checked() -> tuple[SweepFolder, list[str]]:
        check_machine(sweep.trials[0].run)  # all compute alike
        return begin(sweep, name, resume, overwrite)

    with workers.meeting(checked) as (folder, notes):
        board = Board(quiet, live=not workers.is_worker())
        if not workers.is_worker():
            board.say(f"sweep folder: {folder.path}, {amount(len(sweep.trials), 'trial')}")
            if any(trial.run.model.dtype == "auto" for trial in sweep.trials):
                board.say(f"model.dtype: auto is {folder.read().dtype} in this sweep")
            for note in [*notes, *folder.read().notes, *_notes_of(sweep, gpus or workers.num_workers())]:
                board.say(f"note: {note}")
        if gpus:
            _deal_out(folder, board, command, gpus)
        else:
            Driver(sweep, folder, board, pages).work()
    if not workers.is_worker():
        finish(sweep, folder, pages)
    return folder


def _notes_of(sweep: Sweep, num_processes: int) -> list[str]:
    """Return what a user should know of settings that a sweep of several processes has no use for."""
    content = sweep.trials[0].run.deepspeed.config or {}
    stage = content.get("zero_optimization", {}).get("stage", 0)
    if num_processes == 1 or stage == 0:
        return []
    return [f"deepspeed.config: a trial is trained by one process, for which ZeRO-{stage} has nothing to shard"]


def _deal_out(folder: SweepFolder, board: Board, command: Sequence[str], gpus: int) -> None:
    """Have so many processes train the trials.

    Raises:
        UserError: if they ended before all was done.
        Terminated: if a signal came.
    """
    signals = Signals()
    with signals.listening():
        processes = workers.start(command, folder.path, gpus)
        statuses = workers.wait(processes, signals, lambda: board.show(folder.read()))
    board.clear()
    state = folder.read()
    left = [trial.name for trial in state.trials.values() if not trial.has_ended]
    if signals.received:
        done = len(state.trials) - len(left)
        raise Terminated(
            signals.received, f"with {done} of {amount(len(state.trials), 'trial')} done, in {folder.path}"
        )
    if left:
        raise UserError(
            f"{folder.path}: {amount(len(left), 'trial')} not trained to the end, as the processes ended with the "
            f"statuses {', '.join(map(str, statuses))}; what they said tells why; --resume auto goes on"
        )


def finish(sweep: Sweep, folder: SweepFolder, pages: bool = True) -> None:
    """Write the table and the pictures, if they are wanted, and print what came of it."""
    state = folder.read()
    write_table(folder, state)
    if pages:
        finished = [trial.name for trial in state.trials.values() if trial.status == "finished"]
        draw_trials(folder, finished, print_line)  # what a process that was killed left undrawn
        plots.draw(folder, state, {trial.name: trial.run.training["learning_rate"] for trial in sweep.trials})
    for status in ("stopped", "diverged", "failed"):
        if names := [trial.name for trial in state.trials.values() if trial.status == status]:
            print_line(f"{status}: {', '.join(names)}")
    if best := best_of(state):
        print_line(f"best: {best.name}, {score_text(state.scored_by, best.score)}")
        print_line(f"again, alone: {again(folder, best)}")
    drawn = [path for path in (folder.losses, folder.rewards, folder.scores) if path.is_file()]
    pictures = f", pictures: {', '.join(map(str, drawn))}" if pages and drawn else ""
    print_line(f"table: {folder.table}{pictures}")
