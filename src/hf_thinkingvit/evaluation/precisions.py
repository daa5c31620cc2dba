"""
What a runtime or a precision changes: two models that answer in stages, side by side on the same images, and τ moved to
the scores of the second.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from ..models.exit_criteria import EXIT_CRITERIA
from .stages import StageScores, measure_stages
from .threshold_points import shortest_between


if TYPE_CHECKING:
    from ..inference.runtimes import ExportedModel


@dataclass(frozen=True)
class PrecisionComparison:
    """
    Lists have an entry for each stage, of all images.

    Attributes:
        images (`int`): how many were compared.
        same_class (`list[float]`): share of images of which both models name the same class.
        top1 (`tuple[list[float], list[float]]`, *optional*): share of right answers of the first and of the second
            model, where the images have labels.
        entropy (`tuple[list[float], list[float]]`): mean entropy of the answers, in nats, of the first and the second.
        entropy_change (`list[float]`): mean absolute difference of an image's two entropies.
        threshold (`list[float]`): τ of the first model.
        exits (`tuple[list[float], list[float]]`): shares of images that exit at each stage, at that τ.
        same_exit (`float`): share of images that exit at the same stage, at that τ.
        rounding (`float`): how near a score must lie to τ for rounding to decide.
        near_threshold (`int`): images of which the first model has a score within `rounding` of that τ, at a stage that
            they reach.
        other_exit (`int`): images that exit at another stage, at that τ.
        unexplained_exit (`int`): those of them whose exit rounding does not explain: where the two models part, the
            first one's score is not within `rounding` of τ. None, of one model in two runtimes in float32.
        new_threshold (`list[float]`): τ at which the shares of the second model are those of the first, on the images
            that moved it.
        new_exits (`list[float]`), new_same_exit (`float`): of the second model at `new_threshold`.
        accepted_top1 (`tuple[float, float, float]`, *optional*): share of right answers at the exits: of the first
            model, of the second at `threshold`, and of the second at `new_threshold`.
    """

    images: int
    same_class: list[float]
    top1: tuple[list[float], list[float]] | None
    entropy: tuple[list[float], list[float]]
    entropy_change: list[float]
    threshold: list[float]
    exits: tuple[list[float], list[float]]
    same_exit: float
    rounding: float
    near_threshold: int
    other_exit: int
    unexplained_exit: int
    new_threshold: list[float]
    new_exits: list[float]
    new_same_exit: float
    accepted_top1: tuple[float, float, float] | None

    def table(self) -> str:
        """In Markdown: a row for each stage, and the accuracy at the exits below."""
        lines = ["| stage | top-1 | same class | mean entropy | change | exits | exits at the new τ |"]
        lines.append("|---|---|---|---|---|---|---|")
        for stage in range(len(self.same_class)):
            top1 = " → ".join(f"{100 * values[stage]:.2f} %" for values in self.top1) if self.top1 else ""
            entropy = " → ".join(f"{values[stage]:.4f}" for values in self.entropy)
            exits = " → ".join(f"{100 * values[stage]:.1f} %" for values in self.exits)
            lines.append(
                f"| {stage} | {top1} | {100 * self.same_class[stage]:.2f} % | {entropy} | "
                f"{self.entropy_change[stage]:.4f} | {exits} | {100 * self.new_exits[stage]:.1f} % |"
            )
        lines.append(f"\n{self.images} images; τ {self.threshold} → {self.new_threshold}.")
        lines.append(
            f"At the same τ {self.other_exit} images exit elsewhere, {self.unexplained_exit} of them with no score "
            f"within {self.rounding:g} of τ; {self.near_threshold} of all images have one."
        )
        if self.accepted_top1:
            first, second, moved = (f"{100 * value:.2f} %" for value in self.accepted_top1)
            lines.append(f"Top-1 at the exits: {first} → {second} at the same τ, {moved} at the new one.")
        return "\n".join(lines)


def compare_precisions(
    reference: "PreTrainedModel | ExportedModel",
    other: "PreTrainedModel | ExportedModel",
    batches: Iterable[dict[str, torch.Tensor]],
    progress: bool = False,
    rounding: float = 1e-4,
    new_threshold: list[float] | None = None,
) -> PrecisionComparison:
    """
    Args:
        reference: a classifier that thinks in stages, in PyTorch or from `from_exported`; its τ counts.
        other: the same model in another runtime or precision.
        batches: read twice, so a list or a `DataLoader`: dicts of `pixel_values` `(images, channels, height, width)`
            and, if there are any, `labels` `(images,)`.
        progress (`bool`): show progress bars.
        rounding (`float`): the distance of a score to τ up to which rounding may decide; the default is how far answers
            of two runtimes in float32 may differ.
        new_threshold (`list[float]`, *optional*):
            τ of the second model, one per exit, that an earlier comparison found on other images; by default it is
            moved on these images, without their labels.

    Raises:
        ValueError: for models of different numbers of stages or criteria, or without images.
    """
    if reference.config.num_stages != other.config.num_stages or (
        reference.config.exit_criterion != other.config.exit_criterion
    ):
        raise ValueError("Expected one model in two precisions, got two with different stages or exit criteria.")

    def measure(answer, batch):
        found = {"class": answer["logits"].argmax(dim=1), "entropy": answer["entropy"]}
        return {**found, "right": found["class"] == batch["labels"]} if "labels" in batch else found

    first, second = (measure_stages(model, batches, measure, progress=progress) for model in (reference, other))
    if len(first) == 0 or len(first) != len(second):
        raise ValueError(f"Expected the same images twice, at least one, got {len(first)} and {len(second)}.")
    threshold = list(reference.exit_rule().thresholds)
    new_threshold = move_threshold(first, second, threshold) if new_threshold is None else list(new_threshold)
    stages = [first.exit_stages(threshold), second.exit_stages(threshold), second.exit_stages(new_threshold)]
    near, parted, unexplained = _near_threshold(first, stages[0], stages[1], threshold, rounding)
    labelled = "right" in first.measures
    rights = [first, second, second]
    return PrecisionComparison(
        images=len(first),
        same_class=(first.measures["class"] == second.measures["class"]).float().mean(dim=0).tolist(),
        top1=tuple(each.measures["right"].float().mean(dim=0).tolist() for each in (first, second))
        if labelled
        else None,
        entropy=tuple(each.measures["entropy"].mean(dim=0).tolist() for each in (first, second)),
        entropy_change=(first.measures["entropy"] - second.measures["entropy"]).abs().mean(dim=0).tolist(),
        threshold=threshold,
        exits=(_shares(stages[0], first.num_stages), _shares(stages[1], first.num_stages)),
        same_exit=(stages[0] == stages[1]).float().mean().item(),
        rounding=rounding,
        near_threshold=int(near.sum()),
        other_exit=int(parted.sum()),
        unexplained_exit=int(unexplained.sum()),
        new_threshold=new_threshold,
        new_exits=_shares(stages[2], first.num_stages),
        new_same_exit=(stages[0] == stages[2]).float().mean().item(),
        accepted_top1=tuple(
            each.at(each.measures["right"], exits).float().mean().item() for each, exits in zip(rights, stages)
        )
        if labelled
        else None,
    )


def _near_threshold(
    first: StageScores, exits: torch.Tensor, other_exits: torch.Tensor, threshold: list[float], rounding: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Which images have a score of `first` near τ at a stage that they reach, which exit elsewhere by the scores of the
    other model, and which of these have no such score where the two part.
    """
    distance = (first.scores[:, :-1] - torch.tensor(threshold, dtype=first.scores.dtype)).abs()
    is_near = distance <= rounding
    reached = torch.arange(len(threshold)) <= exits[:, None]
    parted = exits != other_exits
    where = torch.minimum(exits, other_exits).clamp(max=max(len(threshold) - 1, 0))
    explained = is_near.gather(1, where[:, None]).squeeze(1) if threshold else torch.zeros_like(parted)
    return (is_near & reached).any(dim=1), parted, parted & ~explained


def _shares(exit_stages: torch.Tensor, num_stages: int) -> list[float]:
    return (exit_stages.bincount(minlength=num_stages).float() / len(exit_stages)).tolist()


def move_threshold(first: StageScores, second: StageScores, threshold: list[float]) -> list[float]:
    """
    τ for `second` at which as many images exit at each stage as at `threshold` with the scores of `first`. An exit's τ
    is kept where it does that already.
    """
    moved: list[float] = []
    exits_below = EXIT_CRITERIA[first.criterion].exits_below
    wanted = first.exit_stages(threshold)
    for stage, tau in enumerate(threshold):
        count = int((wanted == stage).sum())
        if int((second.exit_stages([*moved, *threshold[stage:]]) == stage).sum()) == count:
            moved.append(tau)
            continue
        reached = second.exit_stages([*moved, *threshold[stage:]]) >= stage
        scores = second.scores[reached, stage].sort(descending=not exits_below).values
        moved.append(_between(scores, count, exits_below))
    return moved


def _between(scores: torch.Tensor, count: int, exits_below: bool) -> float:
    """τ between the first `count` scores and the others; equal scores cannot be parted."""
    # A NaN passes no τ. No τ is below 0, and none of the scores is.
    scores = scores[scores.isfinite()]
    if len(scores) == 0:
        return 0.0
    step = 1.0 if exits_below else -1.0
    if count == 0:
        return max(float(scores[0]), 0.0) if exits_below else float(scores[0])
    last = float(scores[min(count, len(scores)) - 1])
    following = float(scores[count]) if count < len(scores) else max(last + step, 0.0)
    middle = shortest_between(last, following)
    return following if middle is None else middle
