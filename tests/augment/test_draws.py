import pytest
import torch

from equiav.augment.draws import Purpose, uniforms

MASK = 2**64 - 1


def splitmix(x):
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


@pytest.mark.parametrize("sample", [0, 1, 12345, 2**62, -1])
def test_equals_arithmetic_on_python_integers(sample, device):
    seed, epoch, golden = 7, 3, 0x9E3779B97F4A7C15
    key = splitmix(splitmix(splitmix(seed + golden) ^ epoch) ^ Purpose.VIEW_AUDIO)
    state = splitmix((sample & MASK) ^ key)
    expected = [(splitmix(state + j * golden) >> 11) / 2**53 for j in range(1, 6)]
    drawn = uniforms(seed, epoch, torch.tensor([sample], device=device), Purpose.VIEW_AUDIO, 5)
    assert drawn[0].tolist() == expected


def test_a_draw_depends_on_its_own_sample_only():
    samples = torch.tensor([5, 900, 17, 3])
    together = uniforms(0, 0, samples, Purpose.FRAME, 9)
    for row, sample in zip(together, samples, strict=True):
        assert torch.equal(uniforms(0, 0, sample[None], Purpose.FRAME, 9)[0], row)
    assert torch.equal(uniforms(0, 0, samples, Purpose.FRAME, 4), together[:, :4])


def test_every_part_of_the_key_matters():
    samples = torch.arange(64)
    base = uniforms(0, 0, samples, Purpose.FRAME, 4)
    for other in (
        uniforms(1, 0, samples, Purpose.FRAME, 4),
        uniforms(0, 1, samples, Purpose.FRAME, 4),
        uniforms(0, 0, samples, Purpose.VIEW_IMAGE, 4),
        uniforms(0, 0, samples + 64, Purpose.FRAME, 4),
    ):
        assert (base == other).sum() == 0


def test_uniform_and_uncorrelated():
    """Neighbouring samples, epochs and positions: moments, a chi-square over 64 bins, and pairwise correlations."""
    n = 50_000
    u = uniforms(0, 0, torch.arange(n), Purpose.VIEW_IMAGE, 8)
    assert u.min() >= 0
    assert u.max() < 1
    for column in u.T:
        counts = torch.histc(column.float(), 64, 0, 1)
        chi2 = ((counts - n / 64) ** 2 / (n / 64)).sum()
        assert chi2 < 120  # 63 degrees of freedom: 1 in 10^5
    following = uniforms(0, 1, torch.arange(n), Purpose.VIEW_IMAGE, 8)
    columns = torch.cat([u, u.roll(1, 0), following], dim=1)
    correlation = torch.corrcoef(columns.T) - torch.eye(columns.shape[1])
    assert correlation.abs().max() < 5 / n**0.5


def test_purposes_keep_their_numbers():
    """They are part of every run's result."""
    assert {p.name: p.value for p in Purpose.__members__.values()} == {
        "VIEW_IMAGE": 1,
        "VIEW_AUDIO": 2,
        "CENTROID_IMAGE": 3,
        "CENTROID_AUDIO": 4,
        "FRAME": 5,
        "ORDER": 6,
        "MIXUP": 7,
        "DROP_PATH": 8,
        "TIME_ROLL": 9,
        "UNSEEN": 10,
    }
    assert len(Purpose.__members__) == len(set(Purpose)) == 10
