"""How sure a difference of two methods is."""

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtr, stdtrit  # Student's t; scipy.stats is slow to import


def interval(std, number, level: float = 0.95):
    """Half the width of the confidence interval of a mean (Student's t)."""
    return stdtrit(number - 1, 0.5 + level / 2) * std / np.sqrt(number)


def over_images_and_seeds(first, second, terms) -> tuple[float, float, float]:
    """Mean of the paired differences, half its 95 % interval and its p-value, by Welch and Satterthwaite: for
    the variance over images and the variances in terms, see spread_of_seeds."""
    away = np.subtract(first, second)
    terms = [(np.var(away, ddof=1) / len(away), len(away) - 1), *terms]
    variance = sum(value for value, _ in terms)
    freedom = variance**2 / sum(value**2 / of for value, of in terms) if variance else 1
    mean, error = float(np.mean(away)), float(np.sqrt(variance))
    p = 2 * stdtr(freedom, -abs(mean) / error) if error else float(mean == 0)
    return mean, float(stdtrit(freedom, 0.975)) * error, float(p)


def holm(values: Sequence[float]) -> np.ndarray:
    """p-values corrected by Holm's method: below 0.05 all differ with 95 % confidence, however they depend on
    one another."""
    order = np.argsort(values)
    scaled = np.asarray(values)[order] * np.arange(len(values), 0, -1)
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return corrected


def spread_of_seeds(settings, evaluation: str, counts: dict, where: str = ""):
    """The variances over seeds, each with its degrees of freedom, of a difference of two methods, counts:
    {method: number of seeds}, and their source (see Comparison): a method's own if it has three seeds or
    more, else one that is pooled over the solvers of a task. None where no solver has several."""
    groups = {}
    for setting in settings:
        means = [r.scores[evaluation].mean for r in setting.seeds if evaluation in r.scores]
        groups |= {setting.method: means} if np.isfinite(means).any() else {}
    groups = {method: [m for m in means if np.isfinite(m)] for method, means in groups.items()}
    freedom = sum(len(group) - 1 for group in groups.values())
    if not freedom:
        return [], ("", "")
    pooled = sum(np.var(group) * len(group) for group in groups.values()) / freedom
    own = {method: groups[method] for method in counts if len(groups.get(method, ())) >= 3}
    terms = [(np.var(group, ddof=1) / counts[method], len(group) - 1) for method, group in own.items()]
    rest = sum(1 / number for method, number in counts.items() if method not in own)
    terms += [(pooled * rest, freedom)] if rest else []
    where = f"{where} {settings[0].profile}" if where else ""
    return terms, tuple(("own" if method in own else "pooled") + where for method in counts)
