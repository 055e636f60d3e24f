"""The compressor once more: slow, in float64, as nested loops, straight from the equations.

This file is the judge of `hicom.model.compressor`. It takes one video and the parameters by name, works on single
vectors in Python loops, projects the keys and values of every patch (the plain form of the global attention) and shares
no code with the package, so that agreement of values and gradients means that both are right. torch supplies autograd
and vectors only.

Legend: a query, c instruction, x any vector; D vision width, K width of keys and instruction, C output width,
T H W patch grid, L instruction length, g number of groups, k group size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Params = Mapping[str, Tensor]
LAYER_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Setting:
    """What the parameters alone do not say."""

    dialect: str = "paper"
    window: tuple[int, int, int] | None = (4, 3, 3)
    local_injection: str = "direct"
    global_injection: str = "coarse"
    num_global_tokens: int = 32


@dataclass(frozen=True)
class Reference:
    """Tokens of one video and where the branches looked."""

    tokens: Tensor  # float[N, C]
    local_attention: list[Tensor]  # one float[k_t, k_h, k_w] per group, in the order of the tokens
    global_attention: list[Tensor]  # one float[heads, T, H, W] per learnable token
    pointer_attention: list[Tensor]  # one float[T, H, W] per pointer


# Vector arithmetic


def linear(params: Params, name: str, x: Tensor) -> Tensor:
    y = params[f"{name}.weight"] @ x
    return y + params[f"{name}.bias"] if f"{name}.bias" in params else y


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def mlp(params: Params, name: str, x: Tensor) -> Tensor:
    return linear(params, f"{name}.2", gelu(linear(params, f"{name}.0", x)))


def layer_norm(params: Params, name: str, x: Tensor) -> Tensor:
    centred = x - x.sum() / len(x)
    variance = (centred * centred).sum() / len(x)
    return centred / torch.sqrt(variance + LAYER_NORM_EPS) * params[f"{name}.weight"] + params[f"{name}.bias"]


def unit(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum())


def softmax(logits: Sequence[Tensor]) -> list[Tensor]:
    highest = max(float(logit.detach()) for logit in logits)
    exponentials = [torch.exp(logit - highest) for logit in logits]
    total = sum(exponentials[1:], start=exponentials[0])
    return [exponential / total for exponential in exponentials]


def log_mean_exp(logits: Sequence[Tensor]) -> Tensor:
    highest = max(float(logit.detach()) for logit in logits)
    total = sum(torch.exp(logit - highest) for logit in logits)
    return highest + torch.log(total / len(logits))


def weighted_sum(weights: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(vectors[0])
    for weight, vector in zip(weights, vectors, strict=True):
        total = total + weight * vector
    return total


# Groups, pooled queries, positions


def group_starts(n: int, k: int) -> list[int]:
    """ceil(n / k) groups of equal size that together cover the axis; the later steps are the shorter ones."""
    g = math.ceil(n / k)
    starts = [0]
    if g == 1:
        return starts
    missing = g * k - n
    shorter_by, still_shorter = divmod(missing, g - 1)
    for step in range(g - 1):
        is_among_the_last = step >= g - 1 - still_shorter
        starts.append(starts[-1] + k - shorter_by - (1 if is_among_the_last else 0))
    return starts


def group_mean(values: Tensor, group: tuple[range, range, range]) -> Tensor:
    """Paper: the pooled query of a group is the mean of its members."""
    members = [values[t, h, w] for t in group[0] for h in group[1] for w in group[2]]
    return sum(members[1:], start=members[0]) / len(members)


def interpolation_weights(index: int, num_in: int, num_out: int) -> list[tuple[int, float]]:
    """One axis of a linear interpolation, align_corners=False, no antialiasing: (source index, weight) pairs."""
    source = max((index + 0.5) * num_in / num_out - 0.5, 0.0)
    lower = math.floor(source)
    upper = min(lower + 1, num_in - 1)
    return [(lower, 1 - (source - lower)), (upper, source - lower)]


def trilinear(values: Tensor, index: tuple[int, int, int], num_out: tuple[int, int, int]) -> Tensor:
    """Release: the pooled query is one place of V interpolated to the grid of groups."""
    total = torch.zeros_like(values[0, 0, 0])
    for t, weight_t in interpolation_weights(index[0], values.shape[0], num_out[0]):
        for h, weight_h in interpolation_weights(index[1], values.shape[1], num_out[1]):
            for w, weight_w in interpolation_weights(index[2], values.shape[2], num_out[2]):
                total = total + weight_t * weight_h * weight_w * values[t, h, w]
    return total


def position(t: int, h: int, w: int, width: int) -> Tensor:
    """The usual sinusoids at full width for each axis, summed over the three axes."""
    total = [0.0] * width
    for place in (t, h, w):
        for channel in range(width):
            angle = place / 10000 ** ((channel - channel % 2) / width)
            total[channel] += math.sin(angle) if channel % 2 == 0 else math.cos(angle)
    return torch.tensor(total, dtype=torch.float64)


# Attention and injection


def multi_head(
    params: Params, name: str, query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]
) -> tuple[Tensor, list[list[Tensor]], list[list[Tensor]]]:
    """Attention of one query over projected keys and values; returns the output, weights and logits of every head.

    The weights do not depend on the bias of the keys' projection, so that the logits are returned without it. With a
    learnable logit scale beside the attention, q and k become unit vectors at full width, before the heads part.
    """
    q = linear(params, f"{name}.q_proj", query)
    projected_keys = [linear(params, f"{name}.k_proj", key) for key in keys]
    projected_values = [linear(params, f"{name}.v_proj", value) for value in values]
    branch = name.rpartition(".")[0]
    has_logit_scale = f"{branch}.logit_scale" in params
    if has_logit_scale:
        q, projected_keys = unit(q), [unit(key) for key in projected_keys]
    num_heads = max(heads for heads in range(1, max(1, len(query) // 128) + 1) if len(query) % heads == 0)
    head_width = len(query) // num_heads
    outputs, weights, bare_logits = [], [], []
    for head in range(num_heads):
        part = slice(head * head_width, (head + 1) * head_width)
        logits = []
        for key in projected_keys:
            product = (q[part] * key[part]).sum()
            if has_logit_scale:
                logits.append(scaled_logit(params, branch, product))
            else:
                logits.append(product / math.sqrt(head_width))
        weights.append(softmax(logits))
        shift = 0 if has_logit_scale else (q[part] * params[f"{name}.k_proj.bias"][part]).sum() / math.sqrt(head_width)
        bare_logits.append([logit - shift for logit in logits])
        outputs.append(weighted_sum(weights[-1], [value[part] for value in projected_values]))
    return linear(params, f"{name}.out_proj", torch.cat(outputs)), weights, bare_logits


def scaled_logit(params: Params, branch: str, product: Tensor) -> Tensor:
    return torch.exp(params[f"{branch}.logit_scale"].squeeze()) * product + params[f"{branch}.logit_bias"].squeeze()


def gate(params: Params, name: str, x: Tensor) -> Tensor:
    """(1 - alpha) x + alpha LN(MLP(x)); the query's MLP is a single bias-free linear map. Absent gate: x."""
    if f"{name}.alpha" not in params:
        return x
    alpha = params[f"{name}.alpha"].squeeze()
    is_linear = f"{name}.proj.weight" in params
    projected = linear(params, f"{name}.proj", x) if is_linear else mlp(params, f"{name}.proj", x)
    return (1 - alpha) * x + alpha * layer_norm(params, f"{name}.norm", projected)


def instruct(params: Params, branch: str, c: Tensor) -> Tensor:
    """The instruction, or one token of it, at the width of the query and through its gate."""
    if f"{branch}.injector.resize.0.weight" in params:
        c = mlp(params, f"{branch}.injector.resize", c)
    return gate(params, f"{branch}.injector.gate", c)


def inject(params: Params, branch: str, injection: str, dialect: str, a: Tensor, instruction: Tensor | None) -> Tensor:
    """The instructed query from `a`, the uninstructed one, by `instruction`: float[K], or float[L, K] (fine)."""
    name = f"{branch}.injector"
    if injection == "none":
        return a
    if injection == "direct":
        c = instruct(params, branch, instruction)
        return mlp(params, f"{name}.mlp", c) if dialect == "paper" else c
    if injection == "coarse":
        film = mlp(params, f"{name}.film", instruct(params, branch, instruction))
        scale, shift = film[: len(a)], film[len(a) :]
        if dialect == "paper":
            return layer_norm(params, f"{name}.norm", a) * scale + shift
        return layer_norm(params, f"{name}.norm", a * (1 + scale) + shift)
    assert injection == "fine"
    tokens = [instruct(params, branch, token) for token in instruction]
    if dialect == "paper":
        return multi_head(params, f"{name}.attention", layer_norm(params, f"{name}.norm", a), tokens, tokens)[0]
    return layer_norm(params, f"{name}.norm", a + multi_head(params, f"{name}.attention", a, tokens, tokens)[0])


# The two branches


def local_branch(
    params: Params, setting: Setting, values: Tensor, keys: Tensor | None, instruction: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """One token per group: softmax(q . k / sqrt(D)) over the members of the group, then the readout MLP.

    A learnable logit scale takes the place of 1 / sqrt(D). Instructed keys and the instruction are unit vectors then.
    """
    if keys is None or (setting.local_injection == "none" and setting.dialect == "paper"):
        keys = values
        is_guided = setting.local_injection != "none"
    else:
        is_guided = True
    pooled = values if values.shape[-1] == keys.shape[-1] else keys
    takes_cosines = "local.logit_scale" in params and setting.dialect == "paper"
    if takes_cosines or ("local.logit_scale" in params and is_guided):
        keys = torch.stack([unit(key) for key in keys.flatten(0, 2)]).view_as(keys)
        if setting.local_injection == "fine":
            instruction = torch.stack([unit(token) for token in instruction])
        elif setting.local_injection != "none":
            instruction = unit(instruction)
    sizes, starts = [], []
    for axis, (n, k) in enumerate(zip(values.shape[:3], setting.window, strict=True)):
        k = 1 if axis == 0 and n == 1 else k
        sizes.append(min(n, k))
        starts.append(group_starts(n, k))
    num_groups = tuple(len(starts_of_axis) for starts_of_axis in starts)
    outputs, maps = [], []
    for i, start_t in enumerate(starts[0]):
        for j, start_h in enumerate(starts[1]):
            for m, start_w in enumerate(starts[2]):
                group = tuple(
                    range(start, start + size) for start, size in zip((start_t, start_h, start_w), sizes, strict=True)
                )
                if setting.dialect == "paper":
                    query = group_mean(pooled, group)
                else:
                    query = trilinear(pooled, (i, j, m), num_groups)
                query = gate(params, "local.query_gate", query)
                query = inject(params, "local", setting.local_injection, setting.dialect, query, instruction)
                if takes_cosines and setting.local_injection != "direct":
                    query = unit(query)
                output, weights, logits = local_attention(params, query, values, keys, group)
                output = output + evidence(params, "local", [logits])
                outputs.append(mlp(params, "local.readout", output))
                maps.append(torch.stack(weights).detach().reshape(sizes))
    return outputs, maps


def local_attention(
    params: Params, query: Tensor, values: Tensor, keys: Tensor, group: tuple[range, range, range]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    logits, members = [], []
    for t in group[0]:
        for h in group[1]:
            for w in group[2]:
                product = (query * gate(params, "local.key_gate", keys[t, h, w])).sum()
                if "local.logit_scale" in params:
                    logits.append(scaled_logit(params, "local", product))
                else:
                    logits.append(product / math.sqrt(len(query)))
                members.append(gate(params, "local.value_gate", values[t, h, w]))
    weights = softmax(logits)
    return weighted_sum(weights, members), weights, logits


def global_branch(
    params: Params, setting: Setting, values: Tensor, instruction: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """One token per learnable query: multi-head attention over all patches, then readout(query + attention).

    The paper has no direct injection here. In the release the instruction takes the place of every learnable token,
    which makes them all the same; in our paper dialect it is added to them.
    """
    num_frames, height, width, dim = values.shape
    patches, placed = [], []
    for t in range(num_frames):
        for h in range(height):
            for w in range(width):
                patches.append(values[t, h, w])
                placed.append(values[t, h, w] + position(t, h, w, dim))
    outputs, maps = [], []
    for n in range(setting.num_global_tokens):
        learned = params["global_.query"][n] if "global_.query" in params else None
        query = inject(params, "global_", setting.global_injection, setting.dialect, learned, instruction)
        if setting.global_injection == "direct" and setting.dialect == "paper":
            query = learned + query
        attended, weights, logits = multi_head(
            params, "global_.attention", query, placed, patches if setting.dialect == "paper" else placed
        )
        attended = attended + evidence(params, "global_", logits)
        outputs.append(mlp(params, "global_.readout", query + attended))
        heads = torch.stack([torch.stack(head) for head in weights]).detach()
        maps.append(heads.reshape(len(weights), num_frames, height, width))
    return outputs, maps


# Beyond the paper


def evidence(params: Params, branch: str, logits: Sequence[Sequence[Tensor]]) -> Tensor | float:
    """What the logits of every head say that their softmax does not: the largest, and the log-mean-exp."""
    if f"{branch}.evidence.proj.weight" not in params:
        return 0.0
    features = [feature for head in logits for feature in (torch.stack(list(head)).amax(), log_mean_exp(head))]
    return linear(params, f"{branch}.evidence.proj", torch.stack(features))


def add_motion(params: Params, values: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Every patch is told how its neighbourhood looks two frames back and ahead: 4 x 9 cosines, 0 where none is.

    Each nine are taken around their mean.
    """
    num_frames, height, width, dim = values.shape
    sources = values if keys is None else keys
    additions = []
    for t in range(num_frames):
        for h in range(height):
            for w in range(width):
                contrasts = []
                for other_t in (t - 2, t - 1, t + 1, t + 2):
                    cosines = []
                    for other_h in (h - 1, h, h + 1):
                        for other_w in (w - 1, w, w + 1):
                            if 0 <= other_t < num_frames and 0 <= other_h < height and 0 <= other_w < width:
                                other = sources[other_t, other_h, other_w]
                                cosines.append((unit(sources[t, h, w]) * unit(other)).sum())
                            else:
                                cosines.append(torch.zeros((), dtype=values.dtype))
                    contrasts += [4 * (cosine - sum(cosines) / 9) for cosine in cosines]
                features = torch.cat([torch.stack(contrasts), linear(params, "motion.appearance", values[t, h, w])])
                hidden = gelu(linear(params, "motion.inner", features))
                additions.append(linear(params, "motion.outer", hidden))
    addition = torch.stack(additions).view(num_frames, height, width, -1)
    return values + addition[..., :dim], None if keys is None else keys + addition[..., dim:]


def pointers(
    params: Params, values: Tensor, keys: Tensor, instruction: Tensor | None, words: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """One token per pointer: what it looks at, its path in 8 time bins, and a summary, through the readout MLP."""
    outputs, maps = [], []
    total = len(params["pointers.query"])
    num_whole = sum(f"pointers.injector.{number}.time.bias" in params for number in range(total))
    for number in range(total):
        query, time = params["pointers.query"][number], torch.zeros(2, dtype=values.dtype)
        if instruction is not None:
            is_whole = number < num_whole
            name = f"pointers.injector.{number}" if is_whole else "pointers.word_injector"
            sought = instruction if is_whole else main_words(instruction, words, total - num_whole)[number - num_whole]
            query = linear(params, f"{name}.outer", gelu(linear(params, f"{name}.inner", sought)))
            time = linear(params, f"{name}.time", sought)
        features, weights = point(params, query, time, values, keys)
        outputs.append(mlp(params, "pointers.readout", features))
        maps.append(weights)
    return outputs, maps


def main_words(instruction: Tensor, words: list[Tensor], number: int) -> list[Tensor]:
    """The words nearest to the instruction in their own order, then as many instructions as words are missing."""
    nearness = [float((unit(word) * unit(instruction)).sum()) for word in words]
    best = sorted(range(len(words)), key=lambda place: -nearness[place])[:number]
    return [words[place] for place in sorted(best)] + [instruction] * (number - len(best))


def point(params: Params, query: Tensor, time: Tensor, values: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    num_frames, height, width = values.shape[:3]
    logits, places, members, triples = [], [], [], []
    for t in range(num_frames):
        tau = (2 * t + 1) / num_frames - 1
        frame_logits, frame_places = [], []
        for h in range(height):
            for w in range(width):
                cosine = (unit(query) * unit(keys[t, h, w])).sum()
                scaled = torch.exp(params["pointers.logit_scale"].squeeze()) * cosine
                frame_logits.append(scaled + time[0] * tau + time[1] * tau**2)
                frame_places.append((tau, (2 * w + 1) / width - 1, (2 * h + 1) / height - 1))
                members.append(values[t, h, w])
        weights = softmax(frame_logits)
        x = sum(weight * place[1] for weight, place in zip(weights, frame_places, strict=True))
        y = sum(weight * place[2] for weight, place in zip(weights, frame_places, strict=True))
        triples.append(torch.stack([x, y, log_mean_exp(frame_logits)]))
        logits += frame_logits
        places += frame_places
    trajectory = []
    for number in range(8):
        triple = torch.zeros(3, dtype=values.dtype)
        for t in range(num_frames):
            overlap = min((number + 1) / 8, (t + 1) / num_frames) - max(number / 8, t / num_frames)
            triple = triple + max(overlap, 0.0) * 8 * triples[t]
        trajectory.append(triple)
    weights = softmax(logits)
    means = [sum(weight * place[axis] for weight, place in zip(weights, places, strict=True)) for axis in range(3)]
    context = weighted_sum(weights, members)
    context = (context - context.mean()) / torch.sqrt(context.var(unbiased=False) + 1e-5)
    places = [x for triple in trajectory for x in triple[:2]] + path_of(trajectory) + means[1:]
    scores = [triple[2] for triple in trajectory]
    summary = [means[0], torch.stack(logits).amax(), log_mean_exp(logits)]
    features = torch.cat([context, 4 * torch.stack(places), torch.stack(scores + summary)])
    return features, torch.stack(weights).detach().view(num_frames, height, width)


def path_of(trajectory: Sequence[Tensor]) -> list[Tensor]:
    """Velocity, spread and speed of x and y over 8 bins (x, y, score), which count as the softmax of the scores."""
    weights = softmax([score for _, _, score in trajectory])
    times = [(2 * number + 1) / 8 - 1 for number in range(8)]
    mean_time = sum(w * t for w, t in zip(weights, times, strict=True))
    variance = sum(w * (t - mean_time) ** 2 for w, t in zip(weights, times, strict=True))
    velocity, spread, speed = [], [], []
    for axis in range(2):
        places = [triple[axis] for triple in trajectory]
        mean = sum(w * x for w, x in zip(weights, places, strict=True))
        covariance = sum(w * (t - mean_time) * (x - mean) for w, t, x in zip(weights, times, places, strict=True))
        velocity.append(covariance / (variance + 1e-3))
        spread.append(torch.sqrt(sum(w * (x - mean) ** 2 for w, x in zip(weights, places, strict=True)) + 1e-6))
        both = [torch.sqrt(weights[i] * weights[i + 1]) for i in range(7)]
        steps = [torch.abs(places[i + 1] - places[i]) for i in range(7)]
        speed.append(4 * sum(b * x for b, x in zip(both, steps, strict=True)) / sum(both))
    return velocity + spread + speed


def compress(
    params: Params,
    setting: Setting,
    values: Tensor,
    keys: Tensor | None = None,
    instruction: Tensor | None = None,
    instruction_tokens: Tensor | None = None,
    instruction_mask: Tensor | None = None,
) -> Reference:
    """Tokens of ONE video: the local grid flattened (t, h, w), then the global tokens, then the pointers.

    Args:
        params: float64 parameters by name. `local.*` and `global_.*` make their branch, the others their option.
        setting: Dialect, window and injections.
        values: float[T, H, W, D].
        keys: float[T, H, W, K], or None for the values.
        instruction: float[K], the pooled instruction (direct, coarse, pointers).
        instruction_tokens: float[L, K] (fine, word pointers).
        instruction_mask: bool[L], False for padding.
    """
    if instruction_mask is not None:
        instruction_tokens = torch.stack(
            [token for token, is_real in zip(instruction_tokens, instruction_mask.tolist(), strict=True) if is_real]
        )
    if "motion.outer.weight" in params:
        values, keys = add_motion(params, values, keys)
    outputs, local_maps, global_maps, pointer_maps = [], [], [], []
    is_guided = False
    if "local.readout.0.weight" in params:
        chosen = instruction_tokens if setting.local_injection == "fine" else instruction
        outputs, local_maps = local_branch(params, setting, values, keys, chosen)
        is_guided |= setting.local_injection != "none"
    if "global_.readout.0.weight" in params:
        chosen = instruction_tokens if setting.global_injection == "fine" else instruction
        global_outputs, global_maps = global_branch(params, setting, values, chosen)
        outputs = outputs + global_outputs
        is_guided |= setting.global_injection != "none"
    if "pointers.query" in params:
        looked_for = instruction if is_guided else None
        words = [] if instruction_tokens is None else list(instruction_tokens)
        pointer_outputs, pointer_maps = pointers(params, values, values if keys is None else keys, looked_for, words)
        outputs = outputs + pointer_outputs
    return Reference(torch.stack(outputs), local_maps, global_maps, pointer_maps)
