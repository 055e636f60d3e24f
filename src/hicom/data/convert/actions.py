"""Sets of the stage 3 mixture that have labels and no questions: Charades, NTU RGB+D, Moments in Time; and TVQA.

The release trains on files of questions about them (`charades.jsonl`, `ntu_rgb_d.jsonl`, `tvqa.jsonl`, and a folder
`mit_action`), which are not published (lntzm/HICom, scripts/data/it_all_video.yaml, README). What its recogniser of
instructions takes off (hicom/mm_utils.py) shows that they ask for one category, or for one or more answers, among
options. The questions here do the same in our words: inferred, not the release's.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .layout import Draft, Layout, LeftOut, Media, an_object, paths_of
from .ntu_classes import NTU_CLASSES
from .options import choose_class, lettered

NUM_WRONG = 7
"""Wrong classes among the options."""
CATEGORY = "Which action does this video show? Select the most fitting category from the options. Options:"


def table_rows(file: Path, header: tuple[str, ...] | None = None) -> Iterator[tuple[str, Any]]:
    """Yield the lines of a CSV file as mappings; `header` names the columns of one that does not itself."""
    with file.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, header)
        for row in reader:
            yield f"line {reader.line_num}", row


def read_lines(src: Path, names: tuple[str, ...]) -> list[str]:
    """Return the lines of the first of some files that is there.

    Raises:
        ValueError: none is.
    """
    for name in names:
        if (src / name).is_file():
            return [line for line in (src / name).read_text("utf-8").splitlines() if line.strip()]
    raise ValueError(f"{src} holds no {' or '.join(names)}, which names the classes")


class Charades(Layout):
    """Charades: people at home, several actions a video.

    Known (prior.allenai.org/projects/charades, README of the annotations; public loaders): `Charades_v1_train.csv` with
    `id`, `actions` (`c092 11.10 21.50;...`: class, first and last second) and more; `Charades_v1_classes.txt` (`c092
    ...`); videos `Charades_v1_480/ID.mp4`. Inferred: which of them the paper's 11K records are (the set has 9,848
    videos), and the question, which is about all actions of the whole video.
    """

    name = "charades"
    title = "Charades (annotations Charades.zip, videos Charades_v1_480.zip)"
    patterns = ("Charades_v1_train.csv", "Charades/Charades_v1_train.csv")
    FOLDERS = ("Charades_v1_480/", "Charades_v1/", "videos/", "")
    QUESTION = "What does the person do in this video? Select one or more correct answers from following:"

    def __init__(self, src: Path) -> None:
        super().__init__(src)
        self._classes: dict[str, str] | None = None

    @property
    def classes(self) -> dict[str, str]:
        """Names of the actions by their codes, read when they are first asked for."""
        if self._classes is None:
            lines = read_lines(self.src, ("Charades_v1_classes.txt", "Charades/Charades_v1_classes.txt"))
            self._classes = {code: name.strip() for code, _, name in (line.partition(" ") for line in lines)}
        return self._classes

    def rows(self, file: Path) -> Iterator[tuple[str, Any]]:
        """Yield the lines of the table."""
        return table_rows(file)

    def draft(self, row: Any, folder: str) -> Draft:
        """Return a record."""
        (video,) = paths_of(row.get("id"))
        codes = dict.fromkeys(each.split()[0] for each in (row.get("actions") or "").split(";") if each.strip())
        unknown = [code for code in codes if code not in self.classes]
        if unknown:
            raise LeftOut("an action is none of the classes", unknown[0])
        right = list(dict.fromkeys(self.classes[code] for code in codes))
        if not right:
            raise LeftOut("no action is named")
        names = list(dict.fromkeys(self.classes.values()))
        question, answer = choose_class(self.QUESTION, right, names, NUM_WRONG, video)
        media = Media("video", tuple(f"{place}{video}.mp4" for place in self.FOLDERS))
        return Draft([("human", question), ("gpt", answer)], (media,), {"id": video})


class NtuRgbD(Layout):
    """NTU RGB+D (120): one action a clip, named by the file.

    Known (shahroudy/NTURGB-D, README): files are called `SsssCcccPpppRrrrAaaa_rgb.avi`, where `aaa` is the number of
    one of 120 actions, which the README names; there are 114,480 clips, the paper's 114K. There is no file of
    annotations: the folder itself is read.
    """

    name = "ntu-rgb-d"
    title = "NTU RGB+D 120 (videos nturgbd_rgb_s*.zip)"
    patterns = ("*_rgb.avi", "*/*_rgb.avi")
    _NAME = re.compile(r"S\d{3}C\d{3}P\d{3}R\d{3}A(\d{3})")

    def files(self) -> list[Path]:
        """Return the folders with clips."""
        return list(dict.fromkeys(file.parent for file in super().files()))

    def rows(self, file: Path) -> Iterator[tuple[str, Any]]:
        """Yield the clips of a folder by their names."""
        for clip in sorted(file.glob("*_rgb.avi")):
            yield clip.name, {"path": clip.relative_to(self.src).as_posix(), "id": clip.stem.removesuffix("_rgb")}

    def draft(self, row: Any, folder: str) -> Draft:
        """Return a record."""
        found = self._NAME.fullmatch(row["id"])
        number = int(found[1]) if found else 0
        if not 1 <= number <= len(NTU_CLASSES):
            raise LeftOut("the name of a clip is not SsssCcccPpppRrrrAaaa", row["id"])
        question, answer = choose_class(CATEGORY, [NTU_CLASSES[number - 1]], NTU_CLASSES, NUM_WRONG, row["id"])
        return Draft([("human", question), ("gpt", answer)], (Media("video", (row["path"],)),), {"id": row["id"]})


class MomentsInTime(Layout):
    """Moments in Time: one action a clip of three seconds.

    Known (README.txt of the data set): `trainingSet.csv` without header (file, label, workers that agreed, workers that
    did not), `moments_categories.txt`, videos in `training/`. Labels of several words have `+` between them. Which 290K
    of its 800K clips the paper took is not known.
    """

    name = "moments-in-time"
    title = "Moments in Time (moments.csail.mit.edu)"
    patterns = ("trainingSet.csv",)

    def __init__(self, src: Path) -> None:
        super().__init__(src)
        self._classes: list[str] | None = None

    @property
    def classes(self) -> list[str]:
        """Names of the classes, read when they are first asked for."""
        if self._classes is None:
            lines = read_lines(self.src, ("moments_categories.txt",))
            self._classes = list(dict.fromkeys(line.partition(",")[0].strip().replace("+", " ") for line in lines))
        return self._classes

    def rows(self, file: Path) -> Iterator[tuple[str, Any]]:
        """Yield the lines of the table."""
        return table_rows(file, ("file", "label", "agree", "disagree"))

    def draft(self, row: Any, folder: str) -> Draft:
        """Return a record."""
        (path,) = paths_of(row.get("file"))
        label = (row.get("label") or "").strip().replace("+", " ")
        if label not in self.classes:
            raise LeftOut("a label is none of the classes", label)
        question, answer = choose_class(CATEGORY, [label], self.classes, NUM_WRONG, path)
        media = Media("video", (f"training/{path}", path))
        return Draft([("human", question), ("gpt", answer)], (media,), {"id": path})


class Tvqa(Layout):
    """TVQA: questions about clips of six television series, five answers each.

    Known (tvqa.cs.unc.edu, download page; public loaders): `tvqa_train.jsonl` with `q`, `a0` to `a4`, `answer_idx`,
    `qid`, `vid_name`, `ts` (the part that the question is about); 122,039 questions, the paper's 122K; frames at 3 a
    second in `frames_hq/SERIES_frames/VID_NAME`, where names of "The Big Bang Theory" lack their series. Inferred: the
    whole clip is shown, without subtitles; `ts` is kept and not used; options are written as VideoChat2-IT writes its.
    """

    name = "tvqa"
    title = "TVQA (tvqa_qa_release, frames of 3 a second)"
    patterns = ("tvqa_train.jsonl", "tvqa_qa_release/tvqa_train.jsonl")
    SERIES = ("bbt", "castle", "friends", "grey", "house", "met")
    NUM_ANSWERS = 5

    def draft(self, row: Any, folder: str) -> Draft:
        """Return a record."""
        row = an_object(row)
        options = [row.get(f"a{number}") for number in range(self.NUM_ANSWERS)]
        if not isinstance(row.get("q"), str) or not all(isinstance(each, str) and each.strip() for each in options):
            raise LeftOut("a question or an option is missing or no text")
        right = str(row.get("answer_idx"))
        if right not in map(str, range(self.NUM_ANSWERS)):
            raise LeftOut("the right answer is none of the options", row.get("answer_idx"))
        (name,) = paths_of(row.get("vid_name"))
        series = name.partition("_")[0]
        frames = f"{series if series in self.SERIES else 'bbt'}_frames/{name}"
        places = (f"frames_hq/{frames}", frames, name, f"{name}.mp4", f"videos/{name}.mp4")
        named = lettered([" ".join(each.split()) for each in options])
        question = "\n".join([f"Question: {row['q'].strip()}", "Options:", *named])
        fields = {"id": row.get("qid", name), "ts": row.get("ts")}
        return Draft([("human", question), ("gpt", f"Answer: {named[int(right)]}")], (Media("video", places),), fields)
