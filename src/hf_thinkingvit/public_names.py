"""Names of data for files that are shared (configurations, model cards, results, plots): nothing about the machine."""

import os
import re
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from urllib.parse import unquote, urlsplit


UNNAMED = "the dataset"  # for a path without a last component, or whose last component is the name of a user
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]*\w", re.ASCII)
_WINDOWS = re.compile(r"[A-Za-z]:(?![^\\/])|.*\\")  # a drive, or any backslash
_ROOTED = re.compile(r"/|~[\w.-]*(/|$)|\.{1,2}[\\/]|[A-Za-z]:[\\/]|\\\\")
# Paths and URLs within a text, but no slash between words and no lone slash.
_PATHS = re.compile(
    r"""[A-Za-z][A-Za-z0-9+.-]+://[^\s'"`<>]+|(?<![\w/\\.:~])(//?(?=[^\s/]+/)|~[\w.-]*/|\.{1,2}[\\/]|[A-Za-z]:[\\/]|\\\\)[^\s'"`<>,;]+"""
)
_PUBLIC_URL = re.compile(r"https?://[^\s@?]+")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # longer than a drive letter


def public_name(dataset: str | os.PathLike) -> str:
    """
    A name for a dataset that reveals nothing about the machine on which it was read.

    Hub ids (`"org/name"`) are returned unchanged, and extracted from `hf://` paths and URLs of the Hub. Any other path
    or URL is reduced to its last component, without the user, password, query and fragment of a URL. A relative path
    that exists is a path and not a Hub id, as in `datasets`. The function is idempotent.

    Args:
        dataset (`str` or `os.PathLike`): in any form that `datasets` accepts: a Hub id, a folder, a file or a URL.
    """
    is_path = not isinstance(dataset, str)
    name = os.fspath(dataset).strip()
    if _URL.match(name):
        return _of_url(name)
    if _WINDOWS.match(name):
        return _last(PureWindowsPath(name))
    if not is_path and _HUB_ID.fullmatch(name) and not _exists(name):
        return name
    if "/" not in name and name not in ("", ".", "..", "~"):
        return name
    return _of_path(name)


def public_text(text: str) -> str:
    """
    A text in which every path, and every URL with a user, password or query, is replaced by its `public_name`.

    Words that begin with a root, a drive, `~`, `./` or `../` are paths, and so is a whole text that names an existing
    file. Plain web addresses stay, and so do texts in which a slash means something else (`"images/s"`).
    """
    stripped = text.strip()
    if not _PUBLIC_URL.fullmatch(stripped):
        is_local = _ROOTED.match(stripped) or ("/" in stripped and _exists(stripped))
        if is_local and not _URL.match(stripped):
            return public_name(stripped)
    return _PATHS.sub(lambda found: found[0] if _PUBLIC_URL.fullmatch(found[0]) else public_name(found[0]), text)


def _of_url(url: str) -> str:
    url = url.rsplit("::", 1)[-1]  # fsspec chains a member of an archive and the archive
    if not _URL.match(url):
        return public_name(url)
    try:
        parts = urlsplit(url)
    except ValueError:
        return UNNAMED
    path = [unquote(part) for part in parts.path.split("/") if part]
    if parts.scheme == "hf":
        path = [parts.netloc.rpartition("@")[2], *path]
    if parts.scheme == "hf" or parts.hostname in ("huggingface.co", "hf.co"):
        if path[:1] in (["datasets"], ["buckets"]) and len(path) > 2:
            return f"{path[1]}/{path[2].partition('@')[0]}"
    elif parts.scheme == "file":
        return public_name("/" + "/".join(path))
    return _last(PurePosixPath("/", *path))


def _of_path(path: str) -> str:
    if "~" in path.split("/", 1)[0]:
        path = os.path.expanduser(path)
    path = os.path.abspath(path)
    return UNNAMED if path == os.path.expanduser("~") else _last(PurePosixPath(Path(path).as_posix()))


def _last(path: PurePath) -> str:
    """The last component, unless it is the name of a user, that is, directly in a folder of home folders."""
    folder = re.split(r"[\\/]", str(path.parent).rstrip("\\/"))[-1]
    return UNNAMED if folder.lower() in ("home", "homes", "users") else path.name or UNNAMED


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long, or characters that file names cannot have
        return False


def is_missing_path(name: str) -> bool:
    """Whether `name` is written as a path, which no Hub id can be, and there is nothing under it."""
    written_so = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name
    return written_so and "://" not in name and not Path(name).exists()
