"""Snapshot of the public names and signatures: changing one is a decision, and goes into the changelog."""

import inspect
from typing import Any

import pytest

import hicom

NAMES = [
    "HIComConfig",
    "HIComForConditionalGeneration",
    "HIComModel",
    "HIComProcessor",
    "HybridCompressor",
    "VideoChat",
    "__version__",
    "attach",
    "probe",
    "read_frames",
    "register",
]

SIGNATURES = {
    "HybridCompressor": (
        "(*, dim, out_dim, instruction_dim=None, window=(4, 3, 3), num_global_tokens=32, "
        "local_injection='direct', global_injection='coarse', dialect='paper', local_gates='', "
        "global_gates='', local_logit_scale=False, global_logit_scale=False, match_evidence=False, "
        "motion_features=False, num_pointers=0, num_word_pointers=0)"
    ),
    "HybridCompressor.forward": (
        "(values, keys, num_frames, instruction=None, instruction_tokens=None, instruction_mask=None, "
        "window=None, compression='conditional', return_attention=False, video_index=None, has_motion=False)"
    ),
    "HybridCompressor.token_count": "(num_frames, height, width, window=None, compression='conditional')",
    "HybridCompressor.stream": (
        "(instruction=None, instruction_tokens=None, instruction_mask=None, window=None, "
        "compression='conditional', num_frames=None)"
    ),
    "HIComForConditionalGeneration.from_official": "(path, dtype=None)",
    "HIComForConditionalGeneration.forward": (
        "(input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, "
        "labels=None, pixel_values=None, image_instruction_input_ids=None, "
        "image_instruction_attention_mask=None, pixel_values_videos=None, video_num_frames=None, "
        "instruction_input_ids=None, instruction_attention_mask=None, video_values=None, video_keys=None, "
        "window=None, compression=None, video_index=None, use_cache=None, logits_to_keep=0, "
        "expected_media=(), **kwargs)"
    ),
    "HIComModel.get_video_features": (
        "(pixel_values_videos=None, video_num_frames=None, instruction_input_ids=None, "
        "instruction_attention_mask=None, video_values=None, video_keys=None, window=None, "
        "compression='conditional', video_index=None)"
    ),
    "HIComModel.get_image_features": (
        "(pixel_values, instruction_input_ids=None, instruction_attention_mask=None, window=None, "
        "compression='conditional')"
    ),
    "HIComProcessor.__call__": (
        "(text, images=None, videos=None, instruction=None, video_num_frames=None, window=None, "
        "compression='conditional', answer_starts=None, num_frames=None, fps=None, start_s=None, end_s=None, "
        "**kwargs)"
    ),
    "VideoChat.from_pretrained": "(name='hicom-tiny', *, device=None, dtype=None, cache=None, **kwargs)",
    "VideoChat.encode": (
        "(source, *, num_frames=None, fps=None, timestamps_s=None, start_s=None, end_s=None, max_frames=None, "
        "snap=None, source_fps=None, keep_features=True, questions=(), window=None, max_visual_tokens=None)"
    ),
    "VideoChat.live": "(*, keep_features=True, questions=(), window=None, num_frames=None, fps=1.0, name='live video')",
    "VideoChat.ask": (
        "(video, question, *, instruction=None, window=None, max_visual_tokens=None, max_new_tokens=256, **kwargs)"
    ),
    "VideoChat.ask_each": (
        "(videos, questions, *, instructions=None, histories=None, window=None, max_new_tokens=256, **kwargs)"
    ),
    "VideoChat.stream": (
        "(video, question, *, instruction=None, window=None, max_visual_tokens=None, max_new_tokens=256, **kwargs)"
    ),
    "VideoChat.reply": (
        "(messages, videos=(), *, instruction=None, window=None, max_visual_tokens=None, max_new_tokens=256, **kwargs)"
    ),
    "VideoChat.stream_reply": (
        "(messages, videos=(), *, instruction=None, window=None, max_visual_tokens=None, max_new_tokens=256, **kwargs)"
    ),
    "VideoChat.conversation": "(video)",
    "attach": (
        "(model, processor=None, *, dual_encoder, instruction_tokenizer=None, window=None, max_visual_tokens=None, "
        "logit_scale=None, share_tower=None, pool_projected=False, user_turn=None)"
    ),
    "probe": "(source, *, source_fps=25.0)",
    "read_frames": (
        "(source, *, num_frames=None, fps=None, timestamps_s=None, start_s=None, end_s=None, "
        "max_frames=None, size=None, source_fps=25.0, snap='exact')"
    ),
    "register": "()",
}


def resolve(path: str) -> Any:
    """Return what `path` below the package names."""
    found: Any = hicom
    for name in path.split("."):
        found = getattr(found, name)
    return found


def signature(path: str) -> str:
    """Return names, kinds and defaults of the parameters; annotations may get better without a promise being broken."""
    parameters = inspect.signature(resolve(path)).parameters.values()
    plain = [each.replace(annotation=inspect.Parameter.empty) for each in parameters]
    return str(inspect.Signature([each for each in plain if each.name != "self"]))


def test_public_names() -> None:
    assert hicom.__all__ == NAMES
    assert set(NAMES) <= set(dir(hicom))


def test_every_public_name_loads_and_is_documented() -> None:
    for name in NAMES:
        value = getattr(hicom, name)
        assert name == "__version__" or inspect.getdoc(value), name


def test_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert hicom.__version__ == version("hicom")


@pytest.mark.parametrize("path", SIGNATURES)
def test_signature(path: str) -> None:
    assert signature(path) == SIGNATURES[path]
