"""
Models that think in stages as backbones (`AutoBackbone`): feature maps of a chosen stage, for other models' heads.

A backbone runs the steps `begin`, `run_stage` and `recycle` of the bare model, for every image, up to
`config.out_stage`. It has no answers, so nothing exits.
"""

import torch
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_backbone import StagedBackboneConfig
from .module_arguments import check_arguments
from .token_policies import layer_outputs


class StagedBackboneMixin(BackboneMixin):
    """
    The `forward` of a backbone. Subclasses hold the bare model (`base_model`), set `num_features`, and define
    `feature_map`.
    """

    def __init__(self, config: StagedBackboneConfig):
        config.refresh_default_features()
        super().__init__(config)

    def check_image_size(self, image_size: tuple[int, int]) -> None:
        """`ValueError` for images of a (height, width) whose feature maps would not cover them evenly."""

    def feature_map(self, name: str, hidden_state: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
        """`(batch, channels, rows, columns)`, normalised, of a layer's output as the bare model computes it."""
        raise NotImplementedError

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BackboneOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Images. Position embeddings are interpolated where the size is not `config.image_size`.

        Returns:
            [`~transformers.modeling_outputs.BackboneOutput`]: `feature_maps`, one for each of `config.out_features`,
            `(batch_size, channels, rows, columns)`, with the channels that stage `config.out_stage` uses.
            `hidden_states`, with `output_hidden_states=True`, are those of that stage as the layers compute them, one
            for each of `stage_names`; `attentions` are of every layer of every stage that ran.

        Raises:
            ValueError: for images that do not fit the model.
            TypeError: for arguments that neither the model nor Transformers knows.
        """
        check_arguments(self, kwargs)
        return self._run(pixel_values, return_dict=True, **kwargs)

    @capture_outputs(tie_last_hidden_states=False)
    def _run(self, pixel_values: torch.Tensor, **kwargs) -> BackboneOutput:
        model, stages = self.base_model, range(self.config.feature_stage + 1)
        state = model.begin(pixel_values, True, stages)
        image_size = tuple(pixel_values.shape[-2:])
        self.check_image_size(image_size)
        for stage in stages[:-1]:
            state = model.recycle(stage, model.run_stage(stage, state, **kwargs), **kwargs)
        stem = state["hidden_states"]
        outputs = layer_outputs(model.run_stage(stages[-1], state, output_layers=True, **kwargs))
        hidden_states = dict(zip(self.stage_names, (stem, *outputs)))
        return BackboneOutput(
            feature_maps=tuple(self.feature_map(name, hidden_states[name], image_size) for name in self.out_features),
            hidden_states=tuple(hidden_states.values()),
        )


__all__ = ["StagedBackboneMixin"]
