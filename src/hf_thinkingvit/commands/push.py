"""Publishes a model with its card, and a demo of it as a Space. `options.py` has its options and description."""

import argparse
from pathlib import Path

from ..hub import push, push_space
from ..hub.commit import check_repo_id
from . import command
from .loading import load_model, start


def run(arguments: argparse.Namespace) -> None:
    if arguments.space_images is not None and not arguments.space:
        raise ValueError("`space_images` are of a Space: give --space as well.")
    samples = command.find_image_files(arguments.space_images) if arguments.space_images is not None else []
    if arguments.space_images is not None and not samples:
        raise FileNotFoundError(f"There are no images in `{arguments.space_images}` (--space-images).")
    space = arguments.repo_id if arguments.space is True else arguments.space
    if space:
        check_repo_id(space, "space")
    model, processor = load_model(arguments.model, task=None)
    place = arguments.dry_run or f"https://huggingface.co/{arguments.repo_id}"
    start(model, results=arguments.results or "none: the card has no figures", saved_to=place)
    done = push(
        model,
        processor,
        arguments.repo_id,
        results=arguments.results,
        license=arguments.license,
        datasets=arguments.datasets,
        private=arguments.private,
        commit_message=arguments.commit_message,
        dry_run=arguments.dry_run,
    )
    print(f"written to {done}" if isinstance(done, Path) else f"pushed: {done.commit_url}")
    if not space:
        return
    done = push_space(
        space,
        [arguments.repo_id],
        samples=samples,
        private=arguments.private,
        commit_message=arguments.commit_message,
        dry_run=arguments.dry_run and arguments.dry_run / "space",
    )
    print(f"Space written to {done}" if isinstance(done, Path) else f"Space pushed: {done.commit_url}")


def main(words: list[str] | None = None, prog: str | None = None) -> None:
    command.run_command("push", words, prog)


if __name__ == "__main__":
    main()
