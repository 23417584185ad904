"""A search by Optuna: asks what to try, starts each trial's workers, feeds its evaluations to the pruner, and records its end.

Several machines that share the storage and the folder may search together. What was killed goes on: a trial that nobody
watches any more is taken up again, in its folder, by the next that looks for work. What a sampler draws for a trial depends on
the seed, the trial's number and the trials before it, so that a search with `parallel=1` is the same whether killed or not.
"""

import socket
import time
from pathlib import Path
from types import FrameType
from typing import Any

import optuna
import optuna.storages.journal
from filelock import FileLock, Timeout
from optuna.trial import TrialState

from rowwise.launch.sweep.config import SweepConfig, keep_asked, keep_plan
from rowwise.launch.sweep.halving import Halving
from rowwise.launch.sweep.running import Running, outcome_of, slot_environment, start_trial
from rowwise.launch.sweep.runs import first_rung, largest_nproc
from rowwise.launch.sweep.space import Choice, Interval, Space
from rowwise.launch.sweep.trials import Trial, result
from rowwise.launch.warm import Warm
from rowwise.trainer.keys import without_password
from rowwise.trainer.metrics import MetricsTail, number
from rowwise.trainer.stop import hearing

JOURNAL = "journal.log"
POLL_SECONDS = 0.5
ALIVE_SECONDS = 20.0  # between signs of life in the storage
DEAD_SECONDS = 120.0  # without one, on another machine
UNNAMED_SECONDS = 5.0  # between the beginning of a trial and the name of its machine


def search(config: SweepConfig, space: Space, warm: Warm | None = None) -> list[Trial]:
    """Searches until `config.trials` have ended, or until asked to stop. Returns all trials there are."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return Search(config, space, warm).run()


class Search:
    def __init__(self, config: SweepConfig, space: Space, warm: Warm | None = None):
        self.warm = warm
        self.config, self.space, self.nproc = config, space, largest_nproc(space)
        self.folder = Path(config.folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            plan = _plan(config, space)
            keep_plan(self.folder, plan)
            self.study = open_study(config, self.folder, first_rung(config, space))
            if self.study.user_attrs.get("plan", plan) != plan:
                raise ValueError(
                    f"{without_password(str(config.storage))} holds another search called {config.name}; give another sweep.name"
                )
            self.study.set_user_attr("plan", plan)
        self.grid = list(space.grid()) if config.search == "grid" else []
        self.limit = len(self.grid) or config.trials
        keep_asked(self.folder, self.limit, config.goal)
        self.running: list[Running] = []
        self.asked_to_stop, self.busy_at = False, time.monotonic()

    def run(self) -> list[Trial]:
        with hearing(self._stop):
            while self._work():
                time.sleep(POLL_SECONDS)
        return [self._of(trial) for trial in self.study.get_trials(deepcopy=False) if trial.number < self.limit]

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.asked_to_stop = True

    def _work(self) -> bool:
        """Looks after what runs, and starts what is free to start. False: there is no more to do here."""
        for running in list(self.running):
            if self.asked_to_stop:
                running.ask_to_stop()
            self._watch(running)
        while not self.asked_to_stop and len(self.running) < self.config.parallel:
            with FileLock(self.folder / ".lock"):  # nobody takes a trial up between its beginning and its lock
                trial = self._take_up() or self._ask()
            if trial is None:
                break
            self._start(*trial)
        if self.running:
            self.busy_at = time.monotonic()
        return bool(self.running) or (not self.asked_to_stop and self._may_be_needed())

    def _may_be_needed(self) -> bool:
        """Whether a trial elsewhere may have lost its machine: for sure only after some silence."""
        begun = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        silent = [silence(trial) > 2 * ALIVE_SECONDS for trial in begun if trial.number < self.limit]
        return any(silent) or (bool(silent) and time.monotonic() - self.busy_at < 3 * ALIVE_SECONDS)

    def _take_up(self) -> tuple[optuna.Trial, FileLock] | None:
        """A trial that was begun, and that nobody looks after any more."""
        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            watched = frozen.number in {running.trial.number for running in self.running}
            if watched or frozen.number >= self.limit or not _abandoned(frozen):
                continue
            lock = self._lock(frozen.number)
            if lock is None:
                continue
            # Whoever looked after it may have told its end, and let go of it, since it was listed.
            if self.study.get_trials(deepcopy=False)[frozen.number].state == TrialState.RUNNING:
                return optuna.Trial(self.study, frozen._trial_id), lock
            lock.release()
        return None

    def _ask(self) -> tuple[optuna.Trial, FileLock] | None:
        begun = self.study.get_trials(deepcopy=False)
        # One without a machine's name will have one at once, or was left by a kill and is taken up soon: what is drawn meanwhile would
        # not know how it ends.
        nameless = any(trial.state == TrialState.RUNNING and "machine" not in trial.user_attrs for trial in begun)
        if len(begun) >= self.limit or nameless:
            return None
        trial = self.study.ask()
        lock = self._lock(trial.number)
        if trial.number >= self.limit or lock is None:  # machines without a common folder asked at once
            self.study.tell(trial, state=TrialState.FAIL)
            return None
        return trial, lock

    def _lock(self, number: int) -> FileLock | None:
        path = self.folder / f"trial-{number}"
        path.mkdir(exist_ok=True)
        lock = FileLock(path / ".watched")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return lock

    def _start(self, trial: optuna.Trial, lock: FileLock) -> None:
        folder = self.folder / f"trial-{trial.number}"
        trial.set_user_attr("machine", socket.gethostname())
        trial.set_user_attr("alive", time.time())
        settings = self._settings(trial)
        if trial.user_attrs.get("pruned"):
            self.study.tell(trial, state=TrialState.PRUNED)
            lock.release()
            return
        slot = min(set(range(self.config.parallel)) - {running.slot for running in self.running})
        environment = slot_environment(slot, self.config.parallel, self.nproc)
        process, steps = start_trial(self.config, self.space, settings, trial.number, folder, environment, self.warm)
        told = set(self.study.get_trials(deepcopy=False)[trial.number].intermediate_values)
        tail, now = MetricsTail(folder), time.monotonic()
        self.running.append(Running(trial, folder, slot, process, steps, lock, tail, now, told))
        if told:  # the last decision may have been cut off
            self._decide(self.running[-1], max(told))

    def _settings(self, trial: optuna.Trial) -> dict[str, str]:
        """The values that the trial has or is given now: the same whether it was killed between two of them or not."""
        self.study.sampler = make_sampler(self.config, trial.number, self.grid)
        assert trial.relative_params is not None  # which draws those that are drawn together
        settings = {}
        for place, (key, values) in enumerate(self.space.varied.items(), 1):
            self.study.sampler = make_sampler(self.config, trial.number, self.grid, place)
            settings[key] = suggest(trial, key, values)
        return settings

    def _watch(self, running: Running) -> None:
        trial, ended = running.trial, running.has_ended()
        if time.monotonic() - running.alive_at > ALIVE_SECONDS:
            running.alive_at = time.monotonic()
            trial.set_user_attr("alive", time.time())
        self._report(running)
        if not ended:
            return
        self.running.remove(running)
        outcome = outcome_of(running)
        if running.pruned:
            self.study.tell(trial, state=TrialState.PRUNED)
        elif outcome.state != "stopped":
            value, lack = result(running.folder, self.config.goal) if outcome.state == "complete" else (None, None)
            if value is not None:
                self.study.tell(trial, value)
            else:
                trial.set_user_attr("state", "failed" if outcome.state == "complete" else outcome.state)
                trial.set_user_attr("reason", lack or outcome.reason or "it does not say why")
                self.study.tell(trial, state=TrialState.FAIL)
        else:  # it stays as it is, and may be taken up at once
            trial.set_user_attr("alive", 0.0)
        running.lock.release()

    def _report(self, running: Running) -> None:
        """Feeds the pruner what was measured since; ends the trial where it says so."""
        trial = running.trial
        for record in running.tail.read():
            step, value = record["step"], number(record.get(self.config.goal))
            if value is None or step in running.told or running.pruned:
                continue
            running.told.add(step)
            trial.report(value, step)
            self._decide(running, step)

    def _decide(self, running: Running, step: int) -> None:
        """Whether the trial goes on past `step`, its last."""
        if step < running.steps and running.trial.should_prune():
            running.pruned = True
            running.trial.set_user_attr("pruned", True)
            running.ask_to_stop()

    def _of(self, frozen: optuna.trial.FrozenTrial) -> Trial:
        told = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned"}
        state = told.get(frozen.state, frozen.user_attrs.get("state"))
        settings = {key: str(frozen.params.get(key, "")) for key in self.space.varied}
        folder = self.folder / f"trial-{frozen.number}"
        return Trial(frozen.number, settings, folder, state, frozen.user_attrs.get("reason"))


def _plan(config: SweepConfig, space: Space) -> dict[str, Any]:
    """What a search that goes on must agree in. More trials are no other search."""
    varied = {key: repr(values) for key, values in space.varied.items()}
    kept = {key: getattr(config, key) for key in ("search", "seed", "goal", "pruner", "factor")}
    return {"fixed": space.lasting, "varied": varied, **kept}


def open_study(config: SweepConfig, folder: Path, first_rung: int) -> optuna.Study:
    """Opens the study of that name in the storage. Raises ValueError where the storage cannot be opened."""
    pruner = Halving(first_rung, config.factor) if config.pruner == "halving" else optuna.pruners.NopPruner()
    for attempt in range(3):
        try:
            return optuna.create_study(
                storage=open_storage(config, folder), study_name=config.name, pruner=pruner, load_if_exists=True
            )
        except Exception as error:  # of the many that databases have
            said = without_password((str(error).splitlines() or [type(error).__name__])[0])
            time.sleep(attempt)  # another process may be making the same tables
    if config.storage is None:
        raise ValueError(f"{folder / JOURNAL} cannot be read ({said}); give another sweep.name, or remove it")
    raise ValueError(f"sweep.storage={without_password(config.storage)}: {said}")


def open_storage(config: SweepConfig, folder: Path) -> optuna.storages.BaseStorage:
    if config.storage:
        return optuna.storages.RDBStorage(config.storage)
    path = str(folder / JOURNAL)
    # One that was killed while it wrote leaves its lock; a write takes milliseconds.
    lock = optuna.storages.journal.JournalFileSymlinkLock(path, grace_period=10)
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(path, lock))


def make_sampler(
    config: SweepConfig, number: int, grid: list[dict[str, str]], place: int = 0
) -> optuna.samplers.BaseSampler:
    """Makes a sampler, anew for every trial and every key (`place`, from 1) that is drawn by itself: a sampler's own random state is
    lost when it is killed."""
    if grid:
        return optuna.samplers.PartialFixedSampler(grid[number], optuna.samplers.RandomSampler())
    seed = ((config.seed * 1_000_003 + number) * 1_009 + place) % 2**32
    if config.search == "tpe":
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=config.parallel > 1)
    if config.search == "gp":
        return optuna.samplers.GPSampler(seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)


def suggest(trial: optuna.Trial, key: str, values: Choice | Interval) -> str:
    """Returns the value that the trial has, or is given, as it stands on a command line."""
    if isinstance(values, Choice):
        return str(trial.suggest_categorical(key, list(values.values)))
    if values.whole:
        return str(trial.suggest_int(key, int(values.low), int(values.high), log=values.log))
    return repr(trial.suggest_float(key, values.low, values.high, log=values.log))


def _abandoned(frozen: optuna.trial.FrozenTrial) -> bool:
    """On this machine its lock decides; on another, signs of life."""
    machine = frozen.user_attrs.get("machine")
    if machine == socket.gethostname():
        return True
    return silence(frozen) > (DEAD_SECONDS if machine else UNNAMED_SECONDS)


def silence(frozen: optuna.trial.FrozenTrial) -> float:
    """Counts the seconds since the last sign of life."""
    begun = frozen.datetime_start.timestamp() if frozen.datetime_start else 0.0
    return time.time() - frozen.user_attrs.get("alive", begun)
