"""Where the branches look: maps, pictures, the pointing game on planted attention, and the command."""

import dataclasses
import importlib.util
import json
import math
import re
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

import media
import tiny
from hicom import VideoChat, cli, read_frames
from hicom.look import (
    Maps,
    Target,
    attend,
    bootstrap,
    cover,
    draw_grid,
    draw_moments,
    frame_facts,
    global_map,
    heat_colors,
    look,
    named_object,
    pace,
    pad_to_square,
    point,
    point_at,
    point_in_windows,
    pointing,
    save_look,
    spread_windows,
    window_index,
)
from hicom.model.ops import group_starts, num_groups

QUESTION = "which object moves left ?"
VIEWS = ["conditional local", "conditional global", "unconditional local", "unconditional global"]


def frames(number: int = 6, seed: int = 0, height: int = 24, width: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (number, height, width, 3), dtype=np.uint8)


def make_chat(**kwargs: Any) -> VideoChat:
    model = tiny.model(**kwargs)
    return VideoChat(model, tiny.processor(model.config, num_frames=6))


@pytest.fixture(scope="module")
def chat() -> VideoChat:
    return make_chat()


# Maps


def softmax(shape: tuple[int, ...], num_axes: int, seed: int = 0) -> np.ndarray:
    """Return random weights that sum to 1 over the last axes."""
    weights = np.exp(np.random.default_rng(seed).standard_normal(shape))
    return (weights / weights.sum(tuple(range(-num_axes, 0)), keepdims=True)).astype(np.float32)


def test_pointers_are_a_view_of_the_question_alone() -> None:
    chat = make_chat(num_pointers=2)
    found = look(chat, frames(), QUESTION, max_new_tokens=2)
    assert list(found.views) == [*VIEWS[:2], "conditional pointers", *VIEWS[2:]]
    output = chat.attention(chat.encode(frames()), QUESTION)
    assert output.pointer_attention is not None
    weights = output.pointer_attention[0].numpy()
    np.testing.assert_allclose(found.views["conditional pointers"], weights.mean(0) * weights[0].size, rtol=1e-4)


@pytest.mark.parametrize("grid", [(4, 4, 6), (7, 5, 5), (3, 5, 4), (1, 3, 3)])
@pytest.mark.parametrize("window", [(2, 2, 2), (4, 3, 3), (9, 9, 9)])
def test_local_map_is_the_mean_over_the_windows_of_a_patch(
    grid: tuple[int, int, int], window: tuple[int, int, int]
) -> None:
    sizes = [min(size, length) for size, length in zip(window, grid, strict=True)]
    starts = [group_starts(length, size) for length, size in zip(grid, window, strict=True)]
    windows = softmax((*(num_groups(n, s) for n, s in zip(grid, window, strict=True)), *sizes), 3)
    found = spread_windows(windows, grid)
    for patch in product(*map(range, grid)):
        given = []
        for number in product(*(range(len(each)) for each in starts)):
            inside = [p - axis[n] for p, axis, n in zip(patch, starts, number, strict=True)]
            if all(0 <= i < size for i, size in zip(inside, sizes, strict=True)):
                given.append(float(windows[(*number, *inside)]) * math.prod(sizes))
        assert found[patch] == pytest.approx(np.mean(given), rel=1e-5)
    if all(length % size == 0 for length, size in zip(grid, sizes, strict=True)):
        assert found.mean() == pytest.approx(1, rel=1e-5)


def test_a_patch_of_two_windows_gets_the_mean() -> None:
    assert group_starts(7, 4) == [0, 3]
    windows = np.zeros((2, 1, 1, 4, 1, 1), np.float32)
    windows[0, 0, 0, 3] = windows[1, 0, 0, 1] = 1
    assert spread_windows(windows, (7, 1, 1)).ravel().tolist() == [0, 0, 0, 2, 4, 0, 0]


def test_global_map_is_the_sum_over_heads_and_tokens_in_units_of_even_attention() -> None:
    attention = softmax((2, 3, 4, 5, 5), 3)
    expected = attention.sum((0, 1)) * (4 * 5 * 5) / (2 * 3)
    np.testing.assert_allclose(global_map(attention), expected, rtol=1e-5)
    np.testing.assert_allclose(global_map(np.full((2, 3, 4, 5, 5), 1 / 100)), 1, rtol=1e-6)


def test_maps_of_a_model(chat: VideoChat) -> None:
    video = chat.encode(frames())
    conditional, unconditional = attend(chat, video, QUESTION)
    assert conditional is not None
    assert unconditional is not None
    output = chat.attention(video, QUESTION)
    for maps in (conditional, unconditional):
        assert list(maps.branches) == ["local", "global"]
        assert all(heat.shape == (6, 5, 5) for heat in maps.branches.values())
        assert maps.global_.mean() == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(conditional.windows, output.local_attention[0].numpy())
    np.testing.assert_allclose(
        conditional.global_, output.global_attention[0].sum((0, 1)).numpy() * 150 / 3, rtol=1e-4, atol=1e-6
    )


def test_the_instruction_changes_the_maps_and_the_window_is_used(chat: VideoChat) -> None:
    video = chat.encode(frames())
    one, without = attend(chat, video, QUESTION)
    other, without_again = attend(chat, video, "is there a dog ?")
    for branch, heat in one.branches.items():
        assert np.abs(heat - other.branches[branch]).max() > 1e-4
        assert np.abs(heat - without.branches[branch]).max() > 1e-4
        np.testing.assert_array_equal(without.branches[branch], without_again.branches[branch])
    steered, _ = attend(chat, video, QUESTION, instruction="is there a dog ?")
    np.testing.assert_array_equal(steered.local, other.local)
    wide, _ = attend(chat, video, QUESTION, window=(6, 5, 5))
    assert wide.windows.shape == (1, 1, 1, 6, 5, 5)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"num_global_tokens": 0}, ["conditional local", "unconditional local"]),
        ({"window": None}, ["conditional global", "unconditional global"]),
        ({"dialect": "release", "global_injection": "direct"}, VIEWS[:2]),
        (
            {"compressor": "unconditional", "compressor_options": {"window": (3, 3, 3), "num_global_tokens": 3}},
            VIEWS[2:],
        ),
        ({"compressor": "unconditional_global"}, VIEWS[3:]),
        ({"compressor": "qformer", "compressor_options": {"num_queries": 2, "per_frame": True}}, VIEWS[3:]),
    ],
)
def test_views_are_those_that_a_model_has(options: dict[str, Any], names: list[str], tmp_path: Path) -> None:
    found = look(make_chat(**options), frames(), QUESTION, max_new_tokens=1)
    assert list(found.views) == names
    size = 3 if "compressor" in options else 2  # of the configuration's window, which is that of the compressor "hicom"
    assert found.window == ([size] * 3 if any("local" in name for name in names) else None)
    for heat in found.views.values():
        assert heat.shape == (6, 5, 5)
        assert (heat >= 0).all()
    save_look(found, tmp_path / "look.png")
    assert all(picture.width % 2 == picture.height % 2 == 0 for picture in draw_moments(found))


@pytest.mark.parametrize("compressor", ["space_time_pool", "llava_video", "no_compression"])
def test_a_compressor_without_attention_is_refused(compressor: str) -> None:
    pooling = make_chat(compressor=compressor)
    with pytest.raises(ValueError, match=f"'{compressor}' pools without attention"):
        look(pooling, frames(), QUESTION, max_new_tokens=1)


def test_look_is_what_ask_answers_with_the_frames_it_saw(chat: VideoChat, tmp_path: Path) -> None:
    media.write_video(tmp_path / "clip.mp4", 32)
    found = look(chat, tmp_path / "clip.mp4", QUESTION, num_frames=4, window=(3, 2, 2), size=48, max_new_tokens=4)
    video = chat.encode(tmp_path / "clip.mp4", num_frames=4)
    assert found.answer == chat.ask(video, QUESTION, window=(3, 2, 2), max_new_tokens=4)
    assert found.window == [3, 2, 2]
    budget = look(chat, tmp_path / "clip.mp4", QUESTION, num_frames=4, max_visual_tokens=12, max_new_tokens=1)
    assert budget.answer.num_visual_tokens == 12
    assert math.prod(budget.conditional.windows.shape[:3]) == 12 - 3
    assert list(found.views) == VIEWS
    assert all(heat.shape == (4, 5, 5) for heat in found.views.values())
    assert found.frames.shape == (4, 48, 48, 3)
    np.testing.assert_array_equal(found.timestamps_s, video.timestamps_s)
    # 96x64 pixels in 48x48: the picture lies in the middle of the padding
    numbers = media.read_numbers(found.frames[:, 8:40])
    assert numbers == media.read_numbers(read_frames(tmp_path / "clip.mp4", num_frames=4).frames)


def test_a_part_of_a_video_is_looked_at(chat: VideoChat, clip: Path) -> None:
    part = look(chat, f"{clip}#t=0.2,1", "which ?", num_frames=3, max_new_tokens=2)
    bounds = look(chat, clip, "which ?", num_frames=3, start_s=0.2, end_s=1.0, max_new_tokens=2)
    assert np.array_equal(part.timestamps_s, bounds.timestamps_s)
    assert np.array_equal(part.frames, bounds.frames)


def test_what_comes_once_is_looked_at(chat: VideoChat) -> None:
    shown = frames(6)
    once = look(chat, iter(list(shown)), "which ?", num_frames=3, max_new_tokens=2)
    again = look(chat, shown, "which ?", num_frames=3, max_new_tokens=2)
    assert np.array_equal(once.frames, again.frames)
    assert np.array_equal(once.timestamps_s, again.timestamps_s)


def test_frames_are_padded_as_the_processor_does(chat: VideoChat) -> None:
    wide = frames(2, height=12, width=20)
    square = pad_to_square(wide, chat.processor.image_mean)
    assert square.shape == (2, 20, 20, 3)
    torch.testing.assert_close(chat.processor.pixel_values(square), chat.processor.pixel_values(wide))


def test_facts_of_a_frame() -> None:
    heat = np.zeros((2, 4), np.float32)
    heat[1, 2] = 3
    assert frame_facts(heat, 12) == {
        "share": 0.25,
        "max": 3.0,
        "patch": [1, 2],
        "box": [0.5, 0.5, 0.75, 1.0],
        "centre": [0.625, 0.75],
    }
    assert frame_facts(np.zeros((2, 2), np.float32), 1)["centre"] == [None, None]


# Pictures


@pytest.fixture(scope="module")
def found(chat: VideoChat) -> Any:
    return look(chat, frames(11), QUESTION, num_frames=11, max_new_tokens=3)


def test_png_has_a_row_a_view_and_at_most_eight_columns(chat: VideoChat, found: Any, tmp_path: Path) -> None:
    save_look(found, tmp_path / "look.PNG")
    picture = Image.open(tmp_path / "look.PNG")
    assert picture.size == draw_grid(found).size
    short = draw_grid(look(chat, frames(3), QUESTION, max_new_tokens=3))
    assert picture.width - short.width == 5 * 154
    local = draw_grid(look(make_chat(num_global_tokens=0), frames(11), QUESTION, num_frames=11, max_new_tokens=3))
    assert abs(picture.height - local.height - 2 * 154) < 30  # answers may break into more lines
    assert list(tmp_path.iterdir()) == [tmp_path / "look.PNG"]


def test_gif_and_mp4_hold_all_frames(found: Any, tmp_path: Path) -> None:
    save_look(found, tmp_path / "look.gif")
    save_look(found, tmp_path / "look.mp4")
    picture = Image.open(tmp_path / "look.gif")
    assert (picture.format, picture.n_frames) == ("GIF", 11)
    with av.open(str(tmp_path / "look.mp4")) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 12  # frames at 25 a second are slowed down
    assert len(decoded) == 11
    assert decoded[0].shape[:2] == picture.size[::-1]
    assert all(side % 2 == 0 for side in picture.size)
    gif = np.asarray(picture.convert("RGB"), np.float64)
    assert np.abs(gif - decoded[0]).mean() < 8


def test_one_frame(chat: VideoChat, tmp_path: Path) -> None:
    found = look(chat, frames(1), QUESTION, max_new_tokens=1)
    for suffix in ("png", "gif", "mp4"):
        save_look(found, tmp_path / f"look.{suffix}")
    assert len(read_frames(tmp_path / "look.mp4").frames) == 1


@pytest.mark.parametrize("question", ["Где кот? 猫はどこ 🟥\n\tdog", "dog " * 300, "x" * 900, "lone \udcff surrogate"])
def test_any_text_can_be_drawn(found: Any, question: str) -> None:
    strange = dataclasses.replace(found, question=question)
    assert draw_grid(strange).height > draw_grid(found).height - 30


def test_unknown_suffix_missing_folder_and_failure_leave_nothing(
    found: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=re.escape("'.webm' is none of .png, .gif and .mp4")):
        save_look(found, tmp_path / "look.webm")
    with pytest.raises(ValueError, match="there is no folder"):
        save_look(found, tmp_path / "nowhere" / "look.png")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory left")

    (tmp_path / "look.mp4").write_text("the last one")
    monkeypatch.setattr(av, "VideoFrame", SimpleNamespace(from_ndarray=fail))  # PyAV's own class takes no other method
    with pytest.raises(RuntimeError, match="no memory left"):
        save_look(found, tmp_path / "look.mp4")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["the last one"]


def test_colours_are_read_in_order() -> None:
    colors = heat_colors(np.array([0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 100], np.float32))
    lightness = colors @ [0.299, 0.587, 0.114]
    assert lightness[0] == lightness[1] == lightness[2]
    assert (np.diff(lightness[2:9]) > 10).all()
    assert lightness[8] == lightness[9]


def test_pace_is_the_videos_own_within_limits() -> None:
    assert pace(np.array([0.0, 0.25, 0.5])) == 4
    assert pace(np.array([0.0, 10.0, 20.0])) == 2
    assert pace(np.array([0.0, 0.01, 0.02])) == 12
    assert pace(np.array([3.0])) == 2


# Pointing game


def test_cover_is_the_share_of_every_patch() -> None:
    covers = cover([0.25, 0.0, 0.625, 0.5], (2, 4))
    np.testing.assert_allclose(covers, [[0, 1, 0.5, 0], [0, 0, 0, 0]])
    assert not cover(None, (2, 4)).any()
    np.testing.assert_allclose(cover([-1, -1, 2, 2], (3, 3)), 1)
    # A frame twice as wide as high fills the middle half of its square.
    np.testing.assert_allclose(cover([0, 0, 1, 1], (4, 4), (10, 20)).sum(1), [0, 4, 4, 0])


def covers_of_a_corner() -> np.ndarray:
    """Return float32[3, 4, 4]: an object that fills the upper left quarter, and is away in the last frame."""
    covers = np.zeros((3, 4, 4), np.float32)
    covers[:2, :2, :2] = 1
    return covers


def test_even_attention_has_gain_one() -> None:
    covers = covers_of_a_corner() * np.float32(0.7)
    found = point(np.ones((3, 4, 4), np.float32), covers)
    assert found == pytest.approx({"share": 0.175, "gain": 1.0, "hit": 0.25, "hit_chance": 0.25})
    found = point_in_windows(np.full((2, 2, 2, 2, 2, 2), 1 / 8), covers[[0, 1, 1, 2]])
    assert found == pytest.approx({"window_share": 0.7 * 0.75, "window_gain": 1.0})


def test_all_attention_in_the_box() -> None:
    covers = covers_of_a_corner()
    heat = covers.copy()
    heat[2] = 100  # does not count: the object is away
    heat[1, 0, 0] = 5
    assert point(heat, covers) == pytest.approx({"share": 1, "gain": 4, "hit": 1, "hit_chance": 0.25})


def test_a_miss_and_half_a_hit() -> None:
    covers = covers_of_a_corner()
    heat = np.zeros((3, 4, 4), np.float32)
    heat[:, 3, 3] = 2
    assert point(heat, covers) == pytest.approx({"share": 0, "gain": 0, "hit": 0, "hit_chance": 0.25})
    heat[0, 1, 1] = 2  # as strong as the one beside the box
    assert point(heat, covers) == pytest.approx({"share": 1 / 3, "gain": 4 / 3, "hit": 0.25, "hit_chance": 0.25})


def test_windows_without_the_object_do_not_count() -> None:
    covers = np.zeros((2, 4, 4), np.float32)
    covers[0, 0, 0] = covers[0, 2, 2] = 1
    windows = np.zeros((1, 2, 2, 2, 2, 2), np.float32)
    windows[0, 0, 0, 0, 0, 0] = 1  # on the object
    windows[0, 1, 1, 1, 0, 0] = 1  # in the window of its other part, beside it
    windows[0, 0, 1] = windows[0, 1, 0] = 1 / 8
    assert point_in_windows(windows, covers) == pytest.approx({"window_share": 0.5, "window_gain": 4})
    maps = Maps(spread_windows(windows, (2, 4, 4)), None, windows)
    found = point_at(maps, covers, np.zeros_like(covers))
    assert list(found) == ["local"]
    assert found["local"]["share"] == pytest.approx(8 / (8 + 4 + 4))
    assert "others_gain" not in found["local"]


def test_overlapping_windows_each_count() -> None:
    covers = np.zeros((3, 1, 1), np.float32)
    covers[1] = 1
    windows = np.array([[0.25, 0.75], [1, 0]], np.float32).reshape(2, 1, 1, 2, 1, 1)
    assert window_index(windows.shape, (3, 1, 1))[0].squeeze().tolist() == [[0, 1], [1, 2]]
    assert point_in_windows(windows, covers) == pytest.approx({"window_share": 0.875, "window_gain": 1.75})


def test_an_object_that_is_never_seen_is_an_error() -> None:
    nothing = np.zeros((2, 2, 2), np.float32)
    with pytest.raises(ValueError, match="visible in none of the frames"):
        point(np.ones((2, 2, 2), np.float32), nothing)
    with pytest.raises(ValueError, match="visible in none of the frames"):
        point_in_windows(np.ones((1, 1, 1, 2, 2, 2), np.float32), nothing)


@pytest.mark.parametrize(
    ("question", "names", "number"),
    [
        ("What color is the cross?", ["bus", "red cross"], 1),
        ("Is the DOG here?", ["dog"], 0),
        ("Where is the blue circle?", ["red circle", "blue circle"], 1),
        ("Where is the circle?", ["red circle", "blue circle"], None),
        ("Where is the carpet?", ["car"], None),
        ("Which object moves left?", ["dog", "cat"], None),
        ("Is the dog near the cat?", ["dog", "cat"], None),
        ("Anything?", [], None),
    ],
)
def test_named_object(question: str, names: list[str], number: int | None) -> None:
    assert named_object(question, names) == number


def test_bootstrap_is_repeatable_and_draws_whole_groups() -> None:
    values = np.random.default_rng(0).standard_normal(200).tolist()
    alone = bootstrap(values, range(200))
    assert alone == bootstrap(values, range(200))
    low, high = alone
    assert low < np.mean(values) < high
    assert high - low == pytest.approx(2 * 1.96 * np.std(values) / math.sqrt(200), rel=0.1)
    # The same number ten times in each group tells no more than once.
    low, high = bootstrap([each for each in values[:20] for _ in range(10)], [i // 10 for i in range(200)])
    assert (low, high) == pytest.approx(bootstrap(values[:20], range(20)))
    assert bootstrap([2.0, 2.0], "ab") == (2.0, 2.0)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return media.write_video(tmp_path / "clip.mp4", 12, fps=6, width=64)


def test_pointing_compares_both_views(chat: VideoChat, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corner, away = [[0.0, 0.0, 0.4, 0.4]] * 12, [None] * 12
    video = chat.encode(clip)
    covers = np.zeros(video.kept_features.values.shape[:3], np.float32)
    covers[:, :2, :2] = 1
    planted = Maps(None, covers), Maps(None, np.ones_like(covers))
    monkeypatch.setattr("hicom.look.attend", lambda *_, **__: planted)
    other = [[0.6, 0.6, 1.0, 1.0]] * 12
    targets = [Target(clip, "dog ?", corner, 6, [other]), Target(clip, "cat ?", away, 6), Target(clip, "a", corner, 6)]
    found = pointing(chat, targets)
    assert json.loads(json.dumps(found))["num_unseen"] == 1
    assert (found["num_questions"], found["num_clips"]) == (2, 1)
    assert list(found["views"]) == ["conditional global", "unconditional global", "difference global"]
    means = {view: {name: each["mean"] for name, each in row.items()} for view, row in found["views"].items()}
    assert means["conditional global"] == pytest.approx(
        {"share": 1, "gain": 25 / 4, "hit": 1, "hit_chance": 4 / 25, "others_gain": 0}, rel=1e-5
    )
    assert means["unconditional global"] == pytest.approx(
        {"share": 4 / 25, "gain": 1, "hit": 4 / 25, "hit_chance": 4 / 25, "others_gain": 1}, rel=1e-5
    )
    assert means["difference global"] == pytest.approx(
        {"share": 21 / 25, "gain": 21 / 4, "hit": 21 / 25, "others_gain": -1}, rel=1e-5
    )
    assert found["views"]["conditional global"]["others_gain"]["n"] == 1


def test_pointing_of_a_model_and_wrong_truth(chat: VideoChat, clip: Path) -> None:
    boxes = [[0.1, 0.1, 0.5, 0.6]] * 12
    found = pointing(chat, [Target(clip, QUESTION, boxes, 6)], num_frames=3, window=(2, 3, 3))
    assert {"window_share", "window_gain"} <= set(found["views"]["conditional local"])
    assert [view.split()[0] for view in found["views"]] == ["conditional"] * 2 + ["unconditional"] * 2 + [
        "difference"
    ] * 2
    with pytest.raises(ValueError, match=r"clip\.mp4 has a frame at .* the truth belongs to another clip"):
        pointing(chat, [Target(clip, QUESTION, boxes[:5], 6)])
    with pytest.raises(ValueError, match="no question that names an object visible"):
        pointing(chat, [Target(clip, QUESTION, [None] * 12, 6)])


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """Return `benchmarks/pointing.py` as a module."""
    path = Path(__file__).parents[1] / "benchmarks" / "pointing.py"
    spec = importlib.util.spec_from_file_location("pointing_benchmark", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module


def test_benchmark_reads_the_world_and_writes_its_table(benchmark: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    box = [0.0, 0.0, 0.5, 0.5]
    dog, cross = {"name": "dog", "boxes": [box] * 4}, {"name": "red cross", "first_frame": 1, "boxes": [box, box]}
    truth = [{"video": f"test/{i}.mp4", "num_frames": 4, "fps": 8, "objects": [dog, cross]} for i in range(2)]
    (tmp_path / "test" / "truth.jsonl").write_text("".join(json.dumps(each) + "\n" for each in truth))
    asked = [
        ("colour", "What color is the cross?", "red", 0),
        ("presence", "Is there a dog?", "yes", 0),
        ("presence", "Is there a cat?", "no", 0),
        ("count", "How many dogs?", "one", 0),
        ("direction", "Where does the dog go?", "left", 1),
    ]
    rows = [
        {
            "video": f"test/{clip}.mp4",
            "conversations": [{"from": "human", "value": f"<video>\n{text}"}, {"from": "gpt", "value": answer}],
            "family": family,
        }
        for family, text, answer, clip in asked
    ]
    (tmp_path / "test" / "tune.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cross_target, dog_target, *rest = benchmark.read_targets(tmp_path, "test")
    assert cross_target == Target(
        tmp_path / "test/0.mp4", "What color is the cross?", [None, box, box, None], 8, [[box] * 4]
    )
    assert (dog_target.question, dog_target.boxes) == ("Is there a dog?", [box] * 4)
    assert [each.video.name for each in rest] == ["1.mp4"]
    assert len(list(benchmark.read_targets(tmp_path, "test", 1))) == 2

    number = {"mean": 2.0, "interval": (1.5, 2.5), "n": 3}
    facts = {"model": "m", "split": "test", "num_frames": 8, "window": [2, 4, 4], "date": "today", "commit": "abc"}
    results = {**facts, "num_questions": 3, "num_clips": 2, "views": {"conditional local": {"gain": number}}}
    page = tmp_path / "look.md"
    page.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    benchmark.write_results(tmp_path / "results" / "pointing.json", results, page)
    assert json.loads((tmp_path / "results" / "pointing.json").read_text())["num_clips"] == 2
    text = page.read_text()
    assert "| conditional local | 2.000 (1.500 to 2.500) |" in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")


# The command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"))


def run(capfd: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    return cli.main([str(arg) for arg in ("look", *args)]), *capfd.readouterr()


@pytest.mark.parametrize("suffix", ["png", "gif", "mp4"])
def test_command_writes_the_picture(
    capfd: pytest.CaptureFixture[str], model: Path, clip: Path, tmp_path: Path, suffix: str
) -> None:
    output = tmp_path / f"look.{suffix}"
    options = ["--model", model, "--num-frames", 3, "--window", 2, 3, 3, "--max-new-tokens", 3]
    code, out, err = run(capfd, clip, QUESTION, "-o", output, *options)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == f"written  {output}"
    assert output.stat().st_size > 1000


def test_command_prints_json(capfd: pytest.CaptureFixture[str], model: Path, clip: Path, tmp_path: Path) -> None:
    code, out, _ = run(capfd, clip, QUESTION, "-o", tmp_path / "a.png", "--model", model, "--json")
    assert code == 0
    facts = json.loads(out)
    assert list(facts["views"]) == VIEWS
    assert facts["output"] == str(tmp_path / "a.png")
    for rows in facts["views"].values():
        assert [row["time_s"] for row in rows] == facts["timestamps_s"]
        assert sum(row["share"] for row in rows) == pytest.approx(1, rel=1e-5)
        assert all(0 <= place <= 1 for row in rows for place in [*row["box"], *row["centre"]])


@pytest.mark.parametrize(
    ("video", "question", "output", "message"),
    [
        ("missing.mp4", QUESTION, "a.png", "missing.mp4"),
        ("clip.mp4", " ", "a.png", "the question is empty"),
        ("clip.mp4", QUESTION, "a.webm", "'.webm' is none of .png, .gif and .mp4"),
        ("clip.mp4", QUESTION, "nowhere/a.png", "there is no folder"),
    ],
)
def test_wrong_input_is_one_line(
    capfd: pytest.CaptureFixture[str],
    model: Path,
    clip: Path,
    tmp_path: Path,
    video: str,
    question: str,
    output: str,
    message: str,
) -> None:
    code, out, err = run(capfd, clip.parent / video, question, "-o", tmp_path / output, "--model", model)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("hicom: error: ")
    assert message in err


def test_command_needs_a_compressor_with_attention(
    capfd: pytest.CaptureFixture[str], clip: Path, tmp_path: Path
) -> None:
    pooling = tiny.model(compressor="space_time_pool", compressor_options={"window": [2, 2, 2]})
    pooling.save_pretrained(tmp_path / "model")
    tiny.processor(pooling.config).save_pretrained(tmp_path / "model")
    code, out, err = run(capfd, clip, QUESTION, "-o", tmp_path / "a.png", "--model", tmp_path / "model")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "choose a model with the compressor 'hicom'" in err
    assert not (tmp_path / "a.png").exists()


def test_command_needs_an_output(capfd: pytest.CaptureFixture[str], clip: Path) -> None:
    code, out, err = run(capfd, clip, QUESTION)
    assert (code, out) == (2, "")
    assert "--output" in err
