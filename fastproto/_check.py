"""The one way to refuse an argument: ``op: argument expected this, got that``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastproto import _native, _settings

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32)
MAX_SIDE = 2**31 - 1  # of an image: kernels count pixels in int32
# Of Python or NumPy; that True and False do not count is expect_type's to say.
INTS = (int, np.integer)
NUMBERS = (*INTS, float, np.floating)
# Not public. Of a subclass that takes over ops, or of a transform, fake, or under a mode that sees all ops.
_is_like_a_subclass = getattr(torch._C, "_dispatch_isTensorSubclassLike", lambda tensor: False)
NONE_IGNORED: Any = object()  # in place of an ignore_index
LONGEST = 200  # characters of a value that an error shows


def describe(value: Any) -> str:
    """What an error message says of a value: dtype and shape of a tensor or array, type and value of the rest."""
    if isinstance(value, Tensor):
        if value.is_nested:
            return f"a nested {_name(value.dtype)} tensor on {value.device}"
        layout = "" if value.layout == torch.strided else f"{_name(value.layout)} "
        return f"{layout}{_name(value.dtype)} {tuple(value.shape)} on {value.device}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} array {value.shape}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= LONGEST else text[:LONGEST] + ' ...'}"


def expect(holds: bool, op: str, argument: str, expected: str, got: Any) -> None:
    """Raises ValueError unless ``holds``. ``got`` is described, unless it is a string, which is shown as it is."""
    if not holds:
        raise ValueError(f"{op}: {argument} expected {expected}, got {got if isinstance(got, str) else describe(got)}")


def expect_type(value: Any, types: type | tuple[type, ...], op: str, argument: str, expected: str) -> None:
    """Raises TypeError unless ``value`` is one of ``types``. True and False are not numbers."""
    if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
        raise TypeError(f"{op}: {argument} expected {expected}, got {describe(value)}")


def is_integer(value: Any) -> bool:
    """Whether it is an integer, of Python or NumPy. True and False do not count."""
    return isinstance(value, INTS) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is an integer or a float, of Python or NumPy. True and False do not count."""
    return isinstance(value, NUMBERS) and not isinstance(value, bool)


def expect_flags(op: str, **flags: Any) -> None:
    """Raises ValueError for one that is not True or False, of Python or NumPy."""
    for argument, flag in flags.items():
        expect(isinstance(flag, (bool, np.bool_)), op, argument, "True or False", describe(flag))


def expect_positive_ints(op: str, **counts: Any) -> None:
    """Raises ValueError for one that is not an integer of at least 1."""
    for argument, count in counts.items():
        expect(is_integer(count) and count >= 1, op, argument, "an integer of at least 1", describe(count))


def expect_size(value: Any, op: str, argument: str, expected: str = "a positive int or two") -> tuple[int, int]:
    """Height and width from two positive ints, or from one for both; raises ValueError for anything else."""
    sides = value if isinstance(value, (tuple, list)) else (value, value)
    good = len(sides) == 2 and all(is_integer(side) and side > 0 for side in sides)
    # Of a string one would not see that it is one.
    expect(good, op, argument, expected, describe(value) if isinstance(value, str) else value)
    expect(max(sides) <= MAX_SIDE, op, argument, f"sides below {MAX_SIDE + 1}", value)
    return int(sides[0]), int(sides[1])


def expect_numbers(values: Any, op: str, argument: str, expected: str) -> tuple[float, ...]:
    """The numbers of a tuple, list, array or tensor; raises TypeError for anything else, ValueError for huge ones."""
    numbers = values.tolist() if isinstance(values, (Tensor, np.ndarray)) else values
    if not isinstance(numbers, (tuple, list)) or not all(map(is_number, numbers)):
        raise TypeError(f"{op}: {argument} expected {expected}, got {describe(values)}")
    try:
        return tuple(float(number) for number in numbers)
    except OverflowError as error:
        raise ValueError(f"{op}: {argument} expected {expected}, got {describe(values)}") from error


def expect_tensor(
    value: Any,
    op: str,
    argument: str,
    shape: tuple[int | str, ...],
    dtypes: Iterable[torch.dtype] = FLOATS,
    device: torch.device | None = None,
) -> None:
    """Raises TypeError for what is no dense tensor or has another dtype, ValueError for another shape or device.

    A string in ``shape`` names a size that may be anything: ``("N", 128)`` is any number of rows of 128.
    """
    dtypes = tuple(dtypes)
    if not isinstance(value, Tensor) or value.dtype not in dtypes or value.layout != torch.strided or value.is_nested:
        names = " or ".join(_name(dtype) for dtype in dtypes)
        wanted = f"{'an' if names.startswith('i') else 'a'} {names} tensor {_shape_name(shape)}"
        raise TypeError(f"{op}: {argument} expected {wanted}, got {describe(value)}")
    fits = value.dim() == len(shape) and all(
        isinstance(size, str) or size == actual for size, actual in zip(shape, value.shape, strict=True)
    )
    if not fits or (device is not None and value.device != device):
        where = f" on {device}" if device is not None else ""
        raise ValueError(f"{op}: {argument} expected {_shape_name(shape)}{where}, got {describe(value)}")


def expect_ignore_index(ignore_index: Any, op: str) -> None:
    expect_type(ignore_index, INTS, op, "ignore_index", "an int")
    expect(-(2**63) <= ignore_index < 2**63, op, "ignore_index", "an integer of 64 bits", ignore_index)


def expect_index(
    index: Tensor, op: str, argument: str, size: int | None, ignore_index: Any = NONE_IGNORED
) -> int | None:
    """Raises ValueError where an entry (N,) is neither ``ignore_index`` nor in 0…size-1, if its data may be read now.

    ``size`` None sets no upper end. Returns how many entries are not ``ignore_index``, where it has counted them.
    """
    ignores = ignore_index is not NONE_IGNORED
    if ignores:
        expect_ignore_index(ignore_index, op)
    if not index.numel() or not reads_data(index):
        return None
    # What is ignored counts as 0.
    low, high, count = _range_of(index, ignore_index if ignores else 0)
    if low < 0 or (size is not None and high >= size):
        ignored = f"{ignore_index} or " if ignores else ""
        inside = "at least 0" if size is None else f"0 to {size - 1}"
        expect(False, op, argument, ignored + inside, f"values from {low} to {high}")
    return count if ignores else None


def without_ignored(labels: Tensor, ignore_index: int) -> Tensor:
    """Labels as int64, with -1 in place of ``ignore_index``."""
    labels = labels.long()  # first: an int32 tensor is compared with the low 32 bits of a wider number
    return labels if ignore_index == -1 else torch.where(labels == ignore_index, -1, labels)


def _range_of(index: Tensor, ignore_index: int) -> tuple[int, int, int | None]:
    """Lowest and highest entry, with 0 for the ignored ones, and how many are not, where that comes for free."""
    # Not one of a subclass, whose memory may be elsewhere, nor one whose memory waits for its sign or its zeros.
    plain = type(index) is Tensor and not index.is_neg() and not index._is_zerotensor()
    if _native.cpp is not None and index.is_cpu and plain:
        where = index.data_ptr(), len(index), index.stride(0)
        return _native.cpp.index_range(*where, index.dtype == torch.int64, ignore_index)
    low, high = map(int, index.aminmax())
    if low < 0 or low == ignore_index or high == ignore_index:
        index = index.long()
        low, high = map(int, torch.where(index == ignore_index, 0, index).aminmax())
    return low, high, None


def reads_data(tensor: Tensor) -> bool:
    """Whether checks that read this tensor's data run now: on the CPU, on CUDA in debug, never where it is traced.

    What a tracer, a compiler or a transform hands round may have no data, and what is read of it would become a
    constant of the trace.
    """
    return has_data(tensor) and (tensor.is_cpu or _settings.debug)


def has_data(tensor: Tensor) -> bool:
    """Whether there is something to be read, and the number read is not to become a part of a trace."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or _is_like_a_subclass(tensor)
    return not traced and not tensor.is_meta


def _name(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")


def _shape_name(shape: tuple[int | str, ...]) -> str:
    return "(" + ", ".join(str(size) for size in shape) + ("," if len(shape) == 1 else "") + ")"
