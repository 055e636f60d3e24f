"""The numbers that results stand beside are the paper's: as its tables print them, and as its text does sums with them.

The rows below were typed from the tables of arXiv 2503.16036 in their own order of columns, apart from `eval/paper.py`.
"""

import pytest

from hicom.eval.paper import PUBLISHED
from hicom.model.ops import token_count

# Table 2: frames, tokens; Video-MME without subtitles (short, medium, long, all), with subtitles; MVBench; EgoSchema.
TABLE_2 = """
LLaVA-OneVision-7B    32 6272  70.1* 56.4* 48.9* 58.5*  75.8* 58.4* 51.6* 61.9*  56.7 60.1
LLaVA-Video-7B        32 6272  73.9* 57.3* 50.4* 60.6*  76.6* 60.3* 51.7* 62.9*  58.6 57.3
HICom-1.5B            32  680  61.7  51.3  43.9  52.3   65.1  54.7  47.3  55.7   56.4 50.1
HICom-7B              32  680  65.7  57.1  51.4  58.1   68.4  58.9  53.1  60.1   64.1 60.5
HICom-7B,@64@frames   64 1328  67.6  58.0  51.2  58.9   71.8  63.7  54.5  63.3   64.7 62.2
HICom-7B,@128@frames 128 2624  69.0  60.2  51.5  60.3   72.7  64.6  57.3  64.8   64.0 62.3
"""
COLUMNS_2 = [
    *(("videomme", name) for name in ("duration: short", "duration: medium", "duration: long", "accuracy")),
    *(("videomme_w_subtitle", name) for name in ("duration: short", "duration: medium", "duration: long", "accuracy")),
    ("mvbench", "accuracy"),
    ("egoschema", "accuracy"),
]
# Table 3: frames, tokens; ActivityNet-QA (accuracy, score); CI, DO, CU, TU, CO, average.
TABLE_3 = """
LLaVA-OneVision-7B    32 6272  56.6* 3.6*  3.45* 3.00* 3.71* 2.68* 3.14* 3.20*
HICom-1.5B            32  680  53.0  3.5   3.09  2.67  3.40  2.41  2.98  2.91
HICom-7B              32  680  58.3  3.7   3.29  2.85  3.59  2.67  3.22  3.12
HICom-7B,@64@frames   64 1328  59.4  3.7   3.32  2.92  3.65  2.74  3.35  3.20
HICom-7B,@128@frames 128 2624  59.5  3.7   3.33  2.86  3.65  2.74  3.32  3.18
"""
COLUMNS_3 = [
    ("activitynetqa", "accuracy"),
    ("activitynetqa", "score"),
    *(("videochatgpt", name) for name in ("correctness", "detail", "context", "temporal", "consistency", "average")),
]
# Table A7: frames, tokens; MLVU-dev.
TABLE_A7 = """
LLaVA-OneVision-7B    32 6272  65.3*
LLaVA-Video-7B        32 6272  66.7*
HICom-7B              32  680  62.8
HICom-7B,@64@frames   64 1328  65.1
HICom-7B,@128@frames 128 2624  67.2
"""
Cells = dict[tuple[str, str, str], tuple[float, int, int, bool]]


def printed(table: str, columns: list[tuple[str, str]]) -> Cells:
    """Return `{(task, score, model): (value, frames, tokens, measured by the authors)}` of a table's rows."""
    cells: Cells = {}
    for line in table.strip().splitlines():
        model, frames, tokens, *values = line.split()
        for (task, score), value in zip(columns, values, strict=True):
            key = task, score, model.replace("@", " ")
            cells[key] = float(value.rstrip("*")), int(frames), int(tokens), value.endswith("*")
    return cells


def ours() -> Cells:
    return {
        (task, score, row.model.rstrip("*")): (value, row.num_frames, row.num_tokens, row.model.endswith("*"))
        for task, rows in PUBLISHED.items()
        for row in rows
        for score, value in row.scores.items()
    }


def test_all_numbers_are_those_that_the_paper_prints() -> None:
    paper = printed(TABLE_2, COLUMNS_2) | printed(TABLE_3, COLUMNS_3) | printed(TABLE_A7, [("mlvu_dev", "accuracy")])
    assert ours() == paper


@pytest.mark.parametrize(("model", "gain", "saved"), [(", 64 frames", 2.43, 78.8), (", 128 frames", 3.0, 58.2)])
def test_the_headline_follows(model: str, gain: float, saved: float) -> None:
    """Section 1: 2.43 % more than LLaVA-Video with 78.8 % fewer tokens: means over four columns of Table 2."""
    cells = {(task, name): cell for (task, score, name), cell in ours().items() if score == "accuracy"}
    tasks = ("videomme", "videomme_w_subtitle", "mvbench", "egoschema")
    gains = [cells[task, f"HICom-7B{model}"][0] - cells[task, "LLaVA-Video-7B"][0] for task in tasks]
    assert sum(gains) / 4 == pytest.approx(gain, abs=0.0051)
    tokens = [cells["mvbench", name][2] for name in (f"HICom-7B{model}", "LLaVA-Video-7B")]
    assert 100 * (1 - tokens[0] / tokens[1]) == pytest.approx(saved, abs=0.051)


def test_totals_follow_from_their_parts() -> None:
    for name in ("videomme", "videomme_w_subtitle"):
        for row in PUBLISHED[name]:  # 900 questions of each length
            *parts, total = row.scores.values()
            assert sum(parts) / 3 == pytest.approx(total, abs=0.101), row
    for row in PUBLISHED["videochatgpt"]:
        *parts, average = row.scores.values()
        assert sum(parts) / 5 == pytest.approx(average, abs=0.0101), row


def test_visual_tokens_follow_from_the_window() -> None:
    for rows in PUBLISHED.values():
        for row in rows:
            if row.model.startswith("HICom"):
                assert row.num_tokens == token_count(row.num_frames, 27, 27, (4, 3, 3), num_global_tokens=32)
