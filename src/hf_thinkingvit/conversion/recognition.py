"""Says what a checkpoint is that is not an official one, and which call takes it instead."""

from ..families import FAMILIES, FAMILY_OF_PLAIN
from ..families.official import Checkpoint


TIMM_VIT, TIMM_SWIN = "blocks.0.attn.qkv.weight", "layers.0.blocks.0.attn.qkv.weight"
EXAMPLES = {"vit": "facebook/deit-small-patch16-224", "swin": "microsoft/swin-small-patch4-window7-224"}


def describe_unofficial(checkpoint: Checkpoint) -> str | None:
    """
    What a checkpoint is and which call takes it, in a sentence or two; `None` if it is unknown.

    Args:
        checkpoint (`Checkpoint`): that no official format matches.
    """
    folder, names, model_type = checkpoint.path.parent, checkpoint.state_dict, checkpoint.config.get("model_type")
    if model_type in FAMILIES:
        return (
            f"It is a {FAMILIES[model_type].name} of this package already: load it with "
            f'`AutoModelForImageClassification.from_pretrained("{folder}")`; nothing has to be converted.'
        )
    own = next((name for name in FAMILIES if any(key.startswith(f"{name}.") for key in names)), None)
    if own is not None:
        return (
            f"It holds the weights of a {FAMILIES[own].name} of this package, without a config.json beside them: load "
            "the folder that `save_pretrained` or a training run (`best`, `last`) has written, with `from_pretrained`."
        )
    if model_type is None:  # weights of Transformers alone
        model_type = next((name for name in FAMILY_OF_PLAIN if any(key.startswith(f"{name}.") for key in names)), None)
    if model_type in FAMILY_OF_PLAIN:
        return (
            f"It is a plain Transformers model of type {model_type!r}, which is a start to train from: "
            f'`{_start(model_type)}("{folder}")`, or `hf-thinkingvit finetune DATASET --source {folder}`.'
        )
    if model_type is not None:
        return f"It is a Transformers model of type {model_type!r}, for which there is no conversion."
    for kind, key in (("vit", TIMM_VIT), ("swin", TIMM_SWIN)):
        if key in names:
            architecture = checkpoint.config.get("architecture")
            known_as = f" ({architecture})" if architecture else ""
            return (
                f"It is a plain timm {'ViT or DeiT' if kind == 'vit' else 'Swin'}{known_as}, which does not think in "
                "stages. Training starts from the same model in Transformers' format: "
                f'`{_start(kind)}("{EXAMPLES[kind]}")`.'
            )
    return None


def _start(model_type: str) -> str:
    """The constructor by which a class of this package starts from a plain model of Transformers of this type."""
    family = FAMILIES[FAMILY_OF_PLAIN[model_type]]
    return f"{family.classifier.__name__}.{family.plain.constructor}"
