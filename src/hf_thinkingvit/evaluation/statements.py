"""Builds the statement of a calibration from its facts, which, unlike a sentence, can be compared with a model."""

from collections.abc import Mapping
from typing import Any

from .splits import ALL, UNKNOWN, is_training_split
from .wording import at_least, at_most


PROMISES = {
    "accuracy_drop": "at most {} of images are right at the last stage and wrong where they exit",
    "error": "at most {} of images are classified wrongly",
    "pixels_lost": (
        "on average at most {} of an image's pixels are right at the last stage and wrong where their window exits"
    ),
    "pixel_error": "on average at most {} of an image's pixels are wrong",
}
NONE_EXITS_EARLY = "No τ at which an image exits early keeps this promise."
UNITS = {"macs": "GMACs", "milliseconds": "ms"}
NO_PROMISE = "This describes these images, and promises nothing for others."


def calibration_statement(facts: Mapping[str, Any]) -> str | None:
    """
    The promise with its assumptions about the images; or what was measured where there is none, which it says.

    Args:
        facts (`dict`): from [`Calibration.to_dict`] of this or a former version.

    Returns:
        `str`: to be shown only with a model for which the calibration holds
        ([`~hf_thinkingvit.evaluation.calibration_status`]). If facts are missing, the `statement` that former versions
        saved, or `None`.
    """
    target, images = facts.get("target"), facts.get("images")
    if target in PROMISES and None not in (images, facts.get("epsilon"), facts.get("delta")):
        return _promise(facts)
    if target in UNITS and None not in (images, facts.get("achieved"), facts.get("budget")):
        unit = UNITS[target]
        return (
            f"On {images} images, {facts['achieved']:.4g} {unit} per image on average, within {facts['budget']!r}. "
            f"{NO_PROMISE}"
        )
    if target == "accuracy" and None not in (images, facts.get("achieved")):
        measure = "accuracy" if facts.get("mean_iou") is None else "mean IoU"
        return (
            f"τ is the one of greatest {measure} on {images} images ({100 * facts['achieved']:.2f} %), and of several "
            f"such the cheapest. {NO_PROMISE}"
        )
    return facts.get("statement")


def quality_of(facts: Mapping[str, Any]) -> float:
    """The accuracy, of a segmentation model the mean IoU, of a row of a sweep or of a calibration: a fraction."""
    return facts["mean_iou"] if facts.get("top1") is None else facts["top1"] / 100


def exits_early(facts: Mapping[str, Any]) -> bool:
    """Whether any image exits early at the calibrated τ; former versions saved this in their `statement` only."""
    if facts.get("exits_early") is None:
        return NONE_EXITS_EARLY not in (facts.get("statement") or "")
    return bool(facts["exits_early"])


def _promise(facts: Mapping[str, Any]) -> str:
    split = facts.get("split", UNKNOWN)
    statement = (
        f"With probability at least {at_least(facts['delta'])} over the choice of {facts['images']} calibration "
        f"images, {PROMISES[facts['target']].format(at_most(facts['epsilon']))}."
    )
    if not exits_early(facts):
        statement += f" {NONE_EXITS_EARLY}"
    if seen := facts.get("seen"):
        statement += f" The calibration images are not new to the model ({seen}); for others this promises nothing."
    elif is_training_split(split):
        statement += (
            f" The calibration images are training images (split {split!r}): for other images this promises "
            "nothing, unless the model was not trained on these."
        )
    elif split in (ALL, UNKNOWN):
        statement += (
            f" Which split the images are of is not known ({split!r}): this holds provided that the model was "
            "not trained on them, nor its epoch chosen by them."
        )
    return statement
