"""Scenes told in words, with questions about them: what a small language model learns to read from.

The paper's language model can read before it ever sees a video. This text gives a small one with random weights the
same start: a line says of every object its name and where it starts, how it moves and where it ends, and a question
about that follows, as it will follow the visual tokens: `python -m hicom.world.stories --dst stories.jsonl`.
"""

import json
from pathlib import Path

import tyro

from hicom.world.questions import captions, descriptions, questions, side
from hicom.world.scenes import Scene, SceneObject, clip_seed, generator, make_scene

# Seeds of the stories' scenes and questions, far from those of the clips.
_SCENES, _QUESTIONS = 1000, 7


def tell(item: SceneObject) -> str:
    """Return `[colour] name [late] start direction end`; `early` in place of the end of what disappears."""
    start = side(item, item.enter) or "middle"
    end = "early" if item.leave < 1 else side(item, 1.0) or "middle"
    return " ".join([item.name, *(["late"] if item.enter > 0 else []), start, item.direction, end])


def story(scene: Scene) -> str:
    """Return all that is told of a scene, from left to right."""
    return ", ".join(tell(item) for item in sorted(scene.objects, key=lambda item: item.start[0] + item.end[0]))


def write_stories(dst: Path, num_scenes: int, seed: int = 0) -> None:
    """Write LLaVA-style records without videos: a story and a question about it; all in one go.

    Args:
        dst: JSONL file.
        num_scenes: scenes, none of them a clip's.
        seed: the same seed gives the same file.
    """
    dst.parent.mkdir(parents=True, exist_ok=True)
    partial = dst.with_suffix(".part")
    with partial.open("w") as file:
        for index in range(num_scenes):
            scene = make_scene(clip_seed(_SCENES + seed, "train", index))
            rng = generator(_QUESTIONS + seed, index)
            asked = questions(scene, rng)
            longer = [*descriptions(scene, rng), *captions(scene, rng)]
            for question in [*asked, longer[int(rng.integers(len(longer)))]]:
                turns = [("human", f"{story(scene)}\n{question.text}"), ("gpt", question.answer)]
                record = {
                    "family": question.family,
                    "conversations": [{"from": role, "value": value} for role, value in turns],
                }
                file.write(json.dumps(record) + "\n")
    partial.replace(dst)


def main(dst: Path, num_scenes: int = 24000, seed: int = 0) -> None:
    """Write the sprite world's stories.

    Args:
        dst: JSONL file.
        num_scenes: scenes that are told.
        seed: seed of everything.
    """
    write_stories(dst, num_scenes, seed)


if __name__ == "__main__":
    tyro.cli(main)
