"""The fields of models that are also backbones of other models' heads (`AutoBackbone`)."""

from typing import Any

from transformers.backbone_utils import BackboneConfigMixin

from .configuration_checks import check_integer
from .configuration_staged import StagedConfig


FEATURE_FIELDS = ("out_features", "out_indices")


class StagedBackboneConfig(BackboneConfigMixin, StagedConfig):
    r"""
    What `AutoBackbone` reads of a model that thinks in stages. Bare models (`AutoModel`) read `out_stage` too; heads of
    this package read none of these fields.

    A backbone has no answer by which an image could exit, so it runs the stages up to `out_stage` for every image, and
    gives the feature maps of that one. Transformers calls the layers of a backbone stages as well: `"stage1"` in
    `out_features` is the first *layer* of stage `out_stage`.

    Args:
        out_stage (`int`, *optional*):
            The stage whose features are given, counted from 0; by default the last. It decides how many channels
            they have. Parameters that only later stages use get no gradient.
        out_features (`list[str]`, *optional*):
            Names of the feature maps: `"stem"` (the input of the first layer), `"stage1"` (the output of the first
            layer) and so on, in this order. By default that of the last layer.
        out_indices (`list[int]`, *optional*):
            The same by number; 0 is `"stem"`.
    """

    out_stage: int | None = None

    _chooses_features = False  # whether the caller did; the default follows the number of layers

    def __post_init__(self, **kwargs):
        features = [kwargs.pop(name, None) for name in FEATURE_FIELDS]
        super().__post_init__(**kwargs)
        self.set_output_features_output_indices(*features)

    @property
    def num_layers(self) -> int:
        """Layers of a stage, each of which has a feature map."""
        return self.num_hidden_layers

    @property
    def stage_names(self) -> list[str]:
        """Names of the feature maps of a stage."""
        return ["stem", *(f"stage{layer}" for layer in range(1, self.num_layers + 1))]

    @property
    def feature_stage(self) -> int:
        """The stage whose feature maps a backbone gives, counted from 0."""
        return self.num_stages - 1 if self.out_stage is None else self.out_stage

    def set_output_features_output_indices(self, out_features: list | None, out_indices: list | None) -> None:
        """As in Transformers. The default is not saved: then a model may be loaded with another number of layers."""
        self._chooses_features = out_features is not None or out_indices is not None
        super().set_output_features_output_indices(out_features, out_indices)

    def refresh_default_features(self) -> None:
        """The default of `out_features` for the present number of layers, where the caller chose none."""
        if not self._chooses_features:
            self.set_output_features_output_indices(None, None)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "StagedBackboneConfig":
        """As in [`StagedConfig`]; `out_features` or `out_indices` replaces what is saved of both."""
        features = {name: kwargs.pop(name) for name in FEATURE_FIELDS if name in kwargs}
        if features:
            others = {name: value for name, value in config_dict.items() if name not in FEATURE_FIELDS}
            config_dict = {**others, **features}
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if not output.pop("_chooses_features", False):
            for name in FEATURE_FIELDS:
                output.pop(name, None)
        return output

    def validate(self) -> None:
        super().validate()
        if self.out_stage is not None:
            check_integer("out_stage", self.out_stage, minimum=0)
            if self.out_stage >= self.num_stages:
                raise ValueError(
                    f"`out_stage` must be at most {self.num_stages - 1}, the last stage, got {self.out_stage}."
                )


__all__ = ["StagedBackboneConfig"]
