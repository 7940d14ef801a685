"""Labels: each dataset's own files, by the names that its clips have; counted without a pass over shards."""

import hashlib
import json

import numpy as np
import pytest
import webdataset

from equiav import cli
from equiav.commands.pack import IndexConfig, run_index
from equiav.config import ConfigError
from equiav.data.labels import columns_of, give, read_classes, read_label_file
from streaming import Dataset, DatasetError, Store
from streaming.dataset import NoDataset
from streaming.labels import Labels, Sets, read_labels, write_labels

FILES = {
    "audioset.csv": (
        "# Segments csv created Sun Mar  5 10:54:31 2017\n# num_ytids=2\n# YTID, start_seconds, end_seconds, positive_labels\n"
        '--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"\n-0RWZT-miFs, 420.000, 430.000, "/m/03v3yw"\n',
        {"--PJHxphWEs": ["/m/09x0r", "/t/dd00088"], "-0RWZT-miFs": ["/m/03v3yw"]},
    ),
    "vggsound.csv": (
        '---g-f_I2yQ,1,"people marching",test\n--0PQM4-hqg,30,"waterfall, burbling",train\n',
        {"---g-f_I2yQ_000001": ["people marching"], "--0PQM4-hqg_000030": ["waterfall, burbling"]},
    ),
    "esc50.csv": (
        "filename,fold,target,category,esc10,src_file,take\n1-100032-A-0.wav,1,0,dog,True,100032,A\n",
        {"1-100032-A-0": ["dog"]},
    ),
    "dev.csv": ('fname,labels,mids,split\n64760,"Purr,Cat","/m/02yds9,/m/01yrx",train\n', {"64760": ["Purr", "Cat"]}),
    "kinetics.csv": (
        "label,youtube_id,time_start,time_end,split\nabseiling,_4YTwq0-73Y,4,14,train\n",
        {"_4YTwq0-73Y_000004_000014": ["abseiling"]},
    ),
    "trainlist01.txt": (
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\n",
        {"ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01": ["ApplyEyeMakeup"]},
    ),
    "brush_hair_test_split1.txt": (
        "April_09_brush_hair_u_nm_np1_ba_goo_0.avi 1 \n",
        {"April_09_brush_hair_u_nm_np1_ba_goo_0": ["brush_hair"]},
    ),
    "testing_list.txt": ("right/bb05582b_nohash_3.wav\n", {"right/bb05582b_nohash_3": ["right"]}),
    "mine.csv": ("a/x.mp4,dog;cat\ny.v2.mp4,dog\ny.v2.mp4,cow\n", {"a/x": ["dog", "cat"], "y.v2": ["dog", "cow"]}),
    "list.json": (
        json.dumps({"data": [{"video_id": "a", "labels": "/m/1,/m/2"}, {"video_id": "b", "labels": ["/m/1"]}]}),
        {"a": ["/m/1", "/m/2"], "b": ["/m/1"]},
    ),
}


PARTS = {
    "esc50.csv": {"1"},
    "dev.csv": {"train"},
    "kinetics.csv": {"train"},
    "brush_hair_test_split1.txt": {"split1-train"},
    "vggsound.csv": {"train", "test"},
}


def labels(found):
    return {name: said.labels for name, said in found.items()}


@pytest.mark.parametrize("name", FILES)
def test_each_dataset_is_read_in_its_own_format(tmp_path, name):
    content, found = FILES[name]
    (tmp_path / name).write_text(content)
    said = read_label_file(tmp_path / name)
    assert labels(said) == found
    parts = PARTS.get(name, {name.partition(".")[0]})  # else those of the file's own name
    assert {part for of_clip in said.values() for part in of_clip.parts} == parts
    assert all(len(of_clip.parts) == 1 for of_clip in said.values())


TABLES = {  # columns, separator, between, table -> labels and parts by name
    "tabs": ("name=clip,label=what,split=fold", "", ";", "clip\tfold\twhat\na.wav\ttest\tdog;cat\nb\ttrain\tcow\nc\ttest\t\n",
             {"a": (["dog", "cat"], ["test"]), "b": (["cow"], ["train"])}),
    "semicolons": ("name=id,label=l", "", ",", 'id;l\na;"dog, cat"\n', {"a": (["dog", "cat"], ["table"])}),
    "one-hot": ("name=file,label=*,split=part", "", ";", "file,dog,cat,part\na.mp4,1,0,x\nb.mp4,true,yes,y\nc.mp4,0,,x\n",
                {"a": (["dog"], ["x"]), "b": (["dog", "cat"], ["y"])}),
    "bars": ("name=file,label=l", "|", "/", "file|l\nsome, name.wav|a/b\n", {"some, name": (["a", "b"], ["table"])}),
    "written as \\t": ("name=f,label=l", "\\t", ";", "f\tl\nx,y.wav\tdog\n", {"x,y": (["dog"], ["table"])}),
    "cells that have nothing": ("name=f,label=l", "", ";", "f,l\na,nan\nb,None\nc,<NA>\nd,none\n", {"d": (["none"], ["table"])}),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_read_by_its_columns(tmp_path, name):
    columns, separator, between, text, expected = TABLES[name]
    (tmp_path / "table.csv").write_text(text)
    found = read_label_file(tmp_path / "table.csv", columns_of(columns, separator, between))
    assert {key: tuple(said) for key, said in found.items()} == expected


@pytest.mark.parametrize(
    ("columns", "text", "told"),
    [
        ("name=a", "a,b\n1,2\n", r"columns is 'name=a', expected name=COLUMN,label=COLUMN"),
        ("name=a,label=b,fold=c", "a,b\n1,2\n", r"columns is .* expected name=COLUMN"),
        ("name=a,label=c", "a,b\n1,2\n", r"table.csv: 0 columns are called 'c', of a, b"),
        ("name=a,label=b", "a,b,b\n1,2,3\n", r"table.csv: 2 columns are called 'b', of a, b, b"),
        ("name=a,label=b", "a,b\n1,2,3\n", r"table.csv, row 2: found .* expected 2 columns, as in its head"),
        (
            "name=a,label=*",
            "a,b\n1,7\n",
            r"table.csv, row 2: found '7' for b, expected 1 or 0, true or false, yes or no",
        ),
        ("name=a,label=b", "a,b\n1,\n", r"table.csv: has no labels"),
    ],
)
def test_a_table_that_is_not_as_was_said(tmp_path, columns, text, told):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(ConfigError, match=told):
        read_label_file(tmp_path / "table.csv", columns_of(columns, "", ";"))


def test_hmdb51s_numbers_are_splits(tmp_path):
    (tmp_path / "sit_test_split2.txt").write_text("a.avi 1\nb.avi 2 \nc.avi 0\n")
    said = read_label_file(tmp_path / "sit_test_split2.txt")
    assert {name: of_clip.parts for name, of_clip in said.items()} == {
        "a": ["split2-train"],
        "b": ["split2-test"],
        "c": [],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no labels"),
        ("# only\n", "has no labels"),
        ("x.mp4,\n", "x has no label"),
        ("filename,fold,category\nx.wav,1, \n", "x has no label"),
        ('x.mp4,"a\ny.mp4,"b\nz.mp4,c\n', "is no file of labels .Error"),
        ('x.mp4,"a\ny.mp4,b\n', "is no file of labels .Error: unexpected end of data"),
        ('filename,fold,category\nx.wav,"1,2",a\n', "x is of the part '1,2', expected a name without a comma"),
        (",dog\n", "a line has no name"),
        ("label,youtube_id,time_start,time_end,split\na,b,x,14,train\n", "is no file of labels .*could not convert"),
        ('"' + "a" * 200_000 + '",dog\n', "is no file of labels .*field larger"),
        ("x.mp4,a,b\n", r"row 1: found \['x.mp4', 'a', 'b'\], expected path,label"),
        ("x.mp4\n", r"row 1: found \['x.mp4'\], expected CLASS/name, or path,label"),
        ("filename,category\nx.wav\n", r"row 2: found \['x.wav'\], expected 2 columns"),
        (b"\xff\n", "byte 0 is no UTF-8"),
    ],
)
def test_a_file_that_says_no_labels(tmp_path, content, message):
    (tmp_path / "l.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        read_label_file(tmp_path / "l.csv")


# ---- given to a dataset

KEYS = ["dog/a", "dog/b_v2", "cat/c", "cat/d-000010000", "cat/e"]


@pytest.fixture
def dataset(tmp_path):
    """Five clips in two shards, the names of which the index does not know."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for number, keys in enumerate((KEYS[:3], KEYS[3:])):
        with webdataset.TarWriter(str(folder / f"{number}.tar"), encoder=False) as tar:
            for key in keys:
                tar.write({"__key__": key, "json": b"{}"})
    run_index(IndexConfig(str(folder), tried=0))
    return folder


def labels_of(folder):
    found = read_labels(Dataset(Store(str(folder)))).classes
    return {key: [found.names[k] for k in found[n]] for n, key in enumerate(KEYS)}


def of(classes, samples):
    return Labels(Sets.of(classes, samples), Sets.of(["p"], [[0], [], [0], [], []]))


def test_by_name_by_the_last_part_and_without_the_time_of_a_cut(dataset, tmp_path, capsys):
    (tmp_path / "l.csv").write_text("dog/a.mp4,x\nb.v2.mp4,y;x\nd.mp4,z\ne.mp4,x\ngone.mp4,x\n")
    assert cli.main(["label", str(dataset), str(tmp_path / "l.csv")]) == 0
    assert labels_of(dataset) == {
        "dog/a": ["x"],
        "dog/b_v2": ["x", "y"],
        "cat/c": [],
        "cat/d-000010000": ["z"],
        "cat/e": ["x"],
    }
    told = capsys.readouterr().out
    assert "4 of 5 clips have labels, 5 in all, of 3 classes" in told
    assert "1 clips without a label: cat/c" in told
    assert "1 names in the files that no clip has: gone" in told
    found = read_labels(Dataset(Store(str(dataset)))).classes
    assert found.counts().tolist() == [3, 1, 1]
    assert found.many_hot(np.array([1, -1, 2])).tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("rows", "both"),
    [
        ("a.mp4,x\n", "'a' may be 'dog/a' or 'cat/a'"),  # a bare name, of two clips
        ("one/dog/a.mp4,x\ntwo/dog/a.mp4,y\n", "'a' may be 'one/dog/a' or 'two/dog/a'"),  # two names, of one clip
    ],
)
def test_what_may_be_another_is_said(tmp_path, rows, both, capsys):
    with webdataset.TarWriter(str(tmp_path / "0.tar"), encoder=False) as tar:
        for key in ("dog/a", "cat/a"):
            tar.write({"__key__": key, "json": b"{}"})
    run_index(IndexConfig(str(tmp_path), tried=0))
    (tmp_path / "l.csv").write_text(rows)
    assert cli.main(["label", str(tmp_path), str(tmp_path / "l.csv")]) == 2
    assert both in capsys.readouterr().err
    (tmp_path / "l.csv").write_text("dog/a.mp4,dog\n")  # not the cat's
    assert cli.main(["label", str(tmp_path), str(tmp_path / "l.csv")]) == 0
    assert "1 clips without a label: cat/a" in capsys.readouterr().out


def test_a_head_is_no_clip_and_a_dot_no_ending(tmp_path):
    (tmp_path / "l.csv").write_text("path,label\na.1,x\na.2,y\n#20_clap.avi,z\nv1.5.mp4,x\n")
    assert labels(read_label_file(tmp_path / "l.csv")) == {"a.1": ["x"], "a.2": ["y"], "#20_clap": ["z"], "v1.5": ["x"]}
    (tmp_path / "m.csv").write_text("x.1,a\nx_1,b\n")
    with pytest.raises(ConfigError, match=r"'x\.1' and 'x_1' are names of one clip"):
        give(None, read_label_file(tmp_path / "m.csv"))


def test_folders_are_classes_and_all_classes_may_be_named(dataset, tmp_path, capsys):
    assert cli.main(["label", str(dataset), "folders"]) == 0
    assert labels_of(dataset)["cat/e"] == ["cat"]
    (tmp_path / "classes.csv").write_text('index,mid,display_name\n1,dog,"Dog, a"\n0,cow,Cow\n2,cat,Cat\n')
    assert cli.main(["label", str(dataset), "folders", "--classes", str(tmp_path / "classes.csv")]) == 0
    assert read_labels(Dataset(Store(str(dataset)))).classes.names == ["cow", "dog", "cat"]
    assert "1 classes without a clip: cow" in capsys.readouterr().out
    (tmp_path / "few.txt").write_text("dog\n")
    assert cli.main(["label", str(dataset), "folders", "--classes", str(tmp_path / "few.txt")]) == 2
    assert "labels: cat (1 in all) are not among the 1 classes; --other CLASS" in capsys.readouterr().err
    (tmp_path / "few.txt").write_text("dog\nrest\n")
    some = ["label", str(dataset), "folders", "--classes", str(tmp_path / "few.txt"), "--other"]
    assert cli.main([*some, "rest"]) == 0
    assert labels_of(dataset) == {key: ["dog" if key.startswith("dog") else "rest"] for key in KEYS}
    assert cli.main([*some, "none"]) == 2
    assert "other is 'none', expected one of the 2 classes" in capsys.readouterr().err


def test_other_is_a_class_whatever_a_name_fits(dataset, tmp_path):
    (tmp_path / "classes.txt").write_text("x\nrest\n")
    rows = "deep/dog/a.mp4,x\ndeep/dog/b.v2.mp4,y\ndeep/cat/c.mp4,z\n"
    (tmp_path / "l.csv").write_text(rows)
    typed = [
        "label",
        str(dataset),
        str(tmp_path / "l.csv"),
        "--classes",
        str(tmp_path / "classes.txt"),
        "--other",
        "rest",
    ]
    assert cli.main(typed) == 0
    assert labels_of(dataset) == {
        "dog/a": ["x"],
        "dog/b_v2": ["rest"],
        "cat/c": ["rest"],
        "cat/d-000010000": [],
        "cat/e": [],
    }


def test_parts_of_a_video_are_those_of_its_clips(dataset, tmp_path):
    (tmp_path / "held.txt").write_text("cat/d.mp4\n")
    assert cli.main(["label", str(dataset), "folders", str(tmp_path / "held.txt")]) == 0
    there = read_labels(Dataset(Store(str(dataset))))
    assert there.parts.has(["held"]).tolist() == [key == "cat/d-000010000" for key in KEYS]


def test_two_files_of_one_name(dataset, tmp_path, capsys):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "l.csv").write_text("dog/a.mp4,x\n")
    assert cli.main(["label", str(dataset), str(tmp_path / "x/l.csv"), str(tmp_path / "y/l.csv")]) == 2
    assert "expected files of different names" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_no_classes(dataset, tmp_path, capsys, content):
    (tmp_path / "none.txt").write_text(content)
    for path, said in ((tmp_path / "none.txt", "there are none, expected a name a line"), (tmp_path, "Is a directory")):
        assert cli.main(["label", str(dataset), "folders", "--classes", str(path)]) == 2
        assert said in capsys.readouterr().err


def test_lists_say_the_part_and_folders_the_class(dataset, tmp_path, capsys):
    """As Speech Commands has it: lists of what is for testing, the rest is for training."""
    (tmp_path / "testing_list.txt").write_text("dog/a.wav\n")
    assert cli.main(["label", str(dataset), "folders", str(tmp_path / "testing_list.txt")]) == 0
    assert "parts: testing_list (1)" in capsys.readouterr().out
    there = read_labels(Dataset(Store(str(dataset))))
    assert there.parts.has(["testing_list"]).tolist() == [key == "dog/a" for key in KEYS]
    assert labels_of(dataset)["dog/a"] == ["dog"]


@pytest.mark.parametrize(
    ("content", "classes"),
    [
        ("0,Purr,/m/1\n1,Water_tap_and_faucet,/m/2\n", ["Purr", "Water_tap_and_faucet"]),  # FSD50K
        ("1 ApplyEyeMakeup\n2 Archery\n", ["ApplyEyeMakeup", "Archery"]),  # UCF101
        ("0,a\n2,b\n", ["0,a", "2,b"]),
        ("1 a\n3 b\n", ["1 a", "3 b"]),
    ],
)
def test_class_files(tmp_path, content, classes):
    (tmp_path / "c.txt").write_text(content)
    assert read_classes(tmp_path / "c.txt") == classes


def test_balancing_weights_are_those_of_the_released_program():
    found = of(["a", "b", "c"], [[0], [0, 1], [0], [2], []])
    among = np.array([True, True, True, True, True])
    often = found.balanced(among)
    plain = np.array([1000 / 3.01, 1000 / 3.01 + 1000 / 1.01, 1000 / 3.01, 1000 / 1.01, 0])
    assert often == pytest.approx(plain / plain.sum() * 5)
    among[3] = False
    plain = plain * among
    assert found.balanced(among) == pytest.approx(plain / plain.sum() * 4)
    among = np.array([False, True, True, True, True])  # of a class that others have, too
    plain = np.array([0, 1000 / 2.01 + 1000 / 1.01, 1000 / 2.01, 1000 / 1.01, 0])
    assert found.balanced(among) == pytest.approx(plain / plain.sum() * 4)


def test_names_of_other_clips_are_said(dataset, tmp_path, capsys):
    (tmp_path / "l.csv").write_text("q.mp4,x\n")
    assert cli.main(["label", str(dataset), str(tmp_path / "l.csv")]) == 2
    assert "none of 1 names, such as 'q', is that of a clip, such as 'dog/a'" in capsys.readouterr().err
    assert not (dataset / "labels").exists()


def test_labels_of_other_shards_or_damaged_ones_are_refused(dataset):
    opened = Dataset(Store(str(dataset)))
    with pytest.raises(NoDataset, match="has no labels; `equiav label`"):
        read_labels(opened)
    right = of(["a", "b"], [[0], [1, 0], [], [1], [0]])
    write_labels(opened.store, opened.fingerprint, right)
    there = read_labels(opened)
    assert there.classes[1].tolist() == [0, 1]
    assert there.parts.has(["p"]).tolist() == [True, False, True, False, False]
    path = dataset / "labels"
    content = path.read_bytes()
    for wrong in (
        content[:-2],
        content.replace(b"\n0 1|\n", b"\n0 0|\n"),
        content + b"\n",
        b"",
        b"[]\n",
        b"{}\n",
        b"[" * 100_000,
    ):
        path.write_bytes(wrong)
        with pytest.raises(DatasetError, match="labels is damaged"):
            read_labels(opened)
    head = json.loads(content.partition(b"\n")[0])
    for lines, classes in [  # with a checksum that fits
        (b"0|\nx|\n|\n1|\n0|\n", ["a", "b"]),
        (b"0|\n99999999999999999999|\n|\n1|\n0|\n", ["a", "b"]),
        (b"0|\n1|\n|\n1|\n0|\n", "ab"),
        (b"0|\n1|\n|\n1|\n0|\n", ["a", "a"]),
        (b"0|\n1|\n|\n1|1\n0|\n", ["a", "b"]),
        (b"0|\n1|\n\n1|\n0|\n", ["a", "b"]),
    ]:
        forged = {**head, "classes": classes, "checksum": hashlib.sha256(lines).hexdigest()}
        path.write_bytes(json.dumps(forged).encode() + b"\n" + lines)
        with pytest.raises(DatasetError, match="labels is damaged"):
            read_labels(opened)
    write_labels(opened.store, "another", right)
    with pytest.raises(DatasetError, match="was made for other shards"):
        read_labels(opened)
    write_labels(opened.store, opened.fingerprint, of(["a"], [[0], [3], [], [], []]))
    with pytest.raises(DatasetError, match="labels is damaged"):
        read_labels(opened)
