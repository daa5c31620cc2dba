"""
Fetch Transformers' own model tests, which are in its source distribution and not in its wheel.

    python tests/fetch_transformers_tests.py

puts `test_modeling_common.py` of the installed version into `tests/.transformers_tests/VERSION/`, where
`tests/models/test_modeling_common.py` finds it. Done once per version; needs the package index.
"""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers


FILE_NAME = "test_modeling_common.py"
FOLDER = Path(__file__).parent / ".transformers_tests" / transformers.__version__


def fetch() -> Path:
    """The path of the installed version's `test_modeling_common.py`, downloaded if it is not there yet."""
    target = FOLDER / FILE_NAME
    if target.is_file():
        return target
    requirement = f"transformers=={transformers.__version__}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*command, "--dest", folder, requirement], check=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            member = f"{archive.name.removesuffix('.tar.gz')}/tests/{FILE_NAME}"
            content = tar.extractfile(member).read()
    FOLDER.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(target)
    return target


if __name__ == "__main__":
    print(fetch())
