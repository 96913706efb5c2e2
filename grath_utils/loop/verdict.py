"""What happened in a run, in sentences that are chosen by its numbers, each at a stated threshold.

A reading rule that fits any outcome says nothing. So a sentence here is one of several, and which
one is printed depends on an interval, or on a limit that stands below.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from grath_utils import evaluation
from grath_utils.loop.choice import displacement, margins
from grath_utils.loop.run_dir import BASE, Run
from grath_utils.loop.state import RunState, run_state
from grath_utils.text import with_interval

DISPLACED = 3.0  # nats that the chosen answers have lost: each is then e^3, twenty times, as rare
TRUTH = ("mc1", "mc2")  # metrics of truthfulness
RIGHT = ("acc", "acc_norm")  # of plain questions: both, or one would be picked by its outcome
KEPT = "retention"  # the benchmark of what must not be lost


class Placebo(NamedTuple):
    """What sentences say of a placebo."""

    name: str
    pairs: str
    training: str
    taught: str  # what a gain over it shows
    had: str


PLACEBOS = {  # by their labels, see Run.placebos
    "random": Placebo(
        name="the placebo",
        pairs="the same pairs with random labels",
        training="the same training with a coin for labels",
        taught="the labels teach",
        had="a coin for labels",
    ),
    "mismatched": Placebo(
        name="the placebo of other questions",
        pairs="the same pairs under other questions",
        training="the same training on the answers of other questions",
        taught="the answers say of their questions",
        had="the answers of another question",
    ),
}


def gain_line(run: Run | RunState) -> str:
    """Return what the model has beyond each placebo, in points with intervals; '' without one."""
    lines = []
    for labels, benchmarks in run_state(run).gains.items():
        found = []
        for benchmark, metrics in benchmarks.items():
            values = ", ".join(f"{metric} {_points(gain)}" for metric, gain in metrics.items())
            found.append(f"{benchmark} {values}")
        what = f"Gain over the placebo ({PLACEBOS[labels].pairs})"
        points = f", in points: {'; '.join(found)}" if found else ": not measured yet"
        lines.append(what + points)
    return "\n".join(lines)


def verdict(run: Run | RunState) -> str:
    """Return what a run has come to, in one sentence; nothing before models were compared."""
    state = run_state(run)
    rows = {(row["benchmark"], row["metric"]): row["difference"] for row in state.rows}
    over = {
        labels: {(name, m): gain for name, metrics in of.items() for m, gain in metrics.items()}
        for labels, of in state.gains.items()
    }
    compared = {PLACEBOS[labels].training: found for labels, found in over.items() if found}
    compared = compared or {"the base model": rows}
    said = " and ".join(filter(None, (outcome(f, what) for what, f in compared.items())))
    if not said:
        return ""
    shown, choice = f"ound {state.final + 1}", state.choice
    begins = f"R{shown}"
    if choice and choice.iteration is None:
        begins = f"No round was fit to be kept: r{shown}"
    elif choice and choice.iteration == state.final:
        begins += " is kept: it"
    if kept := rows.get((KEPT, "acc")):
        lost = retained(kept).replace("; ", " and ")
        said += f"; {lost[0].lower()}{lost[1:-1]}"
    return f"{begins} {said}."


def outcome(found: Mapping[tuple[str, str], Mapping[str, Any]], against: str) -> str:
    """Say how a model stands against another one, by its changes in each (benchmark, metric)."""
    own = {key: change for key, change in found.items() if key[1] in TRUTH}
    own = own or {key: change for key, change in found.items() if key[1] in RIGHT}
    if not own:
        return ""
    sides = [_side(change) for change in own.values()]
    up, down = sides.count("above"), sides.count("below")
    what = "truthful" if next(iter(own))[1] in TRUTH else "often right"
    if up and down:
        said = f"is better than {against} by one measure and worse by another"
    elif up or down:
        said = f"is {'more' if up else 'less'} {what} than {against}"
        said += "" if up + down == len(own) else ", though not by every measure"
    else:
        said = f"is not seen to be more {what} than {against}"
    points = ", ".join(f"{name} {metric} {_points(c)}" for (name, metric), c in own.items())
    return f"{said} ({points} points)"


def what_happened(run: Run | RunState) -> list[str]:
    """Return the sentences about a run, as far as it has been measured."""
    state = run_state(run)
    found = [
        over_placebo(benchmark, metric, gain, labels)
        for labels, benchmarks in state.gains.items()
        for benchmark, metrics in benchmarks.items()
        for metric, gain in metrics.items()
        if metric in TRUTH + RIGHT
    ]
    rows = {(row["benchmark"], row["metric"]): row for row in state.rows}
    if not found:
        found = [over_base(*key, row["difference"]) for key, row in rows.items() if key[1] in TRUTH]
    if row := rows.get((KEPT, "acc")):
        found.append(retained(row["difference"]))
    if state.rounds:
        found.append(displaced(state.base, state.rounds[min(state.final, len(state.rounds) - 1)]))
    started = (started_low(name, models) for name, models in state.results.items())
    return [*found, *filter(None, started)]


def over_placebo(
    benchmark: str, metric: str, gain: Mapping[str, Any], labels: str = "random"
) -> str:
    """Say whether a model is seen to stand above a placebo; ``gain`` as of ``compare``."""
    points, placebo = _points(gain), PLACEBOS[labels]
    match _side(gain):
        case "above":
            return (
                f"On {benchmark} what {placebo.taught} is seen: {metric} stands {points} points "
                f"above {placebo.name}, which had the same pairs and steps and {placebo.had}."
            )
        case "below":
            return f"On {benchmark} {placebo.name} did better: {metric} {points} points against it."
    seen = f"{metric} {points} points{_least(gain)}"
    return f"On {benchmark} no gain over {placebo.name} is seen: {seen}."


def over_base(benchmark: str, metric: str, change: Mapping[str, Any]) -> str:
    """Say whether a metric is seen to have changed, where there is no placebo."""
    points = _points(change)
    match _side(change):
        case "above":
            return (
                f"On {benchmark} {metric} rose by {points} points. Without a placebo "
                "(loop.placebo=true) it is open whether the labels did that, or any training would."
            )
        case "below":
            return f"On {benchmark} {metric} fell: {points} points."
    return f"On {benchmark} no change of {metric} is seen: {points} points{_least(change)}."


def retained(change: Mapping[str, Any]) -> str:
    """Say whether what the model knew is still there."""
    lost = _side(change) == "below"
    what = "Easy facts were lost" if lost else "No loss of easy facts is seen"
    return f"{what}: {KEPT} {_points(change)} points."


def displaced(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Say what DPO did to held-out pairs: did the chosen answers rise, or the rejected ones fall?

    Likelihood displacement: arXiv 2410.08847. Both arguments are signals of
    :func:`.choice.measure_signals`.
    """
    if not before["pairs"]:
        return "No pair was held out, so nothing is known of the margin."
    margin, chosen = (float(np.mean(f(before, after))) for f in (margins, displacement))
    if margin <= 0:
        return f"Held-out pairs are not told apart better than before: margin {margin:+.1f} nats."
    if chosen <= -DISPLACED:
        return (
            f"Displacement: the margin on held-out pairs rose by {margin:.1f} nats while the "
            f"chosen answers themselves lost {-chosen:.1f}. What both sides lose can move a score "
            "without any truth in it."
        )
    kept = "did not fall" if chosen >= 0 else f"lost less than {DISPLACED:g}"
    return (
        f"The margin on held-out pairs rose by {margin:.1f} nats, and the chosen answers {kept}: "
        f"{chosen:+.1f} nats each."
    )


def started_low(benchmark: str, models: Mapping[str, Mapping[str, Any]]) -> str:
    """Say so where the base model was no better than rules that read no question; else nothing."""
    base = models.get(BASE, {})
    low = evaluation.not_above_rules(base.get("metrics", {}), base.get("controls", {}))
    if not low:
        return ""
    named = " and ".join(note.partition(" ")[0] for note in low)
    return (
        f"Before training, {named} on {benchmark} stood no higher than rules that never read the "
        "question: the level proves no knowledge, only the change counts."
    )


def _points(change: Mapping[str, Any]) -> str:
    return with_interval(change["value"], change["ci95"], "+.1f", scale=100)


def _side(change: Mapping[str, Any]) -> str:
    low, high = change["ci95"] or (-1, 1)
    return "above" if low > 0 else "below" if high < 0 else "neither"


def _least(change: Mapping[str, Any]) -> str:
    least = change.get("smallest_detectable")
    return f" (a true change of {100 * least:.1f} is found four times in five)" if least else ""
