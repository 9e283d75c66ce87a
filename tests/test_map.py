"""The estimate (7) over latent codes: the closed form where the flow is linear, starts, batches, refusals."""

import json

import pytest
import torch

import data
from benchmarks import map as benchmark
from companion import map as estimates
from companion.experiment import Experiment
from companion.files import write_json
from companion.records import recorded as all_records
from companion.records import statistics
from companion.words import say
from flowlib import Blur, Denoising, Glow, Inpainting, map_estimate
from flowlib.layers import InvConv1x1
from tests.test_flow import randomize

KEPT = {"profile": "cpu", "dataset": "celeba", "edition": "v2", "seed": 0}


def linear_flow():
    """A Glow whose couplings are affine in their input and whose scales are 1: g(z) = G z + c. In float64."""
    torch.manual_seed(0)
    flow = Glow(num_levels=2, num_steps=1, hidden_channels=4).double()
    with torch.no_grad():
        for module in flow.modules():
            if isinstance(module, InvConv1x1):
                module.weight += 0.1 * torch.randn_like(module.weight)
    return flow


def curved_flow():
    torch.manual_seed(0)
    return randomize(Glow(num_levels=2, num_steps=2, hidden_channels=4)).double()


def images(n=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 8, 8, dtype=torch.float64, generator=generator) - 0.5


def closed_form(flow, operator, y, weight):
    """The minimiser of (7) for linear A and affine g, by the normal equations."""
    shapes = flow.latent_shapes(8)
    sizes = [torch.Size(s).numel() for s in shapes]

    def image(z):
        return flow.inverse([part.reshape(1, *s) for part, s in zip(z.split(sizes), shapes)])[0]

    zero = torch.zeros(sum(sizes), dtype=torch.float64)
    g = torch.autograd.functional.jacobian(image, zero).reshape(-1, sum(sizes))
    a = torch.autograd.functional.jacobian(operator.A, torch.zeros_like(y[:1])).reshape(y[0].numel(), -1)
    h, rest = a @ g, (y - operator.A(image(zero))).flatten(1)
    normal = h.T @ h + weight * torch.eye(sum(sizes), dtype=torch.float64)
    codes = torch.linalg.solve(normal, h.T @ rest.T).T
    return torch.cat([image(z) for z in codes])


@pytest.mark.parametrize("operator", [Denoising(0.2), Inpainting(3, 8), Blur(5.0, 3)], ids=type)
def test_on_a_linear_flow_it_is_the_answer_of_tikhonov(operator):
    flow, operator = linear_flow().requires_grad_(False), operator.double()
    y = operator.measure(images(), torch.Generator().manual_seed(1))
    x_hat, _ = map_estimate(flow, operator, y, 0.05, num_steps=300, lr=0.1)
    torch.testing.assert_close(x_hat, closed_form(flow, operator, y, 0.05), atol=1e-4, rtol=0)


def test_the_objective_falls_and_is_that_of_the_answer():
    flow, operator = curved_flow(), Inpainting(3, 8)
    y = operator.measure(images())
    x_hat, values = map_estimate(flow, operator, y, 0.01, num_steps=80)
    assert values.shape == (81, 2) and (values[-1] < 0.5 * values[0]).all()
    assert (values.diff(dim=0) > 0).sum() < 10
    norm = sum(z.square().flatten(1).sum(1) for z in flow(x_hat)[0])
    misfit = (y - operator.A(x_hat)).square().flatten(1).sum(1)
    torch.testing.assert_close(values[-1], misfit + 0.01 * norm)
    first = (y - operator.A(flow.mode(8))).square().flatten(1).sum(1)
    torch.testing.assert_close(values[0], first)  # z = 0


def test_the_start_matters_and_chance_does_not():
    flow, operator = curved_flow(), Denoising(0.2)
    y = operator.measure(images(), torch.Generator().manual_seed(1))
    zero, again, from_y, from_mode = (
        map_estimate(flow, operator, y, 0.04, start, num_steps=20)[0]
        for start in (None, None, y, flow.mode(8).detach())
    )
    assert torch.equal(zero, again)
    torch.testing.assert_close(from_mode, zero, atol=1e-4, rtol=0)  # f(g(0)) = 0, one for the whole batch
    assert (zero - from_y).abs().max() > 0.01


def test_an_image_does_not_depend_on_its_batch_nor_the_flow_on_the_estimate():
    flow, operator = curved_flow(), Blur(5.0, 3).double()
    y = operator.measure(images(3))
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    together, values = map_estimate(flow, operator, y, 0.01, num_steps=30)
    alone = [map_estimate(flow, operator, one[None], 0.01, num_steps=30) for one in y]
    torch.testing.assert_close(together, torch.cat([x for x, _ in alone]))
    torch.testing.assert_close(values, torch.cat([v for _, v in alone], dim=1))
    assert all(p.grad is None and p.requires_grad for p in flow.parameters()) and not together.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())


def test_it_works_where_gradients_are_off_and_in_float32():
    flow, y = curved_flow().float(), images().float()
    with torch.inference_mode(False), torch.no_grad():
        x_hat, values = map_estimate(flow, Denoising(), y, 0.04, num_steps=3)
    assert x_hat.dtype == values.dtype == torch.float32 and x_hat.shape == y.shape


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(y=images() * float("nan")), "y holds numbers that are not finite"),
        (dict(start=images() / 0), "start holds numbers that are not finite"),
        (dict(y=torch.zeros(2, 3, 8, 8, dtype=torch.uint8)), "floating-point"),
        (dict(y=images()[:, :, :6]), "divisible"),
        (dict(y=images()[:, :1]), "expected images .B, 3, H, W."),
        (dict(y=images()[:, :1], start=images()), "y .2, 1, 8, 8. does not fit A x or start"),
        (dict(start=images(3)), "does not fit A x or start, x being .3, 3, 8, 8."),
        (dict(weight=-0.1), "weight must be >= 0"),
        (dict(weight=float("nan")), "weight must be >= 0"),
        (dict(num_steps=0), "num_steps > 0"),
        (dict(lr=0.0), "lr and num_steps > 0"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = dict(y=images(), weight=0.04) | change
    with pytest.raises(ValueError, match=message):
        map_estimate(curved_flow(), Denoising(), **given)


@pytest.fixture
def benchmarked(tmp_path, monkeypatch):
    """(run, path): the benchmark with a small flow on drawn images; run(images) goes on with the record."""
    experiment = Experiment("smoke", build=tmp_path)
    data.prepare_synthetic(experiment.build / "data/synthetic", num_images=40)
    torch.manual_seed(0)
    flow = Glow(num_levels=2, num_steps=1, hidden_channels=4)
    flow.initialize(torch.rand(8, 3, 64, 64) - 0.5)
    path = tmp_path / "denoising.json"
    monkeypatch.setattr(benchmark, "Experiment", lambda *_, **__: experiment)
    monkeypatch.setattr(benchmark, "kept_model", lambda *_: flow)
    monkeypatch.setattr(benchmark, "time_solvers", lambda *_: {"glow": 0.5})
    grid = dict(weights=(0.04, 0.4), rates=(0.06,), num_steps=(2,))
    monkeypatch.setitem(benchmark.GRIDS, "denoising", grid)

    def run(images):
        given = ["map", "denoising", "--images", str(images), "--validation", "2", "--out", str(path)]
        monkeypatch.setattr("sys.argv", given)
        benchmark.main()
        return json.loads(path.read_text())

    return run, path


def test_the_benchmark_goes_on_where_it_stopped(benchmarked, monkeypatch):
    run, path = benchmarked
    whole = run(6)
    assert whole["chosen"]["num_steps"] == 2 and len(whole["validation"]) == 2 and len(whole["starts"]) == 3
    assert len(whole["test"]["psnr"]["values"]) == 6 and whole["test"]["runs"][0]["images"] == 6
    path.unlink()
    run(3)
    steps = []
    monkeypatch.setattr(benchmark, "map_estimate", lambda *a, **k: steps.append(1) or map_estimate(*a, **k))
    later = run(6)
    assert len(steps) == 1 and [r["images"] for r in later["test"]["runs"]] == [3, 3]
    for name in ("psnr", "ssim", "objective", "bits_per_dim_original"):
        assert later["test"][name]["values"] == pytest.approx(whole["test"][name]["values"], abs=1e-3)
    assert run(4)["test"] == later["test"]  # nothing is lost by asking for fewer


def test_a_record_about_something_else_is_not_gone_on_with(benchmarked):
    run, path = benchmarked
    run(2)
    before = path.read_bytes()
    benchmark.GRIDS["denoising"]["weights"] = (0.04,)
    with pytest.raises(ValueError, match="another grid: delete it, or give --out"):
        run(4)
    assert path.read_bytes() == before


def lesson():
    return say("map", **estimates.summary(all_records()))


def test_the_page_compares_image_by_image(tmp_path, monkeypatch):
    [solver] = (
        r
        for r in all_records()
        if r["kind"] == "solver" and r["name"] == "denoising-glow" and r["experiment"] == KEPT
    )
    values = [value + 1 + 0.1 * (-1) ** i for i, value in enumerate(solver["psnr"]["values"][:10])]
    of_images = dict.fromkeys(("norm_squared", "norm_squared_original", "bits_per_dim"), {"mean": 2.0})
    of_images |= {"bits_per_dim_original": {"mean": 3.0}, "objective": {"mean": 500.0}}
    part = {"psnr": statistics(values), "runs": [{"images": 10, "seconds": 70.0}], **of_images}
    setting = dict(weight=0.04, lr=0.06, num_steps=90)
    tried = setting | {"psnr": 26.0, "objective": 500.0, "seconds": 7.0}
    starts = {"z = 0": tried, "f(Aᵀy)": tried | {"psnr": 12.0, "psnr_of_start": 14.0}}
    record = {"task": "denoising", "experiment": KEPT, "data": solver["data"], "test": part}
    record |= dict(chosen=setting, validation=[tried], starts=starts, solver_seconds={"glow": 0.5})
    monkeypatch.setattr(estimates, "RESULTS", tmp_path)
    assert estimates.rows(all_records()) == [] and "No estimate" in lesson()
    write_json(tmp_path / "benchmarks/map/denoising.json", record)
    [row] = [r for r in estimates.rows(all_records()) if r["Solver"] == "GLOW"]
    assert row["Images"] == 10 and row["Estimate above it, dB"] == "+1.00 ± 0.08"  # t(9) · 0.105 / √10
    assert (row["Estimate, s an image"], row["Solver, s an image"]) == ("7.0", "0.50")
    assert estimates.rows(all_records(), "ood_images") == []
    assert "above the trained flow solver in denoising" in lesson()
    assert "is 14 times as fast" in lesson() and "denoising (f(Aᵀy), −14.00 dB)" in lesson()
    beside = estimates.beside_flow(all_records())
    assert "trained flow solver is −1.00 ± 0.08 dB above it" in say("map_in_short", beside=beside)
    chosen, from_y = estimates.validation_rows("denoising")
    assert chosen["Chosen"] == "yes" and "14.00 dB" in from_y["Start"]
    [row] = estimates.likelihood_rows()
    assert row["Bits/dim"] == "2.00" and row["Bits/dim, original"] == "3.00"
    assert (
        row["‖y − A x‖²"] == "499.9" and row["‖y − A x‖², original"] == "491.5"
    )  # 500 - 0.04 · 2; 12288 · 0.2²
    assert "more steps" not in lesson()
    later = tried | {"num_steps": 180, "objective": 400.0, "psnr": 24.0}
    write_json(tmp_path / "benchmarks/map/denoising.json", record | {"validation": [tried, later]})
    assert "In denoising more steps lower the objective" in lesson()
    later["psnr"] = 27.0
    write_json(tmp_path / "benchmarks/map/denoising.json", record | {"validation": [tried, later]})
    assert "more steps" not in lesson()
    found = {"shrinkage": 0.003, "step_size": 0.2, "psnr": statistics(values)}
    plugged = record | {"measurement": found, "without_flow": found | {"shrinkage": 0.0}, "plugged_in": found}
    write_json(tmp_path / "benchmarks/plugged_in/denoising.json", plugged)
    what = {row["What"]: row["λ, μ"] for row in estimates.plugged_in_rows(all_records())}
    assert what["plugged in, λ and μ chosen"] == "0.003, 0.2" and what["data steps alone"] == "0, 0.2"
    assert what["plugged in, as the paper has it"] == "0.1, trained" and "trained" in what
