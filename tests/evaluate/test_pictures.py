"""What pages and sheets show."""

import numpy as np
import torch

from equiav.evaluate.pictures import coloured


def test_a_spectrogram_is_shown_without_the_padding_behind_it():
    rng = np.random.default_rng(0)
    heard = torch.from_numpy(rng.normal(size=(60, 16)).astype(np.float32))
    padded = torch.cat([heard, torch.full((40, 16), 1.3)])
    assert np.array_equal(coloured(padded), coloured(heard))
    inside = torch.cat([padded, heard])  # what is all alike between sounds is one of them
    assert not np.array_equal(coloured(inside), coloured(heard))
    assert coloured(torch.zeros(100, 16)).shape == (16, 32, 3)
