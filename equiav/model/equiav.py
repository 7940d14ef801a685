"""The whole model: from two views of an audio-visual pair to the embeddings that the objective compares."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equiav.config import AUDIO_VECTOR, IMAGE_VECTOR, ModelConfig, ObjectiveConfig
from equiav.model.encoder import Encoder
from equiav.model.head import ProjectionHead
from equiav.model.predictor import PREDICTORS, AttentionPredictor


class Branch(nn.Module):
    """One modality: encoder f_m, predictor u_m, heads g_m."""

    def __init__(self, encoder: Encoder, d_t: int, model: ModelConfig, objective: ObjectiveConfig):
        super().__init__()
        self.objective = objective
        self.encoder = encoder
        self.predictor = PREDICTORS[model.predictor](d_t, model)
        self.intra_head = ProjectionHead(model.width, model.head_hidden, model.head_width)
        self.inter_head = ProjectionHead(model.width, model.head_hidden, model.head_width)

    def forward(
        self, x: Tensor, x_aug: Tensor | None, t: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """x (B, C, H, W), x_aug alike, t (B, 1 + S, d_t) -> intra, aug, inter, plain, other, each (B, d), and spread (B,).

        t[:, 0] is the transformation that made x_aug; the other S are the centroid's.
        """
        intra, inter_on = self.objective.intra, self.objective.inter_on
        h, h_aug = self.encoder(x, x_aug)
        pooled = {"original": h.mean(dim=1)}  # (B, D) each
        if h_aug is not None:
            pooled["augmented"] = h_aug.mean(dim=1)
        predicted = None
        if intra == "equivariant" or inter_on in ("equivariant", "centroid"):
            predicted = self.predictor(h, t)  # (B, 1 + S, D)
            pooled["equivariant"] = predicted[:, 0]
            if inter_on == "centroid":
                pooled["centroid"] = predicted[:, 1:].mean(dim=1)  # Eq. 12

        z = z_aug = plain = other = spread = None
        if intra != "none":
            anchor = pooled["equivariant" if intra == "equivariant" else "original"]
            # Without gradient, to be compared with: what predicting nothing gives, and what another vector does.
            compared = [pooled["original"].detach()]
            if predicted is not None and intra == "equivariant" and inter_on == "centroid":
                compared.append(predicted[:, 1].detach())
                spread = _spread(predicted[:, 1:].detach())
            z, z_aug, *rest = self.intra_head(torch.cat([anchor, pooled["augmented"], *compared])).chunk(
                2 + len(compared)
            )
            plain, other = (rest[0].detach(), rest[1].detach()) if len(rest) > 1 else (rest[0].detach(), None)
        return z, z_aug, self.inter_head(pooled[inter_on]), plain, other, spread

    def embed(self, x: Tensor, t: Tensor | None) -> Tensor:
        """What represents a clip without an augmented view, x (B, C, H, W) -> (B, d), through what training trained:
        the vectors t (B or 1, S, d_t) where `inter_on` is a prediction, none elsewhere."""
        inter_on = self.objective.inter_on
        if (t is None) == (inter_on in ("equivariant", "centroid")):
            needed = "needs vectors t (equiav.augment.sampled_vectors)" if t is None else "takes no vectors t"
            raise ValueError(f"an embedding with objective.inter_on={inter_on} {needed}")
        h, h_aug = self.encoder(x, x if inter_on == "augmented" else None)
        if h_aug is not None:
            h = h_aug  # after the final norm that this ablation trains
        if t is not None:
            h = self.predictor(h, t.expand(h.shape[0], -1, -1))  # (B, S, D)
        return F.normalize(self.inter_head(h.mean(dim=1)), dim=-1)


class EquiAV(nn.Module):
    def __init__(self, model: ModelConfig, objective: ObjectiveConfig):
        super().__init__()
        self.config = model
        self.objective = objective
        image = Encoder(3, model.image_grid, model.image_patch, model.width, model.depth, model.heads)
        audio = Encoder(1, model.audio_grid, model.audio_patch, model.width, model.depth, model.heads)
        self.audio = Branch(audio, AUDIO_VECTOR, model, objective)
        self.image = Branch(image, IMAGE_VECTOR, model, objective)
        self.log_temperature = nn.Parameter(torch.empty(1)) if objective.learnable_temperature else None

    def forward(
        self, audio: Tensor, image: Tensor, audio_aug: Tensor | None, image_aug: Tensor | None, t_a: Tensor, t_v: Tensor
    ) -> tuple[Tensor | None, ...]:
        """audio, audio_aug (B, T, F); image, image_aug (B, 3, H, W); t_a (B, 1 + S, 24); t_v (B, 1 + S, 18)
        -> the fields of `objective.Embeddings`, in their order; the embeddings (B, d), not normalised."""
        intra_a, aug_a, inter_a, *compared_a = self.audio(
            as_picture(audio), None if audio_aug is None else as_picture(audio_aug), t_a
        )
        intra_v, aug_v, inter_v, *compared_v = self.image(image, image_aug, t_v)
        compared = [z for of_both in zip(compared_a, compared_v, strict=True) for z in of_both]
        temperature = None if self.log_temperature is None else self.log_temperature.exp().expand(len(inter_a))
        return intra_a, aug_a, intra_v, aug_v, inter_a, inter_v, *compared, temperature

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """After an update: a learned tau stays at 0.01 or above, and can come back from there."""
        if self.log_temperature is not None:
            self.log_temperature.clamp_(min=math.log(0.01))

    def encode_audio(self, spectrogram: Tensor) -> Tensor:
        """h_a: (B, T, F) -> (B, N, D)."""
        return self.audio.encoder(as_picture(spectrogram))[0]

    def encode_image(self, image: Tensor) -> Tensor:
        """h_v: (B, 3, H, W) -> (B, N, D)."""
        return self.image.encoder(image)[0]

    def predict_audio(self, h: Tensor, t: Tensor) -> Tensor:
        """u_a: h (B, N, D), t (B, Q, 24) -> (B, Q, D)."""
        return self.audio.predictor(h, t)

    def predict_image(self, h: Tensor, t: Tensor) -> Tensor:
        """u_v: h (B, N, D), t (B, Q, 18) -> (B, Q, D)."""
        return self.image.predictor(h, t)

    def embed_audio(self, spectrogram: Tensor, t: Tensor | None = None) -> Tensor:
        """Inter-modal embedding, L2-normalised: (B, T, F) -> (B, d). By default the centroid's (Eq. 13), of the vectors
        t (B or 1, S, 24) that `equiav.augment.sampled_vectors` draws."""
        return self.audio.embed(as_picture(spectrogram), t)

    def embed_image(self, image: Tensor, t: Tensor | None = None) -> Tensor:
        """As `embed_audio`: image (B, 3, H, W), t (B or 1, S, 18) -> (B, d)."""
        return self.image.embed(image, t)

    def attention_audio(self, spectrogram: Tensor, t: Tensor) -> Tensor:
        """The predictor's attention: (B, T, F), t (B, Q, 24) -> (B, heads, Q, N)."""
        return _attention(self.audio, self.encode_audio(spectrogram), t)

    def attention_image(self, image: Tensor, t: Tensor) -> Tensor:
        """The predictor's attention: (B, 3, H, W), t (B, Q, 18) -> (B, heads, Q, N)."""
        return _attention(self.image, self.encode_image(image), t)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fills every parameter from (seed, its name) alone: no other state, and no order of creation, plays a part."""
        fill(self, seed)
        if self.log_temperature is not None:
            self.log_temperature.fill_(math.log(self.objective.temperature))
        for branch in (self.audio, self.image):
            branch.encoder.reset_positions()


def fill(model: nn.Module, seed: int) -> None:
    """Each parameter from (seed, its name) alone."""
    for name, parameter in model.named_parameters():
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        value = torch.empty(parameter.shape)
        if name.endswith("modality"):
            value.normal_(std=0.02, generator=generator)
        elif parameter.dim() >= 2:  # the patch embedding counts as a linear layer
            nn.init.xavier_uniform_(value.view(value.shape[0], -1), generator=generator)
        else:
            value.fill_(1.0 if "norm" in _owner(model, name) and name.endswith("weight") else 0.0)
        parameter.copy_(value)


def _spread(predicted: Tensor) -> Tensor:
    """(B, S, D) -> (B,): mean distance (1 - cosine) of a clip's predictions from their centroid."""
    predicted = F.normalize(predicted.float(), dim=-1)
    centroid = F.normalize(predicted.mean(dim=1, keepdim=True), dim=-1)
    return 1 - (predicted * centroid).sum(dim=-1).mean(dim=1)


def as_picture(spectrogram: Tensor) -> Tensor:
    """(B, T, F) -> (B, 1, F, T): rows are mel bins, columns are time."""
    return spectrogram.transpose(1, 2).unsqueeze(1)


def _owner(model: nn.Module, parameter: str) -> str:
    return type(model.get_submodule(parameter.rpartition(".")[0])).__name__.lower()


def _attention(branch: Branch, h: Tensor, t: Tensor) -> Tensor:
    if not isinstance(branch.predictor, AttentionPredictor):
        raise ValueError(f"{type(branch.predictor).__name__} has no attention; model.predictor=attention has")
    return branch.predictor.attention(h, t.expand(h.shape[0], -1, -1))
