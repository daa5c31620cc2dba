"""Evaluates any number of τ of a segmentation model from one pass over images in windows."""

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from ..accelerate_state import released_afterwards
from ..masks import MaskLabels, as_mask_split
from ..models.configuration_checks import as_pair
from ..models.exit_rules import ExitRule
from ..windows import WindowPlan, window_batches
from .segmentation import StageConfusions, collect_stage_confusions
from .splits import evaluation_rows, warn_if_not_new
from .stages import Threshold


@released_afterwards()
def evaluate_segmentation_thresholds(
    model: PreTrainedModel,
    dataset: Any,
    processor: Any,
    thresholds: Sequence[Threshold] = (),
    *,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    mask_values: Sequence[int] = (),
    ignored_mask_values: Sequence[int] = (255,),
    short_side: int | None = None,
    long_side: int | None = None,
    max_samples: int | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> tuple[StageConfusions, list[dict[str, Any]]]:
    """
    Evaluate any number of thresholds in one pass: images are cut into windows of `config.image_size`, each of which
    leaves at its own stage, and each pixel counts in one window. Logits are not averaged where windows overlap, and
    masks are resized with their images, as the papers' figures, at a single τ, are not.

    Args:
        model (`PreTrainedModel`): a segmentation model.
        dataset, split, accelerator: as in `evaluate_thresholds`.
        processor (`BaseImageProcessor`): the model's, for its normalisation.
        thresholds (`list`): each one τ, or a list with one per exit; in any order.
        image_column, label_column (`str`, *optional*): as in [`~hf_thinkingvit.masks.as_mask_split`].
        mask_values (`list[int]`, *optional*): the value in the masks of each class, in order; by default 0, 1, 2, ...
        ignored_mask_values (`list[int]`): values of pixels that do not count.
        short_side, long_side (`int`, *optional*): size of the images, as of [`~hf_thinkingvit.windows.fitted_size`].
        max_samples (`int`, *optional*): read only this many images, a random sample with a fixed seed.
        batch_size (`int`): images in a batch, with all of their windows.

    Returns:
        The [`StageConfusions`], which evaluate further τ without running the model, and one row per τ.

    Raises:
        ValueError: if a τ is invalid (checked before anything runs), or data, masks and model do not fit together.
    """
    for threshold in thresholds:
        ExitRule.from_config(model.config, threshold)
    accelerator = accelerator or Accelerator(cpu=model.device.type == "cpu")
    name = dataset if isinstance(dataset, str) else "the dataset"
    trained_on, config = getattr(model.config, "training_data", None), model.config
    rows, split = evaluation_rows(dataset, split, False, trained_on)
    seen = warn_if_not_new(trained_on, dataset, split)
    labels = MaskLabels(
        names=tuple(config.id2label[index] for index in range(config.num_labels)),
        values=tuple(mask_values) or tuple(range(config.num_labels)),
        ignored=tuple(ignored_mask_values),
        ignore_index=config.semantic_loss_ignore_index,
    )
    images = as_mask_split(rows, name, labels, image_column, label_column).sample(max_samples)
    model.to(accelerator.device)
    plan = WindowPlan(as_pair(config.image_size), short_side, long_side)
    batches = accelerator.prepare(window_batches(images, processor, plan, batch_size, num_workers))
    facts = {"dataset": name, "split": split, "seen": seen, "prepared": str(plan), "preprocessing": plan.facts()}
    answers = collect_stage_confusions(model, batches, accelerator, progress, **facts)
    return answers, [answers.row(threshold) for threshold in thresholds]
