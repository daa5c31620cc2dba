"""Official checkpoints as data: what was read of one, and how those of a family become models of this package."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedConfig


@dataclass
class Checkpoint:
    """
    A state dict under its official names, and what its files say about the model.

    Attributes:
        path (`Path`): the weight file.
        state_dict (`dict[str, torch.Tensor]`): on the CPU.
        config (`dict`): the `config.json` beside it; empty without one.
        training_args (`dict`): the training script's pickled arguments; empty without them.
        variant (`dict`): the sections of the `variant.yml` beside it; empty without one.
    """

    path: Path
    state_dict: dict[str, torch.Tensor]
    config: dict = field(default_factory=dict)
    training_args: dict = field(default_factory=dict)
    variant: dict = field(default_factory=dict)

    @property
    def model_args(self) -> dict:
        """The arguments of the official model's constructor, as far as the files state them."""
        from_training = self.training_args.get("model_kwargs") or {}
        return {**self.training_args, **from_training, **(self.config.get("model_args") or {})}

    @property
    def preprocessing(self) -> dict:
        """timm's `pretrained_cfg` (input size, crop, interpolation, mean, std), as far as the files state it."""
        return self.config.get("pretrained_cfg") or {}


class UnstatedField(ValueError):
    """A field of the configuration that the files of a checkpoint do not state, and the caller did not either."""


def rename(name: str, renames: Sequence[tuple[str, str]]) -> str:
    """`name` with the first (pattern, replacement) applied that matches it; `KeyError` if none does."""
    for pattern, replacement in renames:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    raise KeyError(name)


def unchanged_state_dict(checkpoint: Checkpoint, **overrides) -> dict[str, torch.Tensor]:
    return checkpoint.state_dict


def default_crop_pct(checkpoint: Checkpoint) -> None:
    return None


def every_tensor_is_read(config: PreTrainedConfig) -> None:
    return None


@dataclass(frozen=True)
class OfficialFormat:
    """
    How a family's official checkpoints become models of this package.

    Attributes:
        required (`dict[str, int]`): tensors whose shapes `build_config` reads, and their numbers of dimensions.
        matches (`Callable`):
            `(checkpoint, overrides)` to whether the checkpoint is of this family. Families are asked in the order of
            `FAMILIES`.
        build_config (`Callable`):
            `(checkpoint, **overrides)` to the configuration, in which `overrides` win. `ValueError` where a field is
            stated neither by the files nor by `overrides`.
        official_name (`Callable`): the name of one of our parameters to that of the official tensor that holds it.
        convert_tensor (`Callable`): `(name, tensor)`, our parameter's name and the official tensor, to our parameter.
        prepare (`Callable`):
            `(checkpoint, **overrides)` to a state dict for the other functions, where checkpoints come in several forms
            or hold tensors that no model needs.
        task (`str`): which of the family's heads the checkpoints have.
        count_labels (`Callable`, *optional*):
            The state dict that `prepare` returned to the number of classes; by default the rows of the classifier.
        crop_pct (`Callable`):
            `(checkpoint)` to the share of the resized shorter side that evaluation crops, where the files do not state
            it; `None` for the default.
        unread (`Callable`):
            `(config)` to a pattern of the official names that a model of this configuration has no parameters for
            although the checkpoint may hold them, such as parts that the caller turned off; `None` if there are none.
    """

    required: Mapping[str, int]
    matches: Callable[[Checkpoint, Mapping], bool]
    build_config: Callable[..., PreTrainedConfig]
    official_name: Callable[[str], str]
    convert_tensor: Callable[[str, torch.Tensor], torch.Tensor]
    prepare: Callable[..., dict[str, torch.Tensor]] = unchanged_state_dict
    task: str = "image-classification"
    count_labels: Callable[[dict[str, torch.Tensor]], int] | None = None
    crop_pct: Callable[[Checkpoint], float | None] = default_crop_pct
    unread: Callable[[PreTrainedConfig], str | None] = every_tensor_is_read

    def num_labels(self, state_dict: dict[str, torch.Tensor]) -> int:
        """The number of classes, from the state dict that `prepare` returned."""
        if self.count_labels is not None:
            return self.count_labels(state_dict)
        return len(state_dict[self.official_name("classifier.weight")])
