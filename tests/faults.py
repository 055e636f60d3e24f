"""Break the code on purpose and see that the tests notice: `python tests/faults.py [WORDS]` rewrites docs/testing.md.

With words it runs the faults whose names hold them, and leaves the other rows of the table as they are.

Each fault replaces one piece of the source in a copy of `src/` and runs the one test that must fail. A fault that no
longer applies, or that its test no longer notices, is an error: then either the test or this list is out of date.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPS, COMPRESSOR = "hicom/model/ops.py", "hicom/model/compressor.py"
MODELING, PROCESSING = "hicom/model/modeling.py", "hicom/model/processing.py"
GENERATION, TRAINER = "hicom/model/generation.py", "hicom/train/trainer.py"
INFERENCE, CONVERT = "hicom/inference.py", "hicom/model/convert.py"
DROP_IN, DUAL_ENCODER = "hicom/drop_in.py", "hicom/model/dual_encoder.py"
CHOOSE, SOURCES = "hicom/video/choose.py", "hicom/video/sources.py"
STAGES, RUN, COLLATE = "hicom/train/stages.py", "hicom/train/run.py", "hicom/data/collate.py"
ESTIMATE, TRAIN_CONFIG, EVAL_RECORDS = "hicom/train/estimate.py", "hicom/train/config.py", "hicom/eval/records.py"
ENGINES, FEATURES = "hicom/train/engines.py", "hicom/data/features.py"
SCENES, TOWERS = "hicom/world/scenes.py", "hicom/world/towers.py"
LOOP, READER, OPTIM = "hicom/world/loop.py", "hicom/world/reader.py", "hicom/optim.py"
TEXT_TOWER = "hicom/world/text_tower.py"
OPTIONS, LOOK, DOMAIN = "hicom/model/options.py", "hicom/look.py", "hicom/data/domain.py"
INSTRUCTION, ANSWERS, STATISTICS = "hicom/model/instruction.py", "hicom/eval/answers.py", "hicom/eval/statistics.py"
SERVE = "hicom/serve"
EVAL_RUN, RESULTS, BUILD = "hicom/eval/run.py", "hicom/eval/results.py", "hicom/data/build"
QUESTIONS, RENDER, DATASET = "hicom/world/questions.py", "hicom/world/render.py", "hicom/world/dataset.py"


@dataclass(frozen=True)
class Fault:
    """One deliberate fault: what breaks, where, and which test must notice."""

    what: str
    path: str
    old: str
    new: str
    test: str


FAULTS = [
    Fault(
        "windows: the short steps come first instead of last",
        OPS,
        "(step >= groups - 1 - extra)",
        "(step < extra)",
        "tests/model/test_ops.py::test_group_starts_by_hand",
    ),
    Fault(
        "token count rounds down",
        OPS,
        "return -(-length // size)",
        "return max(1, length // size)",
        "tests/model/test_ops.py::test_token_count",
    ),
    Fault(
        "values of the paper's global branch get positions",
        COMPRESSOR,
        '        if self.dialect == "release":\n            context = context +',
        "        if True:\n            context = context +",
        "tests/model/test_compressor.py::test_equals_reference",
    ),
    Fault(
        "the paper's coarse injection normalises after the modulation",
        COMPRESSOR,
        "self.norm(x_VND) * scale + shift",
        "self.norm(x_VND * scale + shift)",
        "tests/model/test_compressor.py::test_equals_reference",
    ),
    Fault(
        "gates blend the wrong way round",
        COMPRESSOR,
        "(1 - self.alpha) * x + self.alpha * self.norm(self.proj(x))",
        "self.alpha * x + (1 - self.alpha) * self.norm(self.proj(x))",
        "tests/model/test_convert.py::test_golden_parity or tests/model/test_compressor.py::test_equals_reference",
    ),
    Fault(
        "no gradient to the keys",
        COMPRESSOR,
        "        if self.key_gate is not None:\n",
        "        keys = keys.detach()\n        if self.key_gate is not None:\n",
        "tests/model/test_compressor.py::test_equals_reference",
    ),
    Fault(
        "no gradient to the query's gate",
        COMPRESSOR,
        "query = self.query_gate(query)",
        "query = self.query_gate(query).detach()",
        "tests/model/test_compressor.py::test_every_trainable_parameter_gets_a_gradient",
    ),
    Fault(
        "local windows are not masked in a batch with shorter videos",
        COMPRESSOR,
        'return logits.masked_fill(~rearrange(plan.mask, "g t -> g 1 1 t 1 1"), -math.inf)',
        "return logits",
        "tests/model/test_compressor.py::test_batch_equals_one_by_one",
    ),
    Fault(
        "the global branch sees its neighbours' padding",
        COMPRESSOR,
        'else logits.masked_fill_(~rearrange(real_VT, "v t -> v 1 t 1 1"), -math.inf)',
        "else logits",
        "tests/model/test_compressor.py::test_batch_equals_one_by_one",
    ),
    Fault(
        "every window takes the first video's instruction",
        COMPRESSOR,
        "frame_video[plan.index] = plan.video[:, None]",
        "pass",
        "tests/model/test_compressor.py::test_batch_equals_one_by_one",
    ),
    Fault(
        "the online softmax forgets to rescale",
        COMPRESSOR,
        "decay = (self.maximum - maximum).exp()",
        "decay = torch.ones_like(maximum)",
        "tests/model/test_compressor.py::test_stream_equals_one_shot",
    ),
    Fault(
        "a live stream closes windows that its length may still move",
        OPS,
        "        closed = min(closed, regular)",
        "        pass",
        "tests/model/test_ops.py::test_closed_groups_stay_where_they_are_whatever_follows",
    ),
    Fault(
        "learnable tokens start at zero, as in the release",
        COMPRESSOR,
        "nn.init.normal_(self.global_.query, std=0.02)",
        "nn.init.zeros_(self.global_.query)",
        "tests/model/test_compressor.py::test_global_tokens_differ_and_only_the_instruction_steers",
    ),
    Fault(
        "the instruction is ignored",
        MODELING,
        "            pooled, tokens = self.encode_instruction(instruction_input_ids, instruction_attention_mask)\n",
        "            pooled, tokens = self.encode_instruction(instruction_input_ids * 0, instruction_attention_mask)\n",
        "tests/model/test_modeling.py::test_instruction_changes_visual_tokens_and_answer_logits",
    ),
    Fault(
        "attention maps are always returned",
        COMPRESSOR,
        "self.global_(values, num_frames, guide, compression, return_attention)",
        "self.global_(values, num_frames, guide, compression, True)",
        "tests/model/test_compressor.py::test_attention_maps_sum_to_one_and_come_on_request_only",
    ),
    Fault(
        "the run-time window is ignored",
        COMPRESSOR,
        "return self.window if window is None else check_window(window)",
        "return self.window",
        "tests/model/test_modeling.py::test_run_time_window_and_compression_modes",
    ),
    Fault(
        "values come from the last layer instead of the one before",
        MODELING,
        "layers[number].register_forward_pre_hook(keep)",
        "layers[number].register_forward_hook(lambda module, args, output: keep(module, (output,)))",
        "tests/model/test_convert.py::test_golden_parity",
    ),
    Fault(
        "keys lose the residual of the pooling head",
        DUAL_ENCODER,
        "return last_FND + head.mlp(",
        "return head.mlp(",
        "tests/model/test_convert.py::test_golden_parity",
    ),
    Fault(
        "a prompt is compressed at every step of generation",
        GENERATION,
        '            kwargs["inputs_embeds"] = self.model.embed(input_ids, **media)\n',
        "            [self.model.embed(input_ids, **media) for _ in range(2)]\n"
        '            kwargs["inputs_embeds"] = self.model.embed(input_ids, **media)\n',
        "tests/model/test_modeling.py::test_encoder_runs_once_per_generate",
    ),
    Fault(
        "prompts are padded on the right",
        "hicom/model/token_rows.py",
        'before = self.side == "left"',
        'before = self.side == "right"',
        "tests/model/test_processing.py::test_left_padding",
    ),
    Fault(
        "the loss covers the question too",
        "hicom/model/token_rows.py",
        "return np.where(is_answer, ids, -100)",
        "return ids",
        "tests/model/test_processing.py::test_labels_cover_the_last_answer_and_its_end",
    ),
    Fault(
        "loading only warns about wrong tensors",
        MODELING,
        "        raise_on_problems(str(pretrained_model_name_or_path), problems)\n",
        "",
        "tests/model/test_modeling.py::test_checkpoint_with_wrong_tensors_is_refused_by_name",
    ),
    Fault(
        "the processor forgets its numbers when saved",
        PROCESSING,
        "self.image_mean = list(image_mean)",
        "self.image_mean = [0.5, 0.5, 0.5]",
        "tests/model/test_processing.py::test_save_and_load",
    ),
    Fault(
        "pickled weights are not recognised",
        CONVERT,
        'if p.suffix in (".bin", ".pt", ".pth", ".pkl")',
        "if False",
        "tests/model/test_convert.py::test_pickled_weights_are_refused",
    ),
    Fault(
        "the second question keeps the first one's visual tokens",
        INFERENCE,
        "texts = [_instruction(*pair) for pair in zip(conversations, instructions, strict=True)]",
        "texts = [_instruction(conversations[0], instruction) for instruction in instructions]",
        "tests/test_inference.py::test_many_questions_in_one_batch_equal_one_by_one",
    ),
    Fault(
        "an error while streaming is swallowed",
        INFERENCE,
        "        ids = generation.result()\n",
        "        ids = torch.zeros(1, 1) if generation.exception() else generation.result()\n",
        "tests/test_inference.py::test_error_in_the_generation_thread_reaches_the_caller",
    ),
    Fault(
        "frames are chosen at the segments' starts",
        CHOOSE,
        "((2 * i + 1) * (total - 1) + num_frames) // (2 * num_frames)",
        "(2 * i * (total - 1) + num_frames) // (2 * num_frames)",
        "tests/test_video.py::test_uniform_indices_are_the_middles_of_equal_segments",
    ),
    Fault(
        "a folder of frames is read in alphabetical order",
        SOURCES,
        "files.sort(key=_natural)",
        "files.sort()",
        "tests/test_video.py::test_a_folder_is_read_in_natural_order",
    ),
    Fault(
        "frozen parameters are trained too",
        STAGES,
        "parameter.requires_grad_(rule is not None and rule.rate > 0)",
        "parameter.requires_grad_(True)",
        "tests/train/test_stages.py::test_first_match_wins_and_the_rest_is_frozen",
    ),
    Fault(
        "the optimizer moves frozen parameters",
        TRAINER,
        "            self.optimizer = make_optimizer(\n",
        "            self.model.model.vision_tower.post_layernorm.weight.data.add_(1)\n"
        "            self.optimizer = make_optimizer(\n",
        "tests/train/test_stages.py::test_every_trainable_parameter_learns_and_frozen_ones_stay",
    ),
    Fault(
        "an interrupted run starts from nothing",
        RUN,
        "resume_from_checkpoint=None if checkpoint is None else str(checkpoint)",
        "resume_from_checkpoint=None",
        "tests/train/test_run.py::test_resumes_exactly_after_a_kill",
    ),
    Fault(
        "two processes train on the same samples at the same rate as one on half as many",
        TRAINER,
        "        per_device_train_batch_size=config.batch_size,",
        "        per_device_train_batch_size=config.batch_size * num_processes(),",
        "tests/train/test_run.py::test_two_processes_are_one",
    ),
    Fault(
        "a batch of text alone leaves towers and compressor out, so processes wait for each other for ever",
        MODELING,
        '        elif "pixel_values" in expected_media:',
        "        elif False:",
        "tests/train/test_scale.py::test_every_batch_makes_the_same_calls",
    ),
    Fault(
        "the main process saves its own part of spread weights as the trained model",
        RUN,
        "whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)",
        "whole = {n: getattr(w, '_local_tensor', w) for n, w in model.state_dict().items()}",
        "tests/train/test_scale.py::test_mixed_batches_in_two_processes_are_one",
    ),
    Fault(
        "gradient checkpointing is not switched on",
        ENGINES,
        "    if gradient_checkpointing:\n",
        "    if False:\n",
        "tests/train/test_scale.py::test_gradient_checkpointing_is_switched_on",
    ),
    Fault(
        "every process computes all features",
        "hicom/locks.py",
        "        yield False\n        return",
        "        yield True\n        return",
        "tests/train/test_scale.py::test_processes_share_the_computation_of_features",
    ),
    Fault(
        "the window of a batch is drawn anew every time",
        COLLATE,
        'random.Random(f"{self.seed} {numbers}")',
        "random.SystemRandom()",
        "tests/data/test_collate.py::test_windows_depend_on_the_samples_alone",
    ),
    Fault(
        "clips of all splits share their seeds",
        SCENES,
        "return (seed, SPLITS.index(split), index)",
        "return (seed, 0, index)",
        "tests/world/test_scenes.py::test_splits_are_disjoint",
    ),
    Fault(
        "training shows the held-out pairs of nouns",
        SCENES,
        "        elif any(held_out):\n            continue\n",
        "",
        "tests/world/test_scenes.py::test_held_out_pairs_are_seen_in_their_split_alone",
    ),
    Fault(
        "boxes are a tenth too small",
        SCENES,
        "half = [0.5 * length * part for part in extent]",
        "half = [0.45 * length * part for part in extent]",
        "tests/world/test_render.py::test_boxes_are_the_extent_of_what_is_drawn",
    ),
    Fault(
        "the right option comes first more often",
        QUESTIONS,
        "place = int(self.rng.integers(len(options) + 1))",
        "place = int(self.rng.integers(len(options) + 1) * (self.rng.random() < 0.7))",
        "tests/world/test_questions.py::test_words_alone_stay_at_chance",
    ),
    Fault(
        "where something ends is answered by where it is in the middle",
        QUESTIONS,
        '("position_end", 1.0)',
        '("position_end", 0.5)',
        "tests/world/test_questions.py::test_answers_follow_from_the_ground_truth",
    ),
    Fault(
        "masks show what is hidden",
        RENDER,
        "labels[area][solid] = label",
        "labels[area][solid & (labels[area] == 0)] = label",
        "tests/world/test_render.py::test_the_object_on_top_hides_the_one_below",
    ),
    Fault(
        "a data set that lost a clip looks finished",
        DATASET,
        "if not (dst / video_name(split, i)).exists()",
        "if not dst.exists()",
        "tests/world/test_dataset.py::test_a_lost_file_is_noticed_and_restored",
    ),
    Fault(
        "training of the towers resumes without its optimizer",
        LOOP,
        'optimizer.load_state_dict(state["optimizer"])',
        "pass",
        "tests/world/test_towers.py::test_resumed_training_equals_uninterrupted",
    ),
    Fault(
        "texts about what is next to a thing point at the thing",
        TOWERS,
        "frame, _, other = neighbours.T",
        "frame, other, _ = neighbours.T",
        "tests/world/test_towers.py::test_a_text_about_a_neighbour_is_to_point_at_the_neighbour_alone",
    ),
    Fault(
        "nothing makes texts point at neighbours",
        TOWERS,
        "(by_mark + by_dot + by_neighbour)",
        "(by_mark + by_dot)",
        "tests/world/test_towers.py::test_the_loss_points_from_a_thing_to_the_one_next_to_it",
    ),
    Fault(
        "Muon's state is lost when a run goes on",
        OPTIM,
        "            part.load_state_dict(state)\n",
        "            pass\n",
        "tests/test_optim.py::test_one_schedule_rules_both_and_a_run_goes_on_exactly",
    ),
    Fault(
        "a file of records forgets which sample is about which video",
        "hicom/data/records.py",
        "digest_size=16).digest(), len(known))",
        "digest_size=16).digest(), 0)",
        "tests/data/test_records.py::test_what_sorts_samples_is_known_without_reading_them",
    ),
    Fault(
        "questions about one story see each other",
        READER,
        "past & ((key == 0) | (key == query))",
        "past",
        "tests/world/test_reader.py::test_questions_of_a_row_are_asked_as_if_alone",
    ),
    Fault(
        "a head that looks back looks ahead",
        READER,
        "-(turn * distance).sin()",
        "(turn * distance).sin()",
        "tests/world/test_reader.py::test_first_heads_look_back",
    ),
    Fault(
        "a head that looks for the same word looks in the fast pairs",
        READER,
        "slow, fast, dim = turn < 0.01, turn > 0.1",
        "slow, fast, dim = turn > 0.01, turn > 0.1",
        "tests/world/test_reader.py::test_last_heads_find_a_word_again",
    ),
    Fault(
        "drills also ask which option comes next",
        READER,
        '[question.form != "drill"] * len(answer)',
        "[True] * len(answer)",
        "tests/world/test_reader.py::test_drills_ask_for_letters_alone",
    ),
    Fault(
        "Muon takes the output matrix of the language model",
        OPTIM,
        "isinstance(m, nn.Linear) and m is not head",
        "isinstance(m, nn.Linear)",
        "tests/test_optim.py::test_the_output_matrix_of_a_language_model_is_no_matter_of_muon",
    ),
    Fault(
        "texts about dots point at one corner of the frame",
        TOWERS,
        "* dense, patch) if len(dots)",
        "* dense, torch.zeros_like(patch)) if len(dots)",
        "tests/world/test_towers.py::test_the_loss_puts_what_is_asked_into_texts_and_dots_into_patches",
    ),
    Fault(
        "all questions of a batch get the first video",
        OPS,
        "torch.cat([parts[video] for video in video_index])",
        "torch.cat([parts[0] for video in video_index])",
        "tests/model/test_compressor.py::test_several_instructions_about_one_video_equal_copies_of_it",
    ),
    Fault(
        "a batch takes every video for its first one",
        COLLATE,
        "[shown.index(video) for video in videos]",
        "[0 for video in videos]",
        "tests/data/test_collate.py::test_a_video_shared_by_questions_is_passed_once_and_gives_the_same_loss",
    ),
    Fault(
        "match evidence counts padded frames",
        COMPRESSOR,
        "num_frames = shape[3] if plan.mask is None else",
        "num_frames = shape[3] if True else",
        "tests/model/test_options.py::test_evidence_ignores_padding",
    ),
    Fault(
        "motion looks into the neighbouring video of a batch",
        OPTIONS,
        'rearrange(place + offset < length, "f -> f 1 1")',
        'rearrange(place == place, "f -> f 1 1")',
        "tests/model/test_options.py::test_motion_does_not_leak_between_packed_videos",
    ),
    Fault(
        "a pointer reports rows as columns",
        OPTIONS,
        "[attention.sum(-2) @ x, attention.sum(-1) @ y, score]",
        "[attention.sum(-1) @ y, attention.sum(-2) @ x, score]",
        "tests/model/test_options.py::test_pointer_reports_the_path_of_what_matches",
    ),
    Fault(
        "a path's velocity is not over time",
        OPTIONS,
        "    velocity = (weight * time * offset).sum(2)",
        "    velocity = (weight * offset.abs()).sum(2)",
        "tests/model/test_options.py::test_path_features_tell_ways_apart",
    ),
    Fault(
        "motion is how alike all neighbours are, not which one is the most",
        OPTIONS,
        "(among_nine - among_nine.mean(-1, keepdim=True))",
        "among_nine",
        "tests/model/test_options.py::test_equals_reference",
    ),
    Fault(
        "a baseline's answer names the configuration's window",
        INFERENCE,
        'getattr(model.compressor, "window", None) if window is None else window',
        "window or model.config.window",
        "tests/test_inference.py::test_answer_names_the_window_of_its_compressor",
    ),
    Fault(
        "a pointer does not start at the instruction",
        OPTIONS,
        "        start_as_identity(self.inner, self.outer)\n        if self.noise:",
        "        if self.noise:",
        "tests/model/test_options.py::test_a_pointer_starts_at_the_instruction",
    ),
    Fault(
        "words are pointed at in the order of their nearness",
        OPTIONS,
        ".masked_fill(nearest.values == -math.inf, length).sort(dim=1).values",
        ".masked_fill(nearest.values == -math.inf, length)",
        "tests/model/test_options.py::test_main_words_are_the_nearest_ones_in_the_order_of_the_text",
    ),
    Fault(
        "padding is a word to point at",
        OPTIONS,
        "is_word = is_word & mask_VL.bool()",
        "pass",
        "tests/model/test_options.py::test_main_words_are_the_nearest_ones_in_the_order_of_the_text",
    ),
    Fault(
        "word pointers are not told of SigLIP's padding",
        MODELING,
        "if attention_mask is None and self.compressor.points_at_words:",
        "if False:",
        "tests/model/test_options.py::test_padding_is_no_word_to_point_at",
    ),
    Fault(
        "the text tower forgets what single names mean while it learns pairs",
        TEXT_TOWER,
        "config.keep_weight * angle(rest, before)",
        "0 * angle(rest, before)",
        "tests/world/test_text_tower.py::test_it_learns_to_name_two_and_keeps_the_rest",
    ),
    Fault(
        "comparisons ask for before and after alike",
        QUESTIONS,
        "return usual if self.rng.random() < 0.9 else rare",
        "return usual if self.rng.random() < 0.5 else rare",
        "tests/world/test_questions.py::test_the_words_of_a_comparison_say_nothing",
    ),
    Fault(
        "local attention without an instruction is no cosine",
        COMPRESSOR,
        "            if takes_cosines:\n                query = normalize(query)\n",
        "",
        "tests/model/test_compressor.py::test_equals_reference",
    ),
    Fault(
        "attention maps forget the size of a window",
        LOOK,
        "windows * math.prod(windows.shape[3:])",
        "windows",
        "tests/test_look.py::test_local_map_is_the_mean_over_the_windows_of_a_patch",
    ),
    Fault(
        "every video looks like the training videos",
        DOMAIN,
        "return self.distance(summary) <= self.limit",
        "return True",
        "tests/data/test_domain.py::test_like_videos_are_like_and_others_are_not",
    ),
    Fault(
        "wrong options are drawn evenly from all nouns",
        QUESTIONS,
        "option = self._any_noun() if is_noun else self.pick(question.options)",
        "option = self.pick(question.options)",
        "tests/world/test_questions.py::test_options_do_not_tell_which_is_right",
    ),
    Fault(
        "a skip list is read and not kept to",
        "hicom/data/mixture.py",
        "if not groups[records.groups[i]] and records.numbers[i] not in skipped",
        "if records.numbers[i] not in skipped",
        "tests/data/test_mixture.py::test_skip_lists",
    ),
    Fault(
        "a record that two chunks of an array share is cut",
        "hicom/data/records.py",
        "if is_open and window.grow():",
        "if False:",
        "tests/data/test_records.py::test_an_array_is_read_in_pieces",
    ),
    Fault(
        "a closed stream generates on",
        INFERENCE,
        "            closed.set()\n            wait([generation])\n",
        "            pass\n",
        "tests/test_inference.py::test_a_closed_stream_stops_generating",
    ),
    Fault(
        "a remark is dropped out of the middle of a question",
        INSTRUCTION,
        "return any(pattern.fullmatch(sentence) for pattern in _REMARKS)",
        "return any(pattern.search(sentence) for pattern in _REMARKS)",
        "tests/model/test_instruction.py::test_questions_that_resemble_remarks_stay",
    ),
    Fault(
        "questions about different videos share the first one's tokens",
        INFERENCE,
        'return (*map(id, videos), text if self.model.config.is_conditional else "")',
        'return (text if self.model.config.is_conditional else "",)',
        "tests/test_inference.py::test_questions_about_their_own_videos_in_one_batch",
    ),
    Fault(
        "an answer that names two options counts as the first",
        ANSWERS,
        "return letters.index(found.pop()) if len(found) == 1 else None",
        "return letters.index(min(found))",
        "tests/eval/test_answers.py::test_chosen_option",
    ),
    Fault(
        "a denied letter is an answer",
        ANSWERS,
        "if not _NEGATION.search(clause):",
        "if True:",
        "tests/eval/test_answers.py::test_chosen_option",
    ),
    Fault(
        "bad records of a benchmark are not counted",
        "hicom/eval/samples.py",
        'found.bad.append(f"{path}: record {number + 1}: {error}")',
        "pass",
        "tests/eval/test_benchmarks.py::test_one_bad_record_is_not_the_end_of_a_task",
    ),
    Fault(
        "a published number is wrong",
        "hicom/eval/paper.py",
        '"HICom-7B": (65.7, 57.1, 51.4, 58.1),',
        '"HICom-7B": (65.7, 57.1, 51.4, 58.3),',
        "tests/eval/test_paper.py::test_all_numbers_are_those_that_the_paper_prints",
    ),
    Fault(
        "an answer without an option counts as option C",
        ANSWERS,
        "return longest[0] if len(longest) == 1 else None",
        "return longest[0] if len(longest) == 1 else 2",
        "tests/eval/test_answers.py::test_chosen_option",
    ),
    Fault(
        "intervals take questions about one video for independent",
        STATISTICS,
        "np.square(np.bincount(codes, residuals)).sum()",
        "np.square(residuals).sum()",
        "tests/eval/test_statistics.py::test_copies_of_a_sample_add_nothing",
    ),
    Fault(
        "the whole prompt steers the compressor in place of the bare question",
        EVAL_RUN,
        "instructions=[sample.question for sample, _, _ in some],",
        "instructions=[prompt for _, _, prompt in some],",
        "tests/eval/test_run.py::test_answers_are_those_of_the_model_asked_alone",
    ),
    Fault(
        "subtitles of the whole video are read",
        EVAL_RUN,
        "subtitles_at(read_subtitles(sample.subtitles), list(video.timestamps_s))",
        "[cue.text for cue in read_subtitles(sample.subtitles)]",
        "tests/eval/test_run.py::test_subtitles_are_those_of_the_frames",
    ),
    Fault(
        "batches are cut after they are dealt out to shards",
        EVAL_RUN,
        "mine = batches[index * len(batches) // count : (index + 1) * len(batches) // count]",
        "mine = list(_cut(there[index::count], options.batch_size))[:-1]",
        "tests/eval/test_run.py::test_shards_make_one_run",
    ),
    Fault(
        "a line cut off by a crash is glued to the next one",
        EVAL_RUN,
        '            if stream.read(1) != b"\\n":\n                stream.write(b"\\n")',
        "            pass",
        "tests/eval/test_run.py::test_an_interrupted_run_goes_on",
    ),
    Fault(
        "samples that failed are not tried again",
        EVAL_RUN,
        'done = {name for name, line in read_answers(out).items() if "error" not in line}',
        "done = set(read_answers(out))",
        "tests/eval/test_run.py::test_broken_videos_fail_alone_and_are_tried_again",
    ),
    Fault(
        "the macro mean is over samples",
        RESULTS,
        "strata = [value.groups[macro] for value in values] if macro else None",
        "strata = None",
        "tests/eval/test_run.py::test_scores_of_a_macro_mean_weigh_its_groups_equally",
    ),
    Fault(
        "replies of a captioner are not kept",
        "hicom/endpoint.py",
        "        self._write(key, reply)\n",
        "",
        "tests/test_endpoint.py::test_nothing_is_asked_twice",
    ),
    Fault(
        "a key frame is compared with the frame before it",
        f"{BUILD}/work.py",
        "            times.append(round(float(time_s), 3))\n            last = embedding",
        "            times.append(round(float(time_s), 3))\n        last = embedding",
        "tests/data/build/test_steps.py::test_key_frames_are_unlike_the_last_key_frame",
    ),
    Fault(
        "a category takes all its videos before the next one",
        f"{BUILD}/steps.py",
        "    for _ in range(per_category):\n        for name, some in left.items():",
        "    for name, some in left.items():\n        for _ in range(per_category):",
        "tests/data/build/test_steps.py::test_selection_takes_turns_and_then_draws_lots",
    ),
    Fault(
        "descriptions of something else stay",
        f"{BUILD}/texts.py",
        "if not named & content_words(pair.description):",
        "if False:",
        "tests/data/build/test_texts.py::test_why_pairs_are_dropped",
    ),
    Fault(
        "media are fetched from private addresses",
        "hicom/fetch.py",
        "not all(map(is_public, found))",
        "not found",
        "tests/serve/test_media.py::test_private_hosts_are_not_asked",
    ),
    Fault(
        "a host's name is looked up again when connecting",
        "hicom/fetch.py",
        "socket.create_connection((address, target.port)",
        "socket.create_connection((target.host, target.port)",
        "tests/serve/test_media.py::test_a_name_that_changes_its_address_gains_nothing",
    ),
    Fault(
        "links lead out of allowed folders",
        f"{SERVE}/media.py",
        "real = path.resolve(strict=True)",
        "real = path.absolute()",
        "tests/serve/test_media.py::test_local_files_where_they_are_allowed",
    ),
    Fault(
        "a client that goes away leaves its generation running",
        f"{SERVE}/local.py",
        "        finally:\n            closed.set()",
        "        finally:\n            pass",
        "tests/serve/test_local.py::test_a_client_that_goes_away_stops_its_generation",
    ),
    Fault(
        "kept videos ignore which frames were chosen",
        f"{SERVE}/kept.py",
        'f"{digest} {sorted(choice.items())}"',
        "digest",
        "tests/serve/test_local.py::test_options_of_the_request",
    ),
    Fault(
        "arguments for media reach vLLM unseen",
        f"{SERVE}/vllm_http.py",
        '        if body.get("media_io_kwargs"):',
        "        if False:",
        "tests/serve/test_vllm_http.py::test_what_is_wrong_does_not_reach_vllm",
    ),
    Fault(
        "bodies without a length are read whole",
        f"{SERVE}/responses.py",
        "                if content.tell() > most:",
        "                if False:",
        "tests/serve/test_vllm_http.py::test_too_long_and_broken_bodies",
    ),
    Fault(
        "attach: all videos get the instruction of the first prompt",
        DROP_IN,
        "return [row for row, count",
        "return [0 for row, count",
        "tests/test_drop_in.py::test_every_video_gets_the_instruction_of_its_prompt",
    ),
    Fault(
        "attach: cosines are not scaled",
        DROP_IN,
        "match_windows(keys, query, plan, window) * logit_scale",
        "match_windows(keys, query, plan, window)",
        "tests/test_drop_in.py::test_equals_loops",
    ),
    Fault(
        "attach: detaching forgets what others had set on the instance",
        DROP_IN,
        "setattr(owner, name, before[0])",
        "delattr(owner, name)",
        "tests/test_drop_in.py::test_what_was_set_on_the_instance_comes_back",
    ),
    Fault(
        "attach: a tower of the same sizes counts as equal",
        DUAL_ENCODER,
        "torch.equal(own[name], other[name].to(own[name]))",
        "own[name].shape == other[name].shape",
        "tests/test_drop_in.py::test_a_tower_that_was_trained_further_is_not_shared",
    ),
    Fault(
        "long videos: the global branch sees the first 32 frames only, as in the released code",
        COMPRESSOR,
        "x = pad_videos(values_FHWD, num_frames)\n        real",
        "x = pad_videos(values_FHWD, num_frames)[:, :32]\n        real",
        "tests/test_long_context.py::test_the_global_branch_sees_every_frame",
    ),
    Fault(
        "long videos: frame numbers start again after 32 frames",
        OPS,
        "torch.arange(start, start + length, dtype=torch.float64)[:, None] / 10000",
        "(torch.arange(start, start + length, dtype=torch.float64) % 32)[:, None] / 10000",
        "tests/test_long_context.py::test_positions_go_on_where_training_ended",
    ),
    Fault(
        "long videos: no more frames are read than in training",
        PROCESSING,
        "choice = {name: value for name, value in choice.items() if value is not None}",
        'choice = {k: min(v, 32) if k == "num_frames" else v for k, v in choice.items() if v is not None}',
        "tests/test_long_context.py::test_no_limit_cuts_frames",
    ),
    Fault(
        "long videos: a prompt longer than the LLM was made for passes without a word",
        GENERATION,
        "        if length > limit:\n            warnings.warn(",
        "        if False:\n            warnings.warn(",
        "tests/test_long_context.py::test_a_prompt_longer_than_the_llm_was_made_for",
    ),
    Fault(
        "long videos: the warning of a long prompt counts padding",
        GENERATION,
        "if length > limit and attention_mask is not None:",
        "if False:",
        "tests/test_long_context.py::test_padding_is_no_part_of_a_prompt",
    ),
    Fault(
        "assemble: a tower taken from a HICom model is still heard for its old layer",
        MODELING,
        "            self.tapped.remove()\n",
        "            pass\n",
        "tests/model/test_assemble.py::test_hidden_states_are_those_of_the_new_layer",
    ),
    Fault(
        "assemble: the compressor's weights depend on what was drawn before",
        MODELING,
        "            torch.manual_seed(seed)\n            self.compressor",
        "            self.compressor",
        "tests/model/test_assemble.py::test_the_compressor_depends_on_the_seed_and_its_sizes_alone",
    ),
    Fault(
        "assemble: answers end at the tokenizer's mark only",
        "hicom/model/assemble.py",
        "    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)\n",
        "    ends = []\n",
        "tests/model/test_assemble.py::test_answers_end_where_the_language_models_did",
    ),
    Fault(
        "a comparison of two objects names the one that came last where the first is asked for",
        QUESTIONS,
        'answer = (first if key == "first_of" else last).noun',
        "answer = last.noun",
        "tests/world/test_questions.py::test_comparisons_are_true_and_name_every_object_and_every_two_in_both_orders",
    ),
    Fault(
        "the object that comes first is named first in every comparison",
        QUESTIONS,
        "x, y = (first, last) if self.rng.random() < 0.5 else (last, first)",
        "x, y = first, last",
        "tests/world/test_questions.py::test_the_words_of_a_comparison_say_nothing",
    ),
    Fault(
        "recipes: in stage pretrain the injections learn no faster than the rest",
        "hicom/recipes/stages.py",
        "injection = 10 * rate if",
        "injection = rate if",
        "tests/test_recipes.py::test_every_parameter_has_the_rate_of_the_paper",
    ),
    Fault(
        "recipes: a step's samples depend on the number of devices",
        "hicom/train/config.py",
        "        return passes\n",
        "        return 1\n",
        "tests/test_recipes.py::test_batches_frames_and_epochs_are_published",
    ),
    Fault(
        "gradients reach into frozen towers where activations are computed again",
        MODELING,
        "    def enable_input_require_grads(self)",
        "    def enable_input_gradients(self)",
        "tests/model/test_modeling.py::test_gradient_checkpointing_leaves_frozen_towers_alone",
    ),
    Fault(
        "views count as memory of their own",
        ESTIMATE,
        "if isinstance(each, Tensor) and storage_id(each) not in self._known:",
        "if isinstance(each, Tensor):",
        "tests/train/test_estimate.py::test_live_bytes_are_those_of_tensors_that_are_alive",
    ),
    Fault(
        "the estimate forgets the gradients of an earlier pass",
        ESTIMATE,
        "for _ in range(min(2, num_passes)):",
        "for _ in range(1):",
        "tests/train/test_estimate.py::test_a_step_without_numbers_holds_what_a_real_one_holds",
    ),
    Fault(
        "the estimate is of whole precision",
        ESTIMATE,
        'torch.autocast("cpu", torch.bfloat16) if config.bf16 else nullcontext()',
        "nullcontext()",
        "tests/train/test_estimate.py::test_published_precision_is_counted",
    ),
    Fault(
        "rates are not scaled",
        TRAIN_CONFIG,
        "(pattern, scale * rate)",
        "(pattern, rate)",
        "tests/train/test_estimate.py::test_recipes_differ_in_adapters_alone",
    ),
    Fault(
        "a tuned model keeps the number of frames of its start",
        RUN,
        "processor.num_frames = trainer.data_collator.num_frames",
        "pass",
        "tests/train/test_run.py::test_a_model_takes_the_frames_that_it_was_trained_on",
    ),
    Fault(
        "turns before the question are not passed on",
        EVAL_RUN,
        "histories=[sample.history for sample, _, _ in some],",
        "histories=None,",
        "tests/eval/test_records.py::test_each_turn_is_asked_after_those_before_it",
    ),
    Fault(
        "all questions of a batch follow the first one's turns",
        INFERENCE,
        "for turns, text in zip(before, questions, strict=True)",
        "for turns, text in zip([before[0]] * len(before), questions, strict=True)",
        "tests/test_inference.py::test_questions_after_their_own_turns_in_one_batch",
    ),
    Fault(
        "a turn whose answer names no option counts as wrong",
        EVAL_RECORDS,
        "options=() if chosen is None else options",
        "options=options",
        "tests/eval/test_records.py::test_every_answered_turn_is_a_sample",
    ),
    Fault(
        "records with the same id are one sample",
        EVAL_RECORDS,
        "if len(set(names)) == len(turns):",
        "if len(names) == len(turns):",
        "tests/eval/test_records.py::test_ids_are_unique",
    ),
    Fault(
        "weights of a mixture repeat samples",
        EVAL_RECORDS,
        "for index in dict.fromkeys(source.indices):",
        "for index in source.indices:",
        "tests/eval/test_records.py::test_mixtures_count_every_chosen_sample_once",
    ),
    Fault(
        "F1 counts a repeated word each time",
        ANSWERS,
        "common = (Counter(said) & Counter(right)).total()",
        "common = sum(word in right for word in said)",
        "tests/eval/test_answers.py::test_open_answers_by_hand",
    ),
    Fault(
        "runs compare by judgements alone",
        RESULTS,
        "[*option_values(chosen), *text_values(written), *judged_values(judged, groups)]",
        "[*option_values(chosen), *judged_values(judged, groups)]",
        "tests/eval/test_records.py::test_two_runs_compare_by_their_lines",
    ),
    Fault(
        "a remark behind the options belongs to the last one",
        INSTRUCTION,
        "        last.pop()\n",
        "        break\n",
        "tests/model/test_instruction.py::test_options_by_hand",
    ),
    Fault(
        "motion of a video is kept when the weights have changed",
        "hicom/encoding.py",
        " or self._moving.state != state",
        "",
        "tests/test_encoding.py::test_changed_weights_see_their_own_motion",
    ),
    Fault(
        "motion is added to features that have it",
        COMPRESSOR,
        "if self.motion is not None and not has_motion:",
        "if self.motion is not None:",
        "tests/model/test_modeling.py::test_motion_added_beforehand_changes_nothing",
    ),
    Fault(
        "parts of a message are glued",
        INSTRUCTION,
        'return "\\n".join(parts)',
        'return "".join(parts)',
        "tests/model/test_turns.py::test_a_message_in_parts",
    ),
    Fault(
        "a video's own choice of frames is dropped",
        "hicom/model/media_inputs.py",
        "own = medium.options\n",
        "own: dict[str, Any] = {}\n",
        "tests/model/test_media_inputs.py::test_each_video_has_its_own_options",
    ),
    Fault(
        "a cut instruction is told twice",
        DUAL_ENCODER,
        "verbose=False",
        "verbose=True",
        "tests/model/test_processor_arguments.py::test_a_cut_instruction_warns_once_and_in_our_words",
    ),
    Fault(
        "a language model's own way to logits is left out",
        "hicom/model/tail.py",
        "decoded = Decoded(",
        "return CausalLMOutputWithPast(logits=head(output.last_hidden_state[:, keep]))\n        decoded = Decoded(",
        "tests/model/test_tail.py::test_a_family_is_the_language_model_itself",
    ),
    Fault(
        "the learning rate falls in a straight line",
        TRAINER,
        'lr_scheduler_type="cosine"',
        'lr_scheduler_type="linear"',
        "tests/train/test_schedule.py::test_a_run_takes_the_steps_of_its_recipe",
    ),
    Fault(
        "a skip list that comes later changes the order",
        "hicom/train/stamp.py",
        "(at == 0) == is_start",
        "is_start",
        "tests/train/test_left_out.py::test_a_run_goes_on_without_what_a_later_list_names",
    ),
    Fault(
        "a record without its video is written",
        "hicom/data/convert/run.py",
        "if (root / place).exists()",
        "if True",
        "tests/data/test_convert.py::test_layouts",
    ),
    Fault(
        "the bounds of a clip are lost",
        "hicom/data/convert/clean.py",
        "return with_bounds(path, *media.bounds)",
        "return path",
        "tests/data/test_convert.py::test_layouts",
    ),
    Fault(
        "a malformed record on the skip list stops training",
        "hicom/data/records.py",
        "and number not in listed",
        "",
        "tests/data/test_mixture.py::test_a_listed_record_that_is_malformed_is_no_error",
    ),
    Fault(
        "squares of the release stand at the corner",
        "hicom/square.py",
        "padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))",
        "padded.paste(image, (0, 0))",
        "tests/model/test_pixels.py::test_exact_pixels_are_pillows",
    ),
    Fault(
        "SigLIP pools with weights that are on disk",
        MODELING,
        "tower.use_head = False",
        "tower.use_head = True",
        "tests/model/test_device_map.py::test_parts_on_disk_answer_as_in_memory",
    ),
    Fault(
        "formats that name other files are opened",
        "hicom/pyav.py",
        '{"format_whitelist": FORMATS, ',
        "{",
        "tests/test_pyav.py::test_what_names_other_files_is_refused",
    ),
    Fault(
        "what requests hold together has no bound",
        f"{SERVE}/memory.py",
        "if number > 0 and self.used + number > self.most:",
        "if False:",
        "tests/serve/test_admission.py::test_memory_of_all_requests_is_bounded",
    ),
    Fault(
        "half surrogate pairs reach the tokenizer",
        f"{SERVE}/responses.py",
        "if not all(map(_is_unicode, _texts(body))):",
        "if False:",
        "tests/serve/test_fuzzing.py::test_no_body_makes_the_server_fail",
    ),
    Fault(
        "files keep the permissions of their writer",
        "hicom/files.py",
        "            part.chmod(mode)",
        "            pass",
        "tests/test_files.py::test_a_file_has_normal_permissions",
    ),
    Fault(
        "a toy's answers do not say that it is one",
        INFERENCE,
        "for note in (self.model.config.toy_note, *cautions)",
        "for note in cautions",
        "tests/test_toy.py::test_every_answer_of_the_library_brings_it_along",
    ),
    Fault(
        "hidden colours show in videos with transparency",
        "hicom/video/colour.py",
        "            if self._is_transparent(frame):",
        "            if False:",
        "tests/video/test_colour.py::test_transparency_lies_on_white_in_videos",
    ),
    Fault(
        "palettes and headers of packets left out do not reach the decoder",
        "hicom/video/decode.py",
        "self._states.bring(position, packet)",
        "pass",
        "tests/video/test_packets.py::test_every_frame_alone_is_that_of_a_plain_decode",
    ),
    Fault(
        "an index passes over a second description",
        "hicom/video/index.py",
        "if num_entries != 1 or ",
        "if ",
        "tests/video/test_index.py::test_two_descriptions_have_no_index",
    ),
]


NO_PROOF = 70
"""Exit status where something went wrong before the test ran; pytest has none so high."""

# Imports are most of a short test, so they happen once: the test of a fault runs in a fork of a process that has
# imported what hicom imports, and no part of hicom.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "av",
        "pytest",
        "torch",
        "transformers.models.clip.modeling_clip",
        "transformers.models.qwen2.modeling_qwen2",
        "transformers.models.siglip.modeling_siglip",
        "transformers.processing_utils",
        "transformers.trainer",
    ]
)


def run_tests(tests: list[str], source: Path, output: Path) -> None:
    """Run tests of the package in `source`, and exit as pytest does; all that is said goes to a file."""
    with output.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    status = NO_PROOF
    try:
        assert "hicom" not in sys.modules, "hicom was imported before its fault was made"
        os.environ.update(PYTHONPATH=str(source), PYTHONDONTWRITEBYTECODE="1")
        sys.dont_write_bytecode = True
        sys.path.insert(0, str(source))
        os.chdir(ROOT)
        status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--tb=short", "-m", "", *tests]))
    except BaseException:
        # Left to itself, it would end this process with the status of a test that failed.
        traceback.print_exc()
    sys.exit(status)


def run(fault: Fault) -> tuple[bool, str]:
    """Return whether the fault's test notices it, and the first line of what it says."""
    with tempfile.TemporaryDirectory() as folder:
        copy, output = Path(folder) / "src", Path(folder) / "output"
        shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__", "hicom-*"))
        source = (copy / fault.path).read_text(encoding="utf-8")
        if source.count(fault.old) < 1:
            raise ValueError(f"{fault.what}: {fault.path} no longer holds {fault.old!r}")
        (copy / fault.path).write_text(source.replace(fault.old, fault.new), encoding="utf-8")
        process = FORKS.Process(target=run_tests, args=(fault.test.split(" or "), copy, output))
        process.start()
        process.join()
        said = output.read_text(encoding="utf-8", errors="replace")
    message = re.search(r"^E\s+(\S.*)$", said, re.MULTILINE)
    return process.exitcode == pytest.ExitCode.TESTS_FAILED, message.group(1) if message else said.strip()[-200:]


def main(words: str) -> int:
    """Run the faults whose names hold `words`, write the table if all are noticed, and return how many are not."""
    page = ROOT / "docs" / "testing.md"
    text = page.read_text(encoding="utf-8")
    start, end = "<!-- faults -->\n", "<!-- /faults -->"
    head, _, rest = text.partition(start)
    table, _, tail = rest.partition(end)
    rows = {line[2:].partition(" | ")[0]: line for line in table.splitlines() if line.startswith("| ")}
    chosen = [fault for fault in FAULTS if words in fault.what]
    unnoticed = 0
    for fault in chosen:
        noticed, message = run(fault)
        unnoticed += not noticed
        print("noticed " if noticed else "UNNOTICED", fault.what, "|", message, flush=True)
        tests = "<br>".join(f"`{test.removeprefix('tests/')}`" for test in fault.test.split(" or "))
        message = message.replace("|", "\\|").replace("<", "&lt;")[:160]
        rows[fault.what] = f"| {fault.what} | `{fault.path.removeprefix('hicom/')}` | {tests} | {message} |"
    print(f"{len(chosen) - unnoticed} of {len(chosen)} faults noticed")
    if not unnoticed:
        lines = [rows[fault.what] for fault in FAULTS if fault.what in rows]
        table = "\n".join(["| fault | in | test that must fail | what it said |", "|---|---|---|---|", *lines])
        page.write_text(f"{head}{start}\n{table}\n\n{end}{tail}", encoding="utf-8")
    return unnoticed


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])))
