"""What a classifier's logits say of its classes, by the problem type of the model."""

import torch
from transformers import PreTrainedConfig

from ..models.configuration_checks import configured_problem_type


def check_has_classes(config: PreTrainedConfig) -> None:
    """`ValueError` for a regression, whose outputs are values and no scores of classes."""
    if configured_problem_type(config) == "regression":
        raise ValueError(
            f"A model whose `problem_type` is regression ({config.num_labels} output"
            f"{'s' if config.num_labels > 1 else ''}) predicts values, and has no classes with scores: read `logits` "
            "of its outputs instead. If it is a classifier, set `problem_type` in its configuration."
        )


def class_scores(logits: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """
    Probabilities of the classes, as `pipeline("image-classification")` gives them for classifiers.

    Args:
        logits (`torch.Tensor` of shape `(..., num_labels)`): of a classifier.
        config (`PreTrainedConfig`): the model's.

    Returns:
        `torch.FloatTensor` of the same shape: of each label by itself (sigmoid) in multi-label classification; else of
        all classes together (softmax).

    Raises:
        ValueError: for a regression.
    """
    check_has_classes(config)
    multi_label = configured_problem_type(config) == "multi_label_classification"
    return logits.float().sigmoid() if multi_label else logits.float().softmax(dim=-1)


def best_classes(logits: torch.Tensor, config: PreTrainedConfig, count: int = 1) -> list[tuple[str, float]]:
    """
    The labels of the `count` greatest scores of one image (of all, where it has fewer), with these, greatest first.

    Args:
        logits (`torch.Tensor` of shape `(num_labels,)`): the model's answer to it.
        config (`PreTrainedConfig`): the model's.
        count (`int`): of labels.

    Raises:
        ArithmeticError: if a logit is not finite, because the ranking is then meaningless.
        ValueError: for a regression.
    """
    scores = class_scores(logits, config)
    if not logits.isfinite().all():
        raise ArithmeticError(
            "The model's answer is not finite (its logits have NaN or infinity), so that no class is the best: check "
            "its weights, and try a precision of a greater range (float32, bfloat16)."
        )
    greatest, classes = scores.topk(min(count, len(scores)))
    return [(config.id2label[index], score) for index, score in zip(classes.tolist(), greatest.tolist())]
