"""Faces cut otherwise than in training."""

import zipfile

import numpy as np
import pytest
from PIL import Image

import data
from benchmarks.crops import CROPS, cut, position
from companion import crops
from companion.words import say


def quality(values):
    return {"values": values, "mean": float(np.mean(values)), "half_width": 0.1}


def of_crop(scale, shift, glow=(30.0, 31.0, 32.0), resnet=(29.0, 30.5, 31.0)):
    psnr = {"inpainting": {"glow": quality(glow), "resnet": quality(resnet)}}
    return {"scale": scale, "shift": shift, "psnr": psnr, "bits_per_dim": quality([3.0, 3.1])}


def test_the_crop_of_training_is_that_of_the_packed_set(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (109, 89, 3), np.uint8)
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive, archive.open("faces/1.jpg", "w") as file:
        Image.fromarray(pixels).save(file, "JPEG")
    data.prepare(tmp_path / "faces.zip", tmp_path / "packed", "celeba")
    packed = data.load(tmp_path / "packed").images
    same, moved = (cut(tmp_path / "faces.zip", [0], 1.0, shift) for shift in (0.0, 0.1))
    assert abs(same.astype(int) - packed).max() <= 2 < abs(moved.astype(int) - packed).max()


def test_a_square_is_where_it_is_said_to_be():
    x, y, zoom = position(89, 109, 0.8, 0.1)
    side = 89 / zoom
    assert side == pytest.approx(0.8 * 74)
    assert x * (89 - side) + side / 2 == pytest.approx(44.5)
    assert y * (109 - side) + side / 2 == pytest.approx(54.5 + 7.4)


def test_all_crops_lie_within_celeba_and_others_are_refused():
    for scale, shift in CROPS:
        position(89, 109, scale, shift)
    for scale, shift in ((1.3, 0.0), (1.0, 0.3), (1.2, -0.2)):
        with pytest.raises(ValueError, match=f"the crop {scale}, {shift} leaves an image of 89 x 109"):
            position(89, 109, scale, shift)


def test_a_series_changes_one_thing():
    rows = [of_crop(*crop) for crop in CROPS]
    for change in crops.CHANGES:
        values = [row[change] for row in crops.series(rows, change)]
        assert values == sorted(values) and len(values) == 7


def test_differences_are_paired():
    mean, half = crops.difference(of_crop(1.0, 0.0), "inpainting")
    assert mean == pytest.approx(2.5 / 3) and 0 < half < 1


def test_the_summary_counts_orders_that_are_told():
    rows = [
        of_crop(1.0, 0.0, (31, 32.1, 33), (30, 31, 32.1)),
        of_crop(0.9, 0.0, (28, 29.1, 30), (30, 31, 32.1)),
    ]
    rows += [of_crop(1.1, 0.0, (31, 29, 33), (30, 31, 32))]
    of_task = crops.summary({"crops": rows})["tasks"]["inpainting"]
    assert (of_task["flipped"], of_task["undecided"]) == (1, 1)
    assert of_task["falls"]["glow"] == pytest.approx(3, abs=0.01)
    told = say("crops", **crops.summary({"crops": rows}))
    assert "the other one in 1 of 2" in told and "Nothing is recorded" in say("crops", **crops.summary(None))
    first, *_ = crops.table(rows)
    assert first["GLOW, dB"] == pytest.approx(32.03, abs=0.01) and first["Side"] == 1.0


def test_the_chart_is_drawn():
    assert len(crops.chart([of_crop(*crop) for crop in CROPS]).axes) == 4


def test_what_the_front_page_says_of_crops_is_recorded():
    rows = {(row["scale"], row["shift"]): row for row in crops.record()["crops"]}
    mean, half = crops.difference(rows[1.0, 0.0], "inpainting")
    assert mean > half
    moved = [crops.difference(rows[1.0, shift], "inpainting") for shift in (-0.05, 0.05)]
    assert moved[0][0] < -moved[0][1] and abs(moved[1][0]) < moved[1][1]
