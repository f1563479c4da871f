"""read_image and to_rgb: every kind of file gives the pixels one sees, and what is no image is refused by name."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastproto.views.files import read_image, to_rgb

Image = pytest.importorskip("PIL.Image")

RAMP = np.arange(12 * 20).reshape(12, 20)
GRAY = RAMP.astype(np.uint8)
COLOUR = np.stack([GRAY, GRAY[::-1], 255 - GRAY], axis=2)


def pixels(path: Path) -> np.ndarray:
    """What read_image gives, rows first."""
    image = read_image(path)
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


def gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[:, :, None], 3, axis=2)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp", ".ppm", ".gif"])
@pytest.mark.parametrize("values", [GRAY, COLOUR], ids=["gray", "colour"])
def test_eight_bits_are_kept(tmp_path: Path, values: np.ndarray, suffix: str) -> None:
    if suffix == ".gif" and values is COLOUR:
        values = COLOUR // 128 * 255  # eight colours, which a palette holds
    Image.fromarray(values).save(tmp_path / f"x{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    np.testing.assert_array_equal(pixels(tmp_path / f"x{suffix}"), gray(values) if values.ndim == 2 else values)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_sixteen_bits_are_scaled(tmp_path: Path, suffix: str) -> None:
    values = np.linspace(0, 65535, 240).reshape(12, 20).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f"x{suffix}")
    np.testing.assert_array_equal(pixels(tmp_path / f"x{suffix}"), gray((values >> 8).astype(np.uint8)))


def test_gray_and_colour_of_sixteen_bits_agree(tmp_path: Path) -> None:
    """A PNG of 16-bit colour, which Pillow reads and cannot write, and its gray twin."""
    import zlib

    values = (RAMP * 270 + 200).astype(">u2")

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    for name, kind, samples in (("gray", 0, values[:, :, None]), ("colour", 2, gray(values))):
        rows = b"".join(b"\0" + row.tobytes() for row in samples)
        header = struct.pack(">IIBBBBB", 20, 12, 16, kind, 0, 0, 0)
        parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        (tmp_path / f"{name}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    np.testing.assert_array_equal(pixels(tmp_path / "gray.png"), pixels(tmp_path / "colour.png"))
    assert pixels(tmp_path / "gray.png")[3, 4].tolist() == [int(values[3, 4]) >> 8] * 3


def test_numbers_of_32_bits(tmp_path: Path) -> None:
    Image.fromarray((RAMP * 256 + 3).astype(np.int32)).save(tmp_path / "x.tif")
    np.testing.assert_array_equal(pixels(tmp_path / "x.tif"), gray(GRAY))
    Image.fromarray((GRAY / 255).astype(np.float32)).save(tmp_path / "f.tif")
    np.testing.assert_array_equal(pixels(tmp_path / "f.tif"), gray(GRAY))
    for name, values, message in (
        ("i.tif", np.array([[-1, 3]], np.int32), r'mode "I" expected numbers in 0 to 65535, got -1 to 3'),
        ("j.tif", np.array([[0, 1 << 16]], np.int32), r"got 0 to 65536"),
        ("g.tif", np.array([[0.0, 1.5]], np.float32), r'mode "F" expected numbers in 0 to 1, got 0.0 to 1.5'),
        ("n.tif", np.array([[0.0, np.nan]], np.float32), "got nan to nan"),
    ):
        Image.fromarray(values).save(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: cannot be read: .*{message}"):
            read_image(tmp_path / name)


ALPHA = np.where(RAMP % 3 == 0, 0, np.where(RAMP % 3 == 1, 255, 100)).astype(np.uint8)


def over_white(colour: np.ndarray) -> np.ndarray:
    share = ALPHA[:, :, None] / 255
    return colour * share + 255 * (1 - share)


def test_premultiplied_gray_is_laid_over_white() -> None:
    """No file has it, but resizing gives it."""
    image = Image.fromarray(np.dstack([GRAY, ALPHA]), mode="LA")
    expected = to_rgb(image.convert("La").convert("LA"))
    assert torch.equal(to_rgb(image.convert("La")), expected)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_what_is_transparent_is_laid_over_white(tmp_path: Path, mode: str, suffix: str) -> None:
    colour = gray(GRAY) if mode == "LA" else COLOUR
    bands = [GRAY, ALPHA] if mode == "LA" else [*COLOUR.transpose(2, 0, 1), ALPHA]
    Image.fromarray(np.stack(bands, axis=2), mode=mode).save(tmp_path / f"x{suffix}")
    np.testing.assert_allclose(pixels(tmp_path / f"x{suffix}"), over_white(colour), atol=1)


def test_transparent_colours(tmp_path: Path) -> None:
    """One colour of a palette, of gray or of RGB that is transparent, or a palette with alpha for each colour."""
    indices = (RAMP % 4).astype(np.uint8)
    palette = [10, 20, 30, 200, 0, 0, 0, 200, 0, 0, 0, 200]
    image = Image.fromarray(indices, mode="P")
    image.putpalette(palette)
    for transparency, share in ((2, [1, 1, 0, 1]), (bytes([255, 51, 0, 255]), [1, 0.2, 0, 1])):
        image.save(tmp_path / "p.png", transparency=transparency)
        colours = np.array(palette).reshape(4, 3)
        expected = colours * np.array(share)[:, None] + 255 * (1 - np.array(share)[:, None])
        np.testing.assert_allclose(pixels(tmp_path / "p.png"), expected[indices], atol=1)
    image.save(tmp_path / "opaque.png")
    np.testing.assert_array_equal(pixels(tmp_path / "opaque.png"), colours[indices])

    Image.fromarray(GRAY).save(tmp_path / "l.png", transparency=7)
    np.testing.assert_array_equal(pixels(tmp_path / "l.png"), gray(np.where(GRAY == 7, 255, GRAY)))
    Image.fromarray(COLOUR).save(tmp_path / "rgb.png", transparency=tuple(COLOUR[2, 3].tolist()))
    found = pixels(tmp_path / "rgb.png")
    assert found[2, 3].tolist() == [255] * 3
    assert found[2, 4].tolist() == COLOUR[2, 4].tolist()


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB"])
def test_other_colours_become_rgb(tmp_path: Path, mode: str) -> None:
    from PIL import ImageCms

    smooth = np.stack(np.broadcast_arrays(RAMP // 2 + 40, 120, 200 - RAMP // 2), axis=2).astype(np.uint8)
    image = Image.fromarray(smooth)
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")
    else:
        image = image.convert(mode)
    image.save(tmp_path / "x.tif")
    with Image.open(tmp_path / "x.tif") as stored:
        if mode == "YCbCr" and int(Image.__version__.partition(".")[0]) < 13:
            pytest.skip("Pillow before 13 does not read the YCbCr that it wrote")
        assert stored.mode == mode
    # Eight bits of another space hold a colour to within some steps of eight bits of this one.
    np.testing.assert_allclose(pixels(tmp_path / "x.tif"), smooth, atol=10 if mode == "LAB" else 4)


def test_jpegs_of_cmyk_are_not_inverted(tmp_path: Path) -> None:
    for colour in ((200, 40, 40), (250, 250, 250), (20, 20, 20)):
        Image.new("RGB", (16, 16), colour).convert("CMYK").save(tmp_path / "x.jpg", quality=95)
        np.testing.assert_allclose(pixels(tmp_path / "x.jpg")[8, 8], colour, atol=6)


def test_one_bit(tmp_path: Path) -> None:
    Image.fromarray(GRAY > 99).save(tmp_path / "x.png")
    np.testing.assert_array_equal(pixels(tmp_path / "x.png"), gray(np.where(GRAY > 99, 255, 0)))


@pytest.mark.parametrize(
    ("mode", "suffix"), [("RGB", ".png"), ("I;16", ".png"), ("LA", ".webp"), ("L", ".tif"), ("RGB", ".tif")]
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path: Path, orientation: int, mode: str, suffix: str) -> None:
    upright = np.array([[0, 50, 100], [150, 200, 250]], np.uint8)
    # How a camera stores an upright picture whose tag then says so.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    if mode == "I;16":
        image = Image.fromarray(stored.astype(np.uint16) << 8)
    else:
        image = Image.fromarray(np.ascontiguousarray(stored)).convert(mode)
    assert image.mode == mode
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"x{suffix}", exif=exif, **({"lossless": True} if suffix == ".webp" else {}))
    np.testing.assert_array_equal(pixels(tmp_path / f"x{suffix}"), gray(upright))


@pytest.mark.parametrize(
    "other",
    [(0x10F, 11, 1, struct.pack("<f", 1.5)), (0x100, 2, 4, b"abc\0"), (0x103, 8, 1, struct.pack("<hH", -1, 0))],
    ids=["a maker that is a number", "a width that is a text", "a negative compression"],
)
def test_an_image_is_turned_whatever_else_its_exif_says(tmp_path: Path, other: tuple[int, int, int, bytes]) -> None:
    """Pillow reads such entries, and fails to write them anew."""
    entries = sorted([other, (0x112, 3, 1, struct.pack("<HH", 6, 0))])
    table = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4)
    Image.fromarray(COLOUR).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(pixels(tmp_path / "x.png"), np.rot90(COLOUR, -1))


@pytest.mark.parametrize("shape", [(1, 1), (1, 4000), (4000, 1)])
def test_any_shape(tmp_path: Path, shape: tuple[int, int]) -> None:
    values = (np.arange(shape[0] * shape[1]) % 251).reshape(shape).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "x.png")
    np.testing.assert_array_equal(pixels(tmp_path / "x.png"), gray(values))


def test_of_several_frames_the_first_is_read(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((4, 5), value, np.uint8)) for value in (10, 200)]
    for suffix in (".gif", ".tif", ".png"):
        frames[0].save(tmp_path / f"x{suffix}", save_all=True, append_images=frames[1:])
        assert set(pixels(tmp_path / f"x{suffix}").ravel()) == {10}


def test_a_pil_image_is_left_as_it_is() -> None:
    image = Image.fromarray(np.dstack([GRAY, ALPHA]), mode="LA")
    exif = image.getexif()
    exif[0x0112] = 6
    before = image.tobytes()
    found = to_rgb(image)
    assert found.shape == (3, 20, 12)
    found.zero_()
    assert image.tobytes() == before
    assert image.getexif()[0x0112] == 6


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("x.png", lambda path: None, "expected an image file, got nothing of that name"),
        ("x.png", lambda path: path.mkdir(), "expected an image file, got a folder"),
        ("x.png", lambda path: path.write_bytes(b""), "expected an image, got a file of no kind that Pillow knows"),
        ("x.png", lambda path: path.write_bytes(b"<svg></svg>"), "got a file of no kind that Pillow knows"),
        ("x.png", lambda path: cut_short(path), "cannot be read: "),
        ("x.jpg", lambda path: cut_short(path), "cannot be read: "),
        ("x.tif", lambda path: cut_short(path), "cannot be read: "),
        ("x.webp", lambda path: cut_short(path), "cannot be read: "),
        ("x.gif", lambda path: cut_short(path), "cannot be read: "),
        ("x.bmp", lambda path: cut_short(path), "cannot be read: "),
    ],
)
def test_what_is_no_image_is_refused_by_name(
    tmp_path: Path, name: str, write: Callable[[Path], object], message: str
) -> None:
    write(tmp_path / name)
    with pytest.raises(ValueError, match=rf"^{tmp_path / name}: .*{message}"):
        read_image(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        read_image(str(tmp_path / name))


def cut_short(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-1000])


def test_a_transparent_gray_of_16_bits_is_laid_over_white() -> None:
    memory = io.BytesIO()
    values = np.array([[100, 200]], np.uint16) * 257
    Image.fromarray(values).save(memory, "PNG", transparency=25700)
    assert to_rgb(Image.open(memory))[0].tolist() == [[255, 200]]
