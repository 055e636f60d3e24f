"""Sets in LLaVA's layout: JSON with `conversations` of `from` and `value`, and `image` or `video`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from .layout import REPORT, Draft, Kind, Layout, LeftOut, Media, an_object, paths_of

Places = Callable[[Kind, str], tuple[str, ...]]
"""Returns where a video or image may lie, by its kind and its path in a record."""


def llava_draft(row: Any, places: Places) -> Draft:
    """Return a record of `conversations`.

    Raises:
        LeftOut: it has no turns, or paths that are none.
    """
    row = an_object(row)
    turns = row.get("conversations", row.get("messages"))
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise LeftOut("a record has no list of turns", turns)
    media = []
    for kind in get_args(Kind):
        for name in (kind, f"{kind}s"):
            if row.get(name) not in (None, [], ""):
                media += [Media(kind, places(kind, path)) for path in paths_of(row[name])]
    fields = {key: value for key, value in row.items() if key not in ("conversations", "messages")}
    talk = [(turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in turns]
    return Draft(talk, tuple(media), fields)


class Llava(Layout):
    """Records of LLaVA or ShareGPT in any `.json` and `.jsonl` files, as `hicom.data.records` reads them anyway.

    For data whose oddities are to be counted and taken out before training.
    """

    name = "llava"
    title = "records in LLaVA's layout"
    patterns = ("*.json", "*.jsonl")

    def files(self) -> list[Path]:
        """Return all but what earlier conversions wrote: reports, and records that have one beside them."""
        files = [file for file in super().files() if not file.name.endswith(REPORT)]
        return [file for file in files if not file.with_suffix(REPORT).exists()]

    def draft(self, row: Any, folder: str) -> Draft:
        """Return a record."""
        return llava_draft(row, lambda kind, path: (path,))


class LlavaPretrain(Layout):
    """LLaVA-Pretrain, 558K captioned images: stage 1.

    Known (haotian-liu/LLaVA, docs; lntzm/HICom, scripts/data/pretrain.yaml): the file, its layout, and a folder
    `images` that `images.zip` is unpacked to.
    """

    name = "llava-pretrain"
    title = "LLaVA-Pretrain (hub: liuhaotian/LLaVA-Pretrain)"
    patterns = ("blip_laion_cc_sbu_558k.json",)

    def draft(self, row: Any, folder: str) -> Draft:
        """Return a record."""
        return llava_draft(row, lambda kind, path: (f"images/{path}", path))


class LlavaInstruct(Layout):
    """LLaVA-1.5's instructions about images, in the released mixture of stage 3.

    Known (haotian-liu/LLaVA, README): `llava_v1_5_mix665k.json`, and folders `coco`, `gqa`, `ocr_vqa`, `textvqa`, `vg`
    that its paths start with. The release names `llava_v1_5_pure_qa.json` (lntzm/HICom, scripts/data), which is not
    published; that it has the same layout is inferred.
    """

    name = "llava-instruct"
    title = "LLaVA-1.5's instructions (hub: liuhaotian/LLaVA-Instruct-150K)"
    patterns = ("llava_v1_5_mix665k.json", "llava_v1_5_pure_qa.json")

    def draft(self, row: Any, folder: str) -> Draft:
        """Return a record."""
        return llava_draft(row, lambda kind, path: (path, f"images/{path}"))


class LlavaVideo(Layout):
    """LLaVA-Video-178K with the sets it comes with, 1.6M answers: most of stage 3.

    Known (dataset card of lmms-lab/LLaVA-Video-178K and LLaVA-VL/LLaVA-NeXT, scripts/video/train/exp.yaml): a folder a
    subset, such as `0_30_s_academic_v0_1`, with `*_cap_processed.json`, `*_oe_v0_1_qa_processed.json`,
    `*_mc_v0_1_qa_processed.json` (`*_oe_qa_processed.json`, `*_mc_qa_processed.json` of NeXT-QA, ActivityNet-QA and
    PerceptionTest); a video's path starts from its subset's folder, where the archives are unpacked; videos are called
    `<image>`; `data_source` names the subset. Videos of `llava_hound` are folders of frames of another data set
    (ShareGPTVideo/train_video_and_instruction, train_300k); public scripts unpack them to one of the places tried here.

    A folder that `datasets.save_to_disk` wrote is read, too: the name of its configuration is that of the subset.
    """

    name = "llava-video"
    title = "LLaVA-Video-178K (hub: lmms-lab/LLaVA-Video-178K)"
    patterns = ("*/*_processed.json", "*_processed.json")
    FRAMES = ("llava_hound/shareVideoGPTV/frames/all_frames", "llava_hound/train_300k", "train_300k")
    """Folders in which public scripts unpack the videos of LLaVA-Hound."""

    def files(self) -> list[Path]:
        """Return the files of all subsets, and folders of saved data sets."""
        saved = [self.src] if is_saved(self.src) else sorted(filter(is_saved, self.src.iterdir()))
        return super().files() + saved

    def rows(self, file: Path) -> Iterator[tuple[str, Any]]:
        """Yield the records of a file, or the rows of a saved data set."""
        return saved_rows(file) if file.is_dir() else super().rows(file)

    def draft(self, row: Any, folder: str) -> Draft:
        """Return a record."""
        if isinstance(row, dict) and SUBSET in row:
            folder = row.pop(SUBSET)

        def places(kind: Kind, path: str) -> tuple[str, ...]:
            here = PurePosixPath(folder, path).as_posix()
            if folder != "llava_hound":
                return (here, path) if here != path else (here,)
            name = PurePosixPath(path).name
            frames = [f"{place}/{name}" for place in self.FRAMES]
            return tuple(dict.fromkeys((here, *frames, *(f"{place}.mp4" for place in (here, *frames)))))

        return llava_draft(row, places)


SUBSET = "_hicom_subset"


def is_saved(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote a folder."""
    return (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()


def saved_rows(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a saved data set, each with the name of its configuration.

    Raises:
        ImportError: `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise ImportError(f"{folder} needs the package datasets: pip install 'hicom[data]'") from None
    found = datasets.load_from_disk(str(folder))
    parts = found if isinstance(found, datasets.DatasetDict) else {"": found}
    for split, table in parts.items():
        for number, row in enumerate(table):
            yield f"{split} row {number}".strip(), {**row, SUBSET: table.info.config_name or "."}


class M4Instruct(Layout):
    """M4-Instruct's records of several images, 615K.

    Known (dataset card of lmms-lab/M4-Instruct-Data; public loaders of it): `m4_instruct_annotations.json` with
    `sample_id`, `image` (a list), `conversations` and `metadata`; archives are unpacked beside it, and paths start with
    the archive's name. Where placeholders are not as many as images, they are put in front of the first question.
    """

    name = "m4-instruct"
    title = "M4-Instruct, records of several images (hub: lmms-lab/M4-Instruct-Data)"
    patterns = ("m4_instruct_annotations.json",)

    def draft(self, row: Any, folder: str) -> Draft:
        """Return a record."""
        return llava_draft(row, lambda kind, path: (path, f"images/{path}"))


class M4Video(Layout):
    """M4-Instruct's 255K records of videos, which are what the mixture of stage 3 takes.

    Known (dataset card of lmms-lab/M4-Instruct-Data; public scripts that prepare it): `m4_instruct_video.json`, whose
    `video` is a name without suffix, called `<image>` in the text; the videos are those of LLaVA-Hound (train_300k),
    folders of frames, or files made of them. That the mixture takes this file is inferred: the paper's number is 255K,
    and the release keeps `m4_instruct_videos`.
    """

    name = "m4-instruct-video"
    title = "M4-Instruct, records of videos (hub: lmms-lab/M4-Instruct-Data)"
    patterns = ("m4_instruct_video.json",)
    FOLDERS = ("", "m4_instruct_videos/", "videos/", "train_300k/")

    def draft(self, row: Any, folder: str) -> Draft:
        """Return a record."""
        return llava_draft(
            row,
            lambda kind, path: tuple(f"{folder}{path}{suffix}" for folder in self.FOLDERS for suffix in ("", ".mp4")),
        )


class Hicom248k(Layout):
    """HICom-248K, stage 2, as the release names it.

    Known (lntzm/HICom, scripts/data/conditional_pretrain.yaml, hicom/train.py): the file's name, a folder
    `split_videos`, and what the loader reads of a record. The data itself has never been published, so all else is
    inferred; `hicom data build` makes such data, and what it exports needs no conversion.
    """

    name = "hicom-248k"
    title = "HICom-248K (not published)"
    patterns = ("248328_qa_llavaformat.json",)

    def draft(self, row: Any, folder: str) -> Draft:
        """Return a record."""
        return llava_draft(row, lambda kind, path: (f"split_videos/{path}", path))
