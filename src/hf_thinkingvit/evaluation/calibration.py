"""
Chooses τ for a budget, or for a promise about accuracy that holds for new images of the same distribution.

The promise is by Learn-then-Test (Angelopoulos et al., arXiv 2110.01052), as in "Fast yet Safe: Early-Exiting with Risk
Control" (Jazbec et al., NeurIPS 2024): thresholds are tested in order, safest first, each by a test of "the risk is
above ε" at level δ, until the first that does not pass: an exact binomial test where an image fails or does not, and
Hoeffding and Bentkus's bound (arXiv 2110.01052, section 3.1) where its loss lies between 0 and 1. The order is fixed
before the images are seen, so that δ bounds the whole sequence. For the same reason the model must be fixed before:
images on which it was trained, or on which its best epoch was chosen, are not distributed like new ones.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.exit_criteria import EXIT_CRITERIA
from ..public_names import public_name
from .conditions import check_same_model
from .p_values import binomial_p_value, hoeffding_bentkus_p_value, least_images
from .segmentation import StageConfusions
from .splits import UNKNOWN, is_training_split
from .statements import UNITS, calibration_statement, quality_of
from .sweep import StageAnswers, Threshold
from .wording import at_least, at_most


Risk = Literal["accuracy_drop", "error", "pixels_lost", "pixel_error"]


@dataclass(frozen=True)
class Calibration:
    """
    A threshold, and the measurements by which it was chosen.

    Attributes:
        threshold: τ, one or one per exit.
        target: a risk by name, "macs", "milliseconds" or, without limit and budget, "accuracy".
        dataset, split, images: the calibration images; `images` is the number of those that were tested or measured.
        epsilon, delta: of a promise; else `None`.
        budget: GMACs or milliseconds per image; `None` where there is none.
        achieved: the risk or the accuracy (fractions), GMACs or milliseconds per image on these images.
        top1, gmacs: accuracy (%) and cost at this τ on these images; `mean_iou` (a fraction) instead of `top1` for a
            segmentation model.
        conditions: the model that was measured, as [`model_conditions`] describes it; [`calibration_status`] compares.
        exits_early: whether any image leaves before the last stage at this τ.
        seen: why the images were not new to the model, in words, if that is known.
        prepared: how images were resized and cut, in words, where the image processor does not say it.
    """

    threshold: float | list[float]
    target: str
    dataset: str
    images: int
    achieved: float
    top1: float | None
    gmacs: float
    epsilon: float | None = None
    delta: float | None = None
    budget: float | None = None
    split: str = UNKNOWN
    conditions: Mapping[str, Any] | None = None
    exits_early: bool = True
    seen: str | None = None
    mean_iou: float | None = None
    prepared: str | None = None

    @property
    def statement(self) -> str:
        """The result as a sentence, which is valid only for the model that was measured."""
        return calibration_statement(asdict(self))

    def to_dict(self) -> dict[str, Any]:
        """
        Plain data to save and share. A local dataset is reduced to its name. `statement` is left out, because it would
        outlive changes of the model.
        """
        facts = {name: value for name, value in asdict(self).items() if value is not None}
        return facts | {"dataset": public_name(self.dataset)}

    def apply(self, model_or_config: PreTrainedModel | PreTrainedConfig) -> None:
        """
        Set `threshold`, and these facts as `calibration`, in the configuration; `save_pretrained` saves both.

        Raises:
            ValueError: if it is not the model that was measured; the message names what differs.
        """
        if self.conditions is not None:
            check_same_model(self.conditions, model_or_config)
        config = getattr(model_or_config, "config", model_or_config)
        config.threshold = self.threshold
        config.calibration = self.to_dict()


def threshold_grid(answers: StageAnswers | StageConfusions, steps: int = 1000) -> list[float]:
    """Evenly spaced τ over the criterion's range, from one at which no image exits early to one at which all do."""
    criterion = EXIT_CRITERIA[answers.criterion]
    limit = criterion.maximum(answers.num_labels, answers.entropy_top_k)
    if math.isinf(limit):  # many scales, because the scores of a criterion without bound may be on any
        grid = [0.0, *np.geomspace(1e-6, 1e6, steps).tolist()]
        return grid if criterion.exits_below else grid[::-1]
    if not criterion.exits_below:
        highest = limit + limit / steps if answers.exit_at_threshold else limit
        return np.linspace(highest, 0.0, steps + 1).tolist()
    return np.linspace(0.0, limit + limit / steps, steps + 2).tolist()


def _grid(answers: StageAnswers, per_exit: bool, levels: int) -> list[Threshold]:
    num_exits = answers.num_stages - 1
    if not per_exit or num_exits == 1:
        return threshold_grid(answers)
    steps = max(2, min(levels, int(20_000 ** (1 / num_exits)) - 1))
    return [list(values) for values in itertools.product(threshold_grid(answers, steps), repeat=num_exits)]


def calibrate_risk(
    answers: StageAnswers,
    epsilon: float,
    delta: float = 0.05,
    risk: Risk | None = None,
    per_exit: bool = False,
    candidates: Sequence[Threshold] | None = None,
    allow_training_images: bool = False,
) -> Calibration:
    """
    The cheapest τ whose risk is at most ε, with probability at least 1 - δ over the calibration images.

    The promise holds if the model, the criterion and the candidate thresholds were fixed before these images were seen,
    and if the images are drawn independently from the same distribution as new images. It does not hold for images on
    which the model was trained, or on which its best epoch, its criterion or ε was chosen. It is valid only for the
    model that was measured: [`calibration_status`] says whether a model still is that one.

    Args:
        answers (`StageAnswers`): the answers to the calibration images.
        epsilon (`float`): greatest risk, a fraction between 0 and 1.
        delta (`float`): greatest probability with which the promise may fail.
        risk (`str`): `"accuracy_drop"`: an image fails if the last stage is right and the answer at its exit is not; so
            accuracy falls by at most ε, and by less if some early answers are right where the last is wrong.
            `"error"`: an image fails if its answer is wrong. Of segmentation models, the mean over images of the share
            of their pixels that are right at the last stage and wrong where their window exits (`"pixels_lost"`), or
            wrong (`"pixel_error"`); images of which no pixel counts are left out, since nothing of them can be lost. By
            default the first that there is.
        per_exit (`bool`): one τ per exit. Half of the images then choose the order in which thresholds are tested
            (Pareto testing, arXiv 2210.07913), and the promise is tested on the other half.
        candidates (`list`, *optional*): thresholds in the order in which to test them, fixed without looking at these
            images, safest first. By default the criterion's range in 1000 steps.
        allow_training_images (`bool`): accept a training split, for instance one that this model never saw, and images
            that had a part in making the model (`answers.seen`); the statement says so.

    Returns:
        [`Calibration`]. If the promise holds only for τ at which no image exits early, its statement says so.

    Raises:
        ValueError: if there are too few images for any promise (the message says how many are needed), or if not even
            the last stage fulfils it; if ε or δ is not between 0 and 1; if the images are training images, or had a
            part in making the model, without `allow_training_images`.
    """
    for name, value in (("epsilon", epsilon), ("delta", delta)):
        if not 0 < value < 1:
            raise ValueError(f"`{name}` must be above 0 and below 1, got {value!r}.")
    risk = answers.risks[0] if risk is None else risk
    if risk not in answers.risks:
        raise ValueError(f"`risk` must be one of {' or '.join(map(repr, answers.risks))}, got {risk!r}.")
    if answers.seen and not allow_training_images:
        raise ValueError(
            f"The calibration images are not new to the model: {answers.seen}. On them a model does better than on "
            "others, so no promise follows. Calibrate on images that had no part in making it, or pass "
            "`allow_training_images=True`."
        )
    if is_training_split(answers.split) and not allow_training_images:
        raise ValueError(
            f"The calibration images are training images (split {answers.split!r}): on them a model does better than "
            "on others, so no promise follows. Calibrate on images that it was not trained on; if these are such, name "
            "their `split` otherwise or pass `allow_training_images=True`."
        )
    answers = answers.judged()
    order, tested = list(candidates or []), answers
    if not order and per_exit and answers.num_stages > 2:
        half = torch.randperm(len(answers), generator=torch.Generator().manual_seed(0)) < len(answers) // 2
        order, tested = _pareto_order(answers.select(half), risk), answers.select(~half)
    elif not order:
        order = _grid(answers, per_exit, levels=1000)
    if len(tested) < least_images(epsilon, delta):
        raise ValueError(
            f"{len(tested)} images are too few to promise a risk of at most {at_most(epsilon)} with probability "
            f"{at_least(delta)}: it takes {least_images(epsilon, delta)} at the least"
            + (", twice as many with `per_exit`." if tested is not answers else ".")
        )
    chosen: Threshold | None = None
    losses = tested.losses(risk)
    for threshold in order:
        failures = tested.at(losses, tested.exit_stages(threshold)).sum().item()
        # With at least the expected number of failures at risk ε, the p-value is about 1/2 or more: no usual δ passes.
        if failures >= epsilon * len(tested):
            break
        if losses.dtype == torch.bool:
            p_value = binomial_p_value(failures, len(tested), epsilon)
        else:
            p_value = hoeffding_bentkus_p_value(failures / len(tested), len(tested), epsilon)
        if p_value > delta:
            break
        chosen = threshold
    if chosen is None:
        raise ValueError(
            f"No τ keeps a risk ({risk.replace('_', ' ')}) of at most {at_most(epsilon)} with "
            f"probability {at_least(delta)} on these {len(tested)} images, not even the last stage for every image."
        )
    early = bool((tested.exit_stages(chosen) < tested.num_stages - 1).any())
    row = tested.row(chosen)
    return Calibration(
        threshold=chosen,
        target=risk,
        dataset=answers.dataset,
        images=len(tested),
        achieved=tested.means([chosen], losses).item(),
        top1=row.get("top1"),
        mean_iou=row.get("mean_iou"),
        gmacs=row["gmacs"],
        epsilon=epsilon,
        delta=delta,
        split=answers.split,
        conditions=answers.conditions,
        exits_early=early,
        seen=answers.seen,
        prepared=answers.prepared,
    )


def _pareto_order(answers: StageAnswers, risk: Risk) -> list[Threshold]:
    """The Pareto-optimal thresholds in risk and cost, in order of increasing risk."""
    grid = _grid(answers, per_exit=True, levels=24)
    risks = answers.means(grid, answers.losses(risk)).tolist()
    costs = answers.means(grid, torch.tensor(answers.macs).expand(len(answers.scores), -1)).tolist()
    points = zip(risks, costs, grid)
    order, cheapest = [], math.inf
    for _, cost, threshold in sorted(points, key=lambda point: point[:2]):
        if cost < cheapest:
            order.append(threshold)
            cheapest = cost
    return order


def calibrate_budget(
    answers: StageAnswers,
    gmacs: float | None = None,
    milliseconds: float | None = None,
    stage_milliseconds: Sequence[float] | None = None,
    per_exit: bool = False,
) -> Calibration:
    """
    The τ of greatest accuracy whose mean cost on these images is within a budget, without a promise for others.

    Args:
        answers (`StageAnswers`): the answers to images of the expected distribution.
        gmacs (`float`, *optional*): mean multiply-accumulates per image, in 10⁹.
        milliseconds (`float`, *optional*): mean time per image, instead of `gmacs`.
        stage_milliseconds (`list[float]`, *optional*): time of an image that exits at each stage, as from
            [`measure_stage_milliseconds`]; needed with `milliseconds`.
        per_exit (`bool`): one τ per exit.

    Raises:
        ValueError: if not exactly one budget is given, or no τ is within it.
    """
    if (gmacs is None) == (milliseconds is None):
        raise ValueError("Give one budget: `gmacs` or `milliseconds`.")
    if milliseconds is not None and (stage_milliseconds is None or len(stage_milliseconds) != answers.num_stages):
        raise ValueError(f"`milliseconds` needs `stage_milliseconds`, {answers.num_stages} of them, one per stage.")
    if milliseconds is not None:
        return _most_accurate(answers, "milliseconds", stage_milliseconds, milliseconds, per_exit)
    return _most_accurate(answers, "macs", [macs / 1e9 for macs in answers.macs], gmacs, per_exit)


def calibrate_accuracy(answers: StageAnswers | StageConfusions, per_exit: bool = False) -> Calibration:
    """
    The τ of greatest accuracy on these images, the cheapest where several are equal; without a promise for others.

    Args:
        answers (`StageAnswers`): the answers to images of the expected distribution.
        per_exit (`bool`): one τ per exit.
    """
    return _most_accurate(answers, "accuracy", [macs / 1e9 for macs in answers.macs], None, per_exit)


def _most_accurate(
    answers: StageAnswers | StageConfusions, target: str, costs: Sequence[float], budget: float | None, per_exit: bool
) -> Calibration:
    """The most accurate τ, and the cheapest of these, within a budget of the `costs` of an exit at each stage."""
    costs = torch.tensor(costs, dtype=torch.float64)
    grid = _grid(answers, per_exit, levels=24)
    spent = answers.means(grid, costs.expand(len(answers.scores), -1)).tolist()
    accuracies = answers.qualities(grid)
    best: tuple[float, float, Threshold] | None = None
    for cost, accuracy, threshold in zip(spent, accuracies, grid):
        # A budget equal to the cost of a stage includes it, however the mean over the images is rounded.
        within = budget is None or cost <= budget or math.isclose(cost, budget)
        if within and (best is None or (accuracy, -cost) > (best[0], -best[1])):
            best = accuracy, cost, threshold
    if best is None:
        unit = UNITS[target]
        raise ValueError(f"No τ costs at most {budget} {unit} per image: the cheapest takes {min(spent):.4g} {unit}.")
    _, cost, threshold = best
    row = answers.row(threshold)
    return Calibration(
        threshold=threshold,
        target=target,
        dataset=answers.dataset,
        images=len(answers),
        achieved=quality_of(row) if target == "accuracy" else cost,
        top1=row.get("top1"),
        mean_iou=row.get("mean_iou"),
        gmacs=row["gmacs"],
        budget=budget,
        split=answers.split,
        conditions=answers.conditions,
        seen=answers.seen,
        prepared=answers.prepared,
    )
