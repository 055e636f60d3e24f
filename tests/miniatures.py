"""Data sets in the layouts in which they are published, made by hand: few records, tiny media, and their oddities.

No record is taken from a data set; only names of files and fields are.
"""

import csv
import json
import shutil
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from PIL import Image

from media import write_video


@cache
def _samples() -> tuple[Path, Path]:
    """Return a video of half a second and an image, made once."""
    folder = Path(mkdtemp(prefix="hicom-miniatures-"))
    Image.new("RGB", (12, 8), (200, 30, 30)).save(folder / "image.jpg")
    return write_video(folder / "video.mp4", 15, width=32, height=32), folder / "image.jpg"


def videos(folder: Path, *names: str) -> None:
    """Put a video under every name; one without suffix is a folder of frames."""
    for name in names:
        path = folder / name
        if path.suffix:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(_samples()[0], path)
        else:
            images(path, *(f"c01_{number:04}.jpeg" for number in range(1, 4)))


def images(folder: Path, *names: str) -> None:
    """Put an image under every name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_samples()[1], folder / name)


def save(path: Path, records: Iterable[Any]) -> None:
    """Write JSON, or JSONL by the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(list(records), ensure_ascii=False), "utf-8")
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")


def talk(*texts: Any) -> list[dict[str, Any]]:
    """Return turns of a human and of gpt in LLaVA's layout."""
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def llava_pretrain(src: Path) -> None:
    """Captions; one image was never downloaded, one caption is empty."""
    images(src, "images/00001/1.jpg", "images/00001/2.jpg")
    save(
        src / "blip_laion_cc_sbu_558k.json",
        [
            {"id": "1", "image": "00001/1.jpg", "conversations": talk("Describe it.\n<image>", "très joli 日本")},
            {"id": "2", "image": "00001/2.jpg", "conversations": talk("<image>\nWhat is it?", "a wall")},
            {"id": "2", "image": "00001/2.jpg", "conversations": talk("<image>\nWhat is it?", "a wall")},
            {"id": "3", "image": "00001/3.jpg", "conversations": talk("<image>\nWhat is it?", "gone")},
            {"id": "4", "image": "00001/2.jpg", "conversations": talk("<image>\nWhat is it?", " ")},
        ],
    )


def hicom_248k(src: Path) -> None:
    """Several descriptions a clip."""
    videos(src, "split_videos/a_1.mp4")
    turns = talk("<video>\nDescribe the wall.", "It is red.", "Describe the floor.", "It is grey.")
    save(src / "248328_qa_llavaformat.json", [{"video": "a_1.mp4", "conversations": turns}])


MC = (
    "What is red?\nA. the wall\nB. the sky\nC. the dog\nD. the sea\n"
    "Please provide your answer by stating the letter followed by the full option."
)


def llava_video(src: Path) -> None:
    """Two subsets, one of NeXT-QA's names, and LLaVA-Hound with frames elsewhere; `<image>` stands for a video."""
    part = "0_30_s_academic_v0_1"
    source = {"data_source": part}
    videos(src / part, "academic_source/Charades/A.mp4", "academic_source/Charades/B.mp4")
    path = {"video": "academic_source/Charades/A.mp4"}
    gone = {"video": "academic_source/Charades/C.mp4"}
    save(
        src / part / f"{part}_cap_processed.json",
        [
            {"id": "A", "conversations": talk("<image>\nDescribe.", "A wall.")} | path | source,
            {"id": "C", "conversations": talk("<image>\nDescribe.", "A wall.")} | gone | source,
        ],
    )
    save(
        src / part / "0_30_s_academic_oe_v0_1_qa_processed.json",
        [
            {"id": "A-0", "conversations": talk("<image>\nWhat?", "A.", "<image>\nAnd then?", "B.")} | path | source,
            {"id": "A-1", "conversations": talk("What?", "A.", "How many?", 3, "Why?", None, "So?")} | path | source,
        ],
    )
    save(
        src / part / "0_30_s_academic_mc_v0_1_qa_processed.json",
        [{"id": "A-2", "conversations": talk(f"<image>\n{MC}", "A. the wall")} | path | source],
    )
    videos(src / "0_30_s_nextqa", "NextQA/1.mp4")
    save(
        src / "0_30_s_nextqa" / "0_30_s_nextqa_oe_qa_processed.json",
        [{"id": "n", "video": "NextQA/1.mp4", "conversations": talk("<image>\nwhy\nAnswer briefly.", "fun")}],
    )
    save(src / "gpt4o_qa_prompt" / "demonstration_pool.json", [{"not": "a record"}])
    videos(src, "llava_hound/train_300k/v_1")
    save(
        src / "llava_hound" / "sharegptvideo_qa_255k_processed.json",
        [{"id": "h", "video": "shareVideoGPTV/frames/all_frames/v_1", "conversations": talk("<image>\nWhat?", "A.")}],
    )


def videochat2(src: Path) -> None:
    """Captions without a question, choices, clips with bounds, one set in two sizes, images, an answer that is none."""
    videos(src, "TextVR/Video/t/1.mp4", "nextqa/2.mp4", "DiDeMo/3.mp4")
    images(src, "coco_caption/a.jpg")
    caption = [{"i": "Describe the video.", "q": "", "a": "A wall."}, {"i": "Tell it again.", "q": "", "a": "Red."}]
    save(src / "video/caption/textvr/train.json", [{"video": "t/1.mp4", "QA": caption}])
    options = "Question: why\nOptions:\n(A) fun\n(B) rain\n(C) sun"
    choice = {"i": "Choose the best option.", "q": options, "a": "Answer: (A) fun"}
    save(
        src / "video/reasoning/next_qa/train.json",
        [
            {"video": "2.mp4", "QA": [choice, choice | {"i": "Choose one.", "a": "Answer: (C) sun"}]},
            {"video": "2.mp4", "QA": [choice | {"a": ["(A)"]}]},
            {"video": "2.mp4", "QA": []},
        ],
    )
    clip = {"video": "3.mp4", "QA": [{"i": "When?", "q": "", "a": "Now."}]}
    save(
        src / "video/grounding/didemo/train.json",
        [clip | {"start": 0.1, "end": 0.4}, clip | {"start": 3, "end": 1}, clip | {"start": None, "end": None}],
    )
    videos(src, "clevrer/video_train/4.mp4", "video_pub/ssv2_video/5.mp4")
    save(src / "video/reasoning/clevrer_mc/train.json", [{"video": "4.mp4", "QA": [choice]}])
    save(src / "video/classification/ssv2/train.json", [{"video": "5.mp4", "QA": [choice]}])
    for name in ("train", "train_100k"):
        save(
            src / f"image/caption/coco/{name}.json", [{"image": "a.jpg", "QA": [{"i": "Caption?", "q": "", "a": "A."}]}]
        )


def m4_instruct(src: Path) -> None:
    """Several images, as many placeholders as images, fewer, more, none; and one in an answer."""
    images(src, "IEdit/1.png", "IEdit/2.png")
    pair = {"image": ["IEdit/1.png", "IEdit/2.png"], "metadata": {"dataset": "IEdit", "split": "train"}}
    questions = {
        "equal": "<image><image>\nWhat changed?",
        "fewer": "<image>\nWhat changed?",
        "more": "Image 1: <image> Image 2: <image> Image 3: <image> What changed?",
        "none": "What changed?",
    }
    records = [{"sample_id": name, "conversations": talk(text, "Color.")} | pair for name, text in questions.items()]
    records.append({"sample_id": "answer", "conversations": talk("<image><image>\nShow it.", "Here: <image>")} | pair)
    save(src / "m4_instruct_annotations.json", records)


def m4_instruct_video(src: Path) -> None:
    """Videos without suffix, of which one is a file and one a folder of frames."""
    videos(src, "m4_instruct_videos/v_1.mp4", "train_300k/v_2")
    save(
        src / "m4_instruct_video.json",
        [{"id": name, "video": name, "conversations": talk("<image>\nWhat?", "A.")} for name in ("v_1", "v_2", "v_3")],
    )


def charades(src: Path) -> None:
    """A table; one video without actions, one with an unknown one."""
    videos(src, "Charades_v1_480/AAAAA.mp4")
    classes = [f"c{number:03} Doing thing {number}" for number in range(12)]
    (src / "Charades").mkdir(parents=True)
    (src / "Charades" / "Charades_v1_classes.txt").write_text("\n".join(classes) + "\n")
    with (src / "Charades" / "Charades_v1_train.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ("id", "script", "actions", "length"))
        table.writeheader()
        for name, actions in (
            ("AAAAA", "c003 0.00 5.10;c007 1.00 9.00;c003 6.00 7.00"),
            ("BBBBB", ""),
            ("CCCCC", "c099 0.00 1.00"),
            ("DDDDD", "c001 0.00 1.00"),
        ):
            table.writerow({"id": name, "script": 'A person, who "walks"\nand sits', "actions": actions, "length": 9})


def ntu_rgb_d(src: Path) -> None:
    """Names alone; one of no action."""
    videos(src, "nturgb+d_rgb/S001C001P001R001A010_rgb.avi", "nturgb+d_rgb/S001C001P001R001A120_rgb.avi")
    videos(src, "nturgb+d_rgb/S001C001P001R001A121_rgb.avi")


def tvqa(src: Path) -> None:
    """Frames by series; the right answer once as text; the test set's records without one."""
    videos(src, "frames_hq/bbt_frames/s01e01_seg01_clip_00", "frames_hq/house_frames/house_s01e01_seg01_clip_00")
    answers = {f"a{number}": f"answer {number}" for number in range(5)}
    base = {"q": "Who sits  there?", "ts": "1.5-3.2", "show_name": "House M.D."} | answers
    save(
        src / "tvqa_qa_release" / "tvqa_train.jsonl",
        [
            base | {"qid": 1, "vid_name": "s01e01_seg01_clip_00", "answer_idx": 2},
            base | {"qid": 2, "vid_name": "house_s01e01_seg01_clip_00", "answer_idx": "0", "ts": "nan-nan"},
            base | {"qid": 3, "vid_name": "house_s01e01_seg01_clip_00"},
        ],
    )


def moments_in_time(src: Path) -> None:
    """A table without header; labels of several words; an unknown one."""
    videos(src, "training/adult+female+singing/a.mp4")
    (src / "moments_categories.txt").write_text("adult+female+singing,0\nclapping,1\nwalking,2\n")
    (src / "trainingSet.csv").write_text(
        "adult+female+singing/a.mp4,adult+female+singing,3,0\nclapping/b.mp4,clapping,3,1\nx/c.mp4,flying,3,1\n"
    )


def video_chatgpt(src: Path) -> None:
    """Several questions a video; suffixes differ."""
    videos(src, "videos/v_1.mp4", "videos/v_2.mkv")
    records = [("v_1", "What?", "A wall."), ("v_1", "Where?", "There."), ("v_2", "What?", "A."), ("v_3", "What?", "A.")]
    save(src / "VideoInstruct100K.json", [{"q": q, "a": a, "video_id": name} for name, q, a in records])


def sharegpt4video(src: Path) -> None:
    """Captions of key frames and of the whole; one video without the latter."""
    videos(src, "panda/a.mp4")
    part = {"idx": "0", "content": "At first."}
    base = {"keyframe": [0, 14], "timestamp": ["00:00:00", "00:00:01"], "zip_folder": "zip_folder/panda/panda_1.zip"}
    base |= {"video_path": "panda/a.mp4"}
    whole = {"idx": "-1", "content": "A wall, all along."}
    save(
        src / "sharegpt4video_40k.jsonl",
        [base | {"video_id": "a", "captions": [part, whole]}, base | {"video_id": "b", "captions": [part]}],
    )


def sharegpt4video_mix(src: Path) -> None:
    """Videos and images."""
    videos(src, "panda/a.mp4")
    save(
        src / "sharegpt4video_mix181k_vqa-153k_share-cap-28k.json",
        [{"id": "a", "video": "panda/a.mp4", "conversations": talk("<video>\nWhat?", "A.")}],
    )


def llava_instruct(src: Path) -> None:
    """Images, text alone, and text alone that speaks of a tag."""
    images(src, "coco/train2017/1.jpg")
    save(
        src / "llava_v1_5_mix665k.json",
        [
            {"id": "1", "image": "coco/train2017/1.jpg", "conversations": talk("<image>\nWhat?", "A.", "Why?", "B.")},
            {"id": "2", "conversations": talk("2 + 2?", "4")},
            {"id": "3", "model": "", "conversations": talk("What does the tag <video> do?", "It plays a video.")},
        ],
    )


def llava(src: Path) -> None:
    """Whatever a model's own data may be."""
    videos(src, "a.mp4")
    save(
        src / "mine.jsonl",
        [
            {"video": "a.mp4", "conversations": talk("What?", "A.")},
            {
                "video": "a.mp4",
                "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A."}],
            },
        ],
    )


MINIATURES: dict[str, Callable[[Path], None]] = {
    "llava-pretrain": llava_pretrain,
    "hicom-248k": hicom_248k,
    "llava-video": llava_video,
    "videochat2-it": videochat2,
    "m4-instruct": m4_instruct,
    "m4-instruct-video": m4_instruct_video,
    "charades": charades,
    "ntu-rgb-d": ntu_rgb_d,
    "tvqa": tvqa,
    "moments-in-time": moments_in_time,
    "video-chatgpt": video_chatgpt,
    "sharegpt4video": sharegpt4video,
    "sharegpt4video-mix": sharegpt4video_mix,
    "llava-instruct": llava_instruct,
    "llava": llava,
}
"""By the names of `hicom data convert`."""
