"""Images that stay in files: the same pixels and the same training as in memory, and what happens to broken ones."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from train._files import write_image
from train._runs import at_the_end, stop_after

from fastproto.train import loop
from fastproto.train.build import load_data
from fastproto.train.checkpoint import State
from fastproto.train.config import Config
from fastproto.train.data import BrokenImage, Dataset, Streamed, batches, dataset, load, squares, streamed
from fastproto.train.evaluate import evaluate
from fastproto.train.files import read_log

# Python 3.12 warns of what DataLoader does by default.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
CPU = torch.device("cpu")


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two classes of seven training and three test images, each of a size of its own."""
    for part, count in (("train", 7), ("val", 3)):
        for seed in range(2 * count):
            write_image(tmp_path / part / f"class{seed // count}" / f"{seed:02}.png", 20 + seed, 34 - 2 * seed, seed)
    return tmp_path


@pytest.fixture
def equal(tmp_path: Path) -> Path:
    """As ``mixed``, but all images are 20 x 20 and there are more of them."""
    for part, count in (("train", 20), ("val", 3)):
        for seed in range(2 * count):
            write_image(tmp_path / part / f"class{seed // count}" / f"{seed:02}.png", 20, 20, seed)
    return tmp_path


def spoil(folder: Path, *numbers: int) -> list[str]:
    """Cuts so many of the training files short, and returns their names."""
    files = sorted((folder / "train").rglob("*.png"))
    for number in numbers:
        files[number].write_bytes(files[number].read_bytes()[:100])
    return [str(files[number]) for number in numbers]


def stream(folder: Path, workers: int = 0, strict: bool = False) -> Dataset:
    return load(f"imagefolder:{folder}", image_size=16, resident=False, workers=workers, strict=strict)


def originals(folder: Path) -> list[Tensor]:
    return [
        torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
        for file in sorted((folder / "train").rglob("*.png"))
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_files_each_at_its_own_size(mixed: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(streamed, "PIECE", 2)
    images, expected = stream(mixed, workers).train_images, originals(mixed)
    order = torch.randperm(14)
    shares = [order[:5], order[5:6], order[6:6], order[6:]]
    for _ in range(2):
        found = list(batches(images, shares, CPU))
        assert [len(batch) for batch in found] == [5, 1, 0, 8]
        for batch, ids in zip(found, shares, strict=True):
            assert all(torch.equal(image, expected[i]) for image, i in zip(batch, ids.tolist(), strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_squares_are_what_would_be_kept_in_memory(mixed: Path, workers: int) -> None:
    data, resident = stream(mixed, workers), load(f"imagefolder:{mixed}", image_size=16)
    assert isinstance(resident.train_images, Tensor)
    assert isinstance(data.train_images, Streamed)
    assert (data.mean, data.std, data.classes) == (resident.mean, resident.std, resident.classes)
    for images, kept in ((data.train_images, resident.train_images), (data.test_images, resident.test_images)):
        assert images.shape == kept.shape
        assert len(images) == len(kept)
        for index in (3, -1, slice(1, 4), torch.tensor([4, 0, 4]), slice(0, 0)):
            assert torch.equal(images[index], kept[index])
        shares = torch.arange(len(kept)).split(4)
        for batch, ids in zip(squares(images, shares, CPU), shares, strict=True):
            assert torch.equal(batch, kept[ids])
        for batch, ids in zip(squares(kept, shares, CPU), shares, strict=True):
            assert torch.equal(batch, kept[ids])


def test_whole_images_are_squeezed_into_squares(mixed: Path) -> None:
    images = stream(mixed).train_images
    (found,) = squares(images, [torch.arange(14)], CPU, whole=True)
    for image, original in zip(found, originals(mixed), strict=True):
        picture = Image.fromarray(original.permute(1, 2, 0).numpy())
        expected = np.asarray(picture.resize((16, 16), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() <= 1


def test_a_new_call_ends_the_one_before(mixed: Path) -> None:
    images = stream(mixed).train_images
    old = batches(images, torch.arange(14).split(4), CPU)
    next(old)
    next(batches(images, torch.arange(14).split(4), CPU))
    with pytest.raises(AssertionError):
        next(old)


def test_batches_for_a_gpu_are_pinned_whoever_came_first(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, loaders = stream(mixed).train_images, []
    monkeypatch.setattr(streamed, "started", loaders.append)
    for device in ("cpu", "cuda", "cuda"):
        assert list(batches(images, [], torch.device(device))) == []
    assert [loader.pin_memory for loader in loaders] == [False, True, True]
    assert loaders[1] is loaders[2]


CRASH = """
import sys, torch
from fastproto.train.data import load

if __name__ == "__main__":
    images = load(f"imagefolder:{sys.argv[1]}", image_size=16, resident=False, workers=1).train_images
    for batch in images.batches(torch.arange(14).split(4), torch.device("cpu")):
        raise RuntimeError("in a step")
"""


def test_an_error_in_a_step_ends_the_process(mixed: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", CRASH, str(mixed)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "RuntimeError: in a step" in ended.stderr
    assert "is killed by signal" not in ended.stderr


QUIET = """
import sys
from fastproto.train.data import load

if __name__ == "__main__":
    data = load(f"imagefolder:{sys.argv[1]}", image_size=16, resident=False, workers=2)
"""


def test_a_script_that_keeps_its_data_ends_in_silence(mixed: Path) -> None:
    """Its workers are still there when the interpreter ends, which torch is not to take for a failure."""
    ended = subprocess.run([sys.executable, "-c", QUIET, str(mixed)], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_images_are_kept_in_memory_where_they_fit(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, kept in ((20 * 3 * 16**2, True), (20 * 3 * 16**2 - 1, False)):
        monkeypatch.setattr(dataset, "RESIDENT_BYTES", limit)
        data = load(f"imagefolder:{mixed}", image_size=16)
        assert isinstance(data.train_images, Tensor) is isinstance(data.test_images, Tensor) is kept


def test_statistics_of_files_are_those_of_a_sample(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "SAMPLED", 4)
    data, resident = stream(mixed), load(f"imagefolder:{mixed}", image_size=16)
    pixels = resident.train_images[[0, 3, 7, 10]].numpy() / 255
    np.testing.assert_allclose(data.mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(data.std, pixels.std(axis=(0, 2, 3)), rtol=1e-9)


def test_what_is_kept_in_memory_is_without_broken_files(mixed: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = load(f"imagefolder:{mixed}", image_size=16)
    broken = spoil(mixed, 3, 4, 13)
    data = load(f"imagefolder:{mixed}", image_size=16)
    kept = [0, 1, 2, *range(5, 13)]
    assert torch.equal(data.train_images, whole.train_images[kept])
    assert torch.equal(data.train_labels, whole.train_labels[kept])
    assert torch.equal(data.test_images, whole.test_images)
    assert (data.skipped, whole.skipped) == (3, 0)
    assert [message.split(":")[:2] for message in caplog.messages] == [["skipped", f" {name}"] for name in broken]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_image_stands_in_for_a_broken_one(mixed: Path, caplog: pytest.LogCaptureFixture, workers: int) -> None:
    broken, expected = spoil(mixed, 3, 4, 13), originals_but(mixed, (3, 4, 13))
    data = stream(mixed, workers)
    for shares in ([torch.arange(14)], [torch.tensor([13, 4]), torch.tensor([3])]):
        for batch, ids in zip(batches(data.train_images, shares, CPU), shares, strict=True):
            for image, i in zip(batch, ids.tolist(), strict=True):
                assert torch.equal(image, expected[{3: 5, 4: 5, 13: 0}.get(i, i)])
    assert data.train_images.broken == {3, 4, 13}
    assert data.skipped == 3
    # Each is named once, however often it was met.
    assert sorted(message.split(": ")[1] for message in caplog.messages) == sorted(broken)


def originals_but(folder: Path, numbers: tuple[int, ...]) -> dict[int, Tensor]:
    files = sorted((folder / "train").rglob("*.png"))
    return {
        i: torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
        for i, file in enumerate(files)
        if i not in numbers
    }


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\nbroken", None])
@pytest.mark.parametrize("resident", [True, False])
def test_strict_refuses_a_file_that_does_not_decode(mixed: Path, content: bytes | None, resident: bool) -> None:
    broken = mixed / "train" / "class1" / "09.png"
    broken.write_bytes(broken.read_bytes()[:200] if content is None else content)
    with pytest.raises(BrokenImage, match=r"data: expected images that decode, got .*class1/09\.png: "):
        load(f"imagefolder:{mixed}", image_size=16, resident=resident, strict=True)
    assert load(f"imagefolder:{mixed}", image_size=16, resident=resident).skipped == 1


def test_a_file_that_is_gone_is_a_broken_one(mixed: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = stream(mixed)
    (mixed / "train" / "class0" / "00.png").unlink()
    assert torch.equal(data.train_images[0], data.train_images[1])
    assert "class0/00.png" in caplog.text


@pytest.mark.parametrize("resident", [True, False])
def test_nothing_but_broken_files_is_refused(mixed: Path, monkeypatch: pytest.MonkeyPatch, resident: bool) -> None:
    spoil(mixed, *range(14))
    with pytest.raises(BrokenImage, match=r"data: expected images that decode, got 14 in a row to .*class1/13\.png"):
        load(f"imagefolder:{mixed}", image_size=16, resident=resident)
    # In a large set not all are tried.
    monkeypatch.setattr(streamed, "GIVE_UP", 5)
    with pytest.raises(BrokenImage, match=r"data: expected images that decode, got 5 in a row to .*class0/04\.png"):
        load(f"imagefolder:{mixed}", image_size=16, resident=resident)


def test_broken_files_are_not_evaluated(mixed: Path) -> None:
    spoil(mixed, 3, 12)
    (mixed / "val" / "class0" / "01.png").write_bytes(b"")
    encode: Callable[[Tensor], Tensor] = lambda images: images[:, :, ::5, ::5].flatten(1)  # noqa: E731
    resident = load(f"imagefolder:{mixed}", image_size=16)
    data = replace(stream(mixed), mean=resident.mean, std=resident.std)
    assert (len(resident.train_labels), len(resident.test_labels)) == (12, 5)
    assert evaluate(encode, data, batch_size=4) == evaluate(encode, resident, batch_size=4)


def test_a_limit_takes_files_evenly(mixed: Path, tiny_config: Config) -> None:
    config = replace(tiny_config, data=f"imagefolder:{mixed}", image_size=16, limit=8, batch_size=4, workers=0)
    limited = [load_data(replace(config, resident=resident)) for resident in (True, False)]
    assert torch.equal(limited[0].train_images, limited[1].train_images[:])
    assert torch.equal(limited[0].train_labels, limited[1].train_labels)


def run(config: Config, folder: Path, **options: object) -> State:
    data = load_data(config)
    loop.train(config, data, folder, **options)  # type: ignore[arg-type]
    return at_the_end(folder, config, data)


def tensors(state: State) -> dict[str, Tensor]:
    parts = (state.method, state.boxes, state.prototypes)
    found = {f"{i}.{key}": value for i, part in enumerate(parts) if part for key, value in part.state_dict().items()}
    for index, values in state.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{index}.{key}": value for key, value in values.items() if isinstance(value, Tensor)}
    return found


def same(first: State, second: State) -> bool:
    one, other = tensors(first), tensors(second)
    losses = [[row["loss"] for row in state.log] for state in (first, second)]
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one) and (
        losses[0] == losses[1]
    )  # fmt: skip


@pytest.fixture
def config(tiny_config: Config, equal: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(loop, "evaluate", lambda *args, **options: {"knn20": 0.25, "knn200": 0.25})
    return replace(tiny_config, data=f"imagefolder:{equal}", image_size=20, resident=False, workers=0, method="pauc")


def test_files_train_as_memory_does(tmp_path: Path, config: Config) -> None:
    """Boxes, prototypes and weights, bit for bit, where the files have the size that is kept in memory."""
    resident = run(replace(config, resident=True), tmp_path / "resident")
    assert same(resident, run(config, tmp_path / "streamed"))
    assert same(resident, run(replace(config, workers=2), tmp_path / "workers"))
    assert [row["skipped"] for row in read_log(tmp_path / "workers")] == [0, 0]


def test_an_interrupted_run_on_files_ends_with_the_same_bits(tmp_path: Path, config: Config) -> None:
    """In the middle of an epoch, of images of different sizes, with a broken one among them, by other workers."""
    for seed, file in enumerate(sorted((tmp_path / "train").rglob("*.png"))):
        write_image(file, 20 + seed % 7, 20 + seed % 5, seed)
    spoil(tmp_path, 7)
    whole = run(config, tmp_path / "whole")
    assert [row["skipped"] for row in whole.log] == [1, 1]
    for workers, stops in ((0, (1, 2)), (2, (3,))):
        folder = tmp_path / str(workers)
        for attempt, steps in enumerate(stops):
            with pytest.raises(loop.Interrupted):
                run(config, folder, resume=attempt > 0, stop=stop_after(steps))
            torch.rand(3)
        assert same(whole, run(replace(config, workers=workers), folder, resume=True))


def test_processes_share_files_as_they_share_memory(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank of two asks for its own images of every step, the same of files and of memory."""
    seen: dict[tuple[bool, int], list[Tensor]] = {}
    views = loop.build_views

    def watched(config: Config, data: Dataset) -> torch.nn.Module:
        made = views(config, data)

        def keep(module: torch.nn.Module, args: tuple) -> None:
            images = args[0] if isinstance(args[0], Tensor) else torch.stack(args[0])
            seen.setdefault((bool(config.resident), rank), []).append(images)

        made.register_forward_pre_hook(keep)
        return made

    monkeypatch.setattr(loop, "build_views", watched)
    monkeypatch.setattr(loop, "asked_anywhere", lambda stop, device: False)
    monkeypatch.setattr(loop, "sum_over_ranks", lambda value: value)
    config = replace(config, method="simclr", crop="random", batch_size=12, epochs=1)
    for resident in (True, False):
        for rank in range(2):
            monkeypatch.setattr(loop, "rank_and_world", lambda rank=rank: (rank, 2))
            chosen = replace(config, resident=resident)
            (tmp_path / f"{resident}{rank}" / "checkpoints").mkdir(parents=True)
            loop.train(chosen, load_data(chosen), tmp_path / f"{resident}{rank}")
    for rank in range(2):
        assert [len(images) for images in seen[False, rank]] == [6, 6, 6]
        pairs = zip(seen[True, rank], seen[False, rank], strict=True)
        assert all(torch.equal(resident, streamed) for resident, streamed in pairs)
