import shutil

import pytest


@pytest.fixture
def folder(request, tmp_path):
    """A copy of the module's golden folder that a test may damage."""
    return shutil.copytree(request.module.GOLDEN, tmp_path / "source")
