"""What the paper reports (arXiv 2503.16036, Tables 2, 3 and A7), to set beside a run.

Rows marked `*` were measured by the authors of HICom. The judge of open answers was GPT-3.5-Turbo-0125: scores of other
judges do not compare.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """A row of a table of the paper.

    Attributes:
        model: its name.
        num_frames: frames it saw.
        num_tokens: visual tokens.
        scores: by name, as in `results.json`; for groups `group: value`.
    """

    model: str
    num_frames: int
    num_tokens: int
    scores: dict[str, float]


_MME = ("duration: short", "duration: medium", "duration: long", "accuracy")
_OPEN = ("correctness", "detail", "context", "temporal", "consistency", "average")
_SIZES = {
    "LLaVA-OneVision-7B": (32, 6272),
    "LLaVA-Video-7B": (32, 6272),
    "HICom-1.5B": (32, 680),
    "HICom-7B": (32, 680),
    "HICom-7B, 64 frames": (64, 1328),
    "HICom-7B, 128 frames": (128, 2624),
}


def _rows(names: tuple[str, ...], table: dict[str, tuple[float, ...]]) -> list[Published]:
    rows = []
    for model, values in table.items():
        size = _SIZES[model.removesuffix("*")]
        rows.append(Published(model, *size, dict(zip(names, values, strict=True))))
    return rows


PUBLISHED = {
    "videomme": _rows(
        _MME,
        {
            "LLaVA-OneVision-7B*": (70.1, 56.4, 48.9, 58.5),
            "LLaVA-Video-7B*": (73.9, 57.3, 50.4, 60.6),
            "HICom-1.5B": (61.7, 51.3, 43.9, 52.3),
            "HICom-7B": (65.7, 57.1, 51.4, 58.1),
            "HICom-7B, 64 frames": (67.6, 58.0, 51.2, 58.9),
            "HICom-7B, 128 frames": (69.0, 60.2, 51.5, 60.3),
        },
    ),
    "videomme_w_subtitle": _rows(
        _MME,
        {
            "LLaVA-OneVision-7B*": (75.8, 58.4, 51.6, 61.9),
            "LLaVA-Video-7B*": (76.6, 60.3, 51.7, 62.9),
            "HICom-1.5B": (65.1, 54.7, 47.3, 55.7),
            "HICom-7B": (68.4, 58.9, 53.1, 60.1),
            "HICom-7B, 64 frames": (71.8, 63.7, 54.5, 63.3),
            "HICom-7B, 128 frames": (72.7, 64.6, 57.3, 64.8),
        },
    ),
    "mvbench": _rows(
        ("accuracy",),
        {
            "LLaVA-OneVision-7B": (56.7,),
            "LLaVA-Video-7B": (58.6,),
            "HICom-1.5B": (56.4,),
            "HICom-7B": (64.1,),
            "HICom-7B, 64 frames": (64.7,),
            "HICom-7B, 128 frames": (64.0,),
        },
    ),
    "egoschema": _rows(
        ("accuracy",),
        {
            "LLaVA-OneVision-7B": (60.1,),
            "LLaVA-Video-7B": (57.3,),
            "HICom-1.5B": (50.1,),
            "HICom-7B": (60.5,),
            "HICom-7B, 64 frames": (62.2,),
            "HICom-7B, 128 frames": (62.3,),
        },
    ),
    "activitynetqa": _rows(
        ("accuracy", "score"),
        {
            "LLaVA-OneVision-7B*": (56.6, 3.6),
            "HICom-1.5B": (53.0, 3.5),
            "HICom-7B": (58.3, 3.7),
            "HICom-7B, 64 frames": (59.4, 3.7),
            "HICom-7B, 128 frames": (59.5, 3.7),
        },
    ),
    "videochatgpt": _rows(
        _OPEN,
        {
            "LLaVA-OneVision-7B*": (3.45, 3.00, 3.71, 2.68, 3.14, 3.20),
            "HICom-1.5B": (3.09, 2.67, 3.40, 2.41, 2.98, 2.91),
            "HICom-7B": (3.29, 2.85, 3.59, 2.67, 3.22, 3.12),
            "HICom-7B, 64 frames": (3.32, 2.92, 3.65, 2.74, 3.35, 3.20),
            "HICom-7B, 128 frames": (3.33, 2.86, 3.65, 2.74, 3.32, 3.18),
        },
    ),
    "mlvu_dev": _rows(
        ("accuracy",),
        {
            "LLaVA-OneVision-7B*": (65.3,),
            "LLaVA-Video-7B*": (66.7,),
            "HICom-7B": (62.8,),
            "HICom-7B, 64 frames": (65.1,),
            "HICom-7B, 128 frames": (67.2,),
        },
    ),
}
