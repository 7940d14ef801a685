"""Shapes, types, initial weights, and the model's equations against plain tensor arithmetic."""

import math

import pytest
import torch
from torch.nn import functional as F

from equiav.config import Config, ModelConfig, from_dict
from equiav.model import EquiAV
from equiav.model.encoder import sincos_positions
from equiav.model.predictor import AttentionPredictor
from equiav.objective import Embeddings

B, S = 5, 3


def build(config, seed=0):
    model = EquiAV(config.model, config.objective)
    model.init_weights(seed)
    return model


def randomised(model):
    """Every parameter away from its initial value, so that biases and norms count."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=g))
    return model


def inputs(config, seed=0, batch=B):
    g = torch.Generator().manual_seed(seed)
    m, Q = config.model, 1 + config.objective.sampled
    shapes = [(m.spectrogram_frames, m.spectrogram_mels), (3, m.image_size, m.image_size)] * 2 + [(Q, 24), (Q, 18)]
    return [torch.randn(batch, *shape, generator=g) for shape in shapes]


def test_shapes_and_dtypes(config, device):
    model, x = build(config).to(device), [v.to(device) for v in inputs(config)]
    for z in model(*x)[:8]:
        assert z.shape == (B, 64)
        assert z.dtype == torch.float32
    with torch.autocast(device, torch.bfloat16):
        assert Embeddings(*model(*x)).inter_a.isfinite().all()
    h_a, h_v = model.encode_audio(x[0]), model.encode_image(x[1])
    assert h_a.shape == (B, 64, 64)
    assert h_v.shape == (B, 64, 64)
    assert model.predict_audio(h_a, x[4]).shape == (B, 1 + S, 64)
    assert model.predict_image(h_v, x[5]).shape == (B, 1 + S, 64)
    for embedding in (model.embed_audio(x[0], x[4][:1]), model.embed_image(x[1], x[5])):
        assert embedding.shape == (B, 64)
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(B, device=device))


def test_devices_agree(config, device):
    here, there = randomised(build(config)).eval(), randomised(build(config)).eval().to(device)
    x = inputs(config)
    for ours, theirs in zip(here(*x)[:8], there(*(v.to(device) for v in x))[:8], strict=True):
        torch.testing.assert_close(ours, theirs.cpu(), atol=2e-3, rtol=1e-3)


def test_wrong_shapes_are_named(config):
    model, x = build(config), inputs(config)
    with pytest.raises(ValueError, match=r"\(5, 1, 64, 250\), expected \(B, \(1, 64, 256\)\)"):
        model.encode_audio(x[0][:, :250])
    with pytest.raises(ValueError, match=r"expected \(B, \(3, 64, 64\)\)"):
        model.encode_image(x[1][:, :1])


def test_every_parameter_is_initialised_and_trained(config):
    model = EquiAV(config.model, config.objective)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(math.nan)
    model.init_weights(0)
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), name
    randomised(model)
    loss = sum(z.square().sum() + z.sum() for z in model(*inputs(config))[:6])
    loss.backward()
    for name, parameter in model.named_parameters():
        # Adding a constant to every key changes no attention: what has no effect gets no gradient, not even rounding noise.
        if name.endswith("key.bias"):
            assert not parameter.requires_grad
            continue
        assert parameter.grad.abs().max() > 0, name
        if name.endswith("qkv.bias"):
            query, key, value = parameter.grad.chunk(3)
            assert query.abs().min() > 0
            assert value.abs().min() > 0
            assert not key.any()


def test_initial_weights_are_a_function_of_seed_and_name(make_config):
    config = make_config()
    one, again, other = build(config, 0), build(config, 0), build(config, 1)
    deeper = build(make_config(model={"depth": 4}), 0).state_dict()
    torch.rand(3)  # global state plays no part
    for name, value in one.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert torch.equal(value, deeper[name])
    assert not torch.equal(one.audio.encoder.patch_embed.weight, other.audio.encoder.patch_embed.weight)
    assert not torch.equal(one.audio.encoder.blocks[0].mlp.fc1.weight, one.audio.encoder.blocks[1].mlp.fc1.weight)


def test_initial_distributions(config):
    model = build(config)
    weight = model.audio.encoder.patch_embed.weight.detach()  # a linear layer from 256 to 64
    bound = math.sqrt(6 / (256 + 64))
    assert 0.95 * bound < weight.abs().max() <= bound
    assert model.audio.encoder.blocks[0].attn.qkv.bias.abs().max() == 0
    assert (model.image.encoder.norm_aug.weight == 1).all()
    assert model.image.encoder.modality.detach().std() == pytest.approx(0.02, rel=0.3)


def test_numerics_of_every_norm_and_activation(config):
    for name, module in build(config).named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert module.eps == 1e-5, name
        if isinstance(module, torch.nn.GELU):
            assert module.approximate == "none", name
        if isinstance(module, torch.nn.Linear):
            assert (module.bias is None) == name.endswith("predictor.out"), name
        if isinstance(module, torch.nn.Dropout):
            assert module.p == 0, name
    assert sum(isinstance(m, torch.nn.LayerNorm) for m in build(config).modules()) == 2 * (2 * 3 + 2 + 2 + 6)


def test_fused_attention_is_used(config):
    for block in build(config).audio.encoder.blocks:
        assert block.attn.fused_attn


def test_positions_are_maes():
    """Column in the first half of the channels, row in the second; sine then cosine; base 10,000."""
    positions, D, rows, columns = sincos_positions(16, 2, 3), 16, 2, 3
    assert positions.shape == (rows * columns, D)
    for r in range(rows):
        for c in range(columns):
            expected = []
            for place in (c, r):
                angles = [place / 10000 ** (i / (D / 4)) for i in range(D // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(positions[r * columns + c], torch.tensor(expected))


def test_two_views_share_all_but_the_last_norm(config):
    encoder = randomised(build(config)).image.encoder
    x, x_aug = inputs(config)[1], inputs(config)[3]
    h, h_aug = encoder(x, x_aug)
    torch.testing.assert_close(h, encoder(x)[0], atol=1e-5, rtol=1e-5)
    swapped = encoder(x_aug)[0]
    plain = (swapped - encoder.norm.bias) / encoder.norm.weight * encoder.norm_aug.weight + encoder.norm_aug.bias
    torch.testing.assert_close(h_aug, plain, atol=1e-4, rtol=1e-4)


def plain_layer_norm(x, norm):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def test_attention_predictor_is_equations_4_and_5(config):
    """One query and one head at a time, in float64."""
    p = randomised(build(config)).audio.predictor.double()
    h, t = torch.randn(2, 7, 64, dtype=torch.float64), torch.randn(2, 4, 24, dtype=torch.float64)
    ours, weights = p(h, t), p.attention(h, t)
    d_H = p.query.out_features // p.heads
    for b in range(2):
        for s in range(4):
            q = t[b, s]
            for k in (0, 2, 4):
                q = p.encode_t[k].weight @ q + p.encode_t[k].bias
                q = q * torch.sigmoid(1.702 * q) if k < 4 else q
            q = p.query.weight @ plain_layer_norm(q, p.norm_query) + p.query.bias
            heads = []
            for j in range(p.heads):
                rows = slice(j * d_H, (j + 1) * d_H)
                keys = h[b] @ p.key.weight[rows].T + p.key.bias[rows]
                values = h[b] @ p.value.weight[rows].T + p.value.bias[rows]
                attention = torch.softmax(keys @ q[rows] / math.sqrt(d_H), dim=0)
                torch.testing.assert_close(weights[b, j, s].double(), attention, atol=1e-6, rtol=1e-5)
                heads.append(attention @ values)
            x = p.out.weight @ torch.cat(heads) + h[b].mean(0)
            y = p.mlp[0].weight @ plain_layer_norm(x, p.norm) + p.mlp[0].bias
            y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
            torch.testing.assert_close(ours[b, s], x + p.mlp[2].weight @ y + p.mlp[2].bias)


@pytest.mark.parametrize("kind", ["attention", "linear", "hypernet"])
def test_predictors(make_config, kind):
    """Each query by itself gives the same; t matters; gradients are right."""
    config = make_config(model={"predictor": kind})
    predictor = randomised(build(config)).image.predictor.double()
    h = torch.randn(2, 6, 64, dtype=torch.float64, requires_grad=True)
    t = torch.randn(2, 3, 18, dtype=torch.float64, requires_grad=True)
    together = predictor(h, t)
    assert together.shape == (2, 3, 64)
    for s in range(3):
        torch.testing.assert_close(predictor(h, t[:, s : s + 1])[:, 0], together[:, s])
    assert (together[:, 0] - together[:, 1]).abs().max() > 1e-3
    assert torch.autograd.gradcheck(predictor, (h, t), fast_mode=True)


def test_linear_and_hypernet_are_what_they_say(make_config):
    h, t, t2 = torch.randn(1, 6, 64), torch.randn(1, 1, 18), torch.randn(1, 1, 18)
    linear = build(make_config(model={"predictor": "linear"})).image.predictor
    hyper = build(make_config(model={"predictor": "hypernet"})).image.predictor
    zero = torch.zeros_like(h)
    for predictor in (linear, hyper):  # for a fixed t, affine in MeanPool(h)
        affine = predictor(h, t) - predictor(zero, t)
        torch.testing.assert_close(predictor(2 * h, t) - predictor(zero, t), 2 * affine, atol=1e-5, rtol=1e-4)
    change, change_2 = (hyper(h, x) - h.mean(1, keepdim=True) for x in (t, t2))
    assert (change - change_2).abs().max() > 1e-4  # t chooses the map itself, not an offset:
    assert (hyper(zero, t)).abs().max() < 1e-6
    linear_shift = (linear(h, t) - linear(h, t2)) - (linear(zero, t) - linear(zero, t2))
    assert linear_shift.abs().max() < 1e-5


@pytest.mark.parametrize("size", ["tiny", "vit_s16", "vit_b16"])
def test_predictor_sizes_can_be_matched(make_config, size):
    counts = {}
    for kind in ("attention", "linear", "hypernet"):
        config = make_config(model={"size": size, "predictor": kind})
        with torch.device("meta"):
            counts[kind] = sum(p.numel() for p in EquiAV(config.model, config.objective).audio.predictor.parameters())
    assert counts["linear"] == pytest.approx(counts["attention"], rel=0.005)
    assert counts["hypernet"] == pytest.approx(counts["attention"], rel=0.05)  # its rank is a whole number
    wide = make_config(model={"predictor": "linear", "predictor_width": 7})
    assert build(wide).audio.predictor.inner.out_features == 7


def test_reference_size_and_the_released_one():
    """docs/method.md: the released state dict's 211,655,168 elements, less what is dead, fixed or redundant there."""
    config = from_dict(Config, {}, "test")
    with torch.device("meta"):
        model = EquiAV(config.model, config.objective)
    ours = sum(p.numel() for p in model.parameters())
    dead_norms, positions, equal_channels = 24 * 4 * 2 * 768, (512 + 196) * 768, 2 * 16 * 16 * 768
    assert ours == 210_570_752
    assert ours + dead_norms + positions + equal_channels == 211_655_168


def heads(model, side, which, h):
    return getattr(model.get_submodule(side), f"{which}_head")(h)


@pytest.mark.parametrize("intra", ["equivariant", "invariant", "none"])
@pytest.mark.parametrize("inter_on", ["original", "augmented", "equivariant", "centroid"])
def test_forward_gives_the_embeddings_of_every_ablation(make_config, intra, inter_on):
    config = make_config(objective={"intra": intra, "inter_on": inter_on, "centroid_size": S})
    model = randomised(build(config))
    x = inputs(config)
    e = Embeddings(*model(*x))
    h, h_aug = model.image.encoder(x[1], x[3])
    predicted = [model.predict_image(h, x[5][:, k : k + 1])[:, 0] for k in range(1 + config.objective.sampled)]
    representative = {
        "original": lambda: h.mean(1),
        "augmented": lambda: h_aug.mean(1),
        "equivariant": lambda: predicted[0],
        "centroid": lambda: sum(predicted[1:]) / S,
    }[inter_on]()
    torch.testing.assert_close(e.inter_v, heads(model, "image", "inter", representative), atol=1e-5, rtol=1e-4)
    if intra == "none":
        assert e.intra_v is e.aug_v is e.intra_a is e.plain_v is None
        return
    anchor = predicted[0] if intra == "equivariant" else h.mean(1)
    torch.testing.assert_close(e.intra_v, heads(model, "image", "intra", anchor), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(e.aug_v, heads(model, "image", "intra", h_aug.mean(1)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(e.plain_v, heads(model, "image", "intra", h.mean(1)), atol=1e-5, rtol=1e-4)
    assert not e.plain_v.requires_grad


@pytest.mark.parametrize("inter_on", ["original", "augmented", "equivariant", "centroid"])
def test_embedding_of_a_clip_is_what_training_compares(make_config, inter_on):
    """The same function of the clip, of the vectors, and for `augmented` of the view in the place of the clip."""
    config = make_config(objective={"inter_on": inter_on, "centroid_size": S})
    model, x = randomised(build(config)), inputs(config)
    e = Embeddings(*model(*x))
    audio, image, t_a, t_v = x[0], x[1], None, None
    if inter_on == "augmented":
        audio, image = x[2], x[3]
    if inter_on in ("equivariant", "centroid"):
        some = slice(1, None) if inter_on == "centroid" else slice(0, 1)
        t_a, t_v = x[4][:, some], x[5][:, some]
        assert t_a.shape[1] == config.objective.sampled_in_evaluation
    torch.testing.assert_close(model.embed_audio(audio, t_a), F.normalize(e.inter_a, dim=1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.embed_image(image, t_v), F.normalize(e.inter_v, dim=1), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=f"inter_on={inter_on} (needs|takes no) vectors t"):
        model.embed_audio(audio, x[4] if t_a is None else None)


def test_attention_on_request(config):
    model, x = randomised(build(config)), inputs(config)
    weights = model.attention_image(x[1], x[5])
    assert weights.shape == (B, 2, 1 + S, 64)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, 2, 1 + S))
    assert isinstance(model.image.predictor, AttentionPredictor)
    linear = EquiAV(ModelConfig(**{**vars(config.model), "predictor": "linear"}), config.objective)
    with pytest.raises(ValueError, match="LinearPredictor has no attention"):
        linear.attention_audio(x[0], x[4])


def test_temperature(make_config):
    config = make_config(objective={"learnable_temperature": True, "centroid_size": S})
    model, x = build(config), inputs(config)
    e = Embeddings(*model(*x))
    assert e.temperature.tolist() == pytest.approx([0.07] * len(x[0]))
    e.temperature.sum().backward()
    assert model.log_temperature.grad.abs().max() > 0
    with torch.no_grad():
        model.log_temperature.fill_(-20)
    model.clamp_temperature()
    assert Embeddings(*model(*x)).temperature.tolist() == pytest.approx([0.01] * len(x[0]))
    fixed = build(make_config(objective={"centroid_size": S}))
    fixed.clamp_temperature()
    assert Embeddings(*fixed(*x)).temperature is None


def test_encoder_is_its_equation(config):
    """Patches one by one, positions where they belong, then timm's blocks."""
    encoder, x = randomised(build(config)).audio.encoder, torch.randn(2, 1, 64, 256)
    rows, columns = config.model.audio_grid
    assert (rows, columns) == (4, 16)
    assert torch.equal(encoder.positions, sincos_positions(64, rows, columns))
    weight, bias = encoder.patch_embed.weight, encoder.patch_embed.bias
    patches = [x[..., 16 * r : 16 * r + 16, 16 * c : 16 * c + 16] for r in range(rows) for c in range(columns)]
    tokens = torch.stack([torch.einsum("bcij,dcij->bd", patch, weight) + bias for patch in patches], dim=1)
    tokens = tokens + encoder.positions + encoder.modality
    for block in encoder.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(encoder(x)[0], encoder.norm(tokens), atol=1e-4, rtol=1e-4)


def test_audio_side_of_forward(config):
    """The spectrogram's two views, its own vectors, and every output in its place."""
    model, x = randomised(build(config)), inputs(config)
    e = Embeddings(*model(*x))
    h, h_aug = model.audio.encoder(x[0].transpose(1, 2)[:, None], x[2].transpose(1, 2)[:, None])
    predicted = model.predict_audio(h, x[4])
    expected = {
        "intra_a": heads(model, "audio", "intra", predicted[:, 0]),
        "aug_a": heads(model, "audio", "intra", h_aug.mean(1)),
        "plain_a": heads(model, "audio", "intra", h.mean(1)),
        "other_a": heads(model, "audio", "intra", predicted[:, 1]),
        "spread_a": 1
        - torch.cosine_similarity(
            predicted[:, 1:], torch.nn.functional.normalize(predicted[:, 1:], dim=-1).mean(1, keepdim=True), dim=-1
        ).mean(1),
        "inter_a": heads(model, "audio", "inter", predicted[:, 1:].mean(1)),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(e, name), value, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        model.attention_audio(x[0], x[4]), model.audio.predictor.attention(h, x[4]), atol=1e-6, rtol=1e-4
    )


def test_head_is_its_equation(config):
    head, y = randomised(build(config)).audio.intra_head, torch.randn(3, 64)
    expected = y
    for linear, norm, last in ((0, 1, False), (3, 4, False), (6, 7, True)):
        layer = head.layers[linear]
        expected = plain_layer_norm(expected @ layer.weight.T + layer.bias, head.layers[norm])
        expected = expected if last else expected.relu()
    torch.testing.assert_close(head(y), expected, atol=1e-5, rtol=1e-4)


def test_rival_predictors_are_their_equations(make_config):
    h, t = torch.randn(2, 6, 64), torch.randn(2, 3, 18)
    pooled = h.mean(1)
    hyper = randomised(build(make_config(model={"predictor": "hypernet"}))).image.predictor
    maps = hyper.weights(hyper.encode_t(t)).view(2, 3, 2, 64, -1)
    for b in range(2):
        for q in range(3):
            down, up = maps[b, q]
            torch.testing.assert_close(hyper(h, t)[b, q], pooled[b] + up @ (down.T @ pooled[b]), atol=1e-4, rtol=1e-3)
    linear = randomised(build(make_config(model={"predictor": "linear"}))).image.predictor
    joined = torch.cat([pooled, linear.encode_t(t)[:, 1]], dim=1)
    expected = linear.out(joined @ linear.inner.weight.T + linear.inner.bias)
    torch.testing.assert_close(linear(h, t)[:, 1], expected, atol=1e-5, rtol=1e-4)
