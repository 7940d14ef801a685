"""The index and the shards: what was written comes back, and whatever is not as it was written is found and named."""

import gzip
import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import webdataset
from xxhash import xxh3_64_hexdigest

from streaming import Dataset, DatasetError, ShardError, Store
from streaming.dataset import (
    COLUMNS,
    MOST_SAMPLES,
    Shard,
    _head,
    describe,
    encode_index,
    index_shard,
    keys_that_come_again,
    read_offsets,
    require_plain,
    verify_shard,
    write_index,
)
from streaming.pack import pack
from streaming.shards import Offsets, encode_offsets, scan
from streaming.store import Missing
from tests.forks import APART
from tests.streaming import pack_children


def random_shards(rng, count):
    letters = "abcXYZ0189-_ é語"
    names = {"".join(rng.choices(letters, k=rng.randint(1, 30))).strip() + f"{k}.tar" for k in range(count)}
    digits = "0123456789abcdef"
    return [
        Shard(name, samples, rng.choice([1024 * samples, 10**13 - 1, 10**12 + rng.randrange(10**9)]), *checksums)
        for name in names
        for samples in [rng.choice([1, 7, 512, MOST_SAMPLES])]
        for checksums in [("".join(rng.choices(digits, k=16)), "".join(rng.choices(digits, k=16)))]
    ]


@pytest.mark.parametrize("wrong", ["flipped", "missing", "short"])
def test_an_index_that_was_read_wrong_is_read_again(tmp_path, wrong):
    """Of a store behind a network; once."""
    opened(tmp_path, INDEX)
    store, reads = Store(str(tmp_path)), []
    store.local, read = False, store.read

    def once(name, *part):
        reads.append(name)
        content = read(name, *part)
        if len(reads) > 1:
            return content
        if wrong == "missing":
            raise Missing(f"{name} does not exist")
        return content[:-30] if wrong == "short" else content[:-3] + b"x" + content[-2:]

    store.read = once
    assert Dataset(store).fingerprint == Dataset(Store(str(tmp_path))).fingerprint
    assert len(reads) == 2


def opened(folder, index):
    (folder / "index").write_bytes(index)
    return Dataset(Store(str(folder)))


# ---- the index


@pytest.mark.parametrize("seed", range(30))
def test_what_is_written_into_an_index_comes_back(tmp_path, seed):
    rng = random.Random(seed)
    shards = random_shards(rng, 1 if seed < 3 else rng.randint(2, 300))
    index = encode_index(shards)
    dataset = opened(tmp_path, index)
    expected = sorted(shards)
    assert list(dataset) == expected
    assert [dataset[k] for k in range(len(dataset))] == expected
    assert dataset.sizes.tolist() == [s.samples for s in expected]
    assert dataset.starts.tolist() == [sum(s.samples for s in expected[:k]) for k in range(len(expected))]
    assert dataset.samples == sum(s.samples for s in expected)
    assert dataset.bytes == sum(s.bytes for s in expected)
    assert dataset.largest == max(s.bytes for s in expected)
    rng.shuffle(shards)
    assert encode_index(shards) == index


def test_a_shard_takes_less_than_200_bytes_of_the_index():
    shards = [Shard(f"{k:0116d}.tar", 10**10 - 1, 10**13 - 1, "f" * 16, "f" * 16) for k in range(1000)]
    assert len(encode_index(shards)) < 1000 * 200


def test_a_name_that_is_too_long_is_refused_by_name():
    shards = [Shard("short.tar", 1, 1, "0" * 16, "0" * 16), Shard("x" * 117 + ".tar", 1, 1, "0" * 16, "0" * 16)]
    with pytest.raises(DatasetError, match=r"xxx\.tar is longer than 120"):
        encode_index(shards)


def test_the_fingerprint_is_of_every_shard():
    shards = random_shards(random.Random(5), 20)
    fingerprint = json.loads(encode_index(shards).split(b"\n")[0])["fingerprint"]
    for change in ({"name": "other.tar"}, {"samples": 3}, {"bytes": 4}, {"checksum": "1" * 16}, {"offsets": "2" * 16}):
        changed = [shards[0]._replace(**change), *shards[1:]]
        assert json.loads(encode_index(changed).split(b"\n")[0])["fingerprint"] != fingerprint
    assert json.loads(encode_index(shards[1:]).split(b"\n")[0])["fingerprint"] != fingerprint


def what_it_is(dataset):
    return dataset.fingerprint, dataset.samples, dataset.bytes, list(dataset), dataset.sizes.tolist()


INDEX = encode_index([s._replace(samples=1 + s.samples % 1000) for s in random_shards(random.Random(1), 7)])
HEAD = INDEX.index(b"\n")


def test_every_flipped_bit_of_the_shards_lines_is_found(tmp_path):
    for place in range(HEAD, len(INDEX)):
        damaged = bytearray(INDEX)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(DatasetError, match=f"{tmp_path}/index"):
            opened(tmp_path, bytes(damaged))


def test_every_flipped_bit_of_the_first_line_is_found_or_changes_nothing(tmp_path):
    right, found, wrong = what_it_is(opened(tmp_path, INDEX)), 0, []
    for place in range(HEAD + 1):
        for bit in range(8):
            damaged = bytearray(INDEX)
            damaged[place] ^= 1 << bit
            try:
                same = what_it_is(opened(tmp_path, bytes(damaged))) == right
            except DatasetError:
                found += 1
            except Exception as error:
                wrong.append((place, bit, repr(error)))
            else:
                if not same:
                    wrong.append((place, bit, "another dataset"))
    assert found > 4 * HEAD
    assert wrong == []


@pytest.mark.parametrize("cut", [0, 1, HEAD // 2, HEAD, HEAD + 1, HEAD + 50, len(INDEX) - 1, len(INDEX) // 2])
def test_an_index_that_was_cut_is_found(tmp_path, cut):
    with pytest.raises(DatasetError, match=f"{tmp_path}/index (is|has)"):
        opened(tmp_path, INDEX[:cut])


@pytest.mark.parametrize("more", [b"\n", b"x", INDEX[-60:], INDEX[HEAD + 1 :]], ids=["empty line", "x", "part", "line"])
def test_an_index_with_more_than_its_own_is_found(tmp_path, more):
    with pytest.raises(DatasetError, match="damaged"):
        opened(tmp_path, INDEX + more)


def test_lines_that_were_exchanged_are_found(tmp_path):
    head, *lines = INDEX.splitlines(keepends=True)
    with pytest.raises(DatasetError, match="damaged"):
        opened(tmp_path, head + b"".join([lines[1], lines[0], *lines[2:]]))


def heads(**changes):
    return json.dumps(json.loads(INDEX[:HEAD]) | changes).encode() + INDEX[HEAD:]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"not json\n", "first line is no JSON object"),
        (b"[1, 2]\n", "first line is no JSON object"),
        (b"\xff\xfe\n", "first line is no JSON object"),
        (b"{}\n", "first line is no JSON object"),
        (heads(format=2), "has format 2, this program reads 1"),
        (heads(name_width="x"), "first line is no JSON object"),
        (heads(name_width=None), "first line is no JSON object"),
        (heads(name_width=3), "damaged"),
        (heads(shards=6), "damaged"),
        (heads(shards="7"), "damaged"),
        (heads(fingerprint="0" * 64), "damaged"),
    ],
)
def test_a_first_line_that_is_wrong_is_named(tmp_path, index, message):
    with pytest.raises(DatasetError, match=f"{tmp_path}/index .*{message}"):
        opened(tmp_path, index)


@pytest.mark.parametrize(
    "name", ["../x.tar", "/etc/x.tar", "a/x.tar", "a\\x.tar", ".x.tar", "..", "x\n.tar", "x\0.tar", "\x7f", ""]
)
def test_an_index_names_files_of_its_own_folder_and_nothing_else(tmp_path, name):
    """With the right fingerprint, as whoever wrote the name would give it."""
    shards = [Shard(f"part-{k}.tar", 10, 1000, "0" * 16, "1" * 16) for k in range(5)]
    index = encode_index([*shards, shards[0]._replace(name=name)])
    with pytest.raises(
        DatasetError, match=rf"^{tmp_path}/index names a shard .*{re.escape(repr(name))}, expected the plain"
    ):
        opened(tmp_path, index)


FIELDS = ["format", "shards", "samples", "bytes", "name_width", "fingerprint"]


@pytest.mark.parametrize("name", FIELDS)
def test_a_first_line_without_one_of_its_fields_is_named(tmp_path, name):
    head = json.loads(INDEX[:HEAD])
    assert list(head) == FIELDS
    del head[name]
    with pytest.raises(DatasetError, match=f"{tmp_path}/index"):
        opened(tmp_path, json.dumps(head).encode() + INDEX[HEAD:])


def test_a_folder_without_an_index_is_named_with_what_to_do(tmp_path):
    with pytest.raises(DatasetError, match=f"{tmp_path}/none holds no dataset: .*equiav pack.*equiav index"):
        Dataset(Store(f"{tmp_path}/none"))
    with pytest.raises(DatasetError, match="no shards to make an index of"):
        write_index(Store(str(tmp_path)), [])


def test_an_index_from_s3_is_mapped_from_a_file_without_a_name(s3, tmp_path):
    (s3.folder / "indexes").mkdir()
    store = Store("s3://indexes/one", patience=20, options=s3.options)
    store.write("index", INDEX)
    dataset = Dataset(store, tmp_path / "scratch")
    assert what_it_is(dataset) == what_it_is(opened(tmp_path, INDEX))
    assert list((tmp_path / "scratch").iterdir()) == []


def test_two_million_shards_open_in_little_memory(tmp_path):
    """The index itself has 160 MB; what is kept of it as numbers, 24 MB."""
    count = 2_000_000
    numbers, lines = np.arange(count), b"part-0000000.tar        512     256000000 0123456789abcdef fedcba9876543210\n"
    sizes, rows = 500 + numbers % 400, np.tile(np.frombuffer(lines, np.uint8), (count, 1))
    for digit in range(7):
        rows[:, lines.index(b".tar") - 1 - digit] = ord("0") + numbers // 10**digit % 10
    for digit in range(3):
        rows[:, lines.index(b"512") + 2 - digit] = ord("0") + sizes // 10**digit % 10
    with (tmp_path / "index").open("wb") as file:
        head = {
            "format": 1,
            "shards": count,
            "samples": int(sizes.sum()),
            "bytes": 256_000_000 * count,
            "name_width": 16,
            "fingerprint": hashlib.sha256(rows).hexdigest(),
        }
        file.write(json.dumps(head).encode() + b"\n")
        file.write(rows)
    program = """if True:
        import json, sys, tracemalloc
        from streaming import Dataset, Store
        store = Store(sys.argv[1])
        store.size("index")
        def resident():  # kB, of its own: not of mapped files
            return int(dict(line.split(":") for line in open("/proc/self/status"))["RssAnon"].split()[0])
        before = resident()
        tracemalloc.start()
        dataset = Dataset(store)
        sizes, starts, largest = dataset.sizes, dataset.starts, dataset.largest
        taken = [(resident() - before) >> 10, tracemalloc.get_traced_memory()[1] >> 20]
        print(json.dumps([len(dataset), dataset.samples, dataset[1234567], largest, sizes.dtype.name,
                          sizes[::1000].tolist(), starts[::1000].tolist(), taken]))
    """
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, **APART},
        capture_output=True,
        text=True,
        check=True,
    )
    *told, taken = json.loads(done.stdout)
    shard = ["part-1234567.tar", 500 + 1234567 % 400, 256_000_000, "0123456789abcdef", "fedcba9876543210"]
    starts = np.cumsum(sizes) - sizes
    assert told == [
        count,
        int(sizes.sum()),
        shard,
        256_000_000,
        "int32",
        sizes[::1000].tolist(),
        starts[::1000].tolist(),
    ]
    assert max(taken) < 80  # MB; a list of two million of anything takes more


# ---- shards of another writer


def write_tar(path, entries, **options):
    """A tar with these members, in this order."""
    with tarfile.open(path, "w", **options) as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def flat(samples):
    return [(f"{key}.{name}", data) for key, members in samples.items() for name, data in members.items()]


SAMPLES = {f"s{k}": pack_children.members(k) for k in range(6)}


def read_by_offsets(folder, shard):
    """key -> members, from the offsets file alone."""
    content = (folder / shard.name).read_bytes()
    offsets = Offsets((folder / shard.offsets_name).read_bytes(), shard.offsets_name, shard.bytes)
    samples = (offsets[k] for k in range(len(offsets)))
    return {s.key: {name: content[m.offset : m.offset + m.length] for name, m in s.members.items()} for s in samples}


def read_plainly(path):
    samples = webdataset.WebDataset(str(path), shardshuffle=False)
    return {s["__key__"]: {name: data for name, data in s.items() if name[0] != "_"} for s in samples}


def test_the_index_of_packed_shards_is_what_packing_computed(tmp_path):
    store = Store(str(tmp_path))
    items = [(f"clips/s{k}", k) for k in range(30)]
    pack(items, pack_children.encode, store, processes=0, part_items=8, max_shard_bytes=20480)
    packed = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for path in [*tmp_path.glob("*.offsets"), tmp_path / "index"]:
        path.unlink()
    write_index(store, [index_shard(store, path.name)[0] for path in tmp_path.glob("*.tar")])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == packed


@pytest.mark.parametrize("where", ["local", "s3"])
def test_shards_that_webdataset_wrote_are_indexed_where_they_are(s3, tmp_path, where):
    folder, store = tmp_path, Store(str(tmp_path))
    if where == "s3":
        folder = s3.folder / tmp_path.name
        folder.mkdir()
        store = Store(f"s3://{tmp_path.name}", patience=20, options=s3.options)
    with webdataset.TarWriter(str(folder / "theirs-000.tar"), encoder=False) as tar:
        for key, members in SAMPLES.items():
            tar.write({"__key__": key, **members})
    shard, _ = index_shard(store, "theirs-000.tar")
    write_index(store, [shard])
    assert read_by_offsets(folder, shard) == SAMPLES
    dataset = Dataset(store)
    assert (list(dataset), dataset.samples) == ([shard], 6)
    assert verify_shard(store, shard) == []


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_other_tars_are_read_as_webdataset_reads_them(tmp_path, form):
    """Folders, keys with folders, long names, names in other scripts, members that belong to no sample."""
    samples = {
        "a/b.c/clip": SAMPLES["s0"],
        "a/b.c/clip-2": SAMPLES["s1"],
        "./here": SAMPLES["s2"],
        "plain": SAMPLES["s3"],
    }
    if form != tarfile.USTAR_FORMAT:
        samples |= {"long/" * 30 + "x" * 120: SAMPLES["s4"], "ключ/鍵": SAMPLES["s5"]}
    entries = flat(samples)
    strangers = [
        ("a", None),
        ("a/b.c", None),
        ("README", b"no dot"),
        ("a/b.c/LICENSE", b"no dot"),
        (".hidden", b"no key"),
    ]
    entries = strangers[:3] + entries[:2] + strangers[3:] + entries[2:]
    path = write_tar(tmp_path / "theirs.tar", entries, format=form)
    shard, _ = index_shard(Store(str(tmp_path)), path.name)
    assert read_by_offsets(tmp_path, shard) == samples == read_plainly(path)
    assert verify_shard(Store(str(tmp_path)), shard) == []


def test_offsets_say_where_each_member_lies(tmp_path):
    path = write_tar(tmp_path / "x.tar", flat(SAMPLES))
    samples, content = scan(path, "x.tar"), path.read_bytes()
    offsets = Offsets(encode_offsets(samples), "x", len(content))
    assert [offsets[k] for k in range(len(offsets))] == samples
    for sample in samples:
        for name, member in sample.members.items():
            data = content[member.offset : member.offset + member.length]
            assert data == SAMPLES[sample.key][name]
            assert member.checksum == xxh3_64_hexdigest(data)
        first = content.index(next(iter(SAMPLES[sample.key].values())))
        assert sample.span == (first, max(m.offset + m.length for m in sample.members.values()))


def refused(path, message):
    with pytest.raises(ShardError, match=f"^shard x.tar: {message}"):
        index_shard(Store(str(path.parent)), path.name)
    assert not path.with_name("x.tar.offsets").exists()


def test_a_tar_cut_within_a_member_is_refused_with_the_members_name(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", bytes(1000)), ("b.jpg", bytes(5000)), ("c.jpg", bytes(1000))])
    path.write_bytes(path.read_bytes()[:4000])
    refused(path, "truncated in member b.jpg: it ends at byte 7048, the file at 4000")


@pytest.mark.parametrize(
    "length",
    [
        6656,  # before the last header
        7000,  # in it
        7168,  # after it
        7467,  # in the content of the last member
        7500,  # behind it
        7680,  # before the empty blocks
        8000,  # in the first of them
        8192,  # between them
        8500,  # in the second
    ],
)
def test_a_tar_cut_anywhere_is_refused(tmp_path, length):
    """Where it ends between members it has no end: the two empty blocks that a tar closes with."""
    path = write_tar(tmp_path / "x.tar", [("a.jpg", bytes(1000)), ("b.jpg", bytes(4500)), ("c.jpg", bytes(300))])
    path.write_bytes(path.read_bytes()[:length])
    refused(path, "")


def test_a_damaged_header_does_not_end_a_shard_in_silence(tmp_path):
    path = write_tar(tmp_path / "x.tar", flat(SAMPLES))
    content = bytearray(path.read_bytes())
    content[content.index(b"s3.json")] ^= 1
    path.write_bytes(content)
    refused(path, "")


def test_a_name_that_is_not_utf8_is_refused_by_name(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("cl\udce9.jpg", b"1")], format=tarfile.GNU_FORMAT)
    refused(path, ".*member")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "holds no samples"),
        ([("folder", None), ("README", b"text")], "holds no samples"),
        ([("a.jpg", b"1"), ("a.wav", b"2"), ("a.jpg", b"3")], "member a.jpg comes twice"),
        (
            [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.wav", b"3")],
            "sample a comes twice, or its members are not side by side",
        ),
        ([("f/a.jpg", b"1"), ("b.jpg", b"2"), ("f/a.jpg", b"3")], "sample f/a comes twice"),
    ],
)
def test_a_tar_that_is_no_shard_is_refused_by_name(tmp_path, entries, message):
    refused(write_tar(tmp_path / "x.tar", entries), message)


@pytest.mark.parametrize(
    "change", [gzip.compress, lambda content: b"", lambda content: bytes(300), lambda content: b"text" * 999]
)
def test_what_is_not_a_plain_tar_is_refused(tmp_path, change):
    path = write_tar(tmp_path / "x.tar", flat(SAMPLES))
    path.write_bytes(change(path.read_bytes()))
    refused(path, "not a plain tar file")


# ---- checking


@pytest.fixture
def shard(tmp_path):
    """A shard in a folder, with its offsets."""
    write_tar(tmp_path / "x.tar", flat(SAMPLES))
    return index_shard(Store(str(tmp_path)), "x.tar")[0]


def problems(folder, shard):
    """(key, reason) of each."""
    found = verify_shard(Store(str(folder)), shard)
    assert {p["shard"] for p in found} <= {"x.tar"}
    return [(p["key"], p["reason"]) for p in found]


def test_each_flipped_bit_is_found_and_laid_to_its_member(tmp_path, shard):
    path, rng = tmp_path / "x.tar", random.Random(0)
    right = path.read_bytes()
    owner = {
        place: (s.key, f"member {name} is damaged")
        for s in scan(path, "x.tar")
        for name, m in s.members.items()
        for place in range(m.offset, m.offset + m.length)
    }
    places = rng.sample(sorted(owner), 150) + rng.sample(sorted(set(range(len(right))) - owner.keys()), 50)
    assert problems(tmp_path, shard) == []
    for place in places:
        damaged = bytearray(right)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        (key, reason), *samples = problems(tmp_path, shard)
        assert (key, reason) == (
            "",
            f"has {len(right)} bytes, expected {len(right)}, or other content than it was indexed with",
        )
        assert samples == ([owner[place]] if place in owner else [])


@pytest.mark.parametrize("where", ["local", "s3"])
def test_of_a_cut_shard_the_samples_beyond_the_end_are_named(s3, tmp_path, where):
    folder, store = tmp_path, Store(str(tmp_path))
    if where == "s3":
        folder = s3.folder / f"{tmp_path.name}-cut"
        folder.mkdir()
        store = Store(f"s3://{folder.name}", patience=20, options=s3.options)
    path = write_tar(folder / "x.tar", flat(SAMPLES))
    shard, _ = index_shard(store, "x.tar")
    cut = scan(path, "x.tar")[3].span[1]
    path.write_bytes(path.read_bytes()[:cut])
    while store.size("x.tar") != cut:
        pass
    found = verify_shard(store, shard)
    assert found[0]["reason"].startswith(f"has {cut} bytes, expected {shard.bytes}")
    assert [(p["key"], p["reason"]) for p in found[1:]] == [
        (key, f"member {name} is damaged") for key in ("s4", "s5") for name in SAMPLES[key]
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c[: c.index(b"\n") + 1], "its offsets file has 1 samples, the index says "),
        (lambda c: b"", "its offsets file has 0 samples"),
        (lambda c: c.replace(b"[", b"{", 1), "its offsets file says otherwise than the shard"),
        (lambda c: c.replace(b":[", b":[-", 1), "its offsets file says otherwise than the shard"),
        (lambda c: c.replace(b":[", b":[9", 1), "its offsets file says otherwise than the shard"),
    ],
)
def test_offsets_that_an_index_vouches_for_have_to_fit_the_shard(tmp_path, shard, change, said):
    path = tmp_path / "x.tar.offsets"
    path.write_bytes(change(path.read_bytes()))
    forged = shard._replace(offsets=xxh3_64_hexdigest(path.read_bytes()))
    ((key, reason),) = problems(tmp_path, forged)
    assert key == ""
    assert reason.startswith(said)


def test_missing_parts_and_other_offsets_are_named(tmp_path, shard):
    offsets = tmp_path / "x.tar.offsets"
    right = offsets.read_bytes()
    place = right.index(b"1")
    for wrong in (right[:-1], right + b"\n", right[:place] + b"2" + right[place + 1 :], b""):
        offsets.write_bytes(wrong)
        assert problems(tmp_path, shard) == [("", "its offsets file is not the one that the index was made with")]
    offsets.unlink()
    assert problems(tmp_path, shard) == [("", "its offsets file is missing")]
    offsets.write_bytes(right)
    (tmp_path / "x.tar").rename(tmp_path / "y.tar")
    assert problems(tmp_path, shard) == [("", "is missing")]


def test_offsets_that_are_wrong_since_they_were_indexed_are_laid_to_the_sample(tmp_path, shard):
    """A tar that another took the place of: the same sizes, one member changed."""
    changed = {key: dict(members) for key, members in SAMPLES.items()}
    changed["s2"]["wav"] = changed["s2"]["wav"][::-1]
    write_tar(tmp_path / "x.tar", flat(changed))
    assert problems(tmp_path, shard)[1:] == [("s2", "member wav is damaged")]
    assert describe(tmp_path / "x.tar", "x.tar")[0].checksum != shard.checksum


# ---- numbers that somebody else has written


def sealed_index(shards):
    """Of shards that may say anything: sums are made without them."""
    lines = [encode_index([shard._replace(samples=1, bytes=1)]).partition(b"\n")[2] for shard in shards]
    width = len(lines[0]) - sum(COLUMNS.values()) - len(COLUMNS) - 1
    for k, shard in enumerate(shards):
        cells = (str(value).encode().rjust(size) for value, size in zip(shard[1:], COLUMNS.values(), strict=True))
        lines[k] = b" ".join([lines[k][:width], *cells]) + b"\n"
    return b"{}\n" + b"".join(lines)


@pytest.mark.parametrize(
    "wrong",
    [
        {"samples": 1_400_000_000},
        {"samples": 0},
        {"samples": "1e3"},
        {"samples": "1 0"},
        {"bytes": ":00000"},
        {"bytes": 600},
        {"checksum": "0123456789ABCDEF"},
        {"offsets": "../../../../etc/"},
        {"samples": MOST_SAMPLES + 1, "bytes": 10**13 - 1},
    ],
)
def test_numbers_that_a_shard_cannot_have_are_refused_before_memory_is_taken(tmp_path, wrong):
    right = Shard("a.tar", 10, 700_000, "0" * 16, "f" * 16)
    lines = sealed_index([right, right._replace(name="b.tar", **wrong)]).partition(b"\n")[2]
    (tmp_path / "index").write_bytes(head_of(lines, len(lines) // 2) + b"\n" + lines)
    with pytest.raises(DatasetError, match=r"says of shard b.tar what cannot be"):
        Dataset(Store(str(tmp_path)))


def head_of(lines, row):
    """The first line that a reader would accept with these."""
    samples = size = 0
    for start in range(0, len(lines), row):
        fields = lines[start : start + row]
        width = row - sum(COLUMNS.values()) - len(COLUMNS) - 1
        digits = [fields[width + 1 : width + 11], fields[width + 12 : width + 25]]
        values = [sum(max(0, c - 48) * 10 ** (len(d) - 1 - k) for k, c in enumerate(d)) for d in digits]
        samples, size = samples + values[0], size + values[1]
    return json.dumps(_head(len(lines) // row, samples, size, width, lines)).encode()


OFFSETS = {
    "a place beyond the shard": ["k", {"json": [2**40, 10, "0" * 16]}],
    "half a byte": ["k", {"json": [0, 1.5, "0" * 16]}],
    "below zero": ["k", {"json": [-1, 1, "0" * 16]}],
    "a length of all": ["k", {"json": [0, 2**62, "0" * 16]}],
    "no checksum": ["k", {"json": [0, 1, 7]}],
    "no members": ["k", {}],
    "no key": [7, {"json": [0, 1, "0" * 16]}],
    "a list": [],
}


@pytest.mark.parametrize("what", OFFSETS)
def test_offsets_that_cannot_be_are_named(what):
    content = json.dumps(OFFSETS[what]).encode() + b"\n"
    with pytest.raises(ShardError, match="line 1 of x is no sample with its members"):
        Offsets(content, "x", 1000)[0]


@pytest.mark.parametrize(
    "line", [b'["k", {"json": [NaN, 1, "0"]}]', b"[" * 100_000, b"\xff", b'["k", {"a": [0, 1], "a": 1}]', b""]
)
def test_lines_of_offsets_that_are_no_json_are_named(line):
    with pytest.raises(ShardError, match="line 1 of x is no sample"):
        Offsets(line + b"\n", "x", 1000)[0]


def test_an_offsets_file_that_is_too_large_is_not_read(tmp_path):
    (tmp_path / "a.tar.offsets").write_bytes(bytes(300_000))
    shard = Shard("a.tar", 10, 10_000, "0" * 16, "0" * 16)
    with pytest.raises(DatasetError, match=r"too large: .* has 300000 bytes, expected 24096 at most"):
        read_offsets(Store(str(tmp_path)), shard)


@pytest.mark.parametrize("size", [-512, -1, -(1 << 40)])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_size_below_zero_ends(tmp_path, size, kind):
    """CVE-2025-8194: Python's reader goes back to where it came from, for ever."""
    path = write_tar(tmp_path / "x.tar", [("a.jpg", bytes(1000)), ("b.jpg", bytes(5000))])
    content = bytearray(path.read_bytes())
    header = tarfile.TarInfo("c.jpg")
    header.type = kind
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" + (size & (1 << 88) - 1).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    path.write_bytes(bytes(content[:1536]) + bytes(block) + bytes(content[1536:]))
    with pytest.raises(ShardError, match=r"shard x\.tar"):
        scan(path, "x.tar")


def test_a_key_that_stands_in_two_shards_is_found():
    hashes = [np.array(keys, np.uint64) for keys in ([1, 2, 3], [4], [5, 2, 6, 1])]
    assert keys_that_come_again(hashes) == [(2, 1), (2, 3)]
    assert keys_that_come_again(hashes[:2]) == []


def test_names_that_no_index_can_have_and_pipes_are_refused(tmp_path):
    store = Store(str(tmp_path))
    with pytest.raises(DatasetError, match="cannot be a shard's name: rename it, in UTF-8"):
        require_plain(store, os.fsdecode(b"\xff.tar"))
    os.mkfifo(tmp_path / "0.tar")
    with pytest.raises(Missing, match="is not a file"):
        index_shard(store, "0.tar")
