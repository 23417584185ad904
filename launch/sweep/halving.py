"""Which trials of a search go on: successive halving, as a pruner of Optuna's."""

import optuna


class Halving(optuna.pruners.BasePruner):
    """Asynchronous successive halving (Li et al., 2020, arXiv:1810.05934): at the rungs `first`, `first` x `factor`, ... a trial
    goes on if it is among the best 1 in `factor` of those that have come so far, or the best.

    Optuna's own keeps what a rung has seen in attributes of the trials, where a kill between two of its writes changes later
    decisions. This one knows only what was reported.
    """

    def __init__(self, first: int, factor: int):
        self._first, self._factor = first, factor

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        values, rung = trial.intermediate_values, self._first
        while values and rung <= (step := max(values)):
            if _reached(values, rung) == step:
                every = [t.intermediate_values for t in study.get_trials(deepcopy=False)]
                there = sorted(other[at] for other in every if (at := _reached(other, rung)) is not None)
                if values[step] > there[max(1, len(there) // self._factor) - 1]:
                    return True
            rung *= self._factor
        return False


def _reached(values: dict[int, float], rung: int) -> int | None:
    """The first step there or beyond."""
    return min((step for step in values if step >= rung), default=None)
