"""Classical methods: each improves on its measurement, and does what its equation says."""

import json

import pytest
import torch

import data
from companion import classical, records, results, runs, tables
from companion.classical import CLASSICAL, conjugate_gradients, record_classical, tikhonov, tv_inpainting
from companion.experiment import Experiment
from flowlib import Blur, Denoising, Inpainting, psnr
from flowlib.images import to_tensor

OPERATORS = {"denoising": Denoising(0.2), "inpainting": Inpainting(19, 64), "deblurring": Blur(5.0)}


@pytest.fixture(scope="module")
def faces():
    return to_tensor(data.draw_faces(range(2)))


@pytest.mark.parametrize("task,key", [(task, key) for task in CLASSICAL for key in CLASSICAL[task]])
def test_every_method_improves_on_the_measurement(faces, task, key):
    method, operator = CLASSICAL[task][key], OPERATORS[task]
    y = operator.measure(faces, torch.Generator().manual_seed(0))
    x_hat = method(y, operator, method.grid[len(method.grid) // 2] if method.parameter else None)
    assert x_hat.shape == y.shape and x_hat.dtype == y.dtype
    gain = psnr(x_hat, faces) - psnr(y, faces)
    assert (gain == 0).all() if key == "measurement" else (gain > 1).all()


@pytest.mark.parametrize("boundary", Blur.BOUNDARIES)
def test_tikhonov_inverts_a_small_blur(faces, boundary):
    x, blur = faces.double()[..., :48], Blur(0.6, 3, boundary)
    assert (psnr(tikhonov(blur.A(x), blur, 1e-14), x) > 100).all()


def test_tikhonov_solves_its_normal_equations(faces):
    x, blur, alpha = faces.double(), Blur(2.0, 7, "zero"), 0.01
    y = blur.A(x)
    x_hat = tikhonov(y, blur, alpha)
    torch.testing.assert_close(blur.A_adjoint(blur.A(x_hat) - y) + alpha * x_hat, torch.zeros_like(x))


def test_conjugate_gradients_fit_better_with_every_step(faces):
    x, blur = faces.double(), Blur(5.0, 9, "reflect")
    y = blur.A(x)
    residuals = torch.stack(
        [(blur.A(conjugate_gradients(y, blur, n)) - y).flatten(1).norm(dim=1) for n in range(12)]
    )
    assert (residuals.diff(dim=0) < 0).all()
    # The answer to a solved system, and to nothing, is finite.
    assert conjugate_gradients(y * 0, Blur(0.5, 3), 400).abs().max() == 0
    assert (psnr(conjugate_gradients(x, Blur(0.5, 1), 400), x) > 100).all()


def test_tv_inpainting_keeps_measured_pixels_and_varies_less_than_the_truth(faces):
    operator = OPERATORS["inpainting"]
    x_hat = tv_inpainting(operator.A(faces), operator)
    torch.testing.assert_close(operator.A(x_hat), operator.A(faces), atol=1e-5, rtol=0)

    def total_variation(x):
        return torch.hypot(x[..., 1:, :-1] - x[..., :-1, :-1], x[..., :-1, 1:] - x[..., :-1, :-1]).sum()

    assert total_variation(x_hat) < total_variation(faces)


def test_records_stand_beside_the_paper_and_go_into_every_table(tmp_path, monkeypatch):
    for module in (records, runs):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    run = Experiment("smoke", edition="v1", build=tmp_path / "build")
    data.prepare_synthetic(run.build / "data" / "synthetic", num_images=40)
    made = record_classical(run, "denoising-0.1")
    runs.publish_classical(run)
    kept = records.recorded()
    assert [r["name"] for r in kept] == [
        f"classical-denoising-0.1-{key}" for key in ("measurement", "nl-means", "tv")
    ]
    [tv] = [r for r in kept if r["method"] == "Total variation"]
    assert tv["parameter"]["value"] in tv["parameter"]["grid"] and len(tv["psnr"]["values"]) == 8
    assert json.dumps(tv) and tv["data"]["name"] == "synthetic"
    found, none = results.load(kept), results.load([])
    assert not len(found.compared("v1"))  # they are no solvers
    assert len(tables.provenance_rows(none, found)) == len(tables.provenance_rows(found, found)) == 3

    # Found again, in another build too, but not for other images.
    with monkeypatch.context() as inner:
        inner.setattr(classical, "psnr", None)  # it would be needed
        other = Experiment("smoke", edition="v1", build=tmp_path / "other")
        data.prepare_synthetic(other.build / "data" / "synthetic", num_images=40)
        assert record_classical(run, "denoising-0.1") == record_classical(other, "denoising-0.1")
        data.prepare_synthetic(other.build / "data" / "synthetic", num_images=40, seed=1)
        with pytest.raises(TypeError):
            record_classical(other, "denoising-0.1")

    rows = tables.as_text(tables.beside_classical(found, "v1", "denoising-0.1"))
    assert rows[0]["PSNR, dB"] == "29.06" and "GLOW" in rows[0]["Method"] and rows[1]["PSNR, dB"] == "not run"
    assert [row["Method"] for row in rows[2:]][-1] == "Noisy image" and len(rows) == 5 and len(made) == 3
    assert all("" not in row.values() for row in rows)
