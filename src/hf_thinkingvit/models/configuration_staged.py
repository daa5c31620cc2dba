"""The exit fields of every model that thinks in stages, whatever its backbone."""

import copy
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from .exit_criteria import check_exit_fields


if TYPE_CHECKING:
    # Never runs: Transformers copies the files that relative imports name along with the code of a saved model, and
    # only `custom_pipelines` names this one.
    from .staged_pipeline import StagedImageClassificationPipeline  # noqa: F401


ADAPTIVE_IMAGE_CLASSIFICATION = "adaptive-image-classification"
# What the configuration says of it, in the form that `Pipeline.save_pretrained` writes for registered pipelines.
PIPELINE = {
    "impl": "staged_pipeline.StagedImageClassificationPipeline",
    "pt": ["AutoModelForImageClassification"],
    "type": "image",
}


class StagedConfig(PreTrainedConfig):
    r"""
    How a model that answers in stages decides, and how its stages are weighted in training. Families say what their
    stages are, in `stages`.

    Args:
        threshold (`float` or `list[float]`, *optional*, defaults to 0.5):
            τ: an image exits after a stage iff its entropy is below τ (strictly; for `max_probability` and `margin`:
            iff they are above it). One number, or one per exit, that is per stage but the last, which always answers.
            For the entropies, 0 never exits early.
        exit_criterion (`str`, *optional*, defaults to `"topk_entropy"`):
            `"topk_entropy"` (the official code's, on which published thresholds are), `"entropy"` (full softmax, the
            paper's formula), `"max_probability"` or `"margin"` (largest minus second largest probability).
        entropy_top_k (`int`, *optional*, defaults to 10):
            How many of the largest probabilities `"topk_entropy"` keeps.
        stage_loss_weights (`list[float]`, *optional*):
            Weight of each stage's cross-entropy in the training loss. Equal weights that sum to 1 by default.
    """

    # So that `Trainer` hands `compute_metrics` the logits alone, as for any classifier.
    keys_to_ignore_at_inference = ["exit_stage", "entropy", "stage_logits", "hidden_states", "attentions"]

    threshold: float | int | list[float] | tuple[float, ...] = 0.5
    exit_criterion: str = "topk_entropy"
    entropy_top_k: int = 10
    stage_loss_weights: list[float] | tuple[float, ...] | None = None

    @property
    def stages(self) -> tuple[Any, ...]:
        """The sub-networks, in the order in which they think."""
        raise NotImplementedError

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def custom_pipelines(self) -> dict[str, dict[str, Any]]:
        """
        The pipelines that travel with the model, by task. Without the adaptive one where it is registered, as this
        package does: Transformers would prefer the folder's, and then insist on `trust_remote_code`. A copy, because
        `pipeline` writes classes into it, which no configuration could save.
        """
        from transformers.pipelines import PIPELINE_REGISTRY

        pipelines = self._pipelines()
        if ADAPTIVE_IMAGE_CLASSIFICATION in PIPELINE_REGISTRY.get_supported_tasks():
            del pipelines[ADAPTIVE_IMAGE_CLASSIFICATION]
        return pipelines

    @custom_pipelines.setter
    def custom_pipelines(self, pipelines: dict[str, dict[str, Any]] | None) -> None:
        others = {task: info for task, info in (pipelines or {}).items() if task != ADAPTIVE_IMAGE_CLASSIFICATION}
        self.__dict__.pop("custom_pipelines", None)
        if others:
            self.__dict__["custom_pipelines"] = others

    def _pipelines(self) -> dict[str, dict[str, Any]]:
        return copy.deepcopy({**self.__dict__.get("custom_pipelines", {}), ADAPTIVE_IMAGE_CLASSIFICATION: PIPELINE})

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "custom_pipelines": self._pipelines()}

    def validate(self) -> None:
        super().validate()
        check_exit_fields(self)


__all__ = ["StagedConfig"]
