"""What data may be called in files that are shared: configurations, model cards, results, plots."""

import os
import re
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from urllib.parse import unquote, urlsplit


UNNAMED = "the dataset"  # for a path whose last component says nothing, or is the home folder's and so a user's name
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]*\w", re.ASCII)
_WINDOWS = re.compile(r"[A-Za-z]:(?![^\\/])|.*\\")  # a drive, or any backslash
_ROOTED = re.compile(r"/|~[\w.-]*(/|$)|\.{1,2}[\\/]|[A-Za-z]:[\\/]|\\\\")
# In a text: not a slash between words, nor one that stands alone.
_PATHS = re.compile(
    r"""[A-Za-z][A-Za-z0-9+.-]+://[^\s'"`<>]+|(?<![\w/\\.:~])(//?(?=[^\s/]+/)|~[\w.-]*/|\.{1,2}[\\/]|[A-Za-z]:[\\/]|\\\\)[^\s'"`<>,;]+"""
)
_PUBLIC_URL = re.compile(r"https?://[^\s@?]+")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # longer than a drive letter


def public_name(dataset: str | os.PathLike) -> str:
    """
    A name for a dataset that tells nothing of the machine on which it was read.

    Hub ids stay (`"org/name"`), also where they stand in an `hf://` path or a URL of the Hub. Of any other path or URL
    the last component is left, without the user, password, query and fragment of a URL. What exists here under a
    relative path is taken for a path, as `datasets` does. Names of names are themselves.

    Args:
        dataset (`str` or `os.PathLike`): as `datasets` takes it: a Hub id, a folder, a file or a URL.
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
    A text in which every path, and every URL with more than an address in it, is replaced by its `public_name`.

    A path is what begins like one (with a root, a drive, `~`, `./` or `../`), or what exists here. Web addresses
    without a user, password or query stay, and so do texts in which a slash means something else (`"images/s"`).
    """
    stripped = text.strip()
    if not _PUBLIC_URL.fullmatch(stripped):
        is_local = _ROOTED.match(stripped) or ("/" in stripped and _exists(stripped))
        if is_local and not _URL.match(stripped):
            return public_name(stripped)
    return _PATHS.sub(lambda found: found[0] if _PUBLIC_URL.fullmatch(found[0]) else public_name(found[0]), text)


def _of_url(url: str) -> str:
    url = url.rsplit("::", 1)[-1]  # fsspec's chains: an archive's member, then the archive
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
    """The last component, unless it is the name of a user: what lies in a folder of homes, wherever that is."""
    folder = re.split(r"[\\/]", str(path.parent).rstrip("\\/"))[-1]
    return UNNAMED if folder.lower() in ("home", "homes", "users") else path.name or UNNAMED


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long, or characters that no file has
        return False
