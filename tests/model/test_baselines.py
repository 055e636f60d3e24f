"""The baselines: the interface they share with the compressor, and their values against loops written by hand."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
from hicom.model.baselines import COMPRESSORS, build_compressor
from hicom.model.compressor import HybridCompressor
from invariants import assert_all_trainable_get_grad, assert_batched_equals_single, assert_close, assert_counts_agree

DIM, OUT_DIM = 8, 6
Params = dict[str, Tensor]

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "unconditional": ("unconditional", {"window": (2, 2, 3), "num_global_tokens": 3}),
    "unconditional_local": ("unconditional_local", {"window": (4, 3, 3)}),
    "unconditional_global": ("unconditional_global", {"num_global_tokens": 3}),
    "spatial_pool": ("spatial_pool", {"size": 3}),
    "space_time_pool": ("space_time_pool", {"window": (2, 2, 2)}),
    "llava_video": ("llava_video", {}),
    "qformer": ("qformer", {"num_queries": 3, "num_layers": 3}),
    "qformer per frame": ("qformer", {"num_queries": 3, "num_layers": 3, "per_frame": True}),
    "perceiver": ("perceiver", {"num_queries": 3, "num_layers": 2}),
    "no_compression": ("no_compression", {}),
}
all_variants = pytest.mark.parametrize("variant", VARIANTS)


def make(variant: str, dim: int = DIM) -> nn.Module:
    """A small compressor with parameters away from their starting point, in float64."""
    name, options = VARIANTS[variant]
    compressor = build_compressor(name, dim=dim, out_dim=OUT_DIM, **options).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in compressor.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise / (parameter.shape[1] ** 0.5 if parameter.ndim == 2 else 2))
    return compressor


def make_values(num_frames: int, height: int = 3, width: int = 5, dim: int = DIM) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_frames, height, width, dim, generator=generator, dtype=torch.float64)


def test_every_name_builds_and_is_tested() -> None:
    assert {name for name, _ in VARIANTS.values()} | {"hicom"} == set(COMPRESSORS)
    assert isinstance(build_compressor("hicom", dim=DIM, out_dim=OUT_DIM), HybridCompressor)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"compressor='q_former' is not one of hicom, .*qformer"):
        build_compressor("q_former", dim=DIM, out_dim=OUT_DIM)


@all_variants
@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 7, 7), (2, 3, 4), (5, 5, 7), (8, 6, 6)], ids=str)
def test_token_count_is_what_comes_out(variant: str, grid: tuple[int, int, int]) -> None:
    compressor = make(variant)
    tokens = compressor(make_values(*grid), None, [grid[0]]).tokens[0]
    assert_counts_agree(compressor.token_count, tokens, *grid)
    assert tokens.shape[1] == OUT_DIM


@pytest.mark.parametrize(
    ("name", "options", "tokens"),
    [
        ("spatial_pool", {}, 2592),
        ("space_time_pool", {}, 648),
        ("llava_video", {}, 6272),
        ("qformer", {}, 32),
        ("qformer", {"per_frame": True}, 1024),
        ("perceiver", {}, 64),
        ("unconditional_local", {}, 648),
        ("unconditional_global", {}, 32),
        ("unconditional", {}, 680),
        ("no_compression", {}, 32 * 27 * 27),
    ],
)
def test_published_token_counts_for_32_frames(name: str, options: dict[str, Any], tokens: int) -> None:
    assert build_compressor(name, dim=DIM, out_dim=OUT_DIM, **options).token_count(32, 27, 27) == tokens


@all_variants
def test_batch_equals_one_by_one(variant: str) -> None:
    compressor = make(variant)
    counts = [5, 1, 3]
    values = make_values(sum(counts)).requires_grad_()
    batched = compressor(values, None, counts).tokens
    parts = values.split(counts)
    singles = [compressor(part, None, [len(part)]).tokens[0] for part in parts]
    assert_batched_equals_single(batched, singles, 1e-10)
    grads = [torch.autograd.grad(sum(x.square().sum() for x in tokens), values)[0] for tokens in (batched, singles)]
    assert_close(*grads, 1e-10, "gradient of the values")


@all_variants
def test_every_parameter_gets_a_gradient(variant: str) -> None:
    compressor = make(variant)
    sum(tokens.square().sum() for tokens in compressor(make_values(4), None, [3, 1]).tokens).backward()
    # A key bias cancels in the softmax; nn.MultiheadAttention keeps it in one tensor with the others.
    assert_all_trainable_get_grad(compressor, zero=["k_proj.bias"])


@all_variants
def test_matches_finite_differences(variant: str) -> None:
    compressor = make(variant)
    values = make_values(2, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: compressor(x, None, [2]).tokens[0], values, fast_mode=True)


@all_variants
def test_keys_and_instruction_have_no_influence(variant: str) -> None:
    compressor = make(variant)
    values = make_values(3)
    tokens = compressor(values, None, [3]).tokens[0]
    others = compressor(values, values + 1, [3], torch.ones(1, DIM).double(), torch.ones(1, 2, DIM).double()).tokens[0]
    assert torch.equal(tokens, others)


@pytest.mark.parametrize("variant", ["qformer", "qformer per frame", "perceiver", "unconditional_global"])
def test_attention_maps(variant: str) -> None:
    compressor = make(variant)
    counts = [4, 1]
    values = make_values(5)
    assert compressor(values, None, counts).global_attention is None
    output = compressor(values, None, counts, return_attention=True)
    for num_frames, maps in zip(counts, output.global_attention, strict=True):
        assert maps.shape[1:] == (3, num_frames, 3, 5)
        sums = maps.sum((2, 3, 4))
        if variant == "perceiver":  # the rest goes to the latents
            assert ((sums > 0) & (sums < 1)).all()
        else:
            per_token = num_frames if "per frame" in variant else 1
            torch.testing.assert_close(sums, torch.full_like(sums, per_token))
    assert_batched_equals_single(compressor(values, None, counts).tokens, output.tokens, 1e-10)


@pytest.mark.parametrize("variant", ["qformer", "perceiver"])
def test_the_order_of_frames_matters(variant: str) -> None:
    compressor = make(variant)
    values = make_values(3)
    backward = compressor(values.flip(0), None, [3]).tokens[0]
    assert (compressor(values, None, [3]).tokens[0] - backward).abs().max() > 1e-3


@pytest.mark.parametrize("variant", ["spatial_pool", "space_time_pool", "unconditional_local"])
def test_the_window_is_a_run_time_argument(variant: str) -> None:
    compressor = make(variant)
    tokens = compressor(make_values(5), None, [5], window=(3, 3, 2)).tokens[0]
    assert_counts_agree(compressor.token_count, tokens, 5, 3, 5, (3, 3, 2))
    assert len(tokens) == 2 * 1 * 3


@pytest.mark.parametrize("variant", ["llava_video", "qformer", "perceiver", "no_compression"])
def test_rejects_a_window_where_there_is_none(variant: str) -> None:
    compressor = make(variant)
    with pytest.raises(ValueError, match=r"window=\(1, 2, 2\) has no meaning for"):
        compressor(make_values(2), None, [2], window=(1, 2, 2))
    with pytest.raises(ValueError, match=r"window=\(1, 2, 2\) has no meaning for"):
        compressor.token_count(2, 3, 3, (1, 2, 2))


@all_variants
@pytest.mark.parametrize(
    ("shape", "counts", "message"),
    [
        ((3, 3, 5, DIM + 1), [3], r"values must be float\[F, H, W, 8\], got the shape \(3, 3, 5, 9\)"),
        ((3, 3, DIM), [3], r"values must be"),
        ((3, 3, 5, DIM), [2], r"num_frames=\[2\] must be positive and sum to the 3 frames"),
        ((3, 3, 5, DIM), [3, 0], r"num_frames=\[3, 0\]"),
        ((3, 3, 5, DIM), [], r"num_frames=\[\]"),
    ],
)
def test_rejects_inputs_that_disagree(variant: str, shape: tuple[int, ...], counts: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(variant)(torch.zeros(shape, dtype=torch.float64), None, counts)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("qformer", {"num_queries": 0}, "num_queries=0"),
        ("qformer", {"num_layers": 0}, "num_layers=0"),
        ("perceiver", {"num_layers": -1}, "num_layers=-1"),
        ("llava_video", {"stride": 0}, "stride=0"),
        ("spatial_pool", {"size": 0}, r"window=\(1, 0, 0\)"),
    ],
)
def test_rejects_impossible_choices(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_compressor(name, dim=DIM, out_dim=OUT_DIM, **options)


# Values by hand


@pytest.mark.parametrize(("variant", "window"), [("spatial_pool", (1, 3, 3)), ("space_time_pool", (2, 2, 2))])
def test_pooling_by_hand(variant: str, window: tuple[int, int, int]) -> None:
    compressor, values = make(variant), make_values(5)
    params = dict(compressor.named_parameters())
    sizes = [min(n, k) for n, k in zip(values.shape, window, strict=False)]
    expected = []
    for starts in itertools.product(
        *(reference.group_starts(n, k) for n, k in zip(values.shape, window, strict=False))
    ):
        group = tuple(range(start, start + size) for start, size in zip(starts, sizes, strict=True))
        expected.append(reference.mlp(params, "readout", reference.group_mean(values, group)))
    assert_close(compressor(values, None, [5]).tokens[0], torch.stack(expected), 1e-10, "pooled tokens")


def test_no_compression_by_hand() -> None:
    compressor, values = make("no_compression"), make_values(2)
    params = dict(compressor.named_parameters())
    expected = [reference.mlp(params, "readout", x) for x in values.flatten(0, 2)]
    assert_close(compressor(values, None, [2]).tokens[0], torch.stack(expected), 1e-10, "projected patches")


def test_llava_video_by_hand() -> None:
    """The MLP on every patch first, then each frame's grid resized, each axis linearly."""
    compressor, values = make("llava_video"), make_values(2)
    params = dict(compressor.named_parameters())
    expected = []
    for frame in values:
        projected = torch.stack([torch.stack([reference.mlp(params, "readout", x) for x in row]) for row in frame])
        for i, j in itertools.product(range(2), range(3)):
            token = torch.zeros(OUT_DIM, dtype=torch.float64)
            for h, weight_h in reference.interpolation_weights(i, 3, 2):
                for w, weight_w in reference.interpolation_weights(j, 5, 3):
                    token = token + weight_h * weight_w * projected[h, w]
            expected.append(token)
    assert_close(compressor(values, None, [2]).tokens[0], torch.stack(expected), 1e-10, "resized tokens")


def norm(params: Params, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean()
    scaled = centred / torch.sqrt((centred**2).mean() + 1e-5)
    return scaled * params[f"{name}.weight"] + params[f"{name}.bias"]


def attend(params: Params, name: str, query: Tensor, features: list[Tensor], num_heads: int) -> Tensor:
    """Plain multi-head attention of one query, from the packed weights of nn.MultiheadAttention."""
    dim = len(query)
    weight = params[f"{name}.in_proj_weight"].split(dim)
    bias = params[f"{name}.in_proj_bias"].split(dim) if f"{name}.in_proj_bias" in params else (0, 0, 0)
    q = weight[0] @ query + bias[0]
    keys = [weight[1] @ x + bias[1] for x in features]
    values = [weight[2] @ x + bias[2] for x in features]
    outputs = []
    for head in range(num_heads):
        part = slice(head * dim // num_heads, (head + 1) * dim // num_heads)
        logits = [(q[part] @ key[part]) / math.sqrt(dim // num_heads) for key in keys]
        outputs.append(reference.weighted_sum(reference.softmax(logits), [value[part] for value in values]))
    return reference.linear(params, f"{name}.out_proj", torch.cat(outputs))


def placed_patches(values: Tensor) -> list[Tensor]:
    """Patches of a video, each with the sinusoids of its frame's number."""
    width = values.shape[-1]
    origin = reference.position(0, 0, 0, width)
    return [
        x + reference.position(t, 0, 0, width) - 2 * origin / 3 for t, f in enumerate(values) for x in f.flatten(0, 1)
    ]


@pytest.mark.parametrize(("dim", "num_heads"), [(DIM, 1), (128, 2)])
@pytest.mark.parametrize("variant", ["qformer", "qformer per frame"])
def test_qformer_by_hand(variant: str, dim: int, num_heads: int) -> None:
    compressor, values = make(variant, dim), make_values(2, 2, 3, dim)
    params = dict(compressor.named_parameters())
    videos = [list(frame.flatten(0, 1)) for frame in values] if "per frame" in variant else [placed_patches(values)]
    expected = []
    for patches in videos:
        queries = [norm(params, "norm", query) for query in params["query"]]
        for layer in range(3):
            at, seen = f"layers.{layer}", []
            for query in queries:
                query = norm(
                    params, f"{at}.self_norm", query + attend(params, f"{at}.self_attention", query, queries, num_heads)
                )
                if layer in (0, 2):
                    cross = attend(params, f"{at}.cross_attention", query, patches, num_heads)
                    query = norm(params, f"{at}.cross_norm", query + cross)
                seen.append(norm(params, f"{at}.norm", query + reference.mlp(params, f"{at}.feed_forward", query)))
            queries = seen
        expected.extend(reference.linear(params, "readout", query) for query in queries)
    assert_close(compressor(values, None, [2]).tokens[0], torch.stack(expected), 1e-10, "Q-Former tokens")


@pytest.mark.parametrize(("dim", "num_heads"), [(DIM, 1), (128, 2)])
def test_perceiver_by_hand(dim: int, num_heads: int) -> None:
    compressor, values = make("perceiver", dim), make_values(2, 2, 3, dim)
    params = dict(compressor.named_parameters())
    latents = list(params["query"])
    for layer in range(2):
        at = f"layers.{layer}"
        normed = [norm(params, f"{at}.norm_q", latent) for latent in latents]
        features = [norm(params, f"{at}.norm_x", x) for x in placed_patches(values)] + normed
        after = []
        for latent, query in zip(latents, normed, strict=True):
            latent = latent + attend(params, f"{at}.attention", query, features, num_heads)
            hidden = reference.gelu(
                reference.linear(params, f"{at}.feed_forward.1", norm(params, f"{at}.feed_forward.0", latent))
            )
            after.append(latent + reference.linear(params, f"{at}.feed_forward.3", hidden))
        latents = after
    expected = [reference.linear(params, "readout", norm(params, "norm", latent)) for latent in latents]
    assert_close(compressor(values, None, [2]).tokens[0], torch.stack(expected), 1e-10, "Perceiver tokens")
