"""What cannot be used is counted by reason, listed once, and too much of it ends the run."""

import json
import pickle

import pytest

from streaming import Bad, BadSample, Quarantine, TooManyBadSamples


def bad(sample, reason, where, detail=""):
    return Bad(sample, reason, where, detail)


def listed(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_samples_are_counted_by_reason_and_each_once():
    quarantine = Quarantine(total=1000)
    for sample, reason in [(5, "checksum"), (7, "image"), (5, "image"), (9, "checksum"), (9, "checksum")]:
        quarantine.add([bad(sample, reason, "shard 1")])
    assert len(quarantine) == 3
    assert quarantine.counts() == {"checksum": 2, "image": 1}
    assert quarantine.state() == {5: "checksum", 7: "image", 9: "checksum"}


@pytest.mark.parametrize(
    ("total", "max_bad", "allowed"),
    [(400, 0.01, 4), (499, 0.01, 4), (200, 0.01, 3), (17, 0.01, 3), (10, 0, 0), (4, 1, 4)],
)
def test_the_run_stops_at_the_first_sample_beyond_the_limit(total, max_bad, allowed):
    quarantine = Quarantine(total, max_bad)
    for sample in range(allowed):
        quarantine.add([bad(sample, "image", "shard 1")])
        quarantine.add([bad(sample, "image", "shard 1")])
    if allowed < total:
        with pytest.raises(TooManyBadSamples, match=f"{allowed + 1} of {total} samples"):
            quarantine.add([bad(allowed, "image", "shard 1")])


def test_the_error_says_what_how_much_and_where(tmp_path):
    path = tmp_path / "bad.jsonl"
    quarantine = Quarantine(100, 0.03, path)
    quarantine.add([bad(0, "audio", "a.tar, sample 0 (w)")])
    quarantine.add([bad(1, "image", "a.tar, sample 1 (x)")])
    quarantine.add([bad(2, "checksum", "a.tar, sample 2 (y)")])
    with pytest.raises(TooManyBadSamples) as caught:
        quarantine.add([bad(3, "image", "a.tar, sample 3 (z)", "cut after 17 bytes")])
    for part in (
        "4 of 100",
        "2 image, 1 audio, 1 checksum",
        "the 3 that stream.max_bad=0.03 allows",
        "a.tar, sample 3 (z)",
        "17 bytes",
        str(path),
    ):
        assert part in str(caught.value)
    assert [line["sample"] for line in listed(path)] == [0, 1, 2, 3]


def test_all_of_one_call_are_recorded_before_they_are_too_many(tmp_path):
    path = tmp_path / "bad.jsonl"
    quarantine = Quarantine(100, 0.02, path)
    with pytest.raises(TooManyBadSamples, match="5 of 100"):
        quarantine.add(bad(sample, "image", "a.tar") for sample in range(5))
    assert [line["sample"] for line in listed(path)] == list(quarantine.state()) == list(range(5))


def test_every_sample_is_a_line_of_the_file(tmp_path):
    path = tmp_path / "new" / "folder" / "bad.jsonl"
    quarantine = Quarantine(1000, path=path)
    assert not path.exists()
    quarantine.add([bad(5, "image", "shard 1", 'ünlike "JPEG"\nat all')])
    quarantine.add([bad(7, "checksum", "shard 2")])
    quarantine.add([bad(5, "checksum", "shard 1")])
    assert listed(path) == [
        {"sample": 5, "where": "shard 1", "reason": "image", "detail": 'ünlike "JPEG"\nat all'},
        {"sample": 7, "where": "shard 2", "reason": "checksum", "detail": ""},
    ]


def test_after_a_restart_nothing_is_listed_twice_but_everything_is_counted(tmp_path):
    path = tmp_path / "bad.jsonl"
    Quarantine(1000, path=path).add([bad(5, "image", "shard 1")])
    again = Quarantine(1000, path=path)
    assert len(again) == 0  # what counts is what the checkpoint says, not what the file says
    again.add([bad(5, "image", "shard 1")])
    again.add([bad(7, "image", "shard 1")])
    assert [line["sample"] for line in listed(path)] == [5, 7]
    assert len(again) == 2


def cut(path):
    """The last line as a crash leaves it: half of it, without its end."""
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 30])


def test_a_half_written_last_line_does_no_harm_to_the_lines_before_it(tmp_path):
    path = tmp_path / "bad.jsonl"
    before = Quarantine(1000, path=path)
    before.add([bad(5, "image", "shard 1")])
    before.add([bad(7, "image", "shard 1")])
    cut(path)
    again = Quarantine(1000, path=path)
    again.add([bad(5, "image", "shard 1")])
    assert len(path.read_text().splitlines()) == 1
    assert listed_where_whole(path) == [5]


def listed_where_whole(path):
    samples = []
    for line in path.read_text().splitlines():
        try:
            samples.append(json.loads(line)["sample"])
        except ValueError:
            continue
    return samples


@pytest.mark.parametrize("sample", [7, 9])
def test_what_follows_a_half_written_last_line_is_listed_once_and_stays_so(tmp_path, sample):
    path = tmp_path / "bad.jsonl"
    before = Quarantine(1000, path=path)
    before.add([bad(5, "image", "shard 1")])
    before.add([bad(7, "image", "shard 1")])
    cut(path)
    for _ in range(2):
        Quarantine(1000, path=path).add([bad(sample, "image", "shard 1")])
        assert listed_where_whole(path) == [5, sample]


def test_the_state_of_a_checkpoint_counts_the_same_samples_without_listing_them_again(tmp_path):
    path = tmp_path / "bad.jsonl"
    before = Quarantine(1000, path=path)
    before.add([bad(5, "image", "shard 1")])
    before.add([bad(7, "checksum", "shard 1")])
    state = before.state()
    before.add([bad(9, "image", "shard 1")])  # after the checkpoint: not of its state
    after = Quarantine(1000, path=path)
    after.load(pickle.loads(pickle.dumps(state)))
    assert (after.state(), after.counts(), len(after)) == (state, {"image": 1, "checksum": 1}, 2)
    after.add([bad(7, "checksum", "shard 1")])
    assert [line["sample"] for line in listed(path)] == [5, 7, 9]


def test_what_was_loaded_counts_towards_the_limit():
    after = Quarantine(100, 0.03)
    after.load({1: "image", 2: "image", 3: "image"})
    with pytest.raises(TooManyBadSamples, match="4 of 100"):
        after.add([bad(4, "image", "shard 1")])


def test_a_bad_sample_keeps_its_reason_on_the_way_between_processes():
    error = pickle.loads(pickle.dumps(BadSample("image", "cut after 17 bytes")))
    assert (error.reason, error.detail, str(error)) == ("image", "cut after 17 bytes", "image: cut after 17 bytes")
    assert str(BadSample("image")) == "image"


def test_each_stands_once_whatever_earlier_starts_have_left(tmp_path):
    """Two starts that wrote at a time, a line that a crash has cut, and lines that are none."""
    path = tmp_path / "quarantine.jsonl"
    good = [json.dumps(bad(k, "image", "w")._asdict()) for k in (1, 2, 1, 3, 2)]
    path.write_text("\n".join([*good, "[" * 50_000, '{"sample": "²"}', '{"sample": true}', "[]", '{"sample": 4']))
    quarantine = Quarantine(1000, path=path)
    quarantine.load({1: "image", 2: "image"})
    quarantine.add([bad(k, "image", "w") for k in (1, 3, 5, 4, 5)])
    assert [line["sample"] for line in listed(path)] == [1, 2, 3, 5, 4]
    again = Quarantine(1000, path=path)
    again.load({1: "image", 2: "image"})
    again.add([bad(k, "image", "w") for k in (3, 4, 5)])
    assert [line["sample"] for line in listed(path)] == [1, 2, 3, 5, 4]


def test_the_list_is_whole_on_another_disk(tmp_path):
    first = Quarantine(1000, path=tmp_path / "one.jsonl")
    first.add([bad(k, reason, f"at {k}") for k, reason in ((7, "image"), (2, "audio"))])
    state = json.loads(json.dumps(first.state()))
    second = Quarantine(1000, path=tmp_path / "two.jsonl")
    second.load(state, lambda sample: f"at {sample}")
    second.add([bad(7, "image", "at 7"), bad(9, "image", "at 9")])
    lines = listed(tmp_path / "two.jsonl")
    assert [(line["sample"], line["reason"], line["where"]) for line in lines] == [
        (7, "image", "at 7"),
        (2, "audio", "at 2"),
        (9, "image", "at 9"),
    ]
