"""Publishing a model to the Hub in one commit: weights, processor, code, card and results."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..families import FAMILIES
from ..models.nested_projection import check_merged
from .card import model_card
from .commit import check_repo_id, publish
from .results import published_calibration, read_results


RESULTS = "results.json"


def push(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    repo_id: str,
    *,
    results: Mapping[str, Any] | str | os.PathLike | None = None,
    license: str | None = None,
    datasets: str | Sequence[str] | None = None,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Upload model",
    dry_run: str | os.PathLike | None = None,
    **card_data: Any,
) -> CommitInfo | Path:
    """
    Publish a model so that `pipeline("image-classification", model=repo_id)`, or `"image-segmentation"`, runs it;
    without this package installed, with `trust_remote_code=True`.

    Everything is written to a temporary folder first and uploaded in one commit, so an interrupted push leaves the
    repository as it was (or empty, if it was just created). Files of the repository that the push does not write stay,
    except the `results.json` of weights that are replaced.

    Args:
        model (`PreTrainedModel`): a classifier or segmentation model of this package.
        processor (`BaseImageProcessor`): its image processor.
        repo_id (`str`): `"organization/name"`. Created if it does not exist.
        results (`dict` or path, *optional*): measured results, or the JSON file that holds them, in the form that
            `hf_thinkingvit.hub.results` describes. They are published with their plot, and are the only source of the
            card's numbers.
        license (`str`, *optional*): license of the weights, as the Hub writes it, such as `"apache-2.0"`.
        datasets (`str` or `list[str]`, *optional*): Hub ids of the training data; for local data, their names.
        private (`bool`, *optional*, defaults to `False`): whether a repository that is created is private. With `True`,
            an existing public repository is an error.
        token (`str`, *optional*): Hugging Face token; by default that of `hf auth login` or `HF_TOKEN`.
        commit_message (`str`, *optional*): message of the commit.
        dry_run (path, *optional*): write everything to this folder instead, without network access.
        card_data: further metadata of `ModelCardData`, such as `base_model`.

    Returns:
        `CommitInfo` of the commit; the `Path` of the folder for a dry run.

    Raises:
        ValueError: for an invalid id, results that cannot be read or are of another model, a model that is not of this
            package, a folder that is not empty, or a public repository where a private one was asked for.
        PermissionError: without a token, or if the token may not write to the repository.

    Example:

    ```python
    >>> from hf_thinkingvit.hub import push

    >>> push(model, processor, "org/thinkingvit-cifar10", results="results.json", license="apache-2.0")
    ```"""
    check_repo_id(repo_id)
    _check_model(model)
    found = None if results is None else read_results(results, model.config)
    card = model_card(
        model, found, name=repo_id.split("/")[1], source=repo_id, license=license, datasets=datasets, **card_data
    )

    def write(folder: Path) -> None:
        with _published_configuration(model):
            model.save_pretrained(folder)  # with its code, because the classes are registered for the Auto classes
        processor.save_pretrained(folder)
        card.save(folder / "README.md")
        if found is None:
            return
        published = dict(found)
        if found.get("calibration"):
            published["calibration"] = published_calibration(found["calibration"])
        if found.get("plot") is not None:
            published["plot"] = Path(shutil.copy(found["plot"], folder)).name
        (folder / RESULTS).write_text(json.dumps(published, indent=1) + "\n", encoding="utf-8")

    return publish(
        write,
        repo_id,
        private=private,
        token=token,
        commit_message=commit_message,
        dry_run=dry_run,
        is_stale=lambda name: name == RESULTS,
    )


@contextmanager
def _published_configuration(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, the configuration holds only the facts of its calibration that may be published."""
    calibration = getattr(model.config, "calibration", None)
    if calibration:
        model.config.calibration = published_calibration(calibration)
    try:
        yield
    finally:
        if calibration:
            model.config.calibration = calibration


def _check_model(model: PreTrainedModel) -> None:
    # Compared by name, because a model that was loaded as remote code has a class of its own.
    names = [head.__name__ for family in FAMILIES.values() for head in family.heads.values()]
    if type(model).__name__ not in names:
        raise ValueError(f"`model` must be one of {', '.join(names)}, unwrapped, got {type(model).__name__}.")
    check_merged(model, "its published weights")
