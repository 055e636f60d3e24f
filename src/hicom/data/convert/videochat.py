"""Sets whose records are lists of questions and answers: VideoChat2-IT, Video-ChatGPT, ShareGPT4Video's captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from .layout import Draft, Kind, Layout, LeftOut, Media, an_object, paths_of
from .llava import llava_draft
from .options import draw

FOLDERS = {
    "image/caption/coco": "coco_caption",
    "image/caption/llava": "coco_caption",
    "image/caption/minigpt4": "minigpt4/image",
    "image/caption/paragraph_captioning": "m3it/image-paragraph-captioning",
    "image/caption/textcaps": "m3it/textcap",
    "image/classification/imagenet": "m3it/imagenet",
    "image/classification/coco_itm": "m3it/coco-itm",
    "image/conversation/llava": "coco_caption",
    "image/reasoning/clevr": "m3it/clevr",
    "image/reasoning/visual_mrc": "m3it/visual-mrc",
    "image/reasoning/llava": "coco_caption",
    "image/reasoning/science_qa": "m3it/science-qa",
    "image/vqa/vqav2": "m3it/vqa-v2",
    "image/vqa/gqa": "m3it/gqa",
    "image/vqa/okvqa": "m3it/okvqa",
    "image/vqa/a_okvqa": "m3it/a-okvqa",
    "image/vqa/viquae": "m3it/viquae",
    "image/vqa/ocr_vqa": "m3it/ocr-vqa",
    "image/vqa/text_vqa": "m3it/text-vqa",
    "image/vqa/st_vqa": "m3it/st-vqa",
    "image/vqa/docvqa": "m3it/docvqa",
    "video/caption/textvr": "TextVR/Video",
    "video/caption/videochat": "WebVid10M",
    "video/caption/webvid": "WebVid2M",
    "video/caption/youcook2": "youcook2/split_videos",
    "video/caption/s_mit": "S-MiT",
    "video/caption/sharegptvideo": "LLaVA_DPO/train_300k",
    "video/classification/ssv2": "video_pub/ssv2_video",
    "video/conversation/videochat1": "WebVid10M",
    "video/conversation/videochat2": "internvid",
    "video/conversation/videochatgpt": "ANet/ANet_320p_fps30",
    "video/reasoning/next_qa": "nextqa",
    "video/reasoning/clevrer_qa": "clevrer/video_train",
    "video/reasoning/clevrer_mc": "clevrer/video_train",
    "video/vqa/ego_qa": "EgoQA/split_videos",
    "video/vqa/tgif_frame_qa": "tgif",
    "video/vqa/tgif_transition_qa": "tgif",
    "video/vqa/webvid_qa": "WebVid2M",
    "video/vqa/sharegptvideo": "LLaVA_DPO/train_300k",
    "video/grounding/didemo": "DiDeMo",
}
"""Where VideoChat2's configuration keeps the videos and images of a set, below one folder of data."""
ONE_TASK = "the task instruction of a later question is not used, as in VideoChat2"


class VideoChat2(Layout):
    """VideoChat2-IT: questions and answers about 40 sets of images and videos.

    Known (OpenGVLab/Ask-Anything, video_chat2: configs/instruction_data.py, dataset/it_dataset.py, DATA.md; dataset
    card of OpenGVLab/VideoChat2-IT): `MODALITY/TASK/SET/train.json`, a list of `{"video" or "image", "QA": [{"i", "q",
    "a"}]}`, some with `start` and `end` in seconds, which count where both are there; `i` of the first question is put
    before the conversation as a system turn, and asks itself where `q` is empty, as of captions; where videos lie is
    named set by set. A set may come in several sizes, of which `train.json` is read unless others are asked for.

    Differences from VideoChat2's own loader: questions keep their order; `i` of a question that asks nothing else is a
    turn of the user, because here the user's turn steers the compressor.
    """

    name = "videochat2-it"
    title = "VideoChat2-IT (hub: OpenGVLab/VideoChat2-IT)"
    patterns = ("video/*/*/*.json", "image/*/*/*.json")

    def default(self, files: Sequence[Path]) -> Sequence[Path]:
        """Return `train.json` of every set, or all its files where it has none of that name."""
        whole = {file.parent for file in files if file.name == "train.json"}
        return [file for file in files if file.name == "train.json" or file.parent not in whole]

    def draft(self, row: Any, folder: str) -> Draft:
        """Return a record."""
        row = an_object(row)
        kind: Kind = "image" if "image" in row else "video"
        below = (FOLDERS.get(folder), None if folder == "." else folder, "")
        bounds = bounds_of(row)
        media = tuple(
            Media(kind, tuple(PurePosixPath(place, path).as_posix() for place in below if place is not None), bounds)
            for path in paths_of(row.get(kind))
        )
        turns, changes = question_turns(row.get("QA"))
        fields = {"id": row["id"]} if "id" in row else {}
        return Draft(turns, media, fields | {"data_source": folder}, changes)


def bounds_of(row: dict[str, Any]) -> tuple[float | None, float | None]:
    """Return `start` and `end` of a record where both are there.

    Raises:
        LeftOut: they are no seconds.
    """
    values: list[Any] = [row.get("start"), row.get("end")]
    if None in values:
        return None, None
    try:
        start_s, end_s = map(float, values)
    except (TypeError, ValueError) as error:
        raise LeftOut("bounds that are no part of a video", values) from error
    return start_s, end_s


def question_turns(found: Any) -> tuple[list[tuple[Any, Any]], list[str]]:
    """Return the turns of a list of `i`, `q` and `a`, and what was changed.

    Raises:
        LeftOut: it is no such list.
    """
    if not isinstance(found, list) or not found or not all(isinstance(each, dict) for each in found):
        raise LeftOut("a record has no list of questions and answers", found)
    turns: list[tuple[Any, Any]] = []
    task = found[0].get("i")
    changes = []
    for number, each in enumerate(found):
        question, own = each.get("q"), each.get("i")
        if question in (None, ""):
            question = own
        elif number and own not in (None, "", task):
            changes.append(ONE_TASK)
        turns += [("human", question), ("gpt", each.get("a"))]
    if isinstance(task, str) and task.strip() and found[0].get("q") not in (None, ""):
        turns.insert(0, ("system", task))
    return turns, changes


class VideoChatGpt(Layout):
    """Video-ChatGPT's VideoInstruct100K: questions about videos of ActivityNet, one a record.

    Known (mbzuai-oryx/Video-ChatGPT, README and data/; dataset card of MBZUAI/VideoInstruct-100K): a list of `{"q",
    "a", "video_id"}`; a video is called after its id (`v_...`) with one of several suffixes. Which folder it is in is
    the user's choice: the usual names are tried.
    """

    name = "video-chatgpt"
    title = "Video-ChatGPT's VideoInstruct100K (hub: MBZUAI/VideoInstruct-100K)"
    patterns = ("VideoInstruct100K.json",)
    FOLDERS = ("", "videos/", "activitynet_videos/", "training_videos/")
    SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", "")

    def draft(self, row: Any, folder: str) -> Draft:
        """Return a record."""
        row = an_object(row)
        (name,) = paths_of(row.get("video_id"))
        places = tuple(f"{folder}{name}{suffix}" for folder in self.FOLDERS for suffix in self.SUFFIXES)
        return Draft([("human", row.get("q")), ("gpt", row.get("a"))], (Media("video", places),))


DESCRIBE = (
    "Describe this video in detail.",
    "What happens in this video? Tell it in detail.",
    "Give a detailed account of what this video shows.",
    "Explain what can be seen in this video, from its beginning to its end.",
    "Write a thorough description of this video.",
)
"""Requests for a caption; the data set has none of its own."""


class ShareGpt4Video(Layout):
    """ShareGPT4Video's 40K captions.

    Known (dataset card of ShareGPT4Video/ShareGPT4Video; public loaders of it): `sharegpt4video_40k.jsonl` with
    `video_id`, `video_path`, `keyframe`, `captions` (`idx`, `content`), `zip_folder` and `timestamp`; the caption of
    the whole video is that of `idx` -1, the others say what changes from key frame to key frame and are not used; a
    video's path starts from the folder that archives are unpacked to. The question is ours.
    """

    name = "sharegpt4video"
    title = "ShareGPT4Video, captions (hub: ShareGPT4Video/ShareGPT4Video)"
    patterns = ("sharegpt4video_40k.jsonl",)

    def draft(self, row: Any, folder: str) -> Draft:
        """Return a record."""
        row = an_object(row)
        captions = row.get("captions")
        if not isinstance(captions, list) or not all(isinstance(each, dict) for each in captions):
            raise LeftOut("a record has no list of captions", captions)
        whole = [each.get("content") for each in captions if str(each.get("idx")) == "-1"]
        if not whole:
            raise LeftOut("no caption of the whole video")
        (path,) = paths_of(row.get("video_path"))
        places = (path, f"videos/{path}", f"zip_folder/{path}", PurePosixPath(path).name)
        question = draw(DESCRIBE, 1, str(row.get("video_id", path)))[0]
        fields = {"id": row["video_id"]} if "video_id" in row else {}
        return Draft([("human", question), ("gpt", whole[0])], (Media("video", places),), fields)


class ShareGpt4VideoMix(Layout):
    """ShareGPT4Video's mixtures for fine-tuning.

    Known (dataset card of ShareGPT4Video/ShareGPT4Video): the names of the files. That they have LLaVA's layout is
    inferred from their names and from the trainers that take them.
    """

    name = "sharegpt4video-mix"
    title = "ShareGPT4Video, mixtures for fine-tuning (hub: ShareGPT4Video/ShareGPT4Video)"
    patterns = (
        "sharegpt4video_mix181k_vqa-153k_share-cap-28k.json",
        "llava_v1_5_mix665k_with_video_chatgpt72k_share4video28k.json",
    )

    def draft(self, row: Any, folder: str) -> Draft:
        """Return a record."""
        return llava_draft(row, lambda kind, path: (path, f"{kind}s/{path}"))
