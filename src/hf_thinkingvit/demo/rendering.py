"""
What the demo shows of an inspected image, as HTML: the decision under τ, the answers, and pictures. Text that comes
from models (their labels) is escaped.
"""

import base64
from html import escape
from io import BytesIO

import numpy as np
import torch
from PIL import Image

from ..commands.segment import label_map, window_picture
from ..evaluation.inspection import ImageInspection
from ..evaluation.token_pictures import ImageTokens, depth_scale, side_by_side
from ..inference.sliding import SlidingResult
from ..models.configuration_checks import configured_problem_type
from ..models.exit_criteria import EXIT_CRITERIA


SHOWN_LABELS = 5
WIDEST = 640  # pixels of a picture


def render(inspection: ImageInspection, threshold: float | None) -> str:
    """The whole answer under τ (the model's own for `None`), as HTML."""
    stages = inspection.exit_stages(threshold)
    pictures = ""
    if inspection.windows is not None:
        pictures = _segmentation(inspection, stages)
    elif inspection.depth is not None:
        pictures = _depths(inspection)
    return f"{_verdict(inspection, stages, threshold)}{_cards(inspection, stages, threshold)}{pictures}"


def answer_name(inspection: ImageInspection, answer: int) -> str:
    """What an answer is of, in words."""
    if inspection.scores is not None:
        return f"Stage {answer}"
    return f"Sub-network {answer}" if inspection.num_answers > 1 else "Answer"


def _verdict(inspection: ImageInspection, stages: torch.Tensor, threshold: float | None) -> str:
    """Which answer counts, and what it cost."""
    spent, full = inspection.spent(threshold)
    name = escape(answer_name(inspection, int(stages[0])))
    if inspection.windows is not None:
        counts = stages.bincount(minlength=inspection.num_answers).tolist()
        left = ", ".join(f"{count} at stage {stage}" for stage, count in enumerate(counts))
        text = f"{len(stages)} window{'s' * (len(stages) > 1)} accepted: <strong>{left}</strong>"
    else:
        label, value = inspection.best(int(stages[0]), 1)[0]
        text = f"{name} accepted: <strong>{escape(label)}</strong> ({_number(inspection, value)})"
        if inspection.scores is None:
            text = f"{name}: <strong>{escape(label)}</strong> ({_number(inspection, value)})"
    return (
        f'<div class="tv-verdict" data-accepted="{",".join(map(str, stages.tolist()))}">{text}</div>'
        f'<div class="tv-small">Compute: {_macs(spent)} of the full model\'s {_macs(full)} multiply-accumulates '
        f"({spent / full:.0%})</div>{_bar(spent / full)}"
    )


def _cards(inspection: ImageInspection, stages: torch.Tensor, threshold: float | None) -> str:
    """One card for each answer."""
    cards = []
    for answer in range(inspection.num_answers):
        kind, badge = _standing(inspection, stages, answer)
        words = _decision(inspection, answer, threshold)
        labels = ""
        for label, value in inspection.best(answer, SHOWN_LABELS) if inspection.probabilities is not None else ():
            is_share = configured_problem_type(inspection.config) != "regression"
            bar = _bar(value) if is_share else ""
            shown = _number(inspection, value)
            labels += f'<div class="tv-label"><span>{escape(label)}</span><span>{shown}</span></div>{bar}'
        cards.append(
            f'<div class="tv-card {kind}"><div class="tv-head"><span>{answer_name(inspection, answer)}</span>'
            f'<span class="tv-badge">{badge}</span></div><div class="tv-small">{words}</div>{labels}</div>'
        )
    return f'<div class="tv-cards">{"".join(cards)}</div>'


def _standing(inspection: ImageInspection, stages: torch.Tensor, answer: int) -> tuple[str, str]:
    """Class and badge of an answer's card."""
    here, later = int((stages == answer).sum()), int((stages > answer).sum())
    if inspection.scores is None and inspection.num_answers == 1:
        return "", ""
    if inspection.windows is not None:
        return ("tv-accepted" if here else ""), f"{here} window{'s' * (here != 1)}"
    if here:
        return "tv-accepted", "accepted" if inspection.scores is not None else "default"
    return "tv-unused", "thinks again" if later else "not needed" if inspection.scores is not None else "not chosen"


def _decision(inspection: ImageInspection, answer: int, threshold: float | None) -> str:
    """The entropy of an answer, what the exit rule compares with τ, and what the answer costs."""
    parts = [f"entropy {inspection.entropies[:, answer].mean():.2f}"]
    if len(inspection.entropies) > 1:
        parts[0] = f"mean {parts[0]}"
    if inspection.scores is not None:
        criterion = EXIT_CRITERIA[inspection.scores.criterion]
        if not criterion.is_entropy:
            parts.append(f"score {inspection.scores.scores[:, answer].mean():.2f}")
        if answer == inspection.num_answers - 1:
            parts.append("last stage: always answers")
    parts.append(f"{_macs(inspection.macs[answer] * len(inspection.entropies))} MACs so far")
    if inspection.scores is None:
        parts[-1] = f"{_macs(inspection.macs[answer])} MACs"
    return ", ".join(parts)


def _depths(inspection: ImageInspection) -> str:
    """The image beside the layers that each patch runs."""
    depth, num_layers = inspection.depth, inspection.config.num_hidden_layers
    picture = side_by_side(ImageTokens("", "", depth, inspection.pixels), inspection.config)
    colors, norm = depth_scale(num_layers, discrete=True)
    steps = [
        f"rgb({', '.join(str(channel) for channel in colors(norm(layer), bytes=True)[:3])})"
        for layer in range(1, num_layers + 1)
    ]
    stops = ", ".join(
        f"{color} {100 * step / num_layers:.1f}% {100 * (step + 1) / num_layers:.1f}%"
        for step, color in enumerate(steps)
    )
    pruned = "in the last stage " if inspection.scores is not None else ""
    return (
        f'<div class="tv-pictures">{_figure(picture, f"Layers that each patch runs {pruned}(mean {depth.mean():.1f})")}'
        f'</div><div class="tv-ramp" style="background: linear-gradient(to right, {stops})"></div>'
        f'<div class="tv-ends tv-small"><span>1 layer</span><span>{num_layers} layers</span></div>'
    )


def _segmentation(inspection: ImageInspection, stages: torch.Tensor) -> str:
    """The accepted classes, where windows left, and every stage's classes, over the image."""
    photograph = Image.fromarray(inspection.pixels)
    accepted = inspection.segmented(stages)
    _, (view, *_) = inspection.windows
    windows = window_picture(photograph, accepted, view.window)
    figures = [
        _figure(_overlay(photograph, accepted), "Accepted classes"),
        _figure(np.asarray(windows), "Windows: stage of exit (from 1) and entropy"),
    ]
    for stage in range(inspection.num_answers):
        result = inspection.segmented(torch.full_like(stages, stage))
        figures.append(_figure(_overlay(photograph, result), f"Stage {stage} everywhere"))
    return f'<div class="tv-pictures">{"".join(figures)}</div>{_legend(inspection, accepted)}'


def _overlay(photograph: Image.Image, result: SlidingResult) -> np.ndarray:
    return np.asarray(Image.blend(photograph, label_map(result).convert("RGB"), 0.5))


def _legend(inspection: ImageInspection, result: SlidingResult) -> str:
    """The classes in a segmentation with their colours, the largest first."""
    counts = result.labels.flatten().bincount()
    colours = label_map(result).getpalette()
    chips = []
    for index in counts.argsort(descending=True).tolist():
        if counts[index] == 0:
            break
        colour = ", ".join(str(channel) for channel in colours[3 * index : 3 * index + 3])
        name = escape(inspection.config.id2label[index])
        share = counts[index].item() / result.labels.numel()
        chips.append(f'<span><span class="tv-chip" style="background: rgb({colour})"></span>{name} {share:.0%}</span>')
    return f'<div class="tv-legend tv-small">{"".join(chips)}</div>'


def _figure(pixels: np.ndarray, caption: str) -> str:
    picture = Image.fromarray(pixels)
    if picture.width > WIDEST:
        picture = picture.resize((WIDEST, max(round(picture.height * WIDEST / picture.width), 1)))
    buffer = BytesIO()
    picture.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    caption = escape(caption)
    return (
        f'<figure><figcaption class="tv-small">{caption}</figcaption>'
        f'<img src="data:image/png;base64,{data}" alt="{caption}"></figure>'
    )


def _bar(share: float) -> str:
    return f'<div class="tv-bar"><div style="width: {100 * min(max(share, 0.0), 1.0):.1f}%"></div></div>'


def _number(inspection: ImageInspection, value: float) -> str:
    return f"{value:.3g}" if configured_problem_type(inspection.config) == "regression" else f"{value:.1%}"


def _macs(macs: int) -> str:
    """With three digits and a unit."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if macs >= size:
            return f"{macs / size:.3g} {unit}"
    return str(macs)
