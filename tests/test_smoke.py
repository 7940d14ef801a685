"""The promise of `equiav smoke`: retrieval far above chance on clips it has not seen."""

import re

import pytest

from equiav.cli import main


@pytest.mark.slow
def test_retrieval_is_ten_times_chance(tmp_path, device):
    assert main(["smoke", "--out", str(tmp_path / "run"), "--device", device]) == 0
    report = (tmp_path / "run" / "report.md").read_text()
    over_chance = [float(value) for value in re.findall(r"to (?:audio|image) .*\| ([\d.]+)x \|", report)]
    assert len(over_chance) == 2
    assert min(over_chance) >= 10, report
