"""Publishing the demo as a Space: the page of `hf_thinkingvit.demo` for given models, with this package's code."""

import os
import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from huggingface_hub import CommitInfo, SpaceCard, SpaceCardData

import hf_thinkingvit

from ..models.image_files import read_image
from .commit import check_repo_id, publish


GRADIO_VERSION, PYTHON_VERSION = "6.31.0", "3.11"  # that the demo is tested with
# What the package needs to run the page. Not gradio, which the Space brings.
REQUIREMENTS = (
    *("torch>=2.11", "transformers>=5.17", "datasets", "accelerate", "huggingface-hub", "evaluate", "jinja2"),
    *("safetensors", "pillow", "matplotlib"),
)
PACKAGE = "hf_thinkingvit"
APP = '''\
"""
A page that shows the answers of a model's stages, the exit under any τ, and the compute spent:

    python app.py

and open the address that it prints. It shows the models that README.md lists; `--model` takes any folders or Hub ids.
"""

from pathlib import Path


IMPORTS_HF_THINKINGVIT_LATER = True  # the page is painted before torch and Transformers are imported

if __name__ == "__main__":
    from hf_thinkingvit.demo.app import main

    main(Path(__file__).resolve().parent)
'''


def write_page(folder: Path, models: Sequence[str] = (), title: str | None = None, license: str = "apache-2.0") -> None:
    """Write the page: `app.py`, `README.md` with what a Space reads of it, and `requirements.txt`."""
    title = title or "Vision transformers that think as long as they need"
    data = SpaceCardData(
        title=title,
        sdk="gradio",
        sdk_version=GRADIO_VERSION,
        python_version=PYTHON_VERSION,
        app_file="app.py",
        license=license,
        **({"models": list(models)} if models else {}),
    )
    template = files(PACKAGE).joinpath("templates", "space_card.md").read_text(encoding="utf-8")
    card = SpaceCard.from_template(data, template_str=f"{template}\n", title=title, models=list(models))
    folder.mkdir(parents=True, exist_ok=True)
    card.save(folder / "README.md")
    (folder / "app.py").write_text(APP, encoding="utf-8")
    (folder / "requirements.txt").write_text("\n".join(REQUIREMENTS) + "\n", encoding="utf-8")


def push_space(
    repo_id: str,
    models: Sequence[str],
    *,
    samples: Sequence[str | os.PathLike] = (),
    title: str | None = None,
    license: str = "apache-2.0",
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Upload demo",
    dry_run: str | os.PathLike | None = None,
) -> CommitInfo | Path:
    """
    Publish a page that shows how models decide, as a Space, in one commit. It holds this version of the package, so it
    needs no release of it, and goes on to work as it is.

    Args:
        repo_id (`str`): `"organization/name"` of the Space. Created if it does not exist.
        models (`Sequence[str]`): Hub ids to choose from. Private ones need a secret `HF_TOKEN` in the Space's settings.
        samples (`Sequence[path]`): images to pick from. Their pixels are published as well, as PNG files of 8 bits per
            channel, of which a model makes the same as of the samples.
        title (`str`, *optional*): of the Space.
        license (`str`): of the page, which is this package's code.
        private, token, commit_message, dry_run: as in [`push`].

    Returns:
        `CommitInfo` of the commit; the `Path` of the folder for a dry run.

    Raises:
        ValueError, PermissionError: as [`push`]; also for `models` that are no ids of models on the Hub, samples
            with the same name but for its suffix, and samples that [`read_image`] refuses.
    """
    check_repo_id(repo_id)
    if not models:
        raise ValueError("`models` must have the Hub id of at least one model, got none.")
    for model in models:
        check_repo_id(model, "models")
    names = [_name_of(sample) for sample in samples]
    if len(set(names)) < len(names):
        got = ", ".join(sorted(map(str, samples)))
        raise ValueError(f"`samples` are published as PNG, and must have different names, got {got}.")

    def write(folder: Path) -> None:
        write_page(folder, models, title, license)
        shutil.copytree(Path(hf_thinkingvit.__file__).parent, folder / PACKAGE, ignore=_not_of_the_package)
        for sample in samples:
            (folder / "images").mkdir(exist_ok=True)
            pixels = read_image(sample)  # and nothing else: photographs know where and by whom they were taken
            pixels.info.clear()
            pixels.save(folder / "images" / _name_of(sample))

    return publish(
        write,
        repo_id,
        repo_type="space",
        private=private,
        token=token,
        commit_message=commit_message,
        dry_run=dry_run,
        # Modules of an earlier version would be imported beside those of this one.
        is_stale=lambda name: name.startswith(f"{PACKAGE}/"),
    )


def _name_of(sample: str | os.PathLike) -> str:
    """The sample's name on the page. PNG loses nothing; JPEG would move entropies a little."""
    return Path(sample).with_suffix(".png").name


def _not_of_the_package(folder: str, names: list[str]) -> list[str]:
    """What else lies in the package's folder, such as notes, keys or weights."""
    paths = [Path(folder) / name for name in names]
    return [
        path.name
        for path in paths
        if path.is_symlink()
        or path.name.startswith((".", "__pycache__"))
        or (path.is_file() and path.suffix not in (".md", ".py", ".txt"))
    ]
