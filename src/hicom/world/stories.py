"""Scenes told in words, with questions about them: what a small language model learns to read from.

The paper's language model can read before it ever sees a video. This text gives a small one with random weights the
same start: a line says of every object its name and where it starts, how it moves and where it ends, and a question
about that follows, as it will follow the visual tokens.
"""

import json
from pathlib import Path

from hicom.world.questions import Asker, article, side
from hicom.world.scenes import Scene, SceneObject, WorldConfig, clip_seed, generator, make_scene

# Seeds of the stories' scenes and questions, far from those of the clips.
_SCENES, _QUESTIONS = 1000, 7
CHOICE_SHARE = 0.25


def tell(scene: Scene, item: SceneObject) -> str:
    """Return `[colour] name, start, way, middle, end`, and what else is true of it."""
    words = [item.name]
    for time in (item.enter, (item.enter + item.leave) / 2, item.leave):
        words.append(side(scene, item, time) or "middle")
        if time == item.enter:
            words.append("brief" if item.is_brief else item.way)
    if item.growth != 1:
        words.append("grows" if item.growth > 1 else "shrinks")
    if item.mark:
        words.append(f"{item.mark} dot")
    if item.enter > 0:
        words.append("late")
    if item.leave < 1:
        words.append("early")
    if scene.kind == "pair" and item in scene.objects[:2]:
        words.append(f"beside {article(scene.objects[1 - scene.objects.index(item)].noun)}")
    return " ".join(words)


def story(scene: Scene) -> str:
    """Return all that is told of a scene, in the order in which it appears, then from left to right."""
    ordered = sorted(scene.objects, key=lambda item: (item.enter, item.path[0][0] + item.path[2][0]))
    return ", ".join(tell(scene, item) for item in ordered)


def write_stories(dst: Path, num_scenes: int = 30000, seed: int = 0, config: WorldConfig | None = None) -> Path:
    """Write LLaVA-style records without videos: a story and a question about it; all in one go.

    Args:
        dst: JSONL file; one that is there is kept, since it is written as a whole or not at all.
        num_scenes: scenes, none of them a clip's.
        seed: the same seed gives the same file.
        config: the world's.
    """
    if dst.exists():
        return dst
    config = config or WorldConfig()
    dst.parent.mkdir(parents=True, exist_ok=True)
    partial = dst.with_suffix(".part")
    with partial.open("w") as file:
        for index in range(num_scenes):
            scene = make_scene(clip_seed(_SCENES + seed, "train", index), config)
            rng = generator(_QUESTIONS + seed, index)
            asker = Asker(scene, rng, nouns=config.nouns)
            asked = [asker.as_choice(q) if rng.random() < CHOICE_SHARE else q for q in asker.questions()]
            longer = [*asker.descriptions(), *asker.captions()]
            for question in [*asked, longer[int(rng.integers(len(longer)))]]:
                turns = [("human", f"{story(scene)}\n{question.text}"), ("gpt", question.answer)]
                record = {
                    "family": question.family,
                    "conversations": [{"from": role, "value": value} for role, value in turns],
                }
                file.write(json.dumps(record) + "\n")
    partial.replace(dst)
    return dst
