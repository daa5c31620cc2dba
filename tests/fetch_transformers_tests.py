"""
Fetch Transformers' own model tests, which are in its source distribution and not in its wheel.

    python tests/fetch_transformers_tests.py

puts `test_modeling_common.py` and `test_backbone_common.py` of the installed version into
`tests/.transformers_tests/VERSION/`, where the tests in `tests/models` find them. Done once per version; needs the
package index.
"""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers


FILE_NAMES = ("test_modeling_common.py", "test_backbone_common.py")
FOLDER = Path(__file__).parent / ".transformers_tests" / transformers.__version__


def fetch() -> list[Path]:
    """The paths of the installed version's test files, downloaded if they are not there yet."""
    targets = [FOLDER / name for name in FILE_NAMES]
    if all(target.is_file() for target in targets):
        return targets
    requirement = f"transformers=={transformers.__version__}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*command, "--dest", folder, requirement], check=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            top = archive.name.removesuffix(".tar.gz")
            contents = [tar.extractfile(f"{top}/tests/{name}").read() for name in FILE_NAMES]
    FOLDER.mkdir(parents=True, exist_ok=True)
    for target, content in zip(targets, contents):
        partial = target.with_suffix(".partial")
        partial.write_bytes(content)
        partial.replace(target)
    return targets


if __name__ == "__main__":
    print(*fetch(), sep="\n")
