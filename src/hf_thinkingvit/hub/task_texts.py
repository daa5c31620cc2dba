"""What model cards say of each task."""

from dataclasses import dataclass

from ..families.record import IMAGE_CLASSIFICATION, IMAGE_SEGMENTATION


@dataclass(frozen=True)
class TaskText:
    """
    What a card says of a task.

    Attributes:
        name (`str`): of the pipeline.
        auto_class (`str`): that loads such models.
        call (`str`): the variable of a pipeline.
        verb (`str`): what the model does, up to the number of classes.
        adaptive_pipeline (`str`, *optional*): this package's own pipeline.
        measure (`str`): by which the best epoch is chosen.
        unit (`str`): what runs through the stages.
        note (`str`, *optional*): on the pipeline, before the command.
        command (`str`, *optional*): that uses a model, `{source}`.
    """

    name: str
    auto_class: str
    call: str
    verb: str
    measure: str
    adaptive_pipeline: str | None = None
    unit: str = "an image"
    note: str | None = None
    command: str | None = None


TASK_TEXTS = {
    IMAGE_CLASSIFICATION: TaskText(
        name=IMAGE_CLASSIFICATION,
        auto_class="AutoModelForImageClassification",
        call="classifier",
        verb="classifies images of {size} pixels into",
        measure="accuracy",
        adaptive_pipeline="adaptive-image-classification",
    ),
    IMAGE_SEGMENTATION: TaskText(
        name=IMAGE_SEGMENTATION,
        auto_class="AutoModelForSemanticSegmentation",
        call="segmenter",
        verb="segments images, in windows of {size} pixels, into",
        measure="mean IoU",
        unit="a window",
        note=(
            "The pipeline squeezes each image into one window. Whole images are segmented in windows, which leave at "
            "their own stages, as those that were measured do (there, logits are averaged where windows overlap):"
        ),
        command='hf-thinkingvit segment --model "{source}" --dataset FOLDER',
    ),
}
