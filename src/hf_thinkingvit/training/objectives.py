"""
What the training loss of a model consists of: small classes that read fields of the model's configuration and outputs
by name. One of `TASK_OBJECTIVES` gives the loss of the answers; those of `ADDED_OBJECTIVES` that apply are added to it.
A new one is a subclass of `Objective` and an entry in one of the two.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedConfig

from ..evaluation.labels import check_single_label
from ..models.configuration_staged import thinks_in_stages
from ..models.exit_losses import exit_losses
from ..models.tasks import weights_of_stages
from .answer_losses import AnswerLosses, TrainingBatch
from .distillation import DistillationLoss, Teacher, teacher_loss, token_distance
from .stage_samplers import AllStages, build_stage_sampler, stage_sampler_class
from .sub_network_distillation import SubNetworkDistillation


if TYPE_CHECKING:
    from .config import TrainingConfig


class Objective:
    """
    A term of the training loss.

    Args:
        config (`TrainingConfig`): of the run.
        model_config (`PreTrainedConfig`): of the model.
        teacher (`Teacher`, *optional*): an image classifier to distil from.

    Raises:
        ValueError: where the configuration asks for what this model cannot do.
    """

    def __init__(self, config: "TrainingConfig", model_config: PreTrainedConfig, teacher: Teacher | None):
        pass

    @classmethod
    def applies(cls, model_config: PreTrainedConfig, teacher: Teacher | None) -> bool:
        """Whether the objective is one for this model."""
        raise NotImplementedError

    def model_arguments(self, step: int, micro_batch: int) -> dict[str, Any]:
        """Arguments of the model's `forward` for the outputs that the objective reads, with or without labels."""
        return {}

    @property
    def leaves_parameters_out(self) -> bool:
        """
        Whether there are steps in which some parameters get no gradient. Distributed training waits for the gradients
        of all of them, unless it is told to look for those without (`find_unused_parameters`).
        """
        return False

    def __call__(self, batch: TrainingBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The term, a scalar, and the parts of it that are worth logging, by name and detached."""
        raise NotImplementedError


class StagesObjective(Objective):
    """
    The weighted sum of the stages' losses (arXiv 2507.10800, section 3), of the stages that the sampler chooses. The
    others are computed as well, and all stages' losses are logged.
    """

    def __init__(self, config: "TrainingConfig", model_config: PreTrainedConfig, teacher: Teacher | None):
        self.sampler = build_stage_sampler(config, model_config)
        self.answer_losses = AnswerLosses(config, model_config, teacher)

    @classmethod
    def applies(cls, model_config: PreTrainedConfig, teacher: Teacher | None) -> bool:
        return thinks_in_stages(model_config)

    @property
    def leaves_parameters_out(self) -> bool:
        return not (isinstance(self.sampler, AllStages) and all(self.sampler.weights(0, 0)))

    def model_arguments(self, step: int, micro_batch: int) -> dict[str, Any]:
        return {"output_stage_logits": True}

    def __call__(self, batch: TrainingBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        losses = self.answer_losses(batch.outputs.stage_logits, batch)
        weights = self.sampler.weights(batch.step, batch.micro_batch)
        loss = sum(weight * part for weight, part in zip(weights, losses) if weight)
        if len(losses) == 1:
            return loss, {}
        return loss, {f"stage_{index}_loss": part.detach() for index, part in enumerate(losses)}


class SubNetworksObjective(Objective):
    """
    The weighted sum of the losses of those sub-networks of an elastic ViT that the sampler draws: of their answers, or
    with `distillation: hidden_states` those of `SubNetworkDistillation`. Only these are computed; their losses are
    logged.

    Raises:
        ValueError: for in-place distillation, which needs the answers of the whole model.
    """

    def __init__(self, config: "TrainingConfig", model_config: PreTrainedConfig, teacher: Teacher | None):
        if config.inplace_distillation:
            raise ValueError("`inplace_distillation` is of models that think in stages: leave it out.")
        self.model_config = model_config
        weights = weights_of_stages(model_config.sub_network_loss_weights, range(len(model_config.sub_networks)))
        self.sampler = stage_sampler_class(config.stage_sampling)(weights, config)
        if config.distillation == "hidden_states":
            self.distillation = SubNetworkDistillation(config, model_config, teacher)
        else:
            self.distillation, self.answer_losses = None, AnswerLosses(config, model_config, teacher)

    @classmethod
    def applies(cls, model_config: PreTrainedConfig, teacher: Teacher | None) -> bool:
        return bool(getattr(model_config, "sub_networks", None))

    @property
    def leaves_parameters_out(self) -> bool:
        every = range(self.sampler.num_stages)
        draws_all = isinstance(self.sampler, AllStages)
        steps = [self._drawn(0, 0)] if draws_all else [[number] for number in every]
        networks, num_layers = self.model_config.networks, self.model_config.num_hidden_layers
        for drawn in steps:
            layers = {layer for number in drawn for layer in networks[number].layer_numbers(num_layers)}
            if len(layers) < num_layers or (self.model_config.separate_classifiers and len(drawn) < len(every)):
                return True
        return False

    def _drawn(self, step: int, micro_batch: int) -> list[int]:
        return [index for index, weight in enumerate(self.sampler.weights(step, micro_batch)) if weight]

    def model_arguments(self, step: int, micro_batch: int) -> dict[str, Any]:
        arguments = {"sub_network": self._drawn(step, micro_batch)}
        return arguments if self.distillation is None else {**arguments, "output_hidden_states": True}

    def __call__(self, batch: TrainingBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        drawn = self._drawn(batch.step, batch.micro_batch)
        if self.distillation is None:
            losses = self.answer_losses(batch.outputs.sub_network_logits, batch)
        else:
            losses = self.distillation(drawn, batch)
        weights = self.sampler.weights(batch.step, batch.micro_batch)
        loss = sum(weights[index] * part for index, part in zip(drawn, losses, strict=True))
        return loss, {f"sub_network_{index}_loss": part.detach() for index, part in zip(drawn, losses)}


class ExitLossObjective(Objective):
    """
    The loss of an early-exit ViT with learned halting or self-distillation: what the model's own training loss is, of
    the labels of the run, which mixup may have mixed. Every stage's loss is logged.

    Raises:
        ValueError: for a teacher, in-place distillation or sampled stages, which these losses have no place for.
    """

    def __init__(self, config: "TrainingConfig", model_config: PreTrainedConfig, teacher: Teacher | None):
        check_single_label(model_config)
        if teacher is not None or config.inplace_distillation or config.stage_sampling != "all":
            raise ValueError(
                "An early-exit ViT with `halting` or `self_distillation` trains all stages by a loss of its own: leave "
                "out `teacher` and `inplace_distillation`, and set `stage_sampling` to all."
            )
        self.model_config, self.label_smoothing = model_config, config.label_smoothing

    @classmethod
    def applies(cls, model_config: PreTrainedConfig, teacher: Teacher | None) -> bool:
        return getattr(model_config, "has_own_loss", False)

    @property
    def leaves_parameters_out(self) -> bool:
        return self.model_config.self_distillation

    def model_arguments(self, step: int, micro_batch: int) -> dict[str, Any]:
        return {"output_stage_logits": True}

    def __call__(self, batch: TrainingBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        smoothing = 0.0 if batch.targets.is_floating_point() else self.label_smoothing
        stage_logits = batch.outputs.stage_logits
        losses = [
            F.cross_entropy(logits.float(), batch.targets, label_smoothing=smoothing, reduction="none")
            for logits in stage_logits
        ]
        loss = exit_losses(
            self.model_config, stage_logits, torch.stack(losses, dim=1), batch.outputs.get("halting_scores")
        ).mean()
        return loss, {f"stage_{index}_loss": part.detach().mean() for index, part in enumerate(losses)}


class DistillationHeadObjective(Objective):
    """
    DeiT's distillation (arXiv 2012.12877): the class head learns from the labels, the distillation head from the
    teacher. See `DistillationLoss`.
    """

    def __init__(self, config: "TrainingConfig", model_config: PreTrainedConfig, teacher: Teacher):
        check_single_label(model_config)
        self.distillation = DistillationLoss(
            teacher,
            kind=config.distillation,
            weight=config.distillation_weight,
            temperature=config.distillation_temperature,
            label_smoothing=config.label_smoothing,
        )

    @classmethod
    def applies(cls, model_config: PreTrainedConfig, teacher: Teacher | None) -> bool:
        return teacher is not None and getattr(model_config, "distilled", False)

    def __call__(self, batch: TrainingBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.distillation.task_loss(batch.outputs, batch.pixel_values, batch.targets), {}


class HeadsObjective(Objective):
    """
    The mean loss of the heads of a model without stages: of its one head, or of the class head and the distillation
    head, which both learn from the labels where there is no teacher.
    """

    def __init__(self, config: "TrainingConfig", model_config: PreTrainedConfig, teacher: Teacher | None):
        self.answer_losses = AnswerLosses(config, model_config, teacher)

    @classmethod
    def applies(cls, model_config: PreTrainedConfig, teacher: Teacher | None) -> bool:
        return True

    def __call__(self, batch: TrainingBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        outputs = batch.outputs
        heads = (outputs.logits,)
        if outputs.get("distillation_logits") is not None:
            heads = (outputs.cls_logits, outputs.distillation_logits)
        losses = self.answer_losses(heads, batch)
        return sum(1.0 / len(losses) * loss for loss in losses), {}


class HaltingObjective(Objective):
    """
    A-ViT's weighted ponder and prior losses (arXiv 2112.07658, section 3): what the model's own loss has beside its
    task loss. Logged without their weights.
    """

    @classmethod
    def applies(cls, model_config: PreTrainedConfig, teacher: Teacher | None) -> bool:
        return hasattr(model_config, "ponder_loss_weight")

    def model_arguments(self, step: int, micro_batch: int) -> dict[str, Any]:
        return {"output_halting_losses": True}

    def __call__(self, batch: TrainingBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        outputs = batch.outputs
        if outputs.get("task_loss") is None:
            raise ValueError(
                "The ponder and prior losses are read from the model's own loss: call it with `labels`, in training "
                "mode. In a run, set `mixup` and `cutmix` to 0."
            )
        parts = {name: outputs[name].detach() for name in ("ponder_loss", "prior_loss")}
        return outputs.loss - outputs.task_loss, parts


class PruningObjective(Objective):
    """
    DynamicViT's losses (arXiv 2106.02034, section 3.3) beside that of the answers: the ratio loss, weighted by the
    model's `pruning_ratio_loss_weight`, and with `distillation: tokens` two terms that the teacher, the same model
    without pruning, gives: the divergence of the last stage's answers, and the squared distance of the patches that are
    kept to the end. Each has the weight `distillation_weight`. For models of several stages the combination is ours,
    since none was published. All parts are logged without their weights.
    """

    def __init__(self, config: "TrainingConfig", model_config: PreTrainedConfig, teacher: Teacher | None):
        self.weight, self.teacher_weight = model_config.pruning_ratio_loss_weight, config.distillation_weight
        self.teacher = None
        if config.distillation == "tokens":
            if teacher is None:
                raise ValueError('`distillation` "tokens" needs a `teacher`: the same model without pruning.')
            self._check_teacher(teacher.model.config, model_config)
            self.teacher = teacher

    def _check_teacher(self, teacher_config: PreTrainedConfig, model_config: PreTrainedConfig) -> None:
        for name in ("model_type", "stages", "patch_grid", "num_prefix_tokens"):
            theirs, ours = getattr(teacher_config, name, None), getattr(model_config, name)
            if theirs != ours:
                raise ValueError(
                    '`distillation` "tokens" compares tokens with those of the same model without pruning, but the '
                    f"teacher's `{name}` is {theirs}, and the model's {ours}."
                )
        if teacher_config.pruning_layers:
            raise ValueError('`distillation` "tokens" needs a teacher that prunes no tokens.')

    @classmethod
    def applies(cls, model_config: PreTrainedConfig, teacher: Teacher | None) -> bool:
        return bool(getattr(model_config, "pruning_layers", None))

    def __call__(self, batch: TrainingBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        outputs = batch.outputs
        parts = {"ratio_loss": outputs.ratio_loss}
        loss = self.weight * outputs.ratio_loss
        if self.teacher is not None:
            logits, tokens = self.teacher.answer_and_tokens(batch.pixel_values)
            patches = tokens[:, -outputs.patch_tokens.shape[1] :]
            parts["answer_distillation"] = teacher_loss(outputs.stage_logits[-1], logits, "soft")
            parts["token_distillation"] = token_distance(outputs.patch_tokens, patches, outputs.keep_decisions[-1])
            loss = loss + self.teacher_weight * (parts["answer_distillation"] + parts["token_distillation"])
        return loss, {name: part.detach() for name, part in parts.items()}


# The first that applies to the model, in this order.
TASK_OBJECTIVES: dict[str, type[Objective]] = {
    "sub_networks": SubNetworksObjective,
    "exit_loss": ExitLossObjective,
    "stages": StagesObjective,
    "distillation_head": DistillationHeadObjective,
    "heads": HeadsObjective,
}
# All that apply to the model.
ADDED_OBJECTIVES: dict[str, type[Objective]] = {"halting": HaltingObjective, "pruning": PruningObjective}


def choose_objectives(model_config: PreTrainedConfig, teacher: Teacher | None) -> list[type[Objective]]:
    """The objectives of a model, the one of its task first."""
    task = next(objective for objective in TASK_OBJECTIVES.values() if objective.applies(model_config, teacher))
    return [task, *(added for added in ADDED_OBJECTIVES.values() if added.applies(model_config, teacher))]
