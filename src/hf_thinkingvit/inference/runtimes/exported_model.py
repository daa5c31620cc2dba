"""
A model whose stages a runtime computes, from an exported folder.

It has the four steps of a model that thinks in stages (`begin`, `run_stage`, `answer`, `recycle`), so that the one loop
of the package drives it: `step_stage` in the engine, `run_stages` in a call. The exit rule is the loop's, in float32,
whatever the stages compute in.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import ModelOutput

from ...models.exit_rules import ExitRule
from ...models.modeling_early_exit_vit import with_halting_scores
from ...models.staged_arguments import resolve_stages
from ...models.staged_loop import run_stages
from ...models.staged_run import Answer, StagedRun, State
from ...models.task_classification import ImageClassificationTask, StagedImageClassifierOutput
from ...models.task_segmentation import SemanticSegmentationTask
from ...models.tasks import Task
from ...torch_free.manifest import checksum
from ...torch_free.programs import ProgramFile, check_pixel_values
from .fixed_fields import check_fixed
from .torch_program import StageProgram


ANSWER_PREFIX = "_answer."  # of entries in a state that are answers, between `run_stage` and `answer`
# Arguments of the PyTorch models' `forward` that programs do not have.
PYTORCH_ONLY = (
    *("labels", "keep_rate", "sub_network", "interpolate_pos_encoding"),
    *("output_hidden_states", "output_attentions", "output_kept_tokens"),
)


class ExportedModel(Task):
    """
    Loaded by `from_exported`. [`AdaptiveEngine`] takes it like a model, and it can be called like one, in inference.
    Copies and pickles carry the configuration and the processor, and load the programs from the folder again: an error
    if it is gone or was exported anew.

    Attributes:
        config (`PreTrainedConfig`): of the model; τ, labels and exit criterion are there.
        processor (`BaseImageProcessor`): of the folder; `None` if it has none.
        folder (`Path`): where it comes from, absolute.
        runtime, precision (`str`): what computes the stages, and in what.
        manifest (`dict`): what `export.json` says, with the checksums of the programs.
        image_size (`tuple[int, int]`): (height, width) of the images that the programs take.
        dtype (`torch.dtype`): of pixel values.
        calls (`list[int]`): how often the program of each stage has run.
    """

    training = False
    device = torch.device("cpu")

    def __init__(
        self,
        config: PreTrainedConfig,
        processor: BaseImageProcessor | None,
        programs: list[StageProgram],
        stages: list[ProgramFile],
        manifest: dict[str, Any],
        dtype: torch.dtype,
        folder: Path,
        runtime: str,
        precision: str,
        options: dict[str, Any],
    ):
        self.config, self.processor, self.folder = config, processor, folder
        self.runtime, self.precision, self._options = runtime, precision, options
        self.manifest, self.dtype = manifest, dtype
        self.image_size, self.num_channels = tuple(manifest["image_size"]), manifest["num_channels"]
        self.calls = [0] * len(programs)
        self._programs, self._stages = programs, stages
        self._checked_fields: dict[str, Any] | None = None

    def __reduce__(self):
        """
        Copies and pickles name the folder, and carry what may have been changed since it was loaded: the configuration
        and the processor. Their programs are loaded from the folder again, which must hold the same ones.
        """
        from .folder import load_again  # which builds this class

        if not self.folder.exists():
            raise TypeError(
                "This model runs from a folder that was temporary, so that it cannot be pickled or copied: write one "
                "with `export_model`, load that with `from_exported`."
            )
        arguments = self.folder, self.precision, self._options, checksum(self.manifest)
        return load_again, arguments, {"config": self.config, "processor": self.processor}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r}, runtime={self.runtime!r}, precision={self.precision!r})"

    def eval(self) -> "ExportedModel":
        """The model itself, which is always in evaluation mode."""
        return self

    def train(self, mode: bool = True) -> "ExportedModel":
        """`ValueError` unless `mode` is `False`."""
        if mode:
            raise ValueError("Exported programs cannot be trained: train the PyTorch model, and export it again.")
        return self

    def exit_rule(self, threshold: float | Sequence[float] | None = None) -> ExitRule:
        """As in [`Task`]. `ValueError` if fields of `config` have changed that are fixed in the programs."""
        now = vars(self.config)
        if now != self._checked_fields:  # a fraction of the time of the check, for each call
            check_fixed(self.config, self.manifest["fixed"])
            self._checked_fields = copy.deepcopy(now)
        return super().exit_rule(threshold)

    def token_arguments(self, keep_rate: float | Sequence[float] | None = None) -> dict[str, Any]:
        """As in [`Task`]. `ValueError` for any `keep_rate`."""
        if keep_rate is None or not getattr(self.config, "pruning_layers", None):
            return super().token_arguments(keep_rate)
        raise ValueError(
            "`keep_rate` is of PyTorch models: the exported programs keep `pruning_keep_rate` = "
            f"{self.config.pruning_keep_rate}. Export the model with another one."
        )

    def begin(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool | None = None,
        stages: range | None = None,
        **kwargs,
    ) -> State:
        """`ValueError` for images of another size than the exported one, and arguments that programs do not have."""
        self._refuse({"interpolate_pos_encoding": interpolate_pos_encoding, **kwargs})
        if stages is not None and stages.start != 0:
            raise ValueError(f"The exported programs run from the first stage on, not from stage {stages.start}.")
        check_pixel_values(pixel_values, torch.Tensor, torch.is_floating_point, self.manifest)
        return {"pixel_values": pixel_values.detach().to(self.device, self.dtype)}

    def run_stage(self, stage_index: int, state: State, is_last: bool = False, **kwargs) -> State:
        """The state after the stage's program, with its answers."""
        self._refuse(kwargs)
        stage = self._stages[stage_index]
        after = {name: state[name] for name in stage.passed_on}
        self.calls[stage_index] += 1
        for output, tensor in zip(stage.outputs, self._programs[stage_index](state), strict=True):
            after[output.name if output.is_state else ANSWER_PREFIX + output.name] = tensor
        return after

    def answer(self, stage_index: int, state: State) -> Answer:
        return {
            name.removeprefix(ANSWER_PREFIX): tensor for name, tensor in state.items() if name.startswith(ANSWER_PREFIX)
        }

    def recycle(self, stage_index: int, state: State, **kwargs) -> State:
        """The state without the answers: the program of the next stage begins with the model's own `recycle`."""
        return {name: tensor for name, tensor in state.items() if not name.startswith(ANSWER_PREFIX)}

    @torch.no_grad()
    def forward(
        self,
        pixel_values: torch.Tensor,
        *,
        threshold: float | Sequence[float] | None = None,
        max_stages: int | None = None,
        output_stage_logits: bool | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> ModelOutput | tuple:
        """
        The output of the PyTorch model's `forward` in evaluation mode; the arguments are as there. `ValueError` for
        those that programs do not have.
        """
        self.token_arguments(kwargs.get("keep_rate"))
        self._refuse(kwargs)
        stages = resolve_stages(self.config.num_stages, max_stages)
        run = run_stages(
            self,
            self.exit_rule(threshold),
            stages,
            pixel_values,
            run_all=bool(output_stage_logits),
            generator=generator,
        )
        output = self.build_output(run, None, output_stage_logits)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    __call__ = forward

    def _refuse(self, arguments: Mapping[str, Any]) -> None:
        """`ValueError` for arguments of PyTorch models that ask for something, `TypeError` for unknown ones."""
        unknown = sorted(arguments.keys() - set(PYTORCH_ONLY))
        if unknown:
            raise TypeError(f"An exported model takes no {', '.join(map(repr, unknown))}.")
        for name, value in arguments.items():
            if value is not None and value is not False:
                raise ValueError(
                    f"`{name}` is of PyTorch models, got {name}={value!r}: the exported programs compute the answers "
                    f"of the stages to images of {self.image_size[0]}×{self.image_size[1]} pixels, and nothing else. "
                    "Leave it out, or use the PyTorch model."
                )

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """`ValueError`: there are no PyTorch weights to save."""
        raise ValueError(
            f"This model runs exported programs and has no weights to save: copy its folder ({str(self.folder)!r}), or "
            "save the PyTorch model."
        )


class ExportedClassifier(ExportedModel, ImageClassificationTask):
    """A classifier's stages in a runtime."""

    def build_output(
        self, run: StagedRun, labels: None, output_stage_logits: bool | None, **kwargs: Any
    ) -> StagedImageClassifierOutput:
        outputs = super().build_output(run, labels, output_stage_logits, **kwargs)
        return with_halting_scores(outputs, run, self.config) if hasattr(self.config, "halting") else outputs


class ExportedSegmenter(ExportedModel, SemanticSegmentationTask):
    """A segmentation model's stages in a runtime."""

    def answer(self, stage_index: int, state: State) -> Answer:
        return self.dense_answer(super().answer(stage_index, state)["logits"])
