"""What a fine-tuning run starts from, and the settings that suit its number of images."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ..conversion import convert_checkpoint
from ..families import FAMILIES, FAMILY_OF_PLAIN


def find_source(source: str | os.PathLike, converted: Path, model_type: str | None = None) -> dict[str, Any]:
    """
    The fields of a `TrainingConfig` that make a run start from `source`: `model_type`, `from_pretrained` or `from_vit`,
    and for a plain ViT as `model` the stages.

    Args:
        source (`str` or `os.PathLike`): folder or Hub id of a model of this package, of an official checkpoint (also a
            file of one), or of a plain ViT, DeiT or Swin.
        converted (`Path`): folder in which an official checkpoint is saved in the form of this package.
        model_type (`str`, *optional*): the family that a plain model becomes; by default ThinkingViT or ThinkingSwin.

    Raises:
        FileNotFoundError: if there is no such file, folder or model on the Hub.
        ValueError: if it is a model of another kind.
    """
    source = os.fspath(source)
    config = _transformers_config(source)
    if config is None:  # an official checkpoint, in the layout of its authors
        _check_not_a_run(source)
        model = convert_checkpoint(source, converted)
        return {"model_type": model.config.model_type, "from_pretrained": str(converted)}
    if config.model_type in FAMILIES:
        return {"model_type": config.model_type, "from_pretrained": source}
    if config.model_type not in FAMILY_OF_PLAIN:
        raise ValueError(
            f"`{source}` is of type {config.model_type!r}: fine-tuning starts from a plain ViT, DeiT or Swin, an "
            f"official checkpoint, or a model of this package ({', '.join(FAMILIES)})."
        )
    model_type = model_type or FAMILY_OF_PLAIN[config.model_type]
    fields: dict[str, Any] = {"model_type": model_type, "from_vit": source}
    if model_type == "thinkingvit" and config.num_attention_heads > 1:
        # The whole source is the last stage and keeps what it has learned; half of its heads learn to answer first.
        # (`from_vit` by default adds a wider stage, whose new weights a few thousand images cannot train.)
        heads = config.num_attention_heads
        fields["model"] = {"thinking_stages": [math.ceil(heads / 2), heads]}
    return fields


def _check_not_a_run(source: str) -> None:
    """`FileNotFoundError` for the folder of a training run, which is one above the models in it."""
    inside = [Path(source, name) for name in ("best", "last") if Path(source, name, "config.json").is_file()]
    if inside:
        raise FileNotFoundError(
            f"The folder `{source}` has no model (there is no config.json in it). Did you mean `{inside[0]}`?"
        )


def _transformers_config(source: str) -> PreTrainedConfig | None:
    """The configuration of a Transformers model; `None` if `source` is a file, or a folder of another layout."""
    if os.path.isfile(source):
        return None
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError):  # no config.json; or one without a known `model_type`, such as timm's
        return None


def num_usable_cores() -> int:
    """Cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def settings_for(num_images: int, model_type: str, from_plain: bool, given: Mapping[str, Any]) -> dict[str, Any]:
    """
    Fields of a `TrainingConfig` that suit `num_images` training images, from some 50 to 50 000.

    Args:
        num_images (`int`): to train on.
        model_type (`str`): the family.
        from_plain (`bool`): whether the run starts from a plain model, whose early layers have to learn another task.
        given (`dict`): fields that the user has chosen; others follow from them. They are not returned.

    Returns:
        Fewer epochs for more images (40 for 200, 21 for 1000, 5 for 50 000), with a tenth of them for warm-up and no
        cooldown; batches of a tenth of the images, between 8 and 64; a learning rate with the square root of the batch;
        a moving average over the last tenth of the run; stronger augmentation for more images. LoRA adapters all learn
        at the same rate.
    """
    epochs = given.get("epochs") or min(40, max(4, round(40 * (200 / num_images) ** 0.4)))
    batch_size = given.get("batch_size") or 2 ** int(math.log2(min(64, max(8, num_images // 10))))
    batch_size = min(batch_size, max(1, num_images))
    steps = epochs * max(1, num_images // batch_size)
    if num_images < 2000:
        augmentation = {"crop_scale": [0.5, 1.0], "color_jitter": 0.2, "auto_augment": None, "random_erasing": 0.0}
    elif num_images < 20_000:
        augmentation = {"crop_scale": [0.35, 1.0], "auto_augment": "rand-m5-mstd0.5-inc1", "random_erasing": 0.1}
    else:
        augmentation = {"crop_scale": [0.25, 1.0], "auto_augment": "rand-m7-mstd0.5-inc1", "random_erasing": 0.2}
    mixes = num_images >= 20_000 and not FAMILIES[model_type].without_mixup and batch_size % 2 == 0
    # A worker that starts anew each epoch takes longer than a few hundred small images.
    workers = min(8, num_usable_cores()) if num_images >= 500 else 0
    settings = {
        "epochs": epochs,
        "cooldown_epochs": 0,
        "warmup_epochs": round(epochs / 10, 2),
        "batch_size": batch_size,
        "learning_rate": round(1e-3 * math.sqrt(batch_size / 16), 6),
        "learning_rate_batch": batch_size,
        "min_learning_rate": 1e-6,
        "layer_decay": 1.0 if given.get("lora_rank") else 0.85 if from_plain else 0.75,
        "ema_decay": round(1 - 10 / max(steps, 20), 6),
        "clip_grad": 1.0,
        **augmentation,
        "mixup": 0.2 if mixes else 0.0,
        "cutmix": 0.2 if mixes else 0.0,
        "eval_epochs": max(1, epochs // 10),
        "num_workers": workers,
        "keep_checkpoints": 1,
        "log_steps": max(1, min(10, steps // 20)),
    }
    return {name: value for name, value in settings.items() if name not in given}
