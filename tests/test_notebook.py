"""Runs the cells of examples/notebook.ipynb in order, as Jupyter does."""

import ast
import json
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[1] / "examples"


def test_notebook_runs(tmp_path, monkeypatch, capsys):
    for name in ("timm", "torchvision", "sklearn"):
        pytest.importorskip(name)
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    assert len(cells) == 10
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        assert not cell.get("outputs")  # they would age
        if cell["cell_type"] == "code":
            exec(compile(ast.parse("".join(cell["source"])), f"cell {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert "With probability at least 95%" in printed and "top-1" in printed
    assert names["done"].model.config.threshold == names["calibration"].threshold
    row = names["answers"].row(names["calibration"].threshold)
    assert row["top1"] > 60  # chance is 20
