"""Published layouts, built here at a small size: every key accounted for, values where they belong."""

import argparse
import json
import re

import pytest
import torch

from equiav.cli import main
from equiav.commands.importing import ImportConfig, import_checkpoint
from equiav.config import ConfigError, ModelConfig, ObjectiveConfig
from equiav.model.importers import CheckpointError
from equiav.weights import load_model, save_model

D, DEPTH, AUG, HIDDEN, OUT = 64, 3, 48, 80, 32
SMALL = ModelConfig(
    size="tiny",
    width=D,
    depth=DEPTH,
    heads=4,
    image_size=64,
    image_patch=16,
    spectrogram_frames=256,
    spectrogram_mels=128,
    audio_patch=16,
    aug_width=AUG,
    predictor_heads=8,
    head_hidden=HIDDEN,
    head_width=OUT,
)
AUDIO_TOKENS, IMAGE_TOKENS = 8 * 16, 16


def linear(name, n_out, n_in, bias=True):
    return {f"{name}.weight": (n_out, n_in), **({f"{name}.bias": (n_out,)} if bias else {})}


def norm(name, width=D):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def block(name, width=D, modality_norms=True):
    shapes = {
        **norm(f"{name}.norm1", width),
        **norm(f"{name}.norm2", width),
        **linear(f"{name}.attn.qkv", 3 * width, width),
        **linear(f"{name}.attn.proj", width, width),
        **linear(f"{name}.mlp.fc1", 4 * width, width),
        **linear(f"{name}.mlp.fc2", width, 4 * width),
    }
    for side in ("a", "v") if modality_norms else ():
        shapes |= norm(f"{name}.norm1_{side}", width) | norm(f"{name}.norm2_{side}", width)
    return shapes


def conv(name, channels):
    return {f"{name}.weight": (D, channels, 16, 16), f"{name}.bias": (D,)}


def fill(shapes, prefix=""):
    g = torch.Generator().manual_seed(0)
    return {prefix + name: 0.1 * torch.randn(shape, generator=g) for name, shape in shapes.items()}


def equiav_layout():
    shapes = {}
    for m, tokens, d_t in (("a", AUDIO_TOKENS, 24), ("v", IMAGE_TOKENS, 18)):
        shapes |= conv(f"patch_embed_{m}.proj", 3) | {f"modality_{m}": (1, 1, D), f"pos_embed_{m}": (1, tokens, D)}
        for n in range(DEPTH):
            shapes |= block(f"blocks_{m}.{n}")
        shapes |= norm(f"norm_{m}") | norm(f"norm_{m}_aug")
        shapes |= (
            linear(f"aug_encoder_{m}.0", AUG, d_t)
            | linear(f"aug_encoder_{m}.2", AUG, AUG)
            | linear(f"aug_encoder_{m}.4", AUG, AUG)
        )
        c = f"cross_attn_{m}"
        shapes |= norm(f"{c}.norm_aug", AUG) | norm(f"{c}.norm") | linear(f"{c}.attn.to_q", 512, AUG)
        shapes |= (
            linear(f"{c}.attn.to_k", 512, D)
            | linear(f"{c}.attn.to_v", 512, D)
            | linear(f"{c}.attn.to_out", D, 512, bias=False)
        )
        shapes |= linear(f"{c}.mlp.fc1", 4 * D, D) | linear(f"{c}.mlp.fc2", D, 4 * D)
        for space in ("intra", "inter"):
            p = f"pred_{m}_{space}"
            shapes |= linear(f"{p}.fc1", HIDDEN, D) | norm(f"{p}.norm1", HIDDEN) | linear(f"{p}.fc2", HIDDEN, HIDDEN)
            shapes |= norm(f"{p}.norm2", HIDDEN) | linear(f"{p}.fc3", OUT, HIDDEN) | norm(f"{p}.norm3", OUT)
    return fill(shapes, "__M__.")


def cavmae_layout():
    shapes = (
        conv("patch_embed_a.proj", 1) | conv("patch_embed_v.proj", 3) | norm("norm") | norm("norm_a") | norm("norm_v")
    )
    for m, tokens in (("a", AUDIO_TOKENS), ("v", IMAGE_TOKENS)):
        shapes |= {
            f"modality_{m}": (1, 1, D),
            f"pos_embed_{m}": (1, tokens, D),
            f"decoder_modality_{m}": (1, 1, 32),
            f"decoder_pos_embed_{m}": (1, tokens, 32),
        } | linear(f"decoder_pred_{m}", 256, 32)
        for n in range(DEPTH - 1):
            shapes |= block(f"blocks_{m}.{n}")
    shapes |= (
        block("blocks_u.0") | linear("decoder_embed", 32, D) | {"mask_token": (1, 1, 32)} | norm("decoder_norm", 32)
    )
    return fill(shapes | block("decoder_blocks.0", 32), "module.")


def mae_layout():
    shapes = {"cls_token": (1, 1, D), "pos_embed": (1, IMAGE_TOKENS + 1, D), "mask_token": (1, 1, 32)} | conv(
        "patch_embed.proj", 3
    )
    for n in range(DEPTH):
        shapes |= block(f"blocks.{n}", modality_norms=False)
    shapes |= (
        norm("norm") | linear("decoder_embed", 32, D) | block("decoder_blocks.0", 32, False) | norm("decoder_norm", 32)
    )
    return {"model": fill(shapes | linear("decoder_pred", 768, 32) | {"decoder_pos_embed": (1, IMAGE_TOKENS + 1, 32)})}


LAYOUTS = {"equiav": equiav_layout, "cavmae": cavmae_layout, "mae": mae_layout}


def run(tmp_path, checkpoint, **options):
    torch.save(checkpoint, tmp_path / "source.pth")
    config = ImportConfig(checkpoint=tmp_path / "source.pth", out=tmp_path / "out", model=SMALL, **options)
    return import_checkpoint(config)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_key_is_accounted_for(tmp_path, kind):
    checkpoint = LAYOUTS[kind]()
    source = checkpoint.get("model", checkpoint)
    model, _, imported = run(tmp_path, checkpoint)
    assert len(imported.used) + len(imported.ignored) == len(source)
    assert all(imported.ignored.values())
    assert set(imported.state) == set(model.state_dict())
    if kind == "equiav":
        assert not imported.fresh
        assert all(re.search(r"norm[12]_[av]", key) for key in imported.ignored)
    else:
        assert not [name for name in imported.fresh if re.search(r"blocks|patch_embed|encoder\.norm\.", name)]
        for side in ("audio", "image"):  # as EquiAV's own program leaves it
            assert torch.equal(model.state_dict()[f"{side}.encoder.norm_aug.weight"], torch.ones(D))
            assert imported.fresh[f"{side}.encoder.norm_aug.bias"] == "norm of the augmented view: 1 and 0"


def test_released_values_land_where_the_program_uses_them(tmp_path):
    source = {key.removeprefix("__M__."): value for key, value in equiav_layout().items()}
    model, _, _ = run(tmp_path, equiav_layout())
    state = model.state_dict()
    same = {
        "audio.encoder.blocks.2.norm1.weight": "blocks_a.2.norm1.weight",
        "image.encoder.norm_aug.bias": "norm_v_aug.bias",
        "image.predictor.out.weight": "cross_attn_v.attn.to_out.weight",
        "audio.predictor.key.bias": "cross_attn_a.attn.to_k.bias",
        "audio.predictor.mlp.2.weight": "cross_attn_a.mlp.fc2.weight",
        "image.inter_head.layers.4.weight": "pred_v_inter.norm2.weight",
        "audio.intra_head.layers.6.bias": "pred_a_intra.fc3.bias",
        "audio.predictor.encode_t.4.bias": "aug_encoder_a.4.bias",
    }
    for ours, theirs in same.items():
        assert torch.equal(state[ours], source[theirs])
    assert torch.equal(state["audio.encoder.positions"], source["pos_embed_a"][0])
    assert torch.equal(state["image.encoder.modality"], source["modality_v"][0, 0])


def test_three_equal_channels_are_one(tmp_path):
    """The released program sees a spectrogram as three equal channels, (mel, time), before its patches."""
    model, _, _ = run(tmp_path, equiav_layout())
    source, x = equiav_layout(), torch.randn(2, 256, 128)
    picture = x.transpose(1, 2).unsqueeze(1).repeat(1, 3, 1, 1)
    theirs = torch.nn.functional.conv2d(
        picture, source["__M__.patch_embed_a.proj.weight"], source["__M__.patch_embed_a.proj.bias"], stride=16
    )
    ours = model.audio.encoder.patch_embed(x.transpose(1, 2).unsqueeze(1))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_cavmae_shared_block_becomes_each_encoders_last(tmp_path):
    source = {key.removeprefix("module."): value for key, value in cavmae_layout().items()}
    state = run(tmp_path, cavmae_layout())[0].state_dict()
    for side, m in (("audio", "a"), ("image", "v")):
        last = f"{side}.encoder.blocks.{DEPTH - 1}"
        assert torch.equal(state[f"{last}.attn.qkv.weight"], source["blocks_u.0.attn.qkv.weight"])
        assert torch.equal(state[f"{last}.norm1.weight"], source[f"blocks_u.0.norm1_{m}.weight"])
        assert torch.equal(state[f"{last}.norm2.bias"], source[f"blocks_u.0.norm2_{m}.bias"])
        assert torch.equal(state[f"{side}.encoder.norm.weight"], source[f"norm_{m}.weight"])


def test_cavmae_with_two_shared_blocks(tmp_path):
    checkpoint = cavmae_layout()
    for key in [key for key in checkpoint if re.match(rf"module\.blocks_[av]\.{DEPTH - 2}\.", key)]:
        del checkpoint[key]
    checkpoint |= {
        key.replace("blocks_u.0", "blocks_u.1"): 2 * x for key, x in checkpoint.items() if "blocks_u.0" in key
    }
    state = run(tmp_path, checkpoint)[0].state_dict()
    for side, n in (("audio", 0), ("image", 1)):
        ours = state[f"{side}.encoder.blocks.{DEPTH - 2 + n}.mlp.fc1.weight"]
        assert torch.equal(ours, checkpoint[f"module.blocks_u.{n}.mlp.fc1.weight"])


def test_mae_initialises_both_encoders_and_the_seed_the_rest(tmp_path):
    source = mae_layout()["model"]
    model, _, imported = run(tmp_path, mae_layout(), seed=3)
    state = model.state_dict()
    for side in ("audio", "image"):
        assert torch.equal(state[f"{side}.encoder.blocks.1.mlp.fc1.weight"], source["blocks.1.mlp.fc1.weight"])
    summed = source["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(state["audio.encoder.patch_embed.weight"], summed)
    fresh = type(model)(SMALL, ObjectiveConfig())
    fresh.init_weights(3)
    for name in imported.fresh:
        assert torch.equal(state[name], fresh.state_dict()[name])
    assert "audio.predictor.query.weight" in imported.fresh


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"__M__.surprise": torch.zeros(1)}), "surprise: unknown key"),
        (lambda s: s.pop("__M__.blocks_a.1.attn.qkv.bias"), "no value for audio.encoder.blocks.1.attn.qkv.bias"),
        (
            lambda s: s.update({"__M__.norm_a.weight": torch.zeros(65)}),
            r"norm_a.weight: shape \(65,\) does not fit .* \(64,\)",
        ),
        (
            lambda s: s.update({"__M__.norm_v.bias": torch.full((64,), torch.nan)}),
            "norm_v.bias: holds values that are not finite",
        ),
        (
            lambda s: s.update({"__M__.blocks_a.3.norm1.weight": torch.zeros(64)}),
            "blocks_a.3.norm1.weight: there is no .* depth 3",
        ),
        (lambda s: s.update({"__M__.norm_a.weight": "text"}), "norm_a.weight: expected a tensor, found str"),
        (lambda s: s.update({"norm_a.weight": torch.zeros(64)}), "norm_a.weight: stands in the checkpoint twice"),
        (lambda s: s.clear(), "expected a state dict"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, message):
    checkpoint = equiav_layout()
    change(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        run(tmp_path, checkpoint)


@pytest.mark.parametrize(
    ("layout", "key", "ours"),
    [
        (cavmae_layout, "module.blocks_u.0.attn.qkv.bias", r"audio.encoder.blocks.2.attn.qkv.bias"),
        (cavmae_layout, "module.norm_v.weight", "image.encoder.norm.weight"),
        (mae_layout, "norm.bias", "audio.encoder.norm.bias"),
        (mae_layout, "patch_embed.proj.weight", "audio.encoder.patch_embed.weight"),
    ],
)
def test_incomplete_sources_are_named(tmp_path, layout, key, ours):
    checkpoint = layout()
    checkpoint.get("model", checkpoint).pop(key)
    with pytest.raises(CheckpointError, match=f"no value for {ours}"):
        run(tmp_path, checkpoint)


def test_unknown_formats_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"not a checkpoint of the released EquiAV .* it begins with x\.weight"):
        run(tmp_path, {"x.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="unknown key"):
        run(tmp_path, equiav_layout(), format="mae")
    with pytest.raises(ConfigError, match=r"nowhere\.pth: no such file"):
        import_checkpoint(ImportConfig(checkpoint=tmp_path / "nowhere.pth", out=tmp_path / "out"))
    with pytest.raises(ConfigError, match="no checkpoint named"):
        ImportConfig(out=tmp_path / "out").ready()


def test_settings_come_back_with_the_weights(tmp_path):
    objective = ObjectiveConfig(centroid_size=4)
    model, settings, _ = run(tmp_path, mae_layout(), objective=objective)
    save_model(tmp_path / "out", model.state_dict(), settings)
    assert load_model(tmp_path / "out")[1].objective == objective


def test_wrong_model_size_is_named(tmp_path):
    torch.save(equiav_layout(), tmp_path / "source.pth")
    with pytest.raises(CheckpointError, match=r"patch_embed_a.proj.weight: shape .* choose the model.size"):
        import_checkpoint(
            ImportConfig(checkpoint=tmp_path / "source.pth", out=tmp_path / "out", model=ModelConfig(depth=3))
        )


def test_what_stands_beside_the_state_dict(tmp_path):
    """Training state is listed as ignored; a tensor nobody asked for is an error."""
    _, _, imported = run(tmp_path, {**mae_layout(), "optimizer": {"state": {}}, "epoch": 7})
    assert {"optimizer", "epoch"} <= set(imported.ignored)
    with pytest.raises(CheckpointError, match="extra_head: a tensor beside the state dict"):
        run(tmp_path, {**mae_layout(), "extra_head": torch.zeros(3)})


def test_another_predictor_is_named(tmp_path):
    torch.save(equiav_layout(), tmp_path / "source.pth")
    model = ModelConfig(**{**vars(SMALL), "predictor": "linear"})
    with pytest.raises(CheckpointError, match=r"norm_aug.weight: there is no .* with predictor linear"):
        import_checkpoint(ImportConfig(checkpoint=tmp_path / "source.pth", out=tmp_path / "out", model=model))


def test_vectors_of_an_imported_model_are_those_it_was_trained_with(tmp_path):
    assert run(tmp_path, equiav_layout())[1].augment.variant == "released"
    assert run(tmp_path, mae_layout())[1].augment.variant == "paper"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "config.json: not valid JSON"),
        ("config.json", b'{"modle": {}}', "config.json: unknown field modle"),
        ("model.safetensors", b"\x00" * 40, "model.safetensors: does not hold the weights"),
        ("model.safetensors", None, "no model.safetensors there"),
    ],
)
def test_a_damaged_model_folder_is_named(tmp_path, name, content, message):
    model, settings, _ = run(tmp_path, equiav_layout())
    save_model(tmp_path / "out", model.state_dict(), settings)
    if content is None:
        (tmp_path / "out" / name).unlink()
    else:
        (tmp_path / "out" / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_model(tmp_path / "out")


def plain_norm(x, state, name):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def plain_linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0.0)


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def plain_attention(q, k, v, heads):
    """q (B, Q, C), k and v (B, N, C) -> (B, Q, C), one head at a time."""
    size = q.shape[-1] // heads
    parts = []
    for j in range(heads):
        some = slice(j * size, (j + 1) * size)
        parts.append(torch.softmax(q[..., some] @ k[..., some].transpose(1, 2) / size**0.5, dim=-1) @ v[..., some])
    return torch.cat(parts, dim=-1)


def plain_block(x, s, name, norms=("norm1", "norm2")):
    qkv = plain_linear(plain_norm(x, s, f"{name}.{norms[0]}"), s, f"{name}.attn.qkv")
    x = x + plain_linear(plain_attention(*qkv.chunk(3, dim=-1), heads=4), s, f"{name}.attn.proj")
    hidden = gelu(plain_linear(plain_norm(x, s, f"{name}.{norms[1]}"), s, f"{name}.mlp.fc1"))
    return x + plain_linear(hidden, s, f"{name}.mlp.fc2")


def plain_tokens(s, m, picture):
    weight, patch = s[f"patch_embed_{m}.proj.weight"], 16
    B, C, H, W = picture.shape
    patches = (
        picture.reshape(B, C, H // patch, patch, W // patch, patch).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    )
    return patches @ weight.flatten(1).T + s[f"patch_embed_{m}.proj.bias"] + s[f"pos_embed_{m}"] + s[f"modality_{m}"]


@pytest.mark.parametrize("m", ["a", "v"])
def test_a_converted_released_checkpoint_computes_what_the_program_computes(tmp_path, m):
    """Its equations written out from its own names, in float64: features, the centroid's embedding, the prediction's."""
    s = {key.removeprefix("__M__."): value.double() for key, value in equiav_layout().items()}
    model = run(tmp_path, equiav_layout())[0].double()
    g = torch.Generator().manual_seed(1)
    side, d_t = ("audio", 24) if m == "a" else ("image", 18)
    x = torch.randn(2, *((256, 128) if m == "a" else (3, 64, 64)), generator=g, dtype=torch.float64)
    t = torch.randn(2, 5, d_t, generator=g, dtype=torch.float64)

    tokens = plain_tokens(s, m, x.transpose(1, 2).unsqueeze(1).repeat(1, 3, 1, 1) if m == "a" else x)
    for n in range(DEPTH):
        tokens = plain_block(tokens, s, f"blocks_{m}.{n}")
    h, h_aug = plain_norm(tokens, s, f"norm_{m}"), plain_norm(tokens, s, f"norm_{m}_aug")

    def predict(t):
        q = t
        for k in (0, 2, 4):
            q = plain_linear(q, s, f"aug_encoder_{m}.{k}")
            q = q * torch.sigmoid(1.702 * q) if k < 4 else q
        c = f"cross_attn_{m}"
        q = plain_linear(plain_norm(q, s, f"{c}.norm_aug"), s, f"{c}.attn.to_q")
        k, v = plain_linear(h, s, f"{c}.attn.to_k"), plain_linear(h, s, f"{c}.attn.to_v")
        y = h.mean(1, keepdim=True) + plain_linear(plain_attention(q, k, v, heads=8), s, f"{c}.attn.to_out")
        y = y + plain_linear(gelu(plain_linear(plain_norm(y, s, f"{c}.norm"), s, f"{c}.mlp.fc1")), s, f"{c}.mlp.fc2")
        return y.mean(1)

    def head(y, space):
        p = f"pred_{m}_{space}"
        for k in (1, 2, 3):
            y = plain_norm(plain_linear(y, s, f"{p}.fc{k}"), s, f"{p}.norm{k}")
            y = y.relu() if k < 3 else y
        return y

    branch, picture = model.get_submodule(side), x.transpose(1, 2).unsqueeze(1) if m == "a" else x
    z, z_aug, inter, *_ = branch(picture, picture, t)
    for ours, theirs in (
        (branch.encoder(picture)[0], h),
        (z, head(predict(t[:, :1]), "intra")),
        (z_aug, head(h_aug.mean(1), "intra")),
        (inter, head(predict(t[:, 1:]), "inter")),
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("m", ["a", "v"])
def test_a_converted_cavmae_computes_its_contrastive_path(tmp_path, m):
    s = {key.removeprefix("module."): value.double() for key, value in cavmae_layout().items()}
    branch = run(tmp_path, cavmae_layout())[0].double().get_submodule("audio" if m == "a" else "image")
    x = torch.randn(2, *((1, 128, 256) if m == "a" else (3, 64, 64)), dtype=torch.float64)
    tokens = plain_tokens(s, m, x)
    for n in range(DEPTH - 1):
        tokens = plain_block(tokens, s, f"blocks_{m}.{n}")
    tokens = plain_norm(plain_block(tokens, s, "blocks_u.0", (f"norm1_{m}", f"norm2_{m}")), s, f"norm_{m}")
    torch.testing.assert_close(branch.encoder(x)[0], tokens, atol=1e-6, rtol=0)


class Code:
    def __reduce__(self):
        return print, ("this must never run",)


def with_norm(tensor):
    return {"model": {**mae_layout()["model"], "norm.weight": tensor}}


class Holder:
    """Of somebody's program."""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"not a checkpoint", "was not written by torch.save"),
        ({"x": Code()}, "holds an object of class print, which is not read"),
        ({"model": mae_layout(), "args": Holder()}, r"class tests.model.test_importers.Holder, which is not read"),
        (with_norm(torch.eye(3).to_sparse()), "norm.weight: is sparse_coo, torch.float32, expected a dense tensor"),
        (with_norm(torch.empty(3, device="meta")), r"norm.weight: is without data \(on meta\)"),
        (with_norm(torch.ones(3, dtype=torch.complex64)), "norm.weight: is strided, torch.complex64"),
    ],
)
def test_files_that_are_not_plain_tensors_are_refused(tmp_path, capsys, content, said):
    if isinstance(content, bytes):
        (tmp_path / "source.pth").write_bytes(content)
    else:
        torch.save(content, tmp_path / "source.pth")
    with pytest.raises(CheckpointError, match=said) as raised:
        import_checkpoint(ImportConfig(checkpoint=tmp_path / "source.pth", out=tmp_path / "out", model=SMALL))
    assert "\x1b" not in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "never run" not in capsys.readouterr().out


def test_a_damaged_file_is_refused(tmp_path):
    torch.save(mae_layout(), tmp_path / "source.pth")
    whole = (tmp_path / "source.pth").read_bytes()
    for place in (len(whole) // 3, len(whole) // 2):
        (tmp_path / "source.pth").write_bytes(whole[:place] + bytes(64) + whole[place + 64 :])
        with pytest.raises(CheckpointError, match=r"is damaged: .* has not its checksum; fetch it again"):
            import_checkpoint(ImportConfig(checkpoint=tmp_path / "source.pth", out=tmp_path / "out", model=SMALL))
    (tmp_path / "source.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError):
        import_checkpoint(ImportConfig(checkpoint=tmp_path / "source.pth", out=tmp_path / "out", model=SMALL))


def test_what_training_programs_leave_beside_the_model(tmp_path):
    """MAE keeps its arguments; releases of torch before 1.6 wrote another format."""
    arguments = argparse.Namespace(lr=1e-3, model="mae_vit_base_patch16")
    reference = run(tmp_path, mae_layout())[2].state
    _, _, imported = run(tmp_path, {**mae_layout(), "args": arguments, "epoch": 800})
    assert imported.ignored["args"] == "stands beside the weights: the state of a training program"
    torch.save(mae_layout(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    _, _, old = import_checkpoint(ImportConfig(checkpoint=tmp_path / "old.pth", out=tmp_path / "out", model=SMALL))
    for state in (imported.state, old.state):
        assert all(torch.equal(state[name], x) for name, x in reference.items())


def test_what_becomes_infinite_on_the_way_is_refused(tmp_path):
    half = {name: x.half() for name, x in mae_layout()["model"].items()}
    half["patch_embed.proj.weight"] = torch.full_like(half["patch_embed.proj.weight"], 60000.0)
    state = run(tmp_path, {"model": half})[2].state
    assert state["audio.encoder.patch_embed.weight"].max() == 180_000  # in half precision it would be infinite
    half["norm.bias"] = torch.full((D,), 1e300, dtype=torch.float64)
    with pytest.raises(CheckpointError, match=r"norm\.bias: holds values that are not finite"):
        run(tmp_path, {"model": half})


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match=r"is a folder, expected a \.pth file"):
        import_checkpoint(ImportConfig(checkpoint=tmp_path, out=tmp_path / "out", model=SMALL))


def test_command_writes_a_model_that_loads_to_the_same_outputs(tmp_path, capsys):
    torch.save(equiav_layout(), tmp_path / "source.pth")
    model, _, _ = import_checkpoint(ImportConfig(checkpoint=tmp_path / "source.pth", out=tmp_path / "x", model=SMALL))
    arguments = [f"--model.{name}={value}" for name, value in vars(SMALL).items()]
    assert main(["import", str(tmp_path / "source.pth"), "--out", str(tmp_path / "out"), *arguments]) == 0
    assert "dead weight" in capsys.readouterr().out
    loaded, settings = load_model(tmp_path / "out")
    assert settings.augment.variant == "released"
    assert settings.model == SMALL
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded.encode_image(x), model.encode_image(x))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model"]["width"] == D
    assert main(["import", str(tmp_path / "source.pth"), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert "exists already" in capsys.readouterr().err
