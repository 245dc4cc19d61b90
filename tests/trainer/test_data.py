"""Reading the three layouts, and saying clearly what is wrong with a data set."""

import logging
from pathlib import Path

import numpy as np
import pytest
from nearkin_trainer.data import read_data
from nearkin_trainer.data.values import JUNK, NO_CAMERA
from PIL import Image

from tests.trainer.pictures import draw, write_csv, write_csv_set


def _touch(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(0, 0).save(path)
    return path.name


def _row(folder: Path, label: str, name: str, split: str = "train", **more: str) -> dict[str, str]:
    _touch(folder / name)
    return {"label": label, "path": name, "split": split, "is_query": "", "is_gallery": "", **more}


def _train_rows(folder: Path) -> list[dict[str, str]]:
    return [_row(folder, label, f"t{label}{i}.png") for label in "ab" for i in range(2)]


def test_csv_round_trip(tmp_path: Path) -> None:
    data = read_data(write_csv_set(tmp_path, train_classes=3, validation_classes=2, images=3, cameras=True))
    assert data.classes == ("class 0", "class 1", "class 2")
    assert data.validation_classes == ("class 3", "class 4")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data.query.labels.tolist() == [0, 1]
    assert data.gallery.labels.tolist() == [0, 0, 1, 1]
    assert data.gallery.cameras.tolist() == [1, 2, 1, 2]
    assert all(path.is_file() for path in data.train.paths)


def test_a_folder_with_one_csv_is_that_csv(tmp_path: Path) -> None:
    write_csv_set(tmp_path)
    assert len(read_data(tmp_path).classes) == 12


@pytest.mark.parametrize(
    ("yes", "no"), [("1", "0"), ("true", "false"), ("True", "False"), ("1.0", ""), ("YES", "no")]
)
def test_flags_are_understood(tmp_path: Path, yes: str, no: str) -> None:
    rows = _train_rows(tmp_path)
    rows.append(_row(tmp_path, "x", "q.png", "validation", is_query=yes, is_gallery=no))
    rows.append(_row(tmp_path, "x", "g.png", "validation", is_query=no, is_gallery=yes))
    data = read_data(write_csv(tmp_path / "d.csv", rows))
    assert [p.name for p in data.query.paths] == ["q.png"]
    assert [p.name for p in data.gallery.paths] == ["g.png"]


def test_an_image_may_be_both_query_and_gallery(tmp_path: Path) -> None:
    rows = _train_rows(tmp_path)
    rows += [_row(tmp_path, "x", f"{i}.png", "validation", is_query="1", is_gallery="1") for i in range(3)]
    data = read_data(write_csv(tmp_path / "d.csv", rows))
    assert len(data.query) == len(data.gallery) == 3


def test_without_flags_one_image_of_each_class_asks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = _train_rows(tmp_path)
    rows += [_row(tmp_path, "x", f"x{i}.png", "validation", camera="12"[i > 0]) for i in range(3)]
    rows += [_row(tmp_path, "alone", "alone.png", "validation", camera="1")]
    for row in rows:
        row.setdefault("camera", "")
    with caplog.at_level(logging.INFO, "nearkin"):
        data = read_data(write_csv(tmp_path / "d.csv", rows))
    assert [p.name for p in data.query.paths] == ["x0.png"]
    assert [p.name for p in data.gallery.paths] == ["x1.png", "x2.png", "alone.png"]
    assert "one image of each class is a query" in caplog.text


def test_columns_for_flags_and_camera_may_be_missing(tmp_path: Path) -> None:
    rows = [{k: r[k] for k in ("label", "path", "split")} for r in _train_rows(tmp_path)]
    data = read_data(write_csv(tmp_path / "d.csv", rows))
    assert len(data.query) == len(data.gallery) == 0
    assert (data.train.cameras == NO_CAMERA).all()


def test_byte_order_mark_and_spaces(tmp_path: Path) -> None:
    for name in "ab":
        _touch(tmp_path / f"{name}.png")
    text = "label, path, split, is_query, is_gallery\n x, a.png, train, ,\n y y, b.png, Train, 0, 0\n"
    (tmp_path / "d.csv").write_text(text, encoding="utf-8-sig")
    assert read_data(tmp_path / "d.csv").classes == ("x", "y y")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "test"}, r"line 2: split='test'"),
        ({"is_query": "maybe"}, r"line 2: is_query='maybe'"),
        ({"label": ""}, r"line 2: label is empty"),
        ({"path": " "}, r"line 2: path is empty"),
        ({"path": "gone.png"}, r"1 of 4 images do not exist: .*gone\.png"),
        ({"path": "long" * 1000}, r"1 of 4 images do not exist: .*longlong"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, change: dict[str, str], message: str) -> None:
    rows = _train_rows(tmp_path)
    rows[0] = {**rows[0], **change}
    with pytest.raises(ValueError, match=message):
        read_data(write_csv(tmp_path / "d.csv", rows))


def test_missing_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("label,file\na,b\n")
    with pytest.raises(ValueError, match="no column path, split, only label, file"):
        read_data(tmp_path / "d.csv")


def test_spaces_around_column_names(tmp_path: Path) -> None:
    _touch(tmp_path / "a.png")
    _touch(tmp_path / "b.png")
    (tmp_path / "d.csv").write_text("label , path, split\na, a.png , train\nb, b.png, train\n")
    assert read_data(tmp_path / "d.csv").classes == ("a", "b")


def test_a_column_that_is_there_twice_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("label,path,label,split\na,a.png,b,train\n")
    with pytest.raises(ValueError, match=r"d\.csv: two columns are called label"):
        read_data(tmp_path / "d.csv")


def test_a_comma_that_is_not_quoted_is_named(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        _touch(tmp_path / name)
    head = "label,path,split,camera\n"
    (tmp_path / "d.csv").write_text(head + "a,a.png,train,1\nb,b.png,train,hall, left\n")
    with pytest.raises(ValueError, match=r"line 3: .*'left'.* quotes"):
        read_data(tmp_path / "d.csv")
    (tmp_path / "d.csv").write_text(head + "a,a.png,train,1,\nb,b.png,train,2,\n")
    assert read_data(tmp_path / "d.csv").classes == ("a", "b")


@pytest.mark.parametrize(
    "content",
    ["é".encode("latin-1"), b"\x89PNG", b"a" * 200_000],
    ids=["latin-1", "png", "a field without end"],
)
def test_what_is_no_csv_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.csv").write_bytes(b"label,path,split,is_query,is_gallery\n" + content)
    with pytest.raises(ValueError, match=r"d\.csv cannot be read as a CSV file; it must be text in UTF-8"):
        read_data(tmp_path / "d.csv")


def test_one_class_is_too_few(tmp_path: Path) -> None:
    rows = [row for row in _train_rows(tmp_path) if row["label"] == "a"]
    with pytest.raises(ValueError, match="1 classes; at least 2"):
        read_data(write_csv(tmp_path / "d.csv", rows))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        read_data(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected a CSV file, one folder per class"):
        read_data(tmp_path)
    with pytest.raises(ValueError, match=r"data=longlong.* cannot be read: .*File name too long"):
        read_data(Path("long" * 1000))


def test_class_folders_are_split_by_class(tmp_path: Path) -> None:
    for label in range(10):
        for i in range(3):
            _touch(tmp_path / f"c{label}" / f"{i}.png")
    (tmp_path / "c0" / "notes.txt").write_text("not an image")
    data = read_data(tmp_path, validation_share=0.3)
    assert len(data.classes) == 7
    assert not set(data.classes) & set(data.validation_classes)
    assert len(data.query) == 3
    assert len(data.gallery) == 6
    assert data.classes == read_data(tmp_path, validation_share=0.3).classes


def test_class_folders_with_a_split(tmp_path: Path) -> None:
    for split, labels in (("train", "abc"), ("val", "de")):
        for label in labels:
            for i in range(2):
                _touch(tmp_path / split / label / f"{i}.png")
    data = read_data(tmp_path)
    assert data.classes == ("a", "b", "c")
    assert data.validation_classes == ("d", "e")


def test_market_layout(tmp_path: Path) -> None:
    names = {
        "bounding_box_train": [
            "0002_c1s1_000451_03.jpg",
            "0002_c2s1_000776_01.jpg",
            "0007_c3s3_077419_03.jpg",
        ],
        "query": ["0001_c1s1_001051_00.jpg"],
        "bounding_box_test": ["-1_c1s1_000401_03.jpg", "0000_c1s1_000151_01.jpg", "0001_c6s1_000100_02.jpg"],
    }
    for folder, files in names.items():
        for name in files:
            _touch(tmp_path / folder / name)
    (tmp_path / "query" / "Thumbs.db").write_text("")
    data = read_data(tmp_path)
    assert data.classes == ("0002", "0007")
    assert data.train.cameras.tolist() == [1, 2, 3]
    assert data.gallery.labels[0] == JUNK
    assert data.gallery.labels[2] == data.query.labels[0] != data.gallery.labels[1]
    _touch(tmp_path / "query" / "portrait.jpg")
    with pytest.raises(ValueError, match=r"portrait\.jpg: expected a name like"):
        read_data(tmp_path)


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    """Other systems leave some beside the images that they copy."""
    for name in "abcde":
        _touch(tmp_path / "folders" / name / "1.png")
        (tmp_path / "folders" / name / "._1.png").write_bytes(b"\0\5\x16\7")
    data = read_data(tmp_path / "folders")
    assert {path.name for path in (*data.train.paths, *data.gallery.paths)} == {"1.png"}
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        for name in ("0002_c1s1_000451_03.jpg", "0003_c2s1_000776_01.jpg"):
            _touch(tmp_path / "market" / folder / name)
            (tmp_path / "market" / folder / f"._{name}").write_bytes(b"\0\5\x16\7")
    assert len(read_data(tmp_path / "market").train) == 2


def test_junk_is_no_class_to_train(tmp_path: Path) -> None:
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        for name in ("-1_c1s1_000001_00.jpg", "0002_c1s1_000451_03.jpg", "0003_c2s1_000776_01.jpg"):
            _touch(tmp_path / folder / name)
    data = read_data(tmp_path)
    assert data.classes == ("0002", "0003")
    assert data.train.labels.tolist() == [0, 1]
    assert data.train.cameras.tolist() == [1, 2]


def test_which_of_several_csv_files_is_asked(tmp_path: Path) -> None:
    for name in ("faces.csv", "animals.csv"):
        (tmp_path / name).touch()
    _touch(tmp_path / "images" / "1.png")
    with pytest.raises(ValueError, match=r"2 CSV files \(.*animals\.csv, .*faces\.csv\): name one"):
        read_data(tmp_path)


def test_a_share_that_leaves_no_classes_is_named(tmp_path: Path) -> None:
    for name in "abc":
        _touch(tmp_path / name / "1.png")
    with pytest.raises(ValueError, match=r"validation-share=0\.9 .*3 .* of the 3 classes"):
        read_data(tmp_path, validation_share=0.9)


def test_numbers_as_labels_are_names(tmp_path: Path) -> None:
    rows = [_row(tmp_path, str(n), f"{n}.png") for n in (10, 9, 2)]
    assert read_data(write_csv(tmp_path / "d.csv", rows)).classes == ("10", "2", "9")
    assert np.asarray(Image.open(tmp_path / "9.png")).shape == (24, 28, 3)


def test_an_image_of_two_classes_is_named(tmp_path: Path) -> None:
    rows = _train_rows(tmp_path)
    rows.append({**rows[0], "label": rows[-1]["label"]})
    with pytest.raises(ValueError, match=rf"{rows[0]['path']} is a training image of two classes, .* once"):
        read_data(write_csv(tmp_path / "d.csv", rows))


def test_images_that_are_named_twice_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rows may be repeated on purpose; and one may be a query in one row, and of the gallery in another."""
    rows = _train_rows(tmp_path)
    rows += [_row(tmp_path, "x", "x.png", "validation", is_query="1", is_gallery="0")]
    rows += [_row(tmp_path, "x", "x.png", "validation", is_query="0", is_gallery="1")]
    read_data(write_csv(tmp_path / "d.csv", rows))
    assert not caplog.messages
    rows += [rows[0], rows[-1], {**rows[1], "split": "validation", "is_gallery": "1"}]
    data = read_data(write_csv(tmp_path / "d.csv", rows))
    assert len(data.train) == len(_train_rows(tmp_path)) + 1
    assert [message.partition(":")[0] for message in caplog.messages] == [
        "1 training images are named more than once, and count as often",
        "1 gallery images are named more than once, and count as often",
        "1 validation images are trained on, too",
    ]
