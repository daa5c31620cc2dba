"""
Publish a trained model: weights, image processor, code and a model card with the measured results.

    hf-thinkingvit push --model MODEL --repo-id org/name --results results.json --dry-run FOLDER
    hf-thinkingvit push --model MODEL --repo-id org/name --results results.json --license mit

The first command writes everything to a folder for inspection. The second needs `hf auth login` and makes one commit.
`hf_thinkingvit.hub.results` describes the results file.
"""

import argparse
import sys
from pathlib import Path

from ..hub import push
from . import command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.add_model(parser, "folder or Hub id of the model and its image processor")
    parser.add_argument("--repo-id", required=True, help="organization/name of the repository; created if needed")
    parser.add_argument(
        "--results", type=Path, help="JSON file of what was measured; without it the card has no figures"
    )
    parser.add_argument("--license", help="of the weights, such as apache-2.0")
    parser.add_argument("--datasets", nargs="+", help="Hub ids of what the model was trained on")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--commit-message", default="Upload model", help="of the commit")
    parser.add_argument("--dry-run", type=Path, metavar="FOLDER", help="write everything to this folder instead")


def run(arguments: argparse.Namespace) -> None:
    model, processor = command.load_model(arguments.model, task=None)
    place = arguments.dry_run or f"https://huggingface.co/{arguments.repo_id}"
    command.start(model, results=arguments.results or "none: the card has no figures", saved_to=place)
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


def main(words: list[str] | None = None, prog: str | None = None) -> None:
    command.run_command(sys.modules[__name__], words, prog)


if __name__ == "__main__":
    main()
