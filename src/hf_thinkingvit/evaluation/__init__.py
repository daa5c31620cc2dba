"""Cost and accuracy of a model at every τ, and calibration of τ."""

from .. import needs_torch  # noqa: F401
from .accuracy import evaluate_accuracy
from .calibration import Calibration, calibrate_accuracy, calibrate_budget, calibrate_risk
from .conditions import CalibrationStatus, calibration_status, model_conditions, weights_fingerprint
from .labels import LabelMap, label_map_argument
from .macs import halting_macs, published_stage_macs, stage_macs, sub_network_macs
from .precisions import PrecisionComparison, compare_precisions
from .segmentation import StageConfusions, collect_stage_confusions, evaluate_segmentation, segmentation_measures
from .segmentation_sweep import evaluate_segmentation_thresholds
from .stage_times import measure_stage_milliseconds
from .sweep import StageAnswers, collect_stage_answers, evaluate_thresholds
from .token_depths import TokenDepths, token_depths


__all__ = [
    "Calibration",
    "CalibrationStatus",
    "LabelMap",
    "PrecisionComparison",
    "StageAnswers",
    "StageConfusions",
    "TokenDepths",
    "calibrate_accuracy",
    "calibrate_budget",
    "calibrate_risk",
    "calibration_status",
    "collect_stage_answers",
    "compare_precisions",
    "collect_stage_confusions",
    "evaluate_accuracy",
    "evaluate_segmentation",
    "evaluate_segmentation_thresholds",
    "evaluate_thresholds",
    "halting_macs",
    "label_map_argument",
    "measure_stage_milliseconds",
    "model_conditions",
    "published_stage_macs",
    "segmentation_measures",
    "stage_macs",
    "sub_network_macs",
    "token_depths",
    "weights_fingerprint",
]
