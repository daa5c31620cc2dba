"""
Exported folders: the programs of each stage and of the decision after it, `config.json`, `preprocessor_config.json`,
and `export.json` (`torch_free/manifest.py`).

The loop of PyTorch models, which `from_exported` gives, decides by itself, as `config.json` says. The decisions'
programs are for those who have no torch (`torch_free/`).
"""

import os
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import transformers
from transformers import AutoImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME

from ...families import task_of
from ...families.record import IMAGE_CLASSIFICATION, IMAGE_SEGMENTATION
from ...image_processing import processed_size
from ...models.configuration_checks import as_pair
from ...torch_free.manifest import MANIFEST, checksum, read_manifest, write_manifest
from ...torch_free.programs import (
    FORMATS,
    RUNTIMES,
    ProgramFile,
    check_precision_name,
    choose_precision,
    pixel_dtype,
)
from ...version import __version__
from ..export import (
    check_onnx_is_there,
    check_stages,
    copy_for_export,
)
from .exported_model import ExportedClassifier, ExportedModel, ExportedSegmenter
from .fixed_fields import fixed_fields, judged_fields, read_config
from .quantisation import check_calibration, quantise_stages
from .torch_program import load_program
from .writing import write_programs


WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
TASKS = {IMAGE_CLASSIFICATION: ExportedClassifier, IMAGE_SEGMENTATION: ExportedSegmenter}


def export_model(
    model: PreTrainedModel,
    output_dir: str | os.PathLike,
    format: Literal["openvino", "onnx"] = "openvino",
    *,
    precision: Literal["fp32", "fp16", "int8"] = "fp32",
    processor: BaseImageProcessor | None = None,
    calibration: torch.Tensor | None = None,
    with_decisions: bool = True,
) -> Path:
    r"""
    Write the stages of a model for a runtime, as a folder that `from_exported` loads without PyTorch weights, and
    [`~hf_thinkingvit.torch_free.load_exported`] without torch. Batches may have any size, images have that of
    `config.image_size`.

    Args:
        model (`PreTrainedModel`):
            A model that thinks in stages, in any dtype; it is not changed, and other threads may use it meanwhile.
        output_dir (`str` or `os.PathLike`): the folder, created if it does not exist.
        format (`"openvino"` or `"onnx"`): of the programs, for the runtimes OpenVINO and ONNX Runtime.
        precision (`"fp32"`, `"fp16"` or `"int8"`):
            Of the programs. `"fp16"` is for ONNX; OpenVINO's programs in float32 compute in the precision that they are
            loaded with. After an export in `"int8"`, look at what
            [`~hf_thinkingvit.evaluation.compare_precisions`] says of it, and take the τ that it proposes.
        processor (`BaseImageProcessor`, *optional*):
            Saved beside the programs. It must make images of `config.image_size` of images that have that size.
        calibration (`torch.Tensor` of shape `(images, channels, height, width)`, *optional*):
            For int8: preprocessed images, a few hundred of the kind that the model is for.
        with_decisions (`bool`, *optional*, defaults to `True`):
            Also write a program for the decision after each stage of a classifier, which `load_exported` needs.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: for a model that does not think in stages, is quantised, or holds what cannot be copied; a format or
            a precision that does not exist; a processor of another image size; a folder that holds a model's weights.
        ImportError: without the packages of the extra `openvino` or `onnx`.
    """
    check_stages(model)
    task = task_of(model)
    if getattr(model, "is_quantized", False) or any(
        type(weight.data) is not torch.Tensor for weight in model.parameters()
    ):
        raise ValueError(
            "The weights of this model are quantised or distributed, which exporters do not write: export the original "
            "model, for int8 with `precision='int8'` and `calibration`."
        )
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(map(repr, FORMATS))}, got {format!r}.")
    check_precision_name(precision)
    if precision == "bf16" or (precision == "fp16" and format == "openvino"):
        raise ValueError(
            f"`precision` = {precision!r} is chosen on loading, of OpenVINO's programs: export in 'fp32', then "
            f"`from_exported(folder, precision={precision!r})`."
        )
    runtime = RUNTIMES[FORMATS[format]]
    runtime.check_installed()
    if format == "onnx":
        check_onnx_is_there()
    if precision == "int8":
        check_calibration(calibration, format, (model.config.num_channels, *as_pair(model.config.image_size)))
    elif calibration is not None:
        raise ValueError(f"`calibration` is for `precision` = 'int8', got {precision!r}.")
    if processor is not None:
        _check_processor(processor, model.config)
    output_dir = Path(output_dir)
    weights = [path.name for pattern in WEIGHTS for path in output_dir.glob(pattern)]
    if weights:
        raise ValueError(
            f"{str(output_dir)!r} holds the weights of a model ({weights[0]}), whose {CONFIG_NAME} an export would "
            "replace: choose another folder."
        )
    dtype = torch.float16 if precision == "fp16" else torch.float32
    copied = copy_for_export(model, "sdpa" if format == "openvino" else "eager", dtype, torch.device("cpu"))
    output_dir.mkdir(parents=True, exist_ok=True)
    # What is written half is no export, and an earlier one may have had another processor.
    for name in (MANIFEST, IMAGE_PROCESSOR_NAME):
        (output_dir / name).unlink(missing_ok=True)
    with_decisions = with_decisions and task == IMAGE_CLASSIFICATION
    stages, judges = write_programs(copied, output_dir, format, with_decisions)
    if precision == "int8":
        quantise_stages(output_dir, format, stages, calibration, partial(load_program, runtime))
    model.config.to_json_file(output_dir / CONFIG_NAME)  # `save_pretrained` would write the code of the model as well
    if processor is not None:
        processor.save_pretrained(output_dir)
    write_manifest(
        output_dir,
        {
            "format": format,
            "precision": precision,
            "task": task,
            "image_size": list(as_pair(model.config.image_size)),
            "num_channels": model.config.num_channels,
            "has_processor": processor is not None,
            "fixed": fixed_fields(model.config),
            "judged": judged_fields(model.config),
            "draws": model.exit_rule().draws,
            "stages": [asdict(stage) for stage in stages],
            "judges": [asdict(judge) for judge in judges],
            "versions": _versions(format),
        },
    )
    return output_dir


def _check_processor(processor: BaseImageProcessor, config: PreTrainedConfig) -> None:
    """`ValueError` if the processor makes other sizes than `config.image_size`, as far as that can be told."""
    size = as_pair(config.image_size)
    found = processed_size(processor, size) if config.num_channels == 3 else None
    if found not in (None, size):
        raise ValueError(
            f"`processor` ({type(processor).__name__}) makes images of {found[0]}×{found[1]} pixels, and the programs "
            f"take {size[0]}×{size[1]}, which is `config.image_size`: give the processor of the model, or set its "
            "`size` and `crop_size`."
        )


def _versions(format: str) -> dict[str, str]:
    package = RUNTIMES[FORMATS[format]].package
    runtime = __import__(package).__version__
    return {
        "hf_thinkingvit": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        package: runtime,
    }


def from_exported(folder: str | os.PathLike, precision: str | None = None, **options) -> ExportedModel:
    r"""
    Load what `export_model` wrote, for [`AdaptiveEngine`], the pipeline, or to be called like the model.

    Neither PyTorch weights nor the code of the model are loaded; the loop over stages and the exit rule are the
    package's own, which uses torch for tensors.

    Args:
        folder (`str` or `os.PathLike`): the exported folder.
        precision (`"fp32"`, `"bf16"`, `"fp16"` or `"int8"`, *optional*):
            To compute in. By default what the folder was exported in. OpenVINO's programs in float32 run in any of the
            first three that the CPU computes in.
        options:
            Of the runtime: `threads` and `config` of both, `providers` of ONNX Runtime.

    Raises:
        ValueError: if the folder is no export, is damaged or of another version, or its `config.json` differs from
            the programs; for a precision that the CPU or the runtime lacks, and options that it does not have.
        ImportError: if the runtime is not installed; the message says how to install it.
    """
    folder = Path(folder).resolve()  # for copies in processes with another working directory
    return _load(folder, read_manifest(folder), precision, options)


def load_again(folder: Path, precision: str, options: dict[str, Any], expected: str) -> ExportedModel:
    """A copy of a model, from its folder. `ValueError` if the manifest's `checksum` is not the `expected` one."""
    manifest = read_manifest(folder)
    if checksum(manifest) != expected:
        raise ValueError(
            f"{str(folder)!r} was exported anew after the model was loaded of which this is a copy: its programs are "
            "others. Load the folder with `from_exported`, and export to a new folder while a model is in use."
        )
    return _load(folder, manifest, precision, options)


def _load(folder: Path, manifest: dict[str, Any], precision: str | None, options: dict[str, Any]) -> ExportedModel:
    name = FORMATS[manifest["format"]]
    precision = choose_precision(manifest, precision, options)
    stages = [ProgramFile.from_manifest(entry) for entry in manifest["stages"]]
    return TASKS[manifest["task"]](
        config=read_config(folder, manifest["fixed"]),
        processor=AutoImageProcessor.from_pretrained(folder) if (folder / IMAGE_PROCESSOR_NAME).is_file() else None,
        programs=[
            load_program(RUNTIMES[name], folder / stage.file, stage.outputs, precision, options) for stage in stages
        ],
        stages=stages,
        manifest=manifest,
        dtype=getattr(torch, pixel_dtype(manifest)),
        folder=folder,
        runtime=name,
        precision=precision,
        options=options,
    )


def with_runtime(
    model: PreTrainedModel | ExportedModel, runtime: str | None = None, precision: str | None = None, **options
) -> PreTrainedModel | ExportedModel:
    r"""
    The model with its stages run by a runtime.

    Args:
        model (`PreTrainedModel`, or what `from_exported` returned): the latter has its runtime already.
        runtime (`str`, *optional*):
            `"torch"`, the default: the model as it is. `"compiled"`: after `model.compile_stages()`, unless it has
            been called. `"openvino"` or `"onnxruntime"`: exported now, into a folder that is deleted again; the result
            does not follow later changes of the model.
        precision, options: as in `from_exported`. The precision of PyTorch models is their dtype.
    """
    if isinstance(model, ExportedModel):
        if runtime not in (None, model.runtime) or precision not in (None, model.precision):
            raise ValueError(
                f"This model was loaded for {model.runtime} in {model.precision}: leave out `runtime` and "
                "`precision`, or load its folder with `from_exported(folder, precision=...)`."
            )
        return model
    if runtime in (None, "torch", "compiled"):
        if precision is not None or options:
            raise ValueError(
                f"The precision of a PyTorch model is its dtype, as in `model.to(torch.bfloat16)`, got `precision` = "
                f"{precision!r}: leave it out, or choose a `runtime`, one of {', '.join(map(repr, RUNTIMES))}."
            )
        if runtime == "compiled":
            check_stages(model)
            if model._stage_programs is None:
                model.compile_stages()
        return model
    if runtime not in RUNTIMES:
        raise ValueError(
            f"`runtime` must be one of 'torch', 'compiled', {', '.join(map(repr, RUNTIMES))}, got {runtime!r}."
        )
    if precision == "int8":
        raise ValueError(
            "int8 needs images to calibrate with: `export_model(model, folder, precision='int8', calibration=images)`, "
            "then `from_exported(folder)`."
        )
    RUNTIMES[runtime].check_installed()
    precision = precision or "fp32"
    check_precision_name(precision)
    stored = precision if RUNTIMES[runtime].file_format == "onnx" else "fp32"
    RUNTIMES[runtime].check_precision(precision, stored)
    with TemporaryDirectory(prefix="hf-thinkingvit-") as folder:
        export_model(model, folder, RUNTIMES[runtime].file_format, precision=stored, with_decisions=False)
        return from_exported(folder, precision, **options)
