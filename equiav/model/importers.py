"""Published checkpoints -> our state dict: the authors' EquiAV, CAV-MAE, MAE. Formats in docs/method.md.

Every key of a source is accounted for: used, knowingly ignored with the reason, or an error. A wrong shape is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from equiav.model.equiav import EquiAV

Format = Literal["equiav", "cavmae", "mae"]


class CheckpointError(ValueError):
    """The checkpoint cannot be imported; the message says which key, and why."""


@dataclass
class Imported:
    state: dict[str, Tensor]  # the full state dict of our model
    used: list[str] = field(default_factory=list)  # keys of the source
    ignored: dict[str, str] = field(default_factory=dict)  # key of the source -> why
    fresh: dict[str, str] = field(default_factory=dict)  # our key that has its initial value -> why
    notes: list[str] = field(default_factory=list)  # of what else is not as it was there

    def restrict_to(self, names: Collection[str]) -> None:
        """Of a model that has less, or a layer of its own: what it does not have is left aside."""
        unneeded = self.state.keys() - set(names)
        self.used = [name for name in self.used if name not in unneeded]
        self.ignored |= {name: "this model has no such part" for name in unneeded if name not in self.fresh}
        self.fresh = {name: why for name, why in self.fresh.items() if name not in unneeded}
        self.fresh |= {name: "not in that model" for name in names if name not in self.state}
        self.state = {name: x for name, x in self.state.items() if name not in unneeded}

    def account(self) -> list[str]:
        """Lines for a reader."""
        lines = [f"used     {len(self.used):4d} tensors"]
        for word, listed in (("ignored", self.ignored), ("initial", self.fresh)):
            for reason in dict.fromkeys(listed.values()):
                keys = [key for key, why in listed.items() if why == reason]
                lines.append(
                    f"{word:8s} {len(keys):4d} tensors: {reason} ({keys[0]}{', ...' if len(keys) > 1 else ''})"
                )
        return lines + self.notes


Change = Callable[[Tensor], Tensor]
Use = dict[str, Change]  # our names that a source tensor fills, and how it is changed on the way
Rule = tuple[str, Callable[[re.Match[str]], Use | str]]  # pattern of a whole key -> its use, or why it is ignored

BLOCK = r"(?P<rest>(?:attn\.(?:qkv|proj)|mlp\.fc[12]|norm[12])\.(?:weight|bias))"
SIDE = {"a": "audio", "v": "image"}


def detect(state: Mapping[str, Any]) -> Format:
    """Which program wrote this state dict (prefixes already stripped)."""
    for key, kind in (
        ("cross_attn_a.norm.weight", "equiav"),
        ("blocks_u.0.norm1.weight", "cavmae"),
        ("cls_token", "mae"),
    ):
        if key in state:
            return kind  # type: ignore[return-value]
    raise CheckpointError(
        "not a checkpoint of the released EquiAV (no cross_attn_a), of CAV-MAE (no blocks_u) or of MAE (no cls_token); "
        f"it begins with {', '.join(list(state)[:3]) or 'nothing'}"
    )


def strip(checkpoint: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The bare state dict, and the keys that stood beside it: unwraps {'model': ..., ...}, drops the prefixes `__M__.` and
    `module.`. A tensor beside the model would be weight that nobody asked for: an error."""
    wrapped = isinstance(checkpoint, Mapping) and isinstance(checkpoint.get("model"), Mapping)
    state = checkpoint["model"] if wrapped else checkpoint
    beside = [str(key) for key in checkpoint if key != "model"] if wrapped else []
    for key in beside:
        if isinstance(checkpoint[key], Tensor):
            raise CheckpointError(f"{key}: a tensor beside the state dict, neither used nor knowingly ignored")
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"expected a state dict (name -> tensor), found {type(checkpoint).__name__}")
    stripped: dict[str, Tensor] = {}
    for key, value in state.items():
        name = re.sub(r"^(__M__\.|module\.)+", "", str(key))
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{key}: expected a tensor, found {type(value).__name__}")
        if name in stripped:
            raise CheckpointError(f"{key}: stands in the checkpoint twice, with different prefixes")
        stripped[name] = value
    return stripped, beside


def import_state(state: Mapping[str, Tensor], kind: Format, model: EquiAV) -> Imported:
    """`model` gives names and shapes, and the initial values of what the source does not have; it is not changed."""
    ours = model.state_dict()
    rules = {"equiav": _equiav_rules, "cavmae": _cavmae_rules, "mae": _mae_rules}[kind](model, state)
    result = Imported(state={})
    for key, tensor in state.items():
        found = _apply(rules, key)
        if isinstance(found, str):
            result.ignored[key] = found
            continue
        require_plain(key, tensor)
        for target, change in found.items():
            if target not in ours:
                raise CheckpointError(
                    f"{key}: there is no {target} in a model of depth {model.config.depth} with "
                    f"predictor {model.config.predictor}; choose what the source was trained with"
                )
            if target in result.state:
                raise CheckpointError(f"{key}: {target} already has a value from another key")
            changed = change(tensor.detach().cpu()) if tensor.numel() <= 1 << 34 else tensor
            if changed.shape != ours[target].shape:
                raise CheckpointError(
                    f"{key}: shape {tuple(tensor.shape)} does not fit {target} "
                    f"{tuple(ours[target].shape)}; choose the model.size (and input sizes) that the "
                    "checkpoint was trained with"
                )
            result.state[target] = finite(key, changed.to(ours[target].dtype).clone())
        result.used.append(key)
    for prefix in REQUIRED[kind]:
        for name in ours:
            if name.startswith(prefix) and name not in result.state:
                raise CheckpointError(
                    f"the checkpoint has no value for {name}: it is incomplete, or "
                    f"model.depth={model.config.depth} is deeper than its encoders"
                )
    for name, value in ours.items():
        if name not in result.state:
            result.state[name] = value.clone()
            result.fresh[name] = (
                "norm of the augmented view: 1 and 0" if "norm_aug" in name else "not in the checkpoint"
            )
    return result


def own_state(state: Mapping[str, Tensor], model: EquiAV) -> Imported:
    """Of a model of ours. Its encoders have to fit; predictors and heads are taken where they do."""
    ours, result = model.state_dict(), Imported(state={})
    for name, value in ours.items():
        found = state.get(name)
        if found is not None and found.shape == value.shape:
            require_plain(name, found)
            result.state[name] = finite(name, found.to(value.dtype))
            result.used.append(name)
            continue
        why = (
            "not in that model" if found is None else f"of shape {tuple(found.shape)} there, {tuple(value.shape)} here"
        )
        side = f"{name.partition('.encoder.')[0]}.encoder."
        part = found is not None or any(other.startswith(side) for other in state)  # a model of one modality has none
        if (
            ".encoder." in name and part and (found is not None or ".norm_aug." not in name)
        ):  # fine-tuning leaves that norm aside
            raise CheckpointError(f"{name} is {why}; choose the model.size (and input sizes) of that model")
        result.state[name], result.fresh[name] = value.clone(), why
    result.ignored |= {name: "not in this model" for name in state if name not in ours}
    return result


def require_plain(key: str, tensor: Tensor) -> None:
    """Real numbers, all of them there."""
    if (
        tensor.is_nested
        or tensor.layout != torch.strided
        or tensor.device.type == "meta"
        or not tensor.is_floating_point()
    ):
        kind = str(tensor.layout).removeprefix("torch.")
        kind = "without data (on meta)" if tensor.device.type == "meta" else f"{kind}, {tensor.dtype}"
        raise CheckpointError(f"{key}: is {kind}, expected a dense tensor of floating-point numbers")


def finite(key: str, tensor: Tensor) -> Tensor:
    """In the precision in which it is used."""
    if not tensor.isfinite().all():
        raise CheckpointError(f"{key}: holds values that are not finite")
    return tensor


REQUIRED: dict[Format, tuple[str, ...]] = {
    "equiav": ("audio.", "image."),
    "cavmae": tuple(
        f"{side}.encoder.{part}"
        for side in SIDE.values()
        for part in ("blocks.", "patch_embed.", "norm.", "modality", "positions")
    ),
    "mae": tuple(f"{side}.encoder.{part}" for side in SIDE.values() for part in ("blocks.", "patch_embed.", "norm.")),
}
"""What a source must fill, by the beginning of our names."""


def _apply(rules: list[Rule], key: str) -> Use | str:
    for pattern, rule in rules:
        match = re.fullmatch(pattern, key)
        if match:
            return rule(match)
    raise CheckpointError(f"{key}: unknown key, neither used nor knowingly ignored in this format")


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _to(*targets: str, change: Change = _same) -> Callable[[re.Match[str]], Use]:
    """A rule whose targets may name groups of the pattern; {m} is replaced by the side that group m names."""

    def rule(match: re.Match[str]) -> Use:
        groups = match.groupdict()
        if "m" in groups:
            groups["m"] = SIDE[groups["m"]]
        return {target.format(**groups): change for target in targets}

    return rule


def _ignore(reason: str) -> Callable[[re.Match[str]], str]:
    return lambda match: reason


def _one_channel(weight: Tensor) -> Tensor:
    """A spectrogram as three equal channels is one channel with the sum of their weights: (D, 3, p, p) -> (D, 1, p, p)."""
    if weight.dim() != 4 or weight.shape[1] != 3:
        return weight
    return weight.double().sum(dim=1, keepdim=True)


def _equiav_rules(model: EquiAV, state: Mapping[str, Tensor]) -> list[Rule]:
    head = {"fc1": 0, "norm1": 1, "fc2": 3, "norm2": 4, "fc3": 6, "norm3": 7}

    def to_head(match: re.Match[str]) -> Use:
        m, space, part, rest = match.groups()
        return {f"{SIDE[m]}.{space}_head.layers.{head[part]}.{rest}": _same}

    end = r"(?P<rest>weight|bias)"
    return [
        (r"patch_embed_a\.proj\.weight", _to("audio.encoder.patch_embed.weight", change=_one_channel)),
        (rf"patch_embed_(?P<m>a|v)\.proj\.{end}", _to("{m}.encoder.patch_embed.{rest}")),
        (r"modality_(?P<m>a|v)", _to("{m}.encoder.modality", change=lambda t: t.flatten())),
        (r"pos_embed_(?P<m>a|v)", _to("{m}.encoder.positions", change=lambda t: t.squeeze(0))),
        (rf"blocks_(?P<m>a|v)\.(?P<n>\d+)\.{BLOCK}", _to("{m}.encoder.blocks.{n}.{rest}")),
        (
            r"blocks_[av]\.\d+\.norm[12]_[av]\.(weight|bias)",
            _ignore("dead weight: the released program never calls it"),
        ),
        (rf"norm_(?P<m>a|v)\.{end}", _to("{m}.encoder.norm.{rest}")),
        (rf"norm_(?P<m>a|v)_aug\.{end}", _to("{m}.encoder.norm_aug.{rest}")),
        (rf"aug_encoder_(?P<m>a|v)\.(?P<n>[024])\.{end}", _to("{m}.predictor.encode_t.{n}.{rest}")),
        (rf"cross_attn_(?P<m>a|v)\.norm_aug\.{end}", _to("{m}.predictor.norm_query.{rest}")),
        (rf"cross_attn_(?P<m>a|v)\.attn\.to_q\.{end}", _to("{m}.predictor.query.{rest}")),
        (rf"cross_attn_(?P<m>a|v)\.attn\.to_k\.{end}", _to("{m}.predictor.key.{rest}")),
        (rf"cross_attn_(?P<m>a|v)\.attn\.to_v\.{end}", _to("{m}.predictor.value.{rest}")),
        (r"cross_attn_(?P<m>a|v)\.attn\.to_out\.weight", _to("{m}.predictor.out.weight")),
        (rf"cross_attn_(?P<m>a|v)\.norm\.{end}", _to("{m}.predictor.norm.{rest}")),
        (rf"cross_attn_(?P<m>a|v)\.mlp\.fc1\.{end}", _to("{m}.predictor.mlp.0.{rest}")),
        (rf"cross_attn_(?P<m>a|v)\.mlp\.fc2\.{end}", _to("{m}.predictor.mlp.2.{rest}")),
        (r"pred_([av])_(intra|inter)\.(fc[123]|norm[123])\.(weight|bias)", to_head),
        (r"__L_(inter|intra)__\.tau", _ignore("a temperature the released program learned: set objective.temperature")),
    ]


def _cavmae_rules(model: EquiAV, state: Mapping[str, Tensor]) -> list[Rule]:
    end = r"(?P<rest>weight|bias)"
    own = len({key.split(".")[1] for key in state if key.startswith("blocks_a.")})  # before the shared ones

    def shared(match: re.Match[str]) -> Use | str:
        n, rest = match.groups()
        if re.match(r"norm[12]\.", rest):
            return "norm of the joint audio-visual stream, which EquiAV does not have"
        side = re.match(r"(norm[12])_([av])\.(.*)", rest)
        if side:
            return {f"{SIDE[side[2]]}.encoder.blocks.{own + int(n)}.{side[1]}.{side[3]}": _same}
        return {f"{m}.encoder.blocks.{own + int(n)}.{rest}": _same for m in SIDE.values()}

    return [
        (rf"patch_embed_(?P<m>a|v)\.proj\.{end}", _to("{m}.encoder.patch_embed.{rest}")),
        (r"modality_(?P<m>a|v)", _to("{m}.encoder.modality", change=lambda t: t.flatten())),
        (r"pos_embed_(?P<m>a|v)", _to("{m}.encoder.positions", change=lambda t: t.squeeze(0))),
        (rf"blocks_(?P<m>a|v)\.(?P<n>\d+)\.{BLOCK}", _to("{m}.encoder.blocks.{n}.{rest}")),
        (
            r"blocks_[av]\.\d+\.norm[12]_[av]\.(weight|bias)",
            _ignore("dead weight: CAV-MAE calls it in the shared block only"),
        ),
        (r"blocks_u\.(\d+)\.((?:attn\.(?:qkv|proj)|mlp\.fc[12]|norm[12](?:_[av])?)\.(?:weight|bias))", shared),
        (rf"norm_(?P<m>a|v)\.{end}", _to("{m}.encoder.norm.{rest}")),
        (r"norm\.(weight|bias)", _ignore("norm of the joint audio-visual stream, which EquiAV does not have")),
        (r"(decoder_.*|mask_token)", _ignore("the masked autoencoder's decoder")),
        (r"mlp_head\..*", _ignore("a classifier of fine-tuning")),
    ]


def _mae_rules(model: EquiAV, state: Mapping[str, Tensor]) -> list[Rule]:
    end = r"(?P<rest>weight|bias)"
    image_tokens = math.prod(model.config.image_grid)

    def positions(match: re.Match[str]) -> str:
        return (
            f"fixed sin-cos positions with a class row: ours are the same ones, made for {image_tokens} image "
            "patches and for the spectrogram's own grid"
        )

    def patch(match: re.Match[str]) -> Use:
        return {"image.encoder.patch_embed.weight": _same, "audio.encoder.patch_embed.weight": _one_channel}

    def both(name: str) -> Callable[[re.Match[str]], Use]:
        return _to(f"audio.encoder.{name}", f"image.encoder.{name}")

    return [
        (r"patch_embed\.proj\.weight", patch),
        (r"patch_embed\.proj\.bias", both("patch_embed.bias")),
        (rf"blocks\.(?P<n>\d+)\.{BLOCK}", both("blocks.{n}.{rest}")),
        (rf"norm\.{end}", both("norm.{rest}")),
        (r"pos_embed", positions),
        (r"cls_token", _ignore("EquiAV's encoders have no class token")),
        (r"(decoder_.*|mask_token)", _ignore("the masked autoencoder's decoder")),
    ]
