"""The drawings: that what is drawn is what was given, and that no text can break out of it."""

from __future__ import annotations

import base64
import io
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from fastproto.train.plots import Line, curve, data_url, duration, percent, picture, point_map, share_bar, ticks

NAN = math.nan


def decode(url: str) -> Tensor:
    """The image (3, H, W) behind a data: URL."""
    content = base64.b64decode(url.partition("base64,")[2])
    return torch.from_numpy(np.array(Image.open(io.BytesIO(content)).convert("RGB"))).permute(2, 0, 1)


def path_points(html: str) -> list[list[tuple[float, float]]]:
    """The points of every path of a curve."""
    numbers = r"([-\d.]+) ([-\d.]+)"
    paths = []
    for data in re.findall(r'class="line" d="(.*?)"', html):
        points = [(float(x), float(y)) for x, y in re.findall(numbers, data)]
        # A lone point is a dash around it.
        paths.append([(points[0][0] + 2, points[0][1])] if data.endswith("h4") else points)
    return paths


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_few_and_inside(low: float, size: float) -> None:
    high = low + size
    if high - low < 1e-9 * abs(low):
        return
    found = ticks(low, high)
    assert 2 <= len(found) <= 6
    slack = 1e-9 * (abs(low) + size)
    assert low - slack <= found[0]
    assert found[-1] <= high + slack
    step = found[1] - found[0]
    mantissa = step / 10 ** math.floor(math.log10(step * (1 + 1e-9)))
    assert min(abs(mantissa - round_step) for round_step in (1, 2, 5)) < 1e-3 * max(1, abs(low) / size)


def test_ticks_of_simple_ranges() -> None:
    assert ticks(0, 5) == [0, 1, 2, 3, 4, 5]
    assert ticks(1, 60) == [20, 40, 60]
    assert ticks(-0.03, 1.03) == pytest.approx([0, 0.5, 1.0])


def test_curve_is_linear_in_value_and_epoch() -> None:
    values = [3.0, -1.0, 0.5, 2.0, 2.0, 7.25]
    (points,) = path_points(curve([Line("", values)], title="loss", start=1))
    x, y = np.array(points).T
    np.testing.assert_allclose(np.diff(x), np.diff(x)[0], atol=0.11)
    slope, offset = np.polyfit(values, y, 1)
    assert slope < 0
    np.testing.assert_allclose(slope * np.array(values) + offset, y, atol=0.11)
    assert y.min() > 10
    assert y.max() < 190 - 24


def test_curve_has_gaps_and_tells_every_value() -> None:
    html = curve([Line("", [NAN, 1.0, 2.0, NAN, 5.0, math.inf])], title="a & <b>", start=1)
    assert [len(points) for points in path_points(html)] == [2, 1]
    assert re.findall(r"<title>(.*?)</title>", html) == ["epoch 2: 1", "epoch 3: 2", "epoch 5: 5"]
    assert "a &amp; &lt;b&gt; <b>5</b>" in html
    assert "nan" not in html
    assert "inf" not in html


@pytest.mark.parametrize("values", [[0.0], [4.0, 4.0, 4.0], [0.0, 0.0], [-2.0], [1e-30, 2e-30], [1e30, -1e30]])
def test_curve_of_one_value_or_of_extremes(values: list[float]) -> None:
    html = curve([Line("", values)], title="x")
    assert len(path_points(html)[0]) == len(values)
    assert "nan" not in html


@pytest.mark.parametrize("values", [[], [NAN], [NAN, math.inf]])
def test_curve_of_nothing_is_nothing(values: list[float]) -> None:
    assert curve([Line("", values), Line("", values)], title="x") == ""


def test_curves_share_one_scale_and_tell_all_values_of_an_epoch() -> None:
    lines = [Line("<one>", [1.0, 2.0, 3.0]), Line("two", [5.0, NAN], 3), Line("none", [], 1)]
    html = curve(lines, title="loss", start=1, note="Low & good.")
    first, second = path_points(html)
    assert len(second) == 1
    slope = (first[2][1] - first[0][1]) / 2
    assert second[0] == pytest.approx((first[0][0], first[0][1] + 4 * slope), abs=0.11)
    assert re.findall(r'<g class="(c\d)">', html) == ["c0", "c3", "c1"]
    told = ["epoch 1\n&lt;one&gt;: 1\ntwo: 5", "epoch 2\n&lt;one&gt;: 2", "epoch 3\n&lt;one&gt;: 3"]
    assert re.findall(r"<title>(.*?)</title>", html, re.DOTALL) == told
    # The circles under the pointer are where the lines are, in their colours.
    circles = re.findall(r'<circle class="(c\d)" cx="([\d.]+)" cy="([\d.]+)"', html)
    assert [(style, float(x), float(y)) for style, x, y in circles] == [
        ("c0", *first[0]),
        ("c3", *second[0]),
        ("c0", *first[1]),
        ("c0", *first[2]),
    ]
    # No single last value, and the note is text.
    assert "<figcaption>loss</figcaption>" in html
    assert "<p>Low &amp; good.</p>" in html


def test_a_joined_curve_goes_on_where_nothing_was_measured() -> None:
    values = [NAN, 1.0, NAN, 2.0, NAN, NAN, 0.0, NAN]
    assert [len(path) for path in path_points(curve([Line("", values)], title="x"))] == [1, 1, 1]
    (points,) = path_points(curve([Line("", values)], title="x", joined=True))
    x = np.array(points)[:, 0]
    np.testing.assert_allclose(x[1:] - x[:-1], np.array([2, 3]) * 284 / 7, atol=0.2)


def test_many_lines_have_many_colours() -> None:
    html = curve([Line(str(i), [1.0, i], i) for i in range(12)], title="x", colours=12)
    assert len(set(re.findall(r"<g (style=.*?)><path", html))) == 12


def test_map_places_and_names_every_point() -> None:
    points = torch.tensor([[0.0, 0.0], [4.0, 0.0], [4.0, 2.0]])
    html = point_map(points, torch.tensor([0, 1, 0]), ["<cat>", "dog"])
    dots = re.findall(r'<circle class="c(\d)" cx="([\d.]+)" cy="([\d.]+)" r="4"><title>(.*?)</title>', html)
    assert [(int(label), name) for label, _, _, name in dots] == [(0, "&lt;cat&gt;"), (1, "dog"), (0, "&lt;cat&gt;")]
    placed = torch.tensor([[float(x), float(y)] for _, x, y, _ in dots])
    torch.testing.assert_close(placed, points * 124 + 12)
    assert 'viewBox="0 0 520 272"' in html
    assert html.count("<li>") == 2


@pytest.mark.parametrize(("count", "legend", "painted"), [(10, True, "class="), (11, True, "hsl"), (21, False, "hsl")])
def test_map_of_many_classes(count: int, legend: bool, painted: str) -> None:
    html = point_map(torch.rand(count, 2), torch.arange(count), [f"class {i}" for i in range(count)])
    colours = set(re.findall(r"<circle (.*?) cx", html))
    assert len(colours) == count
    assert all(painted in colour for colour in colours)
    assert ("<ul" in html) == legend


def test_map_of_one_place() -> None:
    html = point_map(torch.full((3, 2), 5.0), torch.zeros(3, dtype=torch.int64), ["only"])
    assert html.count('cx="12.0" cy="12.0"') == 3


def test_share_bar_shows_parts_that_took_time() -> None:
    html = share_bar([("views", 30.0), ("<idle>", 0.0), ("loss & co", 90.0)])
    assert re.findall(r"flex-grow:([\d.]+)", html) == ["0.250000", "0.750000"]
    assert "idle" not in html
    assert "loss &amp; co" in html
    assert re.findall(r"<td>(.*?)</td>", html) == ["30\u202fs", "25.0\u202f%", "1\u202fmin 30\u202fs", "75.0\u202f%"]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (8, 13), (64, 33)])
def test_small_pictures_are_exact(height: int, width: int) -> None:
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    html = picture(image)
    assert f'viewBox="0 0 {width} {height}"' in html
    assert "pixels" in html
    assert torch.equal(decode(re.search(r'href="(.*?)"', html)[1]), image)


def test_large_pictures_are_nearly_exact_and_small() -> None:
    ramp = torch.linspace(0, 255, 96).to(torch.uint8)
    image = torch.stack([ramp.expand(80, 96), ramp.flip(0).expand(80, 96), torch.full((80, 96), 90, dtype=torch.uint8)])
    url = data_url(image.transpose(1, 2))
    assert url.startswith("data:image/webp")
    assert len(url) < 4000
    assert (decode(url).int() - image.transpose(1, 2).int()).abs().float().mean() < 4
    assert "pixels" not in picture(image)


def test_picture_draws_rectangles_and_a_title() -> None:
    html = picture(torch.zeros(3, 4, 6, dtype=torch.uint8), rectangles=[("box", (1, 0.5, 2, 3))], title='"&"')
    assert html.count('x="0.5" y="1" width="3" height="2"') == 2
    assert 'class="box"' in html
    assert "<title>&quot;&amp;&quot;</title>" in html


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.00 s"),
        (9.994, "9.99 s"),
        (48.4, "48 s"),
        (59.7, "1 min 0 s"),
        (725, "12 min 5 s"),
        (3599.9, "1 h 0 min"),
        (12000, "3 h 20 min"),
        (360000, "100 h 0 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds).replace("\u202f", " ") == text


def test_percent() -> None:
    assert percent(0.4213) == "42.1\u202f%"
    assert percent(1.0) == "100.0\u202f%"
