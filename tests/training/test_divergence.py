"""Losses and weights that are no longer finite."""

import pytest
import torch

from hf_thinkingvit.training import TrainingRun, parse_config
from hf_thinkingvit.training.loop import TrainingDivergedError
from tests.training.tiny_runs import flags, weights


@pytest.mark.parametrize(
    "save_steps, message",
    [
        (1000, r"the loss was nan at step 5 .*last good checkpoint is .*step-00000003"),
        # The step that makes the weights NaN has a finite loss; its weights are not saved.
        (1, r"the weights are no longer finite at step 4.*last good checkpoint is .*step-00000003"),
    ],
)
def test_divergence_stops_the_run(images, tmp_path, save_steps, message):
    run = TrainingRun(parse_config(flags(images, tmp_path, save_steps=save_steps)))
    finish_step = run.finish_step

    def finish_and_break() -> None:
        finish_step()
        if run.progress.step == 4:
            next(run.model.parameters()).data.fill_(float("nan"))

    run.finish_step = finish_and_break
    with pytest.raises(TrainingDivergedError, match=message):
        run.run()
    assert not any(torch.isnan(tensor).any() for tensor in weights(tmp_path).values())
