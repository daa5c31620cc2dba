"""Transformers' own test classes, from the source distribution of the installed version."""

import importlib.util
import sys
import types

from tests.fetch_transformers_tests import FOLDER


PACKAGE = "transformers_tests"
# Base classes that `test_modeling_common.py` imports from other files of its test suite: for exporters and for text
# generation, which do not apply to a vision classifier. Empty classes take their place.
STAND_INS = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


def load_model_tester_mixin() -> type | None:
    """`ModelTesterMixin`, or `None` if `fetch_transformers_tests.py` has not been run for this version."""
    return _load("test_modeling_common.py", "ModelTesterMixin")


def load_backbone_tester_mixin() -> type | None:
    """The same for `BackboneTesterMixin`."""
    return _load("test_backbone_common.py", "BackboneTesterMixin")


def _load(file_name: str, class_name: str) -> type | None:
    path = FOLDER / file_name
    if not path.is_file():
        return None
    name = f"{PACKAGE}.{path.stem}"
    if name not in sys.modules:
        _package(PACKAGE)
        for module_name, stand_in_name in STAND_INS.items():
            _package(f"{PACKAGE}.{module_name.split('.')[0]}")
            stand_in = types.ModuleType(f"{PACKAGE}.{module_name}")
            setattr(stand_in, stand_in_name, type(stand_in_name, (), {}))
            sys.modules[stand_in.__name__] = stand_in
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return getattr(sys.modules[name], class_name)


def _package(name: str) -> None:
    package = types.ModuleType(name)
    package.__path__ = []
    sys.modules[name] = package
