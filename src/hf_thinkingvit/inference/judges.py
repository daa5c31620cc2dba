"""
Export of decisions: what an exit rule says of a stage's answers, as a program of its own, for runtimes without torch.

It computes what `ExitRule.judge` computes, because it is traced from it. Kept apart from the stage's program, it is
float32 whatever the precision of the stages, and it is the same program in every one of them.
"""

from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from ..models.configuration_checks import configured_problem_type
from ..models.staged_run import Answer, Memory
from ..torch_free.programs import ANSWER_PREFIX, MEMORY_PREFIX, THRESHOLD
from .class_scores import class_scores


class StageJudge(nn.Module):
    """
    The decision after a stage: from its answers, what the decision before remembers, and τ of each image, to what is
    reported of the answers, which images exit, and what to remember.

    Args:
        model (`PreTrainedModel`): a classifier.
        stage_index (`int`): the stage that answered.
        answer, memory (`dict[str, torch.Tensor]`): an example of what `ExitRule.judge` takes.

    Attributes:
        passed_on (`tuple[str, ...]`): entries of the memory that the rule leaves as they are, and the program out.
    """

    def __init__(self, model: PreTrainedModel, stage_index: int, answer: Answer, memory: Memory):
        super().__init__()
        self.config, self.rule, self.stage_index = model.config, model.exit_rule(), stage_index
        self.is_last = stage_index == model.config.num_stages - 1
        self.has_classes = configured_problem_type(model.config) != "regression"
        after = self.rule.judge(stage_index, answer, memory).memory
        self.passed_on = tuple(name for name in after if not self.is_last and after[name] is memory.get(name))

    def inputs(self, answer: Answer, memory: Memory) -> dict[str, torch.Tensor]:
        """The program's inputs; floats of answers in float32."""
        as_floats = {name: rows.float() if rows.is_floating_point() else rows for name, rows in answer.items()}
        inputs = {ANSWER_PREFIX + name: rows for name, rows in as_floats.items()}
        inputs |= {MEMORY_PREFIX + name: rows for name, rows in memory.items()}
        return inputs if self.is_last else {**inputs, THRESHOLD: torch.full((len(answer["logits"]),), 0.5)}

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        answer, memory = (
            {name.removeprefix(prefix): tensor for name, tensor in inputs.items() if name.startswith(prefix)}
            for prefix in (ANSWER_PREFIX, MEMORY_PREFIX)
        )
        rule = self.rule
        if not self.is_last:
            rule = replace(rule, thresholds=(inputs[THRESHOLD],) * len(rule.thresholds))
        verdict = rule.judge(self.stage_index, answer, memory)
        outputs = {"entropy": verdict.entropy}
        if self.has_classes:
            outputs["class_scores"] = class_scores(answer["logits"], self.config)
        if self.is_last:
            return {"verdict": outputs, "memory": {}}
        # Computed anew, since they may be inputs, or each other: OpenVINO takes no copy for an output, and none twice.
        remembered = {name: tensor + 0 for name, tensor in verdict.memory.items() if name not in self.passed_on}
        return {"verdict": {**outputs, "score": verdict.score + 0, "exits": verdict.exits}, "memory": remembered}
