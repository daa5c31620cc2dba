"""Writing what is published to a folder, and from there to the Hub, in one commit."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id


def check_repo_id(repo_id: str, name: str = "repo_id") -> None:
    """`ValueError` unless it is of the form "organization/name"; `name` is what messages call it."""
    try:
        validate_repo_id(repo_id)
        valid = isinstance(repo_id, str) and "/" in repo_id
        reason = "it has no organization or user name"
    except HFValidationError as error:
        valid, reason = False, str(error)
    if not valid:
        raise ValueError(f'`{name}` must be of the form "organization/name", got {repo_id!r}: {reason}')


def publish(
    write: Callable[[Path], None],
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool = False,
    token: str | None = None,
    commit_message: str,
    dry_run: str | os.PathLike | None = None,
    is_stale: Callable[[str], bool] = lambda name: False,
) -> CommitInfo | Path:
    """
    Publish what `write` writes into a folder, in one commit, so that an interrupted push leaves the repository as it
    was (or empty, if it was just created). Other files of the repository stay, unless they are stale.

    Args:
        write (`Callable`): writes all files into a folder that it is given.
        repo_id (`str`): `"organization/name"`. Created if it does not exist.
        repo_type (`"model"` or `"space"`): of the repository; a Space is one of gradio.
        private, token, commit_message, dry_run: as in [`push`].
        is_stale (`Callable`): `name -> bool`: whether a file of the repository that is not written is deleted.

    Raises:
        ValueError: for a folder that is not empty, or a public repository where a private one was asked for.
        PermissionError: without a token, or if the token may not write to the repository.
    """
    if dry_run is not None:
        folder = Path(dry_run)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"`dry_run` must be a folder that is empty or does not exist yet, got {folder}.")
        folder.mkdir(parents=True, exist_ok=True)
        write(folder)
        return folder

    token = token or get_token()
    if not token:
        raise PermissionError(
            "There is no Hugging Face token: run `hf auth login`, set HF_TOKEN or pass `token`. It needs write access; "
            "see https://huggingface.co/settings/tokens."
        )
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return _commit(Path(folder), HfApi(token=token), repo_id, repo_type, private, commit_message, is_stale)


def _commit(
    folder: Path,
    api: HfApi,
    repo_id: str,
    repo_type: str,
    private: bool,
    message: str,
    is_stale: Callable[[str], bool],
) -> CommitInfo:
    sdk = {"space_sdk": "gradio"} if repo_type == "space" else {}
    try:
        api.create_repo(repo_id, private=private, exist_ok=True, repo_type=repo_type, **sdk)
        repository = api.repo_info(repo_id, repo_type=repo_type)
        if private and not repository.private:
            raise ValueError(
                f"{repo_id} exists and is public: make it private in its settings, choose another name, or push "
                "without `private`."
            )
        paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        operations = [CommitOperationAdd(name, path) for name, path in paths.items()]
        others = {file.rfilename for file in repository.siblings or []} - paths.keys()
        operations += [CommitOperationDelete(name) for name in sorted(others) if is_stale(name)]
        # Not `upload_folder`: it may make several commits.
        return api.create_commit(repo_id, operations, commit_message=message, repo_type=repo_type)
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
        raise PermissionError(
            f"The Hub does not let this token write to {repo_id}: log in with one that has write access there "
            f"(`hf auth login`, https://huggingface.co/settings/tokens). {error}"
        ) from error
