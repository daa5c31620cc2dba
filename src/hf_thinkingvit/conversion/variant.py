"""`variant.yml`, the configuration beside the official segmentation checkpoints, read as plain data."""

from pathlib import Path

import yaml


VARIANT_FILE = "variant.yml"
# Files of the machine that trained, which are neither opened nor passed on.
FOREIGN_PATHS = ("pretrained_path",)


class _PlainLoader(yaml.SafeLoader):
    """YAML's plain types, and Python's tuples as lists. Any other Python object is refused."""


_PlainLoader.add_constructor(
    "tag:yaml.org,2002:python/tuple", lambda loader, node: loader.construct_sequence(node, deep=True)
)


def read_variant(path: Path) -> dict:
    """
    The sections of a `variant.yml`: `net_kwargs` (the network), `thinking_kwargs` (its stages) and others.

    Raises:
        ValueError: if the file is no YAML mapping of mappings, or would need Python objects to be made.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is no plain YAML file: {error}. Only plain values and tuples are read, since other Python objects "
            "could run code."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("net_kwargs") or {}, dict):
        raise ValueError(f"{path} must hold a mapping with a section `net_kwargs`, got {type(content).__name__}.")
    sections = {name: section for name, section in content.items() if isinstance(section, dict)}
    return {
        name: {key: value for key, value in section.items() if key not in FOREIGN_PATHS}
        for name, section in sections.items()
    }
