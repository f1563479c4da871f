"""Images in tar files: every one is found where it is, with its label, whoever wrote the tar."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastproto.train.data import Streamed, load

Members = list[tuple[str, bytes]]


def png(seed: int, side: int = 8) -> tuple[np.ndarray, bytes]:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return pixels, file.getvalue()


def write_tar(path: Path, members: Members, style: int = tarfile.PAX_FORMAT, mtime: float = 0) -> None:
    with tarfile.open(path, "w", format=style) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), mtime  # type: ignore[assignment]
            tar.addfile(info, io.BytesIO(content))


def members(labels: list[int | None], seed: int = 0) -> tuple[list[np.ndarray], Members]:
    """Images with their labels as WebDataset has them, other things between."""
    pixels, found = [], []
    for i, label in enumerate(labels):
        image, content = png(seed + i)
        pixels.append(image)
        found += [(f"{seed + i:06}.json", b"{}"), (f"{seed + i:06}.png", content), (f"{seed + i:06}.seg.png", b"mask")]
        found += [] if label is None else [(f"{seed + i:06}.cls", str(label).encode())]
    return pixels, found


def test_every_fifth_labelled_image_is_for_testing(tmp_path: Path) -> None:
    labels = [[0, 1, None, 2, 0, 1], [2, None, 1, 0, 3, 1, 2]]
    pixels = []
    for number, part in enumerate(labels):
        images, content = members(part, 100 * number)
        write_tar(tmp_path / f"x-{number:03}.tar", content)
        pixels += images
    for workers in (0, 2):
        data = load(f"shards:{tmp_path}/x-{{000..001}}.tar", image_size=8, workers=workers)
        # Of the eleven with a label the fifth and the tenth, counted over both shards.
        assert data.train_labels.tolist() == [0, 1, -1, 2, 0, 2, -1, 1, 0, 3, 2]
        assert data.test_labels.tolist() == [1, 1]
        assert data.classes == ("0", "1", "2", "3")
        train = [pixels[i] for i in (0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12)]
        assert np.array_equal(data.train_images.permute(0, 2, 3, 1).numpy(), np.stack(train))
        assert np.array_equal(data.test_images.permute(0, 2, 3, 1).numpy(), np.stack([pixels[5], pixels[11]]))


def test_shards_are_known_again_wherever_they_lie(tmp_path: Path) -> None:
    def digest(folder: str, labels: list[int | None]) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        write_tar(tmp_path / folder / "x.tar", members(labels)[1])
        return load(f"shards:{tmp_path / folder}/x.tar", image_size=8).digest

    before = digest("here", [0, 1, 2, 0, 1, 2])
    assert digest("there", [0, 1, 2, 0, 1, 2]) == before
    assert digest("there", [0, 1, 2, 1, 0, 2]) != before
    assert digest("there", [0, 1, 2, 0, 1, 2, 0]) != before


def test_shards_for_testing_have_a_pattern_of_their_own(tmp_path: Path) -> None:
    _, train = members([0, 1, None])
    pixels, test = members([1, 4], 50)
    write_tar(tmp_path / "train.tar", train)
    write_tar(tmp_path / "val.tar", test)
    data = load(f"shards:{tmp_path}/train.tar", test_shards=f"{tmp_path}/val.tar", image_size=8)
    assert data.train_labels.tolist() == [0, 1, -1]
    assert data.test_labels.tolist() == [1, 4]
    assert len(data.classes) == 5
    assert np.array_equal(data.test_images[1].permute(1, 2, 0).numpy(), pixels[1])


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar_is_read(tmp_path: Path, style: int) -> None:
    """Names that fit in no header, times with fractions as WebDataset writes them, names that are not ASCII."""
    long = "a/" + "folder" * 15 + ("/" if style == tarfile.USTAR_FORMAT else "x" * 160) + "name"
    names = ["plain", long, "./here/k", "größe" if style != tarfile.USTAR_FORMAT else "other"]
    pixels, content = [], []
    for seed, name in enumerate(names * 3):
        image, encoded = png(seed)
        pixels.append(image)
        content += [(f"{name}{seed}.PNG", encoded), (f"{name}{seed}.cls", b"%d" % seed)]
    write_tar(tmp_path / "x.tar", content, style, mtime=1234.5 if style == tarfile.PAX_FORMAT else 0)
    data = load(f"shards:{tmp_path}/x.tar", image_size=8)
    assert data.train_labels.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 10, 11]
    assert data.test_labels.tolist() == [4, 9]
    for image, label in zip(data.train_images, data.train_labels.tolist(), strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels[label])


@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE], ids=["folder", "link", "symlink"])
@pytest.mark.parametrize("size", [5, 2048])
def test_folders_and_links_have_no_content_whatever_their_size(tmp_path: Path, kind: bytes, size: int) -> None:
    """As the standard library reads them. Two kilobytes are an image and its label, which were passed over."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for seed in range(5):
            empty = tarfile.TarInfo(f"other{seed}")
            empty.type, empty.size, empty.linkname = kind, size, "0.png"
            tar.addfile(empty)
            for name, content in ((f"{seed}.png", png(seed)[1]), (f"{seed}.cls", b"%d" % seed)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    data = load(f"shards:{tmp_path}/x.tar", image_size=8)
    assert [*data.train_labels.tolist(), *data.test_labels.tolist()] == [0, 1, 2, 3, 4]


def test_labels_are_known_in_capitals_too(tmp_path: Path) -> None:
    """As images are, and as WebDataset reads them."""
    content = [member for seed in range(5) for member in ((f"{seed}.PNG", png(seed)[1]), (f"{seed}.CLS", b"%d" % seed))]
    write_tar(tmp_path / "x.tar", content)
    data = load(f"shards:{tmp_path}/x.tar", image_size=8)
    assert [*data.train_labels.tolist(), *data.test_labels.tolist()] == [0, 1, 2, 3, 4]


def test_a_tar_of_a_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "set" / "sub").mkdir(parents=True)
    pixels = []
    for seed in range(5):
        image, content = png(seed)
        pixels.append(image)
        (tmp_path / "set" / "sub" / f"{seed}.png").write_bytes(content)
        (tmp_path / "set" / "sub" / f"{seed}.cls").write_text(f"{seed}\n")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "set", "set")
    data = load(f"shards:{tmp_path}/*.tar", image_size=8)
    images = torch.cat([data.train_images, data.test_images]).permute(0, 2, 3, 1).numpy()
    for image, label in zip(images, [*data.train_labels.tolist(), *data.test_labels.tolist()], strict=True):
        assert np.array_equal(image, pixels[label])


def test_patterns(tmp_path: Path) -> None:
    for number, name in enumerate(("a-08", "a-09", "a-10", "b-09", "c-8", "c-9", "c-10")):
        write_tar(tmp_path / f"{name}.tar", members([number] * 5, 10 * number)[1])
    for pattern, labels in (
        ("a-{08..10}.tar", [0, 1, 2]),
        ("a-{10..08}.tar", [2, 1, 0]),
        ("c-{10..8}.tar", [6, 5, 4]),
        ("{b,a}-09.tar", [3, 1]),
        ("a-*.tar", [0, 1, 2]),
        ("?-{09,08}.tar", [1, 3, 0]),
    ):
        data = load(f"shards:{tmp_path}/{pattern}", image_size=8)
        assert data.train_labels.tolist() == [label for label in labels for _ in range(4)]
    (tmp_path / "[new] set").mkdir()
    write_tar(tmp_path / "[new] set" / "0.tar", members([7] * 5)[1])
    assert load(f"shards:{tmp_path}/[new] set/{{0..0}}.tar", image_size=8).train_labels.tolist() == [7] * 4
    with pytest.raises(ValueError, match=r"load: shards expected braces one after the other, got \{a-\{08,10\},b-09\}"):
        load("shards:{a-{08,10},b-09}.tar")


def test_broken_images_are_named_by_shard_and_member(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, content = members([0, 1, 0, 1, 0])
    content = [(name, data[:60] if name == "000001.png" else data) for name, data in content]
    write_tar(tmp_path / "x.tar", content)
    data = load(f"shards:{tmp_path}/x.tar", image_size=8, resident=False)
    assert isinstance(data.train_images, Streamed)
    assert data.train_images[torch.tensor([0, 1])].shape == (2, 3, 8, 8)
    assert f"skipped: {tmp_path}/x.tar, 000001.png: cannot be read" in caplog.text
    with pytest.raises(ValueError, match=r"data: expected images that decode, got .*x\.tar, 000001\.png: cannot be"):
        load(f"shards:{tmp_path}/x.tar", image_size=8, strict=True)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_shards_cut_between_members_are_named_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int, resident: bool
) -> None:
    """They lack the zeros that end a tar; of a tar that has them, nothing after them counts."""
    content = members([0] * 5)[1]
    write_tar(tmp_path / "a.tar", content)
    write_tar(tmp_path / "x.tar", content)
    with tarfile.open(tmp_path / "x.tar") as tar:
        last = tar.getmembers()[-4]  # 000004.json
    whole = (tmp_path / "x.tar").read_bytes()
    options = {"image_size": 8, "workers": workers, "resident": resident}
    for ending, skipped in ((b"", 2), (b"\0" * 512, 0), (b"\0" * 1024 + b"more", 0)):
        caplog.clear()
        (tmp_path / "x.tar").write_bytes(whole[: last.offset] + ending)
        pattern = f"{tmp_path}/{{x,a,x}}.tar"
        data = load(f"shards:{pattern}", **options)
        assert len(data.train_labels) + len(data.test_labels) == 4 + 5 + 4
        assert data.skipped == skipped
        assert [record.message for record in caplog.records] == skipped * [
            f"skipped: what {tmp_path}/x.tar may have held: it has no end-of-archive mark at its byte {last.offset}"
        ]
    (tmp_path / "x.tar").write_bytes(whole[: last.offset])
    for pattern, test_shards in (("{a,x}.tar", None), ("a.tar", f"{tmp_path}/x.tar")):
        with pytest.raises(ValueError, match=r"load: shards expected whole tar files, got .*x.tar without its end-of"):
            load(f"shards:{tmp_path}/{pattern}", test_shards=test_shards, strict=True, **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "tar files, got nothing at .*x.tar"),
        (b"", "images, got none in .*x.tar"),
        (b"no tar" * 200, "plain tar files of KEY.jpg and KEY.cls, got .*x.tar: no header at byte 0"),
        ("gzip", "plain tar files of KEY.jpg and KEY.cls, got .*x.tar: no header at byte 0"),
        ("cut", "plain tar files .*, got .*x.tar: cut short at byte 1500"),
        ("padding", "plain tar files .*, got .*x.tar: cut short at byte 700"),
        ("huge", "plain tar files .*, got .*x.tar: 000000.cls holds '99999999999'"),
        ("label", "plain tar files .*, got .*x.tar: 000000.cls holds '-3'"),
        ("word", "plain tar files .*, got .*x.tar: 000000.cls holds 'cat'"),
        ("few", "at least 5 images with a label, got 4 in .*x.tar"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_no_shard_is_refused(tmp_path: Path, content: bytes | str | None, message: str, workers: int) -> None:
    path = tmp_path / "x.tar"
    write_tar(tmp_path / "a.tar", members([0] * 5)[1])
    if content == "few":
        write_tar(path, members([0, 0, None, None, 0, 0])[1])
        (tmp_path / "a.tar").unlink()
    elif content == "label":
        write_tar(path, members([-3] * 5)[1])
    elif content == "huge":
        write_tar(path, members([99_999_999_999] * 5)[1])
    elif content == "word":
        write_tar(path, [("000000.cls", b"cat")])
    elif content == "cut":
        path.write_bytes((tmp_path / "a.tar").read_bytes()[:1500])
    elif content == "padding":
        path.write_bytes((tmp_path / "a.tar").read_bytes()[:700])
    elif content == "gzip":
        path.write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    elif isinstance(content, bytes):
        path.write_bytes(content)
    if content == b"":
        (tmp_path / "a.tar").unlink()
    pattern = f"{tmp_path}/{{a,x}}.tar" if (tmp_path / "a.tar").exists() else str(path)
    with pytest.raises(ValueError, match=f"load: shards expected {message}"):
        load(f"shards:{pattern}", image_size=8, workers=workers)


def test_labels_are_needed_somewhere(tmp_path: Path) -> None:
    write_tar(tmp_path / "none.tar", members([None] * 5)[1])
    write_tar(tmp_path / "all.tar", members([0] * 5)[1])
    for train, test, message in (
        ("none", "all", "shards expected images with a label, KEY.cls, got none in"),
        ("all", "none", "test_shards expected a label for every image, got fewer in"),
    ):
        with pytest.raises(ValueError, match=message):
            load(f"shards:{tmp_path}/{train}.tar", test_shards=f"{tmp_path}/{test}.tar")
