import pytest
import torch
from torchaudio.compliance.kaldi import fbank

from equiav.augment import log_mel, normalised_spectrogram
from equiav.augment.logmel import _hann

RATE = 16000


def reference(waveform, mels=128, rate=RATE):
    return fbank(
        waveform[None],
        htk_compat=True,
        sample_frequency=rate,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=mels,
        dither=0.0,
        frame_shift=10,
    )


def sounds(length):
    """Noise, a tone, a chirp, a click, a quiet tone on an offset, silence, near silence: (7, length)."""
    g = torch.Generator().manual_seed(0)
    time = torch.arange(length) / RATE
    click = torch.zeros(length)
    click[length // 2] = 1
    quiet = torch.zeros(length)
    quiet[::2] = 1 / 32768
    return torch.stack(
        [
            0.1 * torch.randn(length, generator=g),
            0.5 * torch.sin(2 * torch.pi * 440 * time),
            0.5 * torch.sin(2 * torch.pi * (50 + 3000 * time) * time),
            click,
            1e-3 * torch.sin(2 * torch.pi * 5000 * time) + 0.2,
            torch.zeros(length),
            quiet,
        ]
    )


@pytest.mark.parametrize("length", [400, 559, 560, 16000, 41000, 160000])
@pytest.mark.parametrize("mels", [64, 128])
def test_equals_kaldi(length, mels):
    batch = sounds(length)
    ours = log_mel(batch, mels)
    assert ours.isfinite().all()
    for k, sound in enumerate(batch):
        torch.testing.assert_close(ours[k], reference(sound, mels), atol=1e-4, rtol=0)


def test_devices_agree(device):
    noise = sounds(41000)[:1]
    torch.testing.assert_close(log_mel(noise.to(device)).cpu(), log_mel(noise), atol=1e-3, rtol=0)


def test_another_rate():
    noise = sounds(22050)[:1]
    torch.testing.assert_close(log_mel(noise, 64, 22050)[0], reference(noise[0], 64, 22050), atol=1e-4, rtol=0)


def test_normalised_spectrogram_is_cut_padded_and_scaled(config):
    model, data = config.model, config.data
    noise, whole = sounds(60000)[:1], torch.tensor([60000])
    long = normalised_spectrogram(noise, whole, model, data)
    assert long.shape == (1, 256, 64)
    expected = (reference(noise[0], 64)[:256] - data.audio_mean) / data.audio_std
    torch.testing.assert_close(long[0], expected, atol=1e-4, rtol=0)
    as_int = (noise * 32768).clamp(-32768, 32767).to(torch.int16)
    torch.testing.assert_close(normalised_spectrogram(as_int, whole, model, data), long, atol=0.05, rtol=0)


def test_clips_of_different_lengths_share_a_batch(config):
    """Each as it would be alone: windows of its own samples, then padding, whatever fills the batch behind it."""
    model, data = config.model, config.data
    batch, lengths = sounds(30000)[:3], torch.tensor([30000, 16000, 16159])
    batch[1, 16000:] = 0.7
    together = normalised_spectrogram(batch, lengths, model, data)
    padding = -data.audio_mean / data.audio_std
    for k, length in enumerate(lengths.tolist()):
        own = reference(batch[k, :length], 64)
        torch.testing.assert_close(together[k, : len(own)], (own - data.audio_mean) / data.audio_std, atol=1e-4, rtol=0)
        torch.testing.assert_close(together[k, len(own) :], torch.full((256 - len(own), 64), padding))


def test_float32_under_autocast(config, device):
    noise = sounds(41000)[:2].to(device)
    arguments = (noise, torch.tensor([41000] * 2, device=device), config.model, config.data)
    plain = normalised_spectrogram(*arguments)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(normalised_spectrogram(*arguments), plain)


def test_too_short_and_wrong_type_are_named():
    with pytest.raises(ValueError, match=r"waveform is \(2, 399\), expected \(B, L\) with L >= 400"):
        log_mel(torch.zeros(2, 399))
    with pytest.raises(ValueError, match="int16"):
        log_mel(torch.zeros(2, 4000, dtype=torch.int16))


@pytest.mark.parametrize("window", [200, 275, 400, 551, 1102, 1200])
def test_the_window_is_torchs(window):
    for kind in (torch.float32, torch.float64):
        assert torch.equal(
            _hann(window, torch.zeros(1, dtype=kind)), torch.hann_window(window, periodic=False, dtype=kind)
        )
