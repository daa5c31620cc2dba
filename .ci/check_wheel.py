"""Exits with an error unless a wheel holds exactly the package's files that git knows. Usage: check_wheel.py WHEEL"""

import subprocess
import sys
import zipfile


tracked = subprocess.run(["git", "ls-files", "src"], check=True, capture_output=True, text=True).stdout.split("\n")
expected = {path.removeprefix("src/") for path in tracked if path and not path.endswith("README.md")}
held = {name for name in zipfile.ZipFile(sys.argv[1]).namelist() if ".dist-info/" not in name}
if held != expected:
    sys.exit(f"{sys.argv[1]} lacks {sorted(expected - held)} and has too much: {sorted(held - expected)}")
print(f"{sys.argv[1]}: {len(held)} files")
