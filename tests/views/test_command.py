"""fastproto views: every kind of image, whose box, what is drawn, what it refuses, and Ctrl-C."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import fastproto.views
from fastproto import cli
from fastproto.views import SIMC_BOX, ContrastiveCrop, command, crop_resize, localize, sample_crops
from fastproto.views.command import ALPHAS, EPOCHS, MAX_IMAGES, Locator
from fastproto.views.files import read_image
from fastproto.views.picture import Row, draw

Image = pytest.importorskip("PIL.Image")


def photograph(path: Path, height: int = 60, width: int = 80) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def views(*arguments: object) -> int:
    return cli.main(["views", *map(str, arguments)])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err.rstrip("\n").removeprefix("fastproto views: ")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """The rows that would be drawn, and spares the test the time to draw."""
    found: list[Row] = []
    monkeypatch.setattr(command.picture, "draw", lambda file, kind, rows, alpha: found.extend(rows))
    return found


def test_images_of_any_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    colour = Image.open(photograph(tmp_path / "rgb.png"))
    paths = [tmp_path / "rgb.png"]
    for mode, suffix in (("L", "png"), ("LA", "png"), ("RGBA", "webp"), ("P", "gif"), ("CMYK", "jpg"), ("1", "tif")):
        paths.append(tmp_path / f"{mode}.{suffix}")
        colour.convert(mode).save(paths[-1])
    exif = Image.Exif()
    exif[0x0112] = 6
    paths.append(tmp_path / "turned.jpg")
    colour.save(paths[-1], exif=exif)
    paths.append(tmp_path / "deep.png")
    Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80) * 13).save(paths[-1])
    colour.close()
    for name, height, width in (("点.png", 1, 1), ("strip.png", 1, 4000), ("tall.png", 4000, 1)):
        paths.append(photograph(tmp_path / name, height, width))
    out = tmp_path / "out.png"
    assert views(*paths, "--out", out, "--size", 32) == 0
    lines = capsys.readouterr().out.splitlines()
    sizes = ["80 x 60"] * 7 + ["60 x 80", "80 x 60", "1 x 1", "4000 x 1", "1 x 4000"]
    expected = [f"{path}: {size}, box 0.000 0.000 1.000 1.000" for path, size in zip(paths, sizes, strict=True)]
    assert lines == [*expected, f"written {out}"]
    with Image.open(out) as picture:
        assert picture.width < 2000
        assert picture.height < 4000


@pytest.mark.parametrize("name", ["日本.png", "\udcff.png"])
def test_a_name_that_the_terminal_cannot_show_is_escaped(
    tmp_path: Path, drawn: list[Row], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    photograph(tmp_path / "x.png").rename(tmp_path / name)
    assert views(tmp_path / name, "--out", tmp_path / "out.png") == 0
    escaped = name.encode("ascii", "backslashreplace")
    assert escaped + b": 80 x 60, box 0.000 0.000 1.000 1.000\n" in shown.getvalue()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".pdf", ".svg", ".PNG"])
def test_every_format(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"out{suffix}"
    assert views(photograph(tmp_path / "x.png"), "--out", out, "--size", 16) == 0
    start = {".png": b"\x89PNG", ".jpg": b"\xff\xd8", ".pdf": b"%PDF", ".svg": b"<?xml"}[suffix.lower()]
    assert out.read_bytes().startswith(start)
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, "x.png"]


def test_options_reach_the_views(tmp_path: Path, drawn: list[Row]) -> None:
    paths = [photograph(tmp_path / name) for name in ("a.png", "b.png")]
    given = "--size 20 --scale 0.1 0.3 --ratio 0.5 2 --alpha 0.3 --augment moco --views 3 --seed 7 --epoch 5"
    assert views(*paths, "--out", tmp_path / "out.png", *given.split(), "--box", 0.1, 0.2, 0.7, 0.9) == 0
    box = (0.1, 0.2, 0.7, 0.9)
    shape = {"scale": (0.1, 0.3), "ratio": (0.5, 2.0), "seed": 7}
    crop = ContrastiveCrop(20, alpha=0.3, augment="moco", views=3, **shape)
    for number, row in enumerate(drawn):
        ids, image = torch.tensor([number]), read_image(paths[number])
        assert row.name == f"{tmp_path.name}/{paths[number].name}"
        assert tuple(row.box) == box
        assert torch.equal(row.image, image)
        assert list(row.crops) == list(row.views) == [5, 6, 7]
        for epoch in row.crops:
            expected = sample_crops(ids, (60, 80), boxes=box, alpha=0.3, views=3, epoch=epoch, **shape)
            assert torch.equal(row.crops[epoch], expected)
            assert torch.equal(row.views[epoch], torch.cat(crop(image[None], ids, box, epoch)))
        assert list(row.centres) == list(ALPHAS)
    # Centres lie in the box, nearer its edge for a smaller alpha.
    low, high = torch.tensor([6.0, 16.0]) - 1, torch.tensor([42.0, 72.0]) + 1
    spread = []
    for centres in drawn[0].centres.values():
        assert bool(((centres >= low) & (centres <= high)).all())
        spread.append(float(centres.std(0).sum()))
    assert spread == sorted(spread)


def test_defaults_and_the_box_of_simccrop(tmp_path: Path, drawn: list[Row]) -> None:
    path = photograph(tmp_path / "x.png")
    assert views(path, "--out", tmp_path / "out.png") == 0
    assert views(path, "--out", tmp_path / "out.png", "--overwrite", "--simc") == 0
    plain, simc = drawn
    assert (plain.box, simc.box) == ((0.0, 0.0, 1.0, 1.0), SIMC_BOX)
    assert list(plain.views) == list(range(EPOCHS))
    expected = torch.cat(ContrastiveCrop(224)(read_image(path)[None], torch.tensor([0])))
    assert torch.equal(plain.views[0], expected)


def test_boxes_are_found_as_the_trainer_finds_them(tmp_path: Path, drawn: list[Row]) -> None:
    """On an image of the size it trains on: the very box of the loop, with the options of the run."""
    pytest.importorskip("jsonargparse")
    from fastproto.train import loop
    from fastproto.train.run import load_run

    images = tmp_path / "images"
    draw_pixels = np.random.default_rng(0)
    for label in ("dark", "light"):
        (images / label).mkdir(parents=True)
        for number in range(10):
            pixels = draw_pixels.integers(0, 256, (18, 18, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / label / f"{number}.png")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        f"{{method: simclr, data: 'imagefolder:{images}', image_size: 18, epochs: 1, batch_size: 8, device: cpu,\n"
        "crop: contrastive, encoder: {name: resnet-tiny, width: 8},\n"
        "views: {size: 12, alpha: 0.3, scale: [0.3, 0.9], box_threshold: 0.8, blur: [1.0, 0.1], solarize: [0.0, 0.2]}}"
    )
    assert cli.main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 0
    run = load_run(tmp_path / "run")
    boxes = loop.find_boxes(run.config, run.method, run.dataset, torch.device("cpu"))
    assert len({tuple(box) for box in boxes[:4].tolist()}) > 1
    images.rename(tmp_path / "moved")  # the run's data are not needed
    paths = [tmp_path / "moved" / "dark" / f"{number}.png" for number in range(4)]
    assert views(*paths, "--out", tmp_path / "out.png", "--run", tmp_path / "run", "--size", 10) == 0
    for row, box in zip(drawn, boxes.tolist(), strict=False):
        assert list(row.box) == box
    made = {"alpha": 0.3, "scale": (0.3, 0.9), "jitter": run.views.jitter}
    for asked, options in (
        ([], {"augment": run.views.augment, "blur": (1.0, 0.1), "solarize": (0.0, 0.2)}),
        (["--views", 1], {"augment": run.views.augment, "blur": 1.0}),
        (["--views", 3], {"augment": run.views.augment, "blur": (1.0, 0.1, 1.0), "solarize": (0.0, 0.2, 0.0)}),
        (["--augment", "none"], {"augment": "none"}),
    ):
        del drawn[:]
        out = ["--out", tmp_path / "out.png", "--overwrite"]
        assert views(*paths, *out, "--run", tmp_path / "run", "--size", 10, *asked) == 0
        crop = ContrastiveCrop(10, views=asked[1] if "--views" in asked else 2, **made, **options)
        expected = torch.cat(crop(read_image(paths[1])[None], torch.tensor([1]), drawn[1].box))
        assert torch.equal(drawn[1].views[0], expected)


def test_the_locator_looks_at_the_whole_image(tmp_path: Path) -> None:
    """Warm where the image is bright, whatever its shape."""
    image = torch.zeros(3, 40, 100, dtype=torch.uint8)
    image[:, 10:30, 50:75] = 255
    locator = Locator(lambda x: x, (16, 20), (0.5,) * 3, (0.2,) * 3, 0.5)
    box = locator(image)
    assert box == pytest.approx((0.25, 0.5, 0.75, 0.75), abs=0.07)
    whole = crop_resize(image[None], torch.tensor([[0, 0, 40, 100]], dtype=torch.int32), (16, 20))
    assert list(box) == localize(whole, 0.5).tolist()[0]


def test_what_is_drawn(tmp_path: Path) -> None:
    """A red image with black views: each part of the picture shows what it should, in its place."""
    image = torch.zeros(3, 50, 50, dtype=torch.uint8)
    image[0] = 255
    crops = {epoch: torch.tensor([[5, 5, 20, 20]] * 2, dtype=torch.int32) for epoch in range(3)}
    blue = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(2, 3, 8, 8)
    centres = {alpha: torch.full((10, 2), 25.0, dtype=torch.float64) for alpha in ALPHAS}
    row = Row("a$^$.png", image, (0.2, 0.2, 0.8, 0.8), crops, dict.fromkeys(range(3), blue), centres)
    out = tmp_path / "x.png"
    with open(out, "wb") as file:
        draw(file, "png", [row], alpha=0.6)
    with Image.open(out) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    red, blue_ink = (pixels == (255, 0, 0)).all(2), (pixels == (0, 0, 255)).all(2)
    dark = (pixels == (68, 1, 84)).all(2)  # the least of viridis
    columns = [np.flatnonzero(ink.any(0)) for ink in (red, blue_ink, dark)]
    # From left to right the image, the views, the maps, and nothing of one over another.
    assert columns[0].max() < columns[1].min()
    assert columns[1].max() < columns[2].min()
    assert red.sum() > 0.5 * 260**2
    assert blue_ink.sum() > 0.8 * 6 * 126**2
    assert dark.sum() > 0.8 * 3 * 260**2
    for colour in ((0xE6, 0x9F, 0), (0x56, 0xB4, 0xE9), (0xCC, 0x79, 0xA7)):
        assert (pixels == colour).all(2).sum() > 500


def broken(path: Path) -> None:
    photograph(path)
    path.write_bytes(path.read_bytes()[:-500])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "expected an image file, got nothing of that name"),
        (lambda path: path.mkdir(), "expected an image file, got a folder"),
        (lambda path: path.write_text("1,2\n"), "expected an image, got a file of no kind that Pillow knows"),
        (broken, "cannot be read: "),
    ],
)
def test_bad_images_are_refused_with_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], write: Callable[[Path], object], message: str
) -> None:
    good, bad = photograph(tmp_path / "good.png"), tmp_path / "bad.png"
    write(bad)
    before = sorted(tmp_path.iterdir())
    assert views(good, bad, "--out", tmp_path / "out.png") == 2
    line = one_line(capsys)
    assert line.startswith(str(bad))
    assert message in line
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "out.gif"], "--out expected a name in .png, .jpg, .pdf, .svg, got out.gif"),
        (["--out", "out"], "--out expected a name in .png, .jpg, .pdf, .svg, got out"),
        (["--out", "nowhere/out.png"], "--out expected a file in a folder that can be written, got nowhere/out.png"),
        (["--out", "there.png"], "--out expected a new file, got there.png: replace it with --overwrite"),
        (["--out", "folder.png", "--overwrite"], "--out expected a file, got folder.png, which is a folder"),
        (["--out", "./x.png", "--overwrite"], "--out expected another file than the images, got x.png"),
        ([], "the following arguments are required: --out"),
        (["--out", "o.png", "--box", "0", "0", "1", "1.5"], "boxes expected 0 <= h0 <= h1 <= 1"),
        (["--out", "o.png", "--box", "0", "0.5", "1", "0.4"], "boxes expected 0 <= h0 <= h1 <= 1"),
        (["--out", "o.png", "--box", "0", "0", "1", "nan"], "boxes expected 0 <= h0 <= h1 <= 1"),
        (["--out", "o.png", "--box", "0", "0", "1"], "argument --box: expected 4 arguments"),
        (["--out", "o.png", "--box", "0", "0", "1", "1", "--simc"], "argument --simc: not allowed with argument --box"),
        (["--out", "o.png", "--simc", "--run", "r"], "argument --run: not allowed with argument --simc"),
        (["--out", "o.png", "--run", "nowhere"], "folder expected one that holds a run, got nowhere"),
        (["--out", "o.png", "--scale", "0.5", "0.2"], "scale expected (low, high)"),
        (["--out", "o.png", "--ratio", "1", "1000"], "ratio expected (low, high)"),
        (["--out", "o.png", "--alpha", "0"], "alpha expected a positive finite number, got float 0.0"),
        (["--out", "o.png", "--augment", "byol"], "argument --augment: invalid choice: 'byol'"),
        (["--out", "o.png", "--size", "0"], "argument --size: expected an integer of at least 1, got '0'"),
        (["--out", "o.png", "--size", "100000"], "--size expected at most 4729 for so many images and views, got"),
        (["--out", "o.png", "--size", "3000", "--views", "8"], "--size expected at most 2364 for so many images and"),
        (["--out", "o.png", "--views", "9"], "--views expected at most 8, got 9"),
        (["--out", "o.png", "--epoch", "-1"], "argument --epoch: expected an integer of at least 0, got '-1'"),
        (["--out", "o.png", "--epoch", "4294967294"], "--epoch expected at most 4294967293: 3 epochs are drawn"),
    ],
)
def test_bad_options_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    photograph(Path("x.png"), 4, 4)
    Path("there.png").write_text("mine")
    Path("folder.png").mkdir()
    files = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    assert views("x.png", *options) == 2
    assert message in one_line(capsys)
    assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == files
    assert not any(Path("folder.png").iterdir())


def test_too_many_images_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = photograph(tmp_path / "x.png", 4, 4)
    assert views(*[path] * (MAX_IMAGES + 1), "--out", tmp_path / "out.png") == 2
    assert one_line(capsys) == "images expected at most 64, got 65"


def test_a_picture_is_overwritten_only_where_asked(tmp_path: Path, drawn: list[Row]) -> None:
    path, out = photograph(tmp_path / "x.png"), tmp_path / "out.png"
    out.write_text("mine")
    assert views(path, "--out", out) == 2
    assert out.read_text() == "mine"
    assert views(path, "--out", out, "--overwrite") == 0
    assert out.read_bytes() == b""


def test_nothing_is_left_where_drawing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object) -> None:
        raise OSError("No space left on device")

    path, out = photograph(tmp_path / "x.png"), tmp_path / "out.png"
    out.write_text("mine")
    monkeypatch.setattr(command.picture, "draw", full)
    assert views(path, "--out", out, "--overwrite") == 1
    assert one_line(capsys) == "No space left on device"
    assert out.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.png", "x.png"]


def test_ctrl_c_leaves_nothing_behind_and_no_package_was_imported_in_vain(tmp_path: Path) -> None:
    path = photograph(tmp_path / "x.png")
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "fastproto", "views", *[path] * MAX_IMAGES,
         "--out", tmp_path / "out.png", "--size", "500"], stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    imported = set()
    for line in process.stderr:
        imported.add(line.split()[-1])
        if "fastproto.views.command" in imported:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert error.splitlines()[-1] == "fastproto views: interrupted"
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
    assert imported.isdisjoint({"jsonargparse", "torchvision", "lightning_fabric"})


@pytest.mark.parametrize(("package", "extra"), [("PIL", "views"), ("matplotlib", "views"), ("jsonargparse", "train")])
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str, extra: str
) -> None:
    path = photograph(tmp_path / "x.png")
    for name in [name for name in sys.modules if name.split(".")[0] == package or name.startswith("fastproto.train")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("command", "picture"):
        monkeypatch.delitem(sys.modules, f"fastproto.views.{name}")
        monkeypatch.delattr(fastproto.views, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert views(path, "--out", tmp_path / "out.png", "--run", "nowhere") == 1
    line = one_line(capsys)
    assert re.search(package, line)
    assert line.endswith(f'it comes with pip install ".[{extra}]" in the folder of fastproto\'s source')
    assert not (tmp_path / "out.png").exists()
