"""The shared core: kernels, masks, positions, cache and dropout against slow or exact references."""

import math

import pytest
import torch

from mmvit.core.attention import Attention, attend
from mmvit.core.dropout import Dropout
from mmvit.core.masks import additive, causal, prefix, sparse_causal
from mmvit.core.norm import RMSNorm
from mmvit.core.positions import LayerPositions, Positions, RelativePositions, rotate, sincos
from mmvit.core.transformer import Transformer, TransformerConfig
from mmvit.models.activations import kept_for_backward

VARIANTS = {
    "vit": {},
    "llama": {"norm": "rmsnorm", "mlp": "swiglu", "bias": False, "qk_norm": True},
    "scaled": {"layer_scale": 0.1, "mlp": "gelu_tanh"},
}
CHECKPOINTING = {
    "none": {},
    "blocks": {"activation_checkpointing": "blocks"},
    "blocks, every 2": {"activation_checkpointing": "blocks", "activation_checkpointing_every": 2},
    "attention": {"activation_checkpointing": "attention"},
    "attention, every 2": {"activation_checkpointing": "attention", "activation_checkpointing_every": 2},
}


def random_core(**parts) -> Transformer:
    torch.manual_seed(0)
    core = Transformer(TransformerConfig(**{"width": 32, "depth": 3, "num_heads": 2, **parts})).eval()
    for parameter in core.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return core


@pytest.mark.parametrize("mask", [None, causal(9), prefix(9, 4)])
def test_plain_attention_equals_the_fused_kernel(mask):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 9, 8)
    bias = None if mask is None else additive(mask, torch.float32)
    plain = attend(query, key, value, bias, kernel="plain")
    torch.testing.assert_close(plain, attend(query, key, value, bias, kernel="sdpa"))


def test_is_causal_equals_the_causal_mask_on_both_kernels():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 9, 8)
    expected = attend(query, key, value, additive(causal(9), torch.float32), kernel="plain")
    for kernel in ("plain", "sdpa"):
        torch.testing.assert_close(attend(query, key, value, None, is_causal=True, kernel=kernel), expected)


def test_masks_written_out_by_hand():
    assert causal(3).tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert prefix(4, 2).tolist() == [
        [True, True, False, False],
        [True, True, False, False],
        [True, True, True, False],
        [True, True, True, True],
    ]
    with pytest.raises(ValueError, match="prefix_length of 0 to 4, got 5"):
        prefix(4, 5)


# A 4x4 grid in raster order; the marked codes are what the one marked Q sees, itself included.
SPARSE_BY_HAND = {
    ("row", 10): "......XXXXQ.....",
    ("row", 2): "XXQ.............",
    ("row", 12): "........XXXXQ...",
    ("column", 10): "..X...X...Q.....",
    ("column", 12): "X...X...X...Q...",
    ("convolution", 10): ".....XXX.XQ.....",
    ("convolution", 8): "...XXX.XQ.......",  # goes on at the other side, one row higher
    ("convolution", 11): "......XXX.XQ....",
    ("convolution", 1): "XQ..............",
}


@pytest.mark.parametrize(("kind", "query"), SPARSE_BY_HAND)
def test_dalles_masks_by_hand(kind, query):
    mask = sparse_causal(kind, prefix_length=3, grid=(4, 4), kernel=3)
    assert mask[:3].tolist() == [[True] + [False] * 18, [True] * 2 + [False] * 17, [True] * 3 + [False] * 16]
    assert mask[3:, :3].all()  # every code sees the whole caption
    seen = mask[3 + query, 3:].tolist()
    drawn = "".join("Q" if key == query else ".X"[is_seen] for key, is_seen in enumerate(seen))
    assert drawn == SPARSE_BY_HAND[kind, query]
    assert mask[3 + query, 3 + query]


def test_dalles_convolution_is_the_square_around_every_code():
    rows, columns, kernel = 6, 7, 5
    mask = sparse_causal("convolution", 0, (rows, columns), kernel)
    for query in range(rows * columns):
        for key in range(rows * columns):
            offsets = [(down, right) for down in range(-2, 1) for right in range(-2, 3)]
            covered = any(query + down * columns + right == key for down, right in offsets)
            assert mask[query, key] == (covered and key <= query)
    with pytest.raises(ValueError, match="odd and at most 7, got 9"):
        sparse_causal("convolution", 0, (rows, columns), 9)


@pytest.mark.parametrize("parts", VARIANTS.values(), ids=VARIANTS)
def test_a_causal_core_does_not_look_ahead(parts):
    core, x = random_core(**parts), torch.randn(2, 7, 32)
    changed = x.clone()
    changed[:, 5:] += torch.randn(2, 2, 32)
    before, after = core(x, is_causal=True), core(changed, is_causal=True)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("parts", VARIANTS.values(), ids=VARIANTS)
def test_cached_core_equals_uncached(parts):
    core, x = random_core(**parts), torch.randn(2, 7, 32)
    with torch.inference_mode():
        whole = core(x, is_causal=True)
        cache = core.new_cache(2, 7, torch.float32, "cpu")
        pieces = [core(x[:, :3], is_causal=True, cache=cache)]
        pieces += [core(x[:, i : i + 1], cache=cache) for i in range(3, 7)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="holds 7 tokens"):
            core(x[:, :1], cache=cache)


@pytest.mark.parametrize("parts", VARIANTS.values(), ids=VARIANTS)
def test_activation_checkpointing_changes_no_bit_and_keeps_less_for_the_gradient(parts):
    """By what a block keeps beside its input: all of it, or what belongs to attention."""
    tokens, results, kept = 24, [], {}
    for name, settings in CHECKPOINTING.items():
        settings = {**parts, **settings, "depth": 4, "dropout": 0.2, "stochastic_depth": 0.3}
        core = random_core(**settings).train()
        torch.manual_seed(1)

        def forward(core=core) -> torch.Tensor:
            return core(torch.ones(2, tokens, 32), is_causal=True).square().mean()

        loss, kept[name] = kept_for_backward(forward, but=core)
        loss.backward()
        results.append(torch.cat([loss.detach().view(1), *(p.grad.flatten() for p in core.parameters())]))
    assert all(torch.equal(result, results[0]) for result in results)
    saved = {name: kept["none"] - size for name, size in kept.items()}
    maps = 4 * 2 * 2 * tokens**2 * 4  # bytes of layers, examples and heads
    assert kept["blocks"] < kept["none"] / 6
    assert saved["blocks, every 2"] == pytest.approx(saved["blocks"] / 2, rel=0.05)
    assert 2 * maps < saved["attention"] < saved["blocks"]  # logits or their softmax, and the causal mask
    assert saved["attention, every 2"] == pytest.approx(saved["attention"] / 2, rel=0.05)


def test_recipes_with_true_and_false_for_activation_checkpointing_still_work():
    for old, new in ((True, "blocks"), (False, "none")):
        assert TransformerConfig(activation_checkpointing=old) == TransformerConfig(
            activation_checkpointing=new
        )
    with pytest.raises(ValueError, match="'none', 'blocks' or 'attention'"):
        TransformerConfig(activation_checkpointing="every block")


def test_rotary_logits_depend_on_relative_place_alone():
    positions = Positions("rotary_2d", width=16, head_dim=16, prefix_length=0, grid=(6, 6))
    cosines, sines = positions.in_layers(0, 36).rotations
    query, key = torch.randn(2, 1, 1, 1, 16)

    def logit(a: tuple[int, int], b: tuple[int, int]) -> float:
        at = [6 * row + column for row, column in (a, b)]
        turned = [
            rotate(v, (cosines[i : i + 1], sines[i : i + 1])) for v, i in zip((query, key), at, strict=True)
        ]
        return (turned[0] * turned[1]).sum().item()

    assert logit((0, 1), (2, 4)) == pytest.approx(logit((3, 2), (5, 5)), abs=1e-5)
    assert logit((0, 1), (2, 4)) != pytest.approx(logit((0, 1), (4, 2)), abs=1e-3)


def test_rotation_and_dropout_have_the_gradients_of_their_formulas():
    torch.manual_seed(0)
    angles = torch.rand(5, 4, dtype=torch.float64)
    tables = (angles.cos(), angles.sin())
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: rotate(x, tables), x)
    dropout = Dropout(0.3)

    def same_mask_every_time(x):
        torch.manual_seed(1)
        return dropout(x)

    torch.autograd.gradcheck(same_mask_every_time, x)


def test_rotary_angles_by_hand_with_the_grid_behind_the_prefix():
    positions = Positions("rotary_2d", width=8, head_dim=8, prefix_length=3, grid=(2, 2))
    places = [(0, 0), (1, 1), (2, 2), (3, 3), (3, 4), (4, 3), (4, 4)]
    angles = torch.tensor([[row, row / 100, column, column / 100] for row, column in places])
    cosines, sines = positions.in_layers(1, 6).rotations
    torch.testing.assert_close(cosines, angles[1:].cos())
    torch.testing.assert_close(sines, angles[1:].sin())


def test_queries_and_keys_have_norms_of_their_own():
    torch.manual_seed(0)
    attention, x = Attention(16, 2, qk_norm=True), torch.randn(3, 5, 16)
    for norm in (attention.query_norm, attention.key_norm):
        torch.nn.init.normal_(norm.weight)
    projected = attention.qkv(x).view(3, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
    query, key, value = attention.heads(x)
    for found, raw, norm in zip(
        (query, key), projected, (attention.query_norm, attention.key_norm), strict=False
    ):
        torch.testing.assert_close(
            found, raw / (raw.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
        )
    torch.testing.assert_close(value, projected[2])


def test_weights_that_write_into_the_residual_stream_begin_smaller():
    torch.manual_seed(0)
    core = Transformer(TransformerConfig(width=256, depth=8, num_heads=4, layer_scale=0.1))
    for name, parameter in core.named_parameters():
        if name.endswith((".qkv.weight", ".up.weight")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.02), name
        elif name.endswith((".out.weight", ".down.weight")):
            assert parameter.std().item() == pytest.approx(0.02 / 4, rel=0.02), name  # √(2 · 8)
        elif name.endswith(".bias"):
            assert not parameter.any(), name
        elif name.endswith(".scale"):
            assert parameter.eq(0.1).all(), name


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_dropout_reaches_the_hidden_units_and_both_residual_branches(mlp):
    core = random_core(dropout=0.5, mlp=mlp, depth=1)
    block, x = core.blocks[0], torch.randn(8, 16, 32)
    seen = {}
    block.mlp.down.register_forward_pre_hook(lambda _, inputs: seen.update(hidden=inputs[0]))
    for name in ("branch1", "branch2"):
        branch = getattr(block, name)
        branch.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: output}))
    block(x)
    assert all((tensor != 0).all() for tensor in seen.values())
    block.train()(x)
    assert {*seen} == {"hidden", "branch1", "branch2"}
    for name, tensor in seen.items():
        assert (tensor == 0).float().mean().item() == pytest.approx(0.5, abs=0.04), name


def test_sincos_by_hand():
    row, column = 2.0, 3.0
    table = sincos(torch.tensor([[row, column]]), width=8)[0]
    expected = [math.sin(row), math.sin(row / 100), math.cos(row), math.cos(row / 100)]
    expected += [math.sin(column), math.sin(column / 100), math.cos(column), math.cos(column / 100)]
    torch.testing.assert_close(table, torch.tensor(expected))


def test_learned_2d_is_row_plus_column():
    positions = Positions("learned_2d", width=4, head_dim=4, prefix_length=2, grid=(3, 5))
    added = positions.add(torch.zeros(1, 17, 4))[0]
    torch.testing.assert_close(added[2 + 1 * 5 + 4], positions.row_table[1] + positions.column_table[4])
    torch.testing.assert_close(added[:2], positions.prefix_table)


def test_learned_2d_concat_is_half_row_half_column():
    positions = Positions("learned_2d_concat", 8, 4, prefix_length=1, grid=(2, 3))
    found = positions.add(torch.zeros(1, 7, 8))[0]
    assert torch.equal(found[0], positions.prefix_table[0])
    expected = torch.cat([positions.row_table[1], positions.column_table[2]])
    assert torch.equal(found[1 + 5], expected)


@pytest.mark.parametrize("kernel", ["plain", "sdpa"])
def test_relative_positions_add_what_each_query_says_of_each_offset(kernel):
    torch.manual_seed(0)
    attention = Attention(8, 2, kernel=kernel)
    relative = RelativePositions(1, length=3, head_dim=4)
    (offsets,) = relative.tables
    torch.nn.init.normal_(offsets)
    x = torch.randn(2, 3, 8)
    mask = additive(causal(3), torch.float32)
    query, key, value = attention.heads(x)
    logits = torch.empty(2, 2, 3, 3)
    for q in range(3):
        for k in range(3):
            towards = key[:, :, k] + offsets[q - k + 2]
            logits[:, :, q, k] = (query[:, :, q] * towards).sum(-1) / 2
    expected = attention.out(((logits + mask).softmax(-1) @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, mask, positions=LayerPositions(offsets=offsets)), expected)
    with pytest.raises(ValueError, match="expected 3 offsets for 2 tokens, got 5"):
        attention(x[:, :2], positions=LayerPositions(offsets=offsets))


def test_rmsnorm_equals_torch():
    x, norm = torch.randn(3, 5, 16), RMSNorm(16)
    torch.nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (16,), norm.weight, 1e-6))


def test_dropout_keeps_the_expectation_and_repeats_by_seed():
    dropout, x = Dropout(0.3), torch.ones(1000, 1001)
    torch.manual_seed(0)
    first = dropout(x)
    torch.manual_seed(0)
    assert torch.equal(first, dropout(x))
    dropped = 77 / 256  # 0.3 to the nearest 256th
    assert (first == 0).float().mean().item() == pytest.approx(dropped, abs=2e-3)  # 4 standard deviations
    assert first.max().item() == pytest.approx(1 / (1 - dropped))
    assert not torch.equal(first[0] == 0, first[1] == 0)
    assert torch.equal(dropout.eval()(x), x)


def test_stochastic_depth_drops_whole_branches_of_single_samples():
    core = random_core(stochastic_depth=0.5, depth=2).train()
    block = core.blocks[1]
    out = block.branch1(torch.ones(400, 3, 32))
    assert {value.item() for value in out.unique()} == {0.0, 2.0}
    assert out[:, 0, 0].eq(0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert torch.equal(out[:, 0, 0], out[:, 2, 31])
    assert core.blocks[0].branch1.drop_probability == 0


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="num_heads 5 does not divide width 32"):
        TransformerConfig(width=32, num_heads=5)
    with pytest.raises(ValueError, match="not both"):
        random_core()(torch.zeros(1, 2, 32), mask=causal(2), is_causal=True)
