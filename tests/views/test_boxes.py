"""BoxBank: what is written is read, in place, saved and checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastproto.views import SIMC_BOX, BoxBank


def test_starts_with_whole_images() -> None:
    bank = BoxBank(33)
    assert bank.boxes.tolist() == [[0.0, 0.0, 1.0, 1.0]] * 33
    assert SIMC_BOX == (0.25, 0.25, 0.75, 0.75)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_update_and_lookup(dtype: torch.dtype) -> None:
    bank = BoxBank(10)
    storage = bank.boxes.data_ptr()
    boxes = torch.rand(3, 2, 2).sort(dim=1).values.flatten(1).to(dtype)
    bank.update(torch.tensor([7, 0, 4]), boxes)
    assert bank.boxes.data_ptr() == storage
    assert torch.equal(bank.lookup(torch.tensor([4, 7, 7, 0], dtype=torch.int32)), boxes[[2, 0, 0, 1]].float())
    assert bank.lookup(torch.tensor([1, 9])).tolist() == [[0.0, 0.0, 1.0, 1.0]] * 2
    bank.lookup(torch.tensor([4])).zero_()
    assert torch.equal(bank.boxes[4], boxes[2].float())


def test_boxes_with_a_gradient_and_no_boxes() -> None:
    bank = BoxBank(2)
    bank.update(torch.tensor([1]), torch.full((1, 4), 0.5, requires_grad=True))
    assert not bank.boxes.requires_grad
    bank.update(torch.empty(0, dtype=torch.int64), torch.zeros(0, 4))
    assert bank.lookup(torch.empty(0, dtype=torch.int64)).shape == (0, 4)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_boxes_keep_their_digits_in_a_module_of_another_dtype(cast: str) -> None:
    module = nn.ModuleDict({"encoder": nn.Linear(2, 2), "bank": BoxBank(4)})
    bank = module["bank"]
    bank.update(torch.arange(4), torch.rand(4, 2).sort(1).values.repeat_interleave(2, 1)[:, [0, 2, 1, 3]])
    before = bank.boxes.clone()
    assert getattr(module, cast)()["bank"] is bank
    assert bank.boxes.dtype == torch.float32 and torch.equal(bank.boxes, before)
    assert module.to("meta")["bank"].boxes.is_meta


def test_update_with_rows_of_its_own() -> None:
    bank = BoxBank(4)
    bank.update(torch.arange(2), torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]]))
    expected = bank.boxes.flip(0)
    bank.update(torch.tensor([3, 2, 1, 0]), bank.boxes)
    assert torch.equal(bank.boxes, expected)


def test_is_saved() -> None:
    bank, other = BoxBank(5), BoxBank(5)
    bank.update(torch.arange(5), torch.tensor([SIMC_BOX] * 5))
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.boxes, bank.boxes)
    assert repr(bank) == "BoxBank(5)"


BOXES = torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2)


@pytest.mark.parametrize(
    ("error", "message", "sample_ids", "boxes"),
    [
        (ValueError, "sample_ids expected 0 to 4, got values from 1 to 5", torch.tensor([1, 5]), BOXES),
        (ValueError, "sample_ids expected 0 to 4, got values from -1 to 3", torch.tensor([-1, 3]), BOXES),
        (TypeError, "sample_ids expected an int64 or int32 tensor", torch.tensor([1.0, 2.0]), BOXES),
        (TypeError, "sample_ids expected an int64 or int32 tensor", [1, 2], BOXES),
        (ValueError, r"sample_ids expected \(N,\) on cpu, got .* on meta", torch.arange(2).to("meta"), BOXES),
        (ValueError, r"boxes expected \(2, 4\) on cpu, got float32 \(1, 4\)", torch.tensor([1, 2]), BOXES[:1]),
        (ValueError, r"boxes expected \(2, 4\) on cpu, got .* on meta", torch.tensor([1, 2]), BOXES.to("meta")),
        (TypeError, "boxes expected a float32 or", torch.tensor([1, 2]), BOXES.int()),
        (ValueError, r"boxes expected 0 <= h0.*, got \[0.0, 0.0, 2.0, 2.0\]", torch.tensor([1, 2]), BOXES * 2),
        (ValueError, "boxes expected 0 <= h0", torch.tensor([1, 2]), BOXES.flip(1)),
    ],
)
def test_bad_input(error: type[Exception], message: str, sample_ids: Any, boxes: Any) -> None:
    bank = BoxBank(5)
    with pytest.raises(error, match="^BoxBank: " + message):
        bank.update(sample_ids, boxes)
    assert bank.boxes.tolist() == [[0.0, 0.0, 1.0, 1.0]] * 5
    if "sample_ids" in message:
        with pytest.raises(error, match="^BoxBank: " + message):
            bank.lookup(sample_ids)


def test_bad_size() -> None:
    for size, got in ((0, "int 0"), (1.5, "float 1.5"), (True, "bool True")):
        with pytest.raises(ValueError, match=f"BoxBank: num_samples expected an integer of at least 1, got {got}"):
            BoxBank(size)  # type: ignore[arg-type]
