"""Model cards, made from what was measured: a card cannot disagree with the run."""

import json
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from .evaluation.macs import stage_macs


USAGE = """## Use

```python
import hf_thinkingvit  # or trust_remote_code=True, without the package
from transformers import pipeline

classifier = pipeline("image-classification", model="{source}")
classifier("image.jpg")
```"""


def model_card(
    model: PreTrainedModel,
    name: str,
    dataset: str,
    results: dict[str, Any],
    training: dict[str, Any],
    source: str = "path/to/this/folder",
    **card_data: Any,
) -> ModelCard:
    """
    A card for a trained classifier.

    Args:
        model (`PreTrainedModel`): whose configuration the card describes.
        name (`str`): of the model.
        dataset (`str`): what it was evaluated on.
        results (`dict`): of one model, from [`~hf_thinkingvit.evaluation.evaluate_accuracy`].
        training (`dict`): facts of the run, one line each.
        source (`str`): what a user loads it from: a folder, or the id of its repository.
        card_data: further metadata, such as `license`.
    """
    top1, top5 = results["top1"], results["top5"]
    metrics = [("accuracy", "top-1 accuracy", top1[-1]), ("top_5_accuracy", "top-5 accuracy", top5[-1])]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["vision", "adaptive-inference", model.config.model_type],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset,
                dataset_name=dataset,
                metric_type=kind,
                metric_name=metric,
                metric_value=round(value, 2),
            )
            for kind, metric, value in metrics
        ],
        **card_data,
    )
    return ModelCard(
        "\n\n".join(
            [
                f"---\n{data.to_yaml()}\n---",
                f"# {name}",
                USAGE.format(source=source),
                f"## Measured\n\nOn {results['images']} images of `{dataset}`.\n\n{_table(model, results)}",
                "## Training\n\n" + "\n".join(f"* {key}: {value}" for key, value in training.items()),
                "## Architecture\n\n```json\n" + json.dumps(_shape(model), indent=2) + "\n```\n",
            ]
        )
    )


def _table(model: PreTrainedModel, results: dict[str, Any]) -> str:
    top1, top5 = results["top1"], results["top5"]
    if len(top1) == 1:
        header, rows = ["top-1 (%)", "top-5 (%)"], [[f"{top1[0]:.2f}", f"{top5[0]:.2f}"]]
        if "mean_depth" in results:
            header.append(f"mean depth of {model.config.num_hidden_layers} layers")
            rows[0].append(f"{results['mean_depth']:.2f}")
        if "macs" in results:
            header.append("mean GMACs")
            rows[0].append(f"{results['macs'] / 1e9:.4g}")
    else:
        header = ["every image answered by", "top-1 (%)", "top-5 (%)", "GMACs"]
        spent, rows = 0, []
        for stage, macs in enumerate(stage_macs(model.config)):
            spent += macs
            rows.append([f"stage {stage}", f"{top1[stage]:.2f}", f"{top5[stage]:.2f}", f"{spent / 1e9:.4g}"])
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shape(model: PreTrainedModel) -> dict[str, Any]:
    """What of the configuration says which network it is."""
    names = ("thinking_stages", "hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    names += ("threshold", "gate_scale", "gate_center", "distilled")
    shape = {name: getattr(model.config, name) for name in names if hasattr(model.config, name)}
    return {"model_type": model.config.model_type, **shape, "parameters": model.num_parameters()}
