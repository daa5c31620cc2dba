"""
A classifier from an exported folder, without torch: the loop over stages, in NumPy.

A stage's program computes the answers, and the program of the decision after it, which is traced from the exit rule of
the PyTorch model, says which images exit. This loop carries arrays from one to the next, for the images that go on.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.utils import IMAGE_PROCESSOR_NAME

from ..models.configuration_checks import check_integer
from ..models.staged_arguments import resolve_stages
from .manifest import read_manifest
from .pictures import name_of, prepare_image
from .programs import (
    ANSWER_PREFIX,
    FORMATS,
    MEMORY_PREFIX,
    RUNTIMES,
    THRESHOLD,
    Program,
    ProgramFile,
    check_pixel_values,
    choose_precision,
    memory_errors,
    numpy_dtype,
    pixel_dtype,
)
from .settings import Settings, read_settings


Arrays = dict[str, np.ndarray]  # whose first dimension is the image
BROKEN = "_broken"  # entry of the memory: of which images an answer had NaN. For this loop, no program reads it.


@dataclass(frozen=True)
class StagedAnswers:
    """
    The accepted answers to a batch: of each image the answer of the first stage that passes τ, or of the last one.

    Attributes:
        logits (`np.ndarray` of shape `(batch_size, num_labels)`, float32): before softmax.
        exit_stage (`np.ndarray` of shape `(batch_size,)`, int64): the accepted stage, counted from 0.
        entropy (`np.ndarray` of shape `(batch_size,)`, float32): of the answer, in nats, as the PyTorch model reports.
        scores (`np.ndarray` of shape `(batch_size, num_labels)`, float32, *optional*):
            Probabilities of the classes: of all together (softmax), or of each label by itself (sigmoid) where
            `problem_type` is multi-label classification. `None` for a regression.
    """

    logits: np.ndarray
    exit_stage: np.ndarray
    entropy: np.ndarray
    scores: np.ndarray | None


@dataclass(frozen=True)
class Classification:
    """
    What `ExportedPrograms.classify` says of an image.

    Attributes:
        labels (`list[str]`): of the greatest scores, greatest first.
        scores (`list[float]`): of these labels.
        exit_stage (`int`): the accepted stage, counted from 0.
        entropy (`float`): of the answer, in nats.
    """

    labels: list[str]
    scores: list[float]
    exit_stage: int
    entropy: float


def load_exported(folder: str | os.PathLike, precision: str | None = None, **options: Any) -> "ExportedPrograms":
    r"""
    Load a classifier that `hf_thinkingvit.inference.export_model` wrote. Needs the runtime, NumPy, Pillow, and
    Transformers for the image processor, but no torch.

    Args:
        folder (`str` or `os.PathLike`): the exported folder.
        precision (`"fp32"`, `"bf16"`, `"fp16"` or `"int8"`, *optional*):
            To compute stages in, as in `from_exported`; by default what the folder was exported in.
        options:
            Of the runtime: `threads` and `config` of both, `providers` of ONNX Runtime.

    Raises:
        ValueError: if the folder is no export, is damaged or of another version, was exported without decisions or of
            a segmentation model; if its `config.json` differs from the programs, which includes the exit criterion
            here; for a precision that the CPU or the runtime lacks, and options that it does not have.
        ImportError: if the runtime is not installed; the message says how to install it.
    """
    folder = Path(folder).resolve()
    manifest = read_manifest(folder)
    if manifest["task"] != "image-classification":
        raise ValueError(
            f"{str(folder)!r} holds a model for {manifest['task']}, and only classifiers run without torch: load it "
            "with `hf_thinkingvit.inference.from_exported`, where torch is installed."
        )
    if not manifest["judges"]:
        raise ValueError(
            f"{str(folder)!r} was exported without the programs of decisions, which a run without torch needs: export "
            "the model with `with_decisions=True`."
        )
    precision = choose_precision(manifest, precision, options)
    return ExportedPrograms(folder, manifest, read_settings(folder, manifest), precision, options)


class ExportedPrograms:
    """
    Built by `load_exported`. Threads may share it; other processes load the folder by themselves.

    Attributes:
        folder (`Path`): where it comes from, absolute.
        runtime, precision (`str`): what computes the stages, and in what. Decisions are computed in float32.
        manifest (`dict`): what `export.json` says.
        image_size (`tuple[int, int]`): (height, width) of the images that the programs take.
        num_stages (`int`): how many stages there are.
        threshold (`tuple[float, ...]`): τ of each stage but the last, as `config.json` says.
        id2label (`dict[int, str]`): the classes.
        processor (`BaseImageProcessor`):
            Of the folder, in Transformers' version for Pillow, which needs no torch; `None` if the folder has none.
        calls (`list[int]`): how often the program of each stage has run.
    """

    def __init__(
        self, folder: Path, manifest: dict[str, Any], settings: Settings, precision: str, options: dict[str, Any]
    ):
        self.folder, self.manifest, self.precision = folder, manifest, precision
        self.runtime, self.image_size = FORMATS[manifest["format"]], tuple(manifest["image_size"])
        self.threshold, self.id2label, self._settings = settings.threshold, settings.id2label, settings
        self._stages, self._judges = (
            [ProgramFile.from_manifest(entry) for entry in manifest[kind]] for kind in ("stages", "judges")
        )
        self.num_stages, self.calls = len(self._stages), [0] * len(self._stages)
        load = RUNTIMES[self.runtime].load
        self._stage_programs = [load(folder / file.file, file.outputs, precision, options) for file in self._stages]
        self._judge_programs = [load(folder / file.file, file.outputs, "fp32", options) for file in self._judges]
        self.processor = None
        if (folder / IMAGE_PROCESSOR_NAME).is_file():
            from transformers import AutoImageProcessor

            self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r}, runtime={self.runtime!r}, precision={self.precision!r})"

    def __reduce__(self):
        raise TypeError(
            "Loaded programs cannot be copied or pickled: call `load_exported` with the folder in each process. "
            "Threads may share them."
        )

    def __call__(
        self,
        pixel_values: np.ndarray,
        threshold: float | Sequence[float] | np.ndarray | None = None,
        max_stages: int | None = None,
        *,
        noise: np.ndarray | None = None,
        generator: np.random.Generator | None = None,
    ) -> StagedAnswers:
        """
        Args:
            pixel_values (`np.ndarray` of shape `(batch_size, num_channels, height, width)`, any floating dtype):
                Preprocessed images.
            threshold (`float`, `list[float]` or `np.ndarray` of shape `(batch_size, num_stages - 1)`, *optional*):
                τ: one number, one for each stage but the last, or such a row for each image. By default `threshold`
                of the folder.
            max_stages (`int`, *optional*): run the first so many stages only, of which the last always answers.
            noise (`np.ndarray` of shape `(batch_size,)`, *optional*):
                For the exit criterion "pondernet": a number in [0, 1) for each image.
            generator (`np.random.Generator`, *optional*): what draws these numbers otherwise; by default a fresh one.

        Raises:
            ValueError: for pixel values or arguments that do not fit.
        """
        check_pixel_values(
            pixel_values, np.ndarray, lambda array: np.issubdtype(array.dtype, np.floating), self.manifest
        )
        count = len(pixel_values)
        return self._run(
            pixel_values,
            self._settings.thresholds(threshold, count),
            resolve_stages(self.num_stages, max_stages),
            self._first_memory(count, noise, generator),
        )

    def classify(
        self,
        images: Sequence[Image.Image | str | os.PathLike] | Image.Image | str | os.PathLike,
        *,
        top_k: int = 1,
        threshold: float | Sequence[float] | np.ndarray | None = None,
        max_stages: int | None = None,
        batch_size: int = 16,
        generator: np.random.Generator | None = None,
    ) -> list[Classification]:
        """
        Read, preprocess and classify images.

        Args:
            images: pictures of Pillow, or paths or URLs of image files; or one of these.
            top_k (`int`): how many labels to give (all, where there are fewer).
            threshold, max_stages, generator: as in a call.
            batch_size (`int`): how many images to compute at once.

        Returns:
            One [`Classification`] for each image, in order.

        Raises:
            ValueError: for arguments that do not fit, an image (by its name) that cannot be read or gets another size
                than the programs take, a folder without image processor, and a regression, which has no classes.
            ArithmeticError: if the answer to an image is not finite, because no class is then the best.
        """
        if self.processor is None:
            raise ValueError(
                f"{str(self.folder)!r} has no {IMAGE_PROCESSOR_NAME}: export the model with its `processor`, or call "
                "this object with preprocessed pixel values."
            )
        if self._settings.is_regression:
            raise ValueError(
                "A regression predicts values, and has no classes with scores: call this object with pixel values, and "
                "read `logits`."
            )
        check_integer("top_k", top_k, minimum=1)
        check_integer("batch_size", batch_size, minimum=1)
        images = [images] if isinstance(images, (Image.Image, str, os.PathLike)) else list(images)
        taus = self._settings.thresholds(threshold, len(images))
        found: list[Classification] = []
        generator = np.random.default_rng() if generator is None and self.manifest["draws"] else generator
        for start in range(0, len(images), batch_size):
            batch = list(enumerate(images[start : start + batch_size], start))
            pixel_values = np.stack([prepare_image(self.processor, self.image_size, *entry) for entry in batch])
            answers = self(pixel_values, taus[start : start + batch_size], max_stages, generator=generator)
            broken = np.flatnonzero(~np.isfinite(answers.logits).all(axis=1))
            if len(broken):
                raise ArithmeticError(
                    f"The answer to the image {name_of(*batch[broken[0]])} is not finite (its logits have NaN or "
                    "infinity), so that no class is the best: check the weights, or take a greater precision."
                )
            found += self._best(answers, top_k)
        return found

    def _best(self, answers: StagedAnswers, top_k: int) -> list[Classification]:
        ranked = np.argsort(-answers.scores, axis=1, kind="stable")[:, :top_k]
        greatest = np.take_along_axis(answers.scores, ranked, axis=1)
        columns = (column.tolist() for column in (ranked, greatest, answers.exit_stage, answers.entropy))
        return [
            Classification([self.id2label[index] for index in indices], scores, stage, entropy)
            for indices, scores, stage, entropy in zip(*columns)
        ]

    def _first_memory(self, count: int, noise: np.ndarray | None, generator: np.random.Generator | None) -> Arrays:
        """As `ExitRule.first_memory`."""
        if not self.manifest["draws"]:
            if noise is not None or generator is not None:
                raise ValueError(
                    "`noise` and `generator` are for an `exit_criterion` that draws random numbers ('pondernet'), not "
                    f"{self.manifest['judged']['exit_criterion']!r}."
                )
            return {}
        if noise is None:
            generator = np.random.default_rng() if generator is None else generator
            return {"noise": generator.random(count, dtype=np.float32)}
        if generator is not None:
            raise ValueError("Give `noise` or the `generator` that draws it, not both.")
        noise = np.asarray(noise, np.float32)
        if noise.shape != (count,) or not ((noise >= 0) & (noise < 1)).all():
            raise ValueError(f"`noise` must be {count} numbers in [0, 1), one for each image, got {noise!r}.")
        return {"noise": noise}

    def _run(self, pixel_values: np.ndarray, taus: np.ndarray, stages: range, memory: Arrays) -> StagedAnswers:
        state = {"pixel_values": np.require(pixel_values, pixel_dtype(self.manifest), "CW")}
        rows, exit_stage, accepted = np.arange(len(pixel_values)), np.empty(len(pixel_values), np.int64), None
        for index in stages:
            answer, state = self._run_stage(index, state)
            verdict, memory = self._judge(index, answer, memory, taus[rows])
            exits = verdict.pop("exits", None)
            reported = {"logits": answer["logits"], **verdict}
            if accepted is None:
                accepted = reported
            else:
                for name, array in reported.items():
                    accepted[name][rows] = array
            exit_stage[rows] = index
            if index == stages[-1] or exits.all():
                break
            if exits.any():
                going_on = np.flatnonzero(~exits)
                rows = rows[going_on]
                state, memory = (
                    {name: array[going_on] for name, array in arrays.items()} for arrays in (state, memory)
                )
        return StagedAnswers(accepted["logits"], exit_stage, accepted["entropy"], accepted.get("class_scores"))

    def _run_stage(self, index: int, state: Arrays) -> tuple[Arrays, Arrays]:
        """The answers of a stage in float32, and the state for the next one."""
        self.calls[index] += 1
        answer, after = _run_program(self._stage_programs[index], self._stages[index], state, state)
        floating = {name: array for name, array in answer.items() if array.dtype == np.float16}
        return {**answer, **{name: array.astype(np.float32) for name, array in floating.items()}}, after

    def _judge(self, index: int, answer: Arrays, memory: Arrays, taus: np.ndarray) -> tuple[Arrays, Arrays]:
        """What the decision says of the answers, and what it remembers. `taus` are of each image and exit."""
        inputs = {
            **{ANSWER_PREFIX + name: array for name, array in answer.items()},
            **{MEMORY_PREFIX + name: array for name, array in memory.items()},
        }
        if index < taus.shape[1]:
            inputs[THRESHOLD] = taus[:, index]
        verdict, after = _run_program(self._judge_programs[index], self._judges[index], inputs, memory)
        # A broken answer passes no τ, and its entropy is NaN. Comparisons and clamps of OpenVINO take NaN for a number.
        broken = _has_nan(verdict.get("class_scores", answer["logits"]))
        verdict["entropy"][broken] = np.nan
        if "exits" in verdict:
            for array in (*answer.values(), verdict.pop("score")):
                broken |= _has_nan(array)
            if any(np.issubdtype(array.dtype, np.floating) for array in after.values()):
                broken |= memory.get(BROKEN, False)  # what is remembered of a broken answer is broken as well
                after[BROKEN] = broken
            verdict["exits"] &= ~broken
        return verdict, after


def _has_nan(array: np.ndarray) -> np.ndarray:
    """Of which images there is NaN in the array: bool `(images,)`."""
    return np.isnan(array).reshape(len(array), -1).any(axis=1)


def _run_program(program: Program, file: ProgramFile, inputs: Arrays, before: Arrays) -> tuple[Arrays, Arrays]:
    """
    The outputs of a program for a batch, each in memory of its own: those for the caller, and those for the next
    stage, together with what is passed on of `before`.
    """
    count = len(next(iter(inputs.values())))
    with memory_errors():
        arrays = [np.empty((count, *shape), numpy_dtype(dtype)) for shape, dtype in program.outputs]
        program.run([np.require(inputs[name], None, "CW") for name in program.inputs], arrays)
    named = list(zip(file.outputs, arrays, strict=True))
    after = {name: before[name] for name in file.passed_on}
    after |= {output.name: array for output, array in named if output.is_state}
    return {output.name: array for output, array in named if not output.is_state}, after
