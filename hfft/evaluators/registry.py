"""The evaluators of a run: the one place that names them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hfft.evaluators.attribution import Attribution
from hfft.evaluators.baselines import Baselines
from hfft.evaluators.label_issues import LabelIssues
from hfft.evaluators.out_of_distribution import OutOfDistribution
from hfft.evaluators.protocol import Evaluator, Job
from hfft.evaluators.retention import Retention
from hfft.evaluators.weight_interpolation import WeightInterpolation
from hfft.system.progress import timed
from hfft.training.failures import failures_explained


def evaluators_for(job: Job, network: Any) -> list[Evaluator]:
    """What the recipe asks for, in the order in which it is computed; the network is as it was loaded."""
    recipe = job.recipe
    evaluators = [
        (recipe.retain.interpolate is not None, WeightInterpolation),
        (recipe.retain.measure, lambda: Retention(job, network)),
        (recipe.label_hints, LabelIssues),
        (True, Baselines),
        (recipe.novelty, OutOfDistribution),
        (recipe.report, Attribution),
    ]
    return [make() for is_asked, make in evaluators if is_asked]


@contextmanager
def measuring(evaluator: Evaluator, seconds: dict[str, float]) -> Iterator[None]:
    """Note how long an evaluator takes, and explain its failures."""
    with timed(seconds, evaluator.name), failures_explained(evaluator.name):
        yield
