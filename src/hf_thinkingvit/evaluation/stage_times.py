"""Times the stages of a model, for a budget of milliseconds."""

import time

import numpy as np
import torch
from transformers import PreTrainedModel

from ..models.exit_criteria import EXIT_CRITERIA


@torch.no_grad()
def measure_stage_milliseconds(model: PreTrainedModel, pixel_values: torch.Tensor, repeats: int = 10) -> list[float]:
    """
    Median milliseconds per image that exits at each stage, on the device and in the batch size of `pixel_values`.

    Args:
        model (`PreTrainedModel`): a model that thinks in stages.
        pixel_values (`torch.Tensor`): one batch.
        repeats (`int`): timed forward passes per stage, interleaved, after two for warm-up.
    """

    def seconds(max_stages: int) -> float:
        if pixel_values.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        model(pixel_values, threshold=never, max_stages=max_stages, **all_stages)
        if pixel_values.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    # The τ at which nothing exits early. With `exit_at_threshold` an entropy of 0 does, unless the logits of all stages
    # are asked for.
    config = model.config
    all_stages = {"output_stage_logits": True} if config.exit_at_threshold else {}
    criterion = EXIT_CRITERIA[config.exit_criterion]
    never = 0.0 if criterion.exits_below else 2 * criterion.maximum(config.num_labels, config.entropy_top_k)
    was_training = model.training
    model.eval()
    try:
        runs = [[seconds(stage + 1) for stage in range(model.config.num_stages)] for _ in range(repeats + 2)]
    finally:
        model.train(was_training)
    return [1e3 / len(pixel_values) * float(np.median(column)) for column in zip(*runs[2:])]
