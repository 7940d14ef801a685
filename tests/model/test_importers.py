"""Published layouts, built here at a small size: every key accounted for, values where they belong."""

import json
import re

import pytest
import torch

from equiav.cli import main
from equiav.config import ModelConfig, ObjectiveConfig
from equiav.model.importers import CheckpointError
from equiav.weights import ImportConfig, import_checkpoint, load_model

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
    shapes = {**norm(f"{name}.norm1", width), **norm(f"{name}.norm2", width), **linear(f"{name}.attn.qkv", 3 * width, width),
              **linear(f"{name}.attn.proj", width, width), **linear(f"{name}.mlp.fc1", 4 * width, width),
              **linear(f"{name}.mlp.fc2", width, 4 * width)}  # fmt: skip
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
        shapes |= {f"modality_{m}": (1, 1, D), f"pos_embed_{m}": (1, tokens, D), f"decoder_modality_{m}": (1, 1, 32),
                   f"decoder_pos_embed_{m}": (1, tokens, 32)} | linear(f"decoder_pred_{m}", 256, 32)  # fmt: skip
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
    model, imported = run(tmp_path, checkpoint)
    assert len(imported.used) + len(imported.ignored) == len(source)
    assert all(imported.ignored.values())
    assert set(imported.state) == set(model.state_dict())
    if kind == "equiav":
        assert not imported.fresh
        assert all(re.search(r"norm[12]_[av]", key) for key in imported.ignored)
    else:
        assert not [name for name in imported.fresh if re.search(r"blocks|patch_embed|norm_aug|encoder\.norm", name)]


def test_released_values_land_where_the_program_uses_them(tmp_path):
    source = {key.removeprefix("__M__."): value for key, value in equiav_layout().items()}
    model, _ = run(tmp_path, equiav_layout())
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
    model, _ = run(tmp_path, equiav_layout())
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
        assert torch.equal(state[f"{side}.encoder.norm_aug.weight"], source[f"norm_{m}.weight"])


def test_mae_initialises_both_encoders_and_the_seed_the_rest(tmp_path):
    source = mae_layout()["model"]
    model, imported = run(tmp_path, mae_layout(), seed=3)
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


@pytest.mark.parametrize(("change", "message"), [
    (lambda s: s.update({"__M__.surprise": torch.zeros(1)}), "surprise: unknown key"),
    (lambda s: s.pop("__M__.blocks_a.1.attn.qkv.bias"), "no value for audio.encoder.blocks.1.attn.qkv.bias"),
    (lambda s: s.update({"__M__.norm_a.weight": torch.zeros(65)}), r"norm_a.weight: shape \(65,\) does not fit .* \(64,\)"),
    (lambda s: s.update({"__M__.norm_v.bias": torch.full((64,), torch.nan)}), "norm_v.bias: holds values that are not finite"),
    (lambda s: s.update({"__M__.blocks_a.3.norm1.weight": torch.zeros(64)}), "blocks_a.3.norm1.weight: there is no .* depth 3"),
    (lambda s: s.update({"__M__.norm_a.weight": "text"}), "norm_a.weight: expected a tensor, found str"),
    (lambda s: s.update({"norm_a.weight": torch.zeros(64)}), "norm_a.weight: stands in the checkpoint twice"),
    (lambda s: s.clear(), "expected a state dict"),
])  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path, change, message):
    checkpoint = equiav_layout()
    change(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        run(tmp_path, checkpoint)


def test_wrong_model_size_is_named(tmp_path):
    torch.save(equiav_layout(), tmp_path / "source.pth")
    with pytest.raises(CheckpointError, match=r"patch_embed_a.proj.weight: shape .* choose the model.size"):
        import_checkpoint(
            ImportConfig(checkpoint=tmp_path / "source.pth", out=tmp_path / "out", model=ModelConfig(depth=3))
        )


class Code:
    def __reduce__(self):
        return print, ("this must never run",)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", Code()])
def test_files_that_are_not_plain_tensors_are_refused(tmp_path, capsys, content):
    if isinstance(content, bytes):
        (tmp_path / "source.pth").write_bytes(content)
    else:
        torch.save({"x": content}, tmp_path / "source.pth")
    with pytest.raises(CheckpointError, match="not a PyTorch checkpoint of plain tensors"):
        import_checkpoint(ImportConfig(checkpoint=tmp_path / "source.pth", out=tmp_path / "out", model=SMALL))
    assert "never run" not in capsys.readouterr().out


def test_command_writes_a_model_that_loads_to_the_same_outputs(tmp_path, capsys):
    torch.save(equiav_layout(), tmp_path / "source.pth")
    model, _ = import_checkpoint(ImportConfig(checkpoint=tmp_path / "source.pth", out=tmp_path / "x", model=SMALL))
    arguments = [f"--model.{name}={value}" for name, value in vars(SMALL).items()]
    assert main(["import", str(tmp_path / "source.pth"), "--out", str(tmp_path / "out"), *arguments]) == 0
    assert "dead weight" in capsys.readouterr().out
    loaded = load_model(tmp_path / "out")
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded.embed_image(x), model.embed_image(x))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model"]["width"] == D
    assert main(["import", str(tmp_path / "source.pth"), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert "exists already" in capsys.readouterr().err
