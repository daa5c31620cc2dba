"""Cost and accuracy of a model at every τ, and calibration of τ."""

from .accuracy import evaluate_accuracy
from .calibration import Calibration, calibrate_budget, calibrate_risk, measure_stage_milliseconds
from .conditions import CalibrationStatus, calibration_status, model_conditions, weights_fingerprint
from .labels import LabelMap, label_map_argument
from .macs import halting_macs, published_stage_macs, stage_macs, sub_network_macs
from .precisions import PrecisionComparison, compare_precisions
from .segmentation import StageConfusions, collect_stage_confusions, evaluate_segmentation, segmentation_measures
from .segmentation_sweep import evaluate_segmentation_thresholds
from .sweep import StageAnswers, collect_stage_answers, evaluate_thresholds


__all__ = [
    "Calibration",
    "CalibrationStatus",
    "LabelMap",
    "PrecisionComparison",
    "StageAnswers",
    "StageConfusions",
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
    "weights_fingerprint",
]
