"""
ThinkingViT for semantic segmentation, with Segmenter's decoders (arXiv 2507.10800, arXiv 2105.05633).

From pixels to masks: `forward` calls the loop over stages (`staged_loop.py`). `begin` pads the images to whole patches,
the backbone (`modeling_thinkingvit.py`) runs its stages, and `answer` has the decoder read each stage's patch tokens.
"""

import os
from collections.abc import Sequence

import torch
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging
from transformers.utils.output_capturing import capture_outputs

from .configuration_checks import as_pair
from .configuration_thinkingvit import ThinkingViTConfig
from .decoders_segmenter import SegmenterMaskTransformer, build_decoder
from .modeling_thinkingvit import ThinkingViTForImageClassification, ThinkingViTModel, ThinkingViTPreTrainedModel
from .module_arguments import check_arguments
from .module_recording import record
from .nested_vit import NestedViTAttention, NestedViTLayer, check_pixel_values
from .staged_arguments import resolve_stages
from .staged_compilation import compilable_step
from .staged_loop import StagedModelMixin, run_stages
from .staged_run import Answer, State
from .task_segmentation import (
    SemanticSegmentationTask,
    StagedSemanticSegmenterOutput,
    check_mask_size,
    pad_to_patches,
)
from .weights_from_thinkingvit import import_backbone, segmentation_config


logger = logging.get_logger(__name__)


class ThinkingViTForSemanticSegmentation(SemanticSegmentationTask, StagedModelMixin, ThinkingViTPreTrainedModel):
    """
    ThinkingViT with a decoder (`config.decoder_type`) on the patch tokens, one decoder for all stages, and early exit
    of whole images.

    Call it as any Transformers segmentation model, with images of any size; see `forward` for the arguments that steer
    the exits, and [`StagedSemanticSegmenterOutput`] for what each output means when images exit at different stages.

    Example:

    ```python
    >>> model = ThinkingViTForSemanticSegmentation.from_pretrained("org/thinkingvit-3-6-ade", threshold=0.9)
    >>> outputs = model(pixel_values)
    >>> outputs.logits.shape, outputs.exit_stage, outputs.entropy
    ```"""

    # The decoder has layers and attentions of the same classes, which are not the backbone's to record.
    _can_record_outputs = {
        "hidden_states": record(NestedViTLayer, layer_name="thinkingvit"),
        "attentions": record(NestedViTAttention, index=1, layer_name="thinkingvit"),
    }

    def __init__(self, config: ThinkingViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.thinkingvit = ThinkingViTModel(config)
        self.decoder = build_decoder(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SegmenterMaskTransformer):
            init.trunc_normal_(module.class_embeddings, mean=0.0, std=self.config.initializer_range)
            for projection in (module.patch_projection, module.class_projection):
                init.normal_(projection.weight, mean=0.0, std=module.sizes.hidden_size**-0.5)

    @compilable_step
    def begin(self, pixel_values, interpolate_pos_encoding=None, stages: range | None = None, **kwargs) -> State:
        """
        As the backbone's, of the padded images. Every state carries the patch grid, as the shape `(images, rows,
        columns, 0)` of an empty tensor: images of different grids then never share a batch, and the numbers are known
        without a look at values, which would wait for the device.
        """
        check_pixel_values(pixel_values, self.config.num_channels)
        patch_size = as_pair(self.config.patch_size)
        pixel_values = pad_to_patches(pixel_values, patch_size)
        interpolate = True if interpolate_pos_encoding is None else interpolate_pos_encoding
        state = self.base_model.begin(pixel_values, interpolate, stages)
        grid = [side // patch for side, patch in zip(pixel_values.shape[2:], patch_size)]
        return {**state, "patch_grid": pixel_values.new_empty((len(pixel_values), *grid, 0))}

    @compilable_step
    def run_stage(self, stage_index: int, state: State, is_last: bool = False, **kwargs) -> State:
        """As the backbone's."""
        after = super().run_stage(stage_index, state, is_last=is_last, **kwargs)
        return {**after, "patch_grid": state["patch_grid"]}

    @compilable_step
    def recycle(self, stage_index: int, state: State, **kwargs) -> State:
        """As the backbone's."""
        return {**super().recycle(stage_index, state, **kwargs), "patch_grid": state["patch_grid"]}

    def answer(self, stage_index: int, state: State) -> Answer:
        patches = state["tokens"][:, self.config.num_prefix_tokens :]
        logits = self.decoder(patches).transpose(1, 2).contiguous().unflatten(2, state["patch_grid"].shape[1:3])
        return self.dense_answer(logits)

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        threshold: float | Sequence[float] | None = None,
        max_stages: int | None = None,
        sub_network: int | None = None,
        output_stage_logits: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> StagedSemanticSegmenterOutput:
        r"""
        In evaluation mode an image leaves after the first stage whose answer passes τ, and only the others are computed
        further. In training mode every image runs every stage.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Images of any size. Zeros are added right and below, up to whole patches, and the logits cover them:
                resize these to the padded size and cut them to the image (`resize_logits`). An image processor's
                `post_process_semantic_segmentation` does not cut; give it images of whole patches only.
            labels (`torch.LongTensor` of shape `(batch_size, height, width)`, *optional*):
                A class index for each pixel of the images; `config.semantic_loss_ignore_index` does not count.
                `Trainer` counts every pixel but those of -100. With another index and accumulated gradients or several
                processes, each part of a batch therefore weighs as its pixels, ignored ones too. For the mean over the
                pixels that count, write -100 into the masks and set the index to -100.
            threshold (`float` or `list[float]`, *optional*):
                τ for this call, instead of `config.threshold`: Python's or NumPy's numbers, an array or a tensor.
            max_stages (`int`, *optional*):
                Run at most this many stages, from 1 to the number that the model has; the last of them always answers.
            sub_network (`int`, *optional*):
                Run the sub-network of this stage alone, from the embeddings and without recycled tokens. It is the
                `exit_stage` of every image.
            output_stage_logits (`bool`, *optional*):
                Return every stage's logits for every image, which makes all of them run.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `True`):
                Interpolate the position embeddings for images of another grid than `config.image_size` has. `False`
                refuses such images.

        Returns:
            [`StagedSemanticSegmenterOutput`]

        Raises:
            ValueError: for pixel values, labels, `threshold`, `max_stages` or `sub_network` that do not fit the model.
            TypeError: for arguments that neither the model nor Transformers knows.
        """
        check_arguments(self, kwargs)
        check_pixel_values(pixel_values, self.config.num_channels)
        self._report_padding(pixel_values, labels)
        if labels is not None:
            check_mask_size(labels, pixel_values)
            self.check_labels(labels, len(pixel_values))
        run = run_stages(
            self,
            self.exit_rule(threshold),
            resolve_stages(self.config.num_stages, max_stages, sub_network, threshold),
            pixel_values,
            run_all=bool(output_stage_logits),
            interpolate_pos_encoding=interpolate_pos_encoding,
            **kwargs,
        )
        return self.build_output(run, labels, output_stage_logits, **kwargs)

    def _report_padding(self, pixel_values: torch.Tensor, labels: torch.Tensor | None) -> None:
        """Warn once of logits that cover more than the images. With labels, the loss cuts them itself."""
        if labels is not None or torch.compiler.is_compiling():
            return
        height, width = pixel_values.shape[2:]
        rows, columns = as_pair(self.config.patch_size)
        if height % rows or width % columns:
            logger.warning_once(
                f"Images of {height}×{width} pixels are padded right and below to whole patches of {rows}×{columns}, "
                "and the logits cover the padding. `post_process_semantic_segmentation` would stretch them over the "
                "image and shift the map: set the processor's `size` to multiples of the patch, or use "
                "`resize_logits`, which cuts the padding off."
            )

    @classmethod
    def from_thinkingvit(
        cls, source, decoder_type="linear", **config_overrides
    ) -> "ThinkingViTForSemanticSegmentation":
        r"""
        Start from the backbone of a trained ThinkingViT classifier, without its token pruning if it has any. The
        decoder is freshly initialised.

        Args:
            source (`str`, `os.PathLike` or a ThinkingViT):
                A model, or the folder or Hub id of one.
            decoder_type (`str`, *optional*, defaults to `"linear"`):
                `"linear"` or `"mask_transformer"`.
            config_overrides:
                Further fields of [`ThinkingViTConfig`]. One of `num_labels`, `id2label` and `label2id` must be given.
                `image_size` may be another than the source's: the position embeddings are resized. By default
                `position_interpolation` is `"bilinear"`, as in the official code, and the exit criterion that of
                segmentation. `layer_norm_eps` stays the source's (1e-6 for converted classifiers), for which its
                weights were trained. The official segmentation code uses 1e-5 also where it starts from such a
                classifier: pass `layer_norm_eps=1e-5` to train as it does.

        Raises:
            ValueError: if the source is no ThinkingViT or has adapters or quantised weights, the labels are not given,
                or an override changes what the source's weights fix.
        """
        if isinstance(source, (str, os.PathLike)):
            source = ThinkingViTModel.from_pretrained(source)
        elif not isinstance(source, ThinkingViTPreTrainedModel):
            raise ValueError(f"`source` must be a ThinkingViT, its folder or its Hub id, got {type(source).__name__}.")
        model = cls(segmentation_config(source.config, decoder_type=decoder_type, **config_overrides))
        import_backbone(model, source)
        return model

    @classmethod
    def from_vit(
        cls, source, thinking_stages=None, decoder_type="linear", **config_overrides
    ) -> "ThinkingViTForSemanticSegmentation":
        r"""
        Start from the backbone of a trained plain ViT, which goes into the leading channels and heads, as in
        `ThinkingViTForImageClassification.from_vit`; the decoder is freshly initialised.

        Args:
            source, thinking_stages: as there.
            decoder_type, config_overrides: as in `from_thinkingvit`.

        Raises:
            ValueError: as there.
        """
        classifier = ThinkingViTForImageClassification.from_vit(source, thinking_stages)
        return cls.from_thinkingvit(classifier, decoder_type, **config_overrides)


__all__ = ["ThinkingViTForSemanticSegmentation"]
