"""The recipe: folds that are added to a solver, the profile made of it, its trials, what is said of them."""

from dataclasses import replace

import pytest
import torch

import data
from benchmarks import recipe
from companion import compute, records, results, runs
from companion.experiment import Experiment
from companion.queue import TASK_ORDER, queue
from companion.settings import PROFILES, Training
from companion.training import add_folds, build_solver, train
from flowlib import Denoising, Glow, GlowProx, UnfoldedPGD, psnr
from tests.test_flow import randomize


def small_solver(num_folds=1):
    torch.manual_seed(0)
    flows = [randomize(Glow(num_levels=2, num_steps=1, hidden_channels=4), seed=k) for k in range(num_folds)]
    proxes = [GlowProx(flow.double()) for flow in flows]
    return UnfoldedPGD(proxes, torch.zeros(1, 3, 16, 16, dtype=torch.float64), 0.7, 0.4)


def test_added_folds_do_nothing_at_first_and_learn():
    one, operator = small_solver(), Denoising(0.2)
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64) - 0.5
    y = operator.measure(x, torch.Generator().manual_seed(0))
    expected = one(y, operator).detach()
    four = add_folds(one, 4)
    torch.testing.assert_close(four(y, operator), expected)
    assert four.step_size.tolist() == pytest.approx([0.7, 0, 0, 0])
    assert four.shrinkage.tolist() == pytest.approx([0.4, 0, 0, 0])
    assert (
        len({id(p) for p in four.parameters()}) == len(list(four.parameters())) > len(list(one.parameters()))
    )
    (four(y, operator) - x).square().mean().backward()
    assert (four.step_size.grad != 0).all() and (four.shrinkage.grad != 0).all()


def test_a_fold_is_worth_what_is_lost_without_its_prox():
    solver, operator = small_solver(2), Denoising(0.2)
    x = torch.rand(4, 3, 16, 16, dtype=torch.float64) - 0.5
    y = operator.measure(x, torch.Generator().manual_seed(0))
    before = solver.shrinkage.clone()
    rows = records.describe_folds(solver, operator, y, x)
    assert torch.equal(solver.shrinkage, before)
    with torch.no_grad():
        whole = psnr(solver(y, operator), x).mean()
        for k, row in enumerate(rows):
            without = UnfoldedPGD(solver.proxes, solver.x0, 0.7, [0.4 * (j != k) for j in range(2)])
            assert row["worth"] == pytest.approx((whole - psnr(without(y, operator), x).mean()).item())
            assert abs(row["worth"]) > 1e-3


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """A smoke experiment whose four folds start from its one, as the profile muon's do."""
    with pytest.MonkeyPatch.context() as patch:
        stages = replace(PROFILES["smoke"], starts={"glow": "glow-1"})
        patch.setitem(PROFILES, "smoke", stages)
        experiment = Experiment("smoke", build=tmp_path_factory.mktemp("build"))
    data.prepare_synthetic(experiment.build / "data" / "synthetic", num_images=40)
    return experiment


def test_four_folds_start_where_one_ended(staged):
    run = staged.solver("inpainting", "glow")
    assert (run.num_folds, run.start.name, run.start.num_folds) == (4, "inpainting-glow-1", 1)
    assert run.start.start == staged.flow()
    runs.ensure(staged, run.start)
    one, four = runs.load(staged, run.start), build_solver(staged, run)
    x = torch.rand(2, 3, 64, 64) - 0.5
    torch.testing.assert_close(four(x, Denoising(0.2)), one(x, Denoising(0.2)), atol=1e-4, rtol=0)
    record = runs.ensure(staged, run)
    assert record["settings"]["start"] == run.start.settings_hash and record["num_folds"] == 4
    found = results.load(runs.ensure(staged, r) for r in (staged.flow(), run.start, run))
    every = results.rows(found.runs)
    assert compute.spent(every[-1], every) == pytest.approx(found.runs.minutes.sum())


def test_a_blind_denoiser_sees_a_noise_level_for_each_image(staged, monkeypatch):
    run = replace(staged.solver("denoising", "unet"), blind_sigma=0.3, training=Training(1, 16, 1e-3))
    seen = {}
    monkeypatch.setattr("companion.training.fit", lambda *given, **_: seen.update(batch=given[2]) or {})
    train(staged, run)
    x, y = seen["batch"](range(16), 0)
    levels = (y - x).std(dim=(1, 2, 3))
    assert 0 < levels.min() < 0.1 and 0.2 < levels.max() < 0.31
    assert torch.equal(seen["batch"](range(16), 0)[1], y)


def test_the_profile_shares_the_flow_of_another():
    cpu = Experiment("cpu", "celeba")
    for seed in (0, 2):
        muon = Experiment("muon", "celeba", seed=seed)
        assert muon.flow() == cpu.flow() and muon.place(muon.flow()) == cpu.place(cpu.flow())
        assert muon.place(muon.solver("inpainting", "glow")) == f"muon-celeba-s{seed}/v2/inpainting-glow"


def test_a_profile_supersedes_another_where_it_has_all_that_is_compared():
    found = [r for r in records.recorded() if r["experiment"]["profile"] in ("cpu", "short")]
    newer = [
        r | {"experiment": r["experiment"] | {"profile": "muon"}}
        for r in found
        if r["experiment"]["profile"] == "cpu" and r["task"] == "inpainting" and "settings_hash" in r
    ]

    def shown(more):
        return set(results.load(found + more).compared("v2", "inpainting").profile)

    assert shown([]) == {"cpu"} and shown(newer) == {"muon"}
    assert shown([r for r in newer if r["method"] != "unet"]) == {"cpu"}  # no rival, no comparison


def test_trials_start_from_what_there_is():
    for name, trial in recipe.TRIALS.items():
        before = recipe.TRIALS.get(trial.start)
        assert before or trial.start in ("flow", "flow-noisy", None), name
        if before:
            assert before.task == trial.task and before.num_folds < trial.num_folds, name


def test_folds_of_a_trial_share_a_flow_where_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "ensure", lambda *_: None)
    monkeypatch.setattr(recipe, "load", lambda *_: Glow(num_levels=2, num_steps=1, hidden_channels=4))
    experiment = Experiment("smoke", build=tmp_path)
    for tied in (False, True):
        trial = recipe.Trial("denoising", 1, 1, 1e-3, num_folds=4, tied=tied)
        solver = recipe.build(experiment, trial, tmp_path)
        assert len({id(prox) for prox in solver.proxes}) == (1 if tied else 4)


def test_the_loss_of_all_folds_ends_as_that_of_the_last():
    solver, operator = small_solver(2), Denoising(0.2)
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64) - 0.5
    y = operator.measure(x, torch.Generator().manual_seed(0))
    last, folds = solver(y, operator, return_folds=True)
    errors = [(fold.x - x).square().mean() for fold in folds]
    loss = recipe.fold_loss(solver, 0.3, 4)
    values = [loss(x, y, operator) for _ in range(4)]
    for value, share in zip(values, (0.3, 0.15, 0, 0)):
        torch.testing.assert_close(value.detach(), errors[1] + share * errors[0])


def best(optimizer, task, shrinkage=0.1):
    about = dict(optimizer=optimizer, task=task, shrinkage=shrinkage, num_folds=1, network="glow")
    found = [t for t in compute.trials().values() if about.items() <= t["trial"].items()]
    return max(t["curve"][-1][1] for t in found if not t["diverged"] and t["minutes"] < 12)


def test_what_the_front_page_says_of_the_optimizers_is_recorded():
    """Much faster in denoising; alike in inpainting, but for a larger λ at the start."""
    trials = compute.trials()
    muon, adam = trials["screen-muon-0.001"]["curve"], trials["screen-adam-0.0004"]["curve"][-1]
    assert min(minute for minute, decibels in muon if decibels > adam[1]) < 0.75 * adam[0]
    assert best("muon", "denoising") - best("adam", "denoising") > 0.5
    assert abs(best("muon", "inpainting") - best("adam", "inpainting")) < 0.1
    assert best("muon", "inpainting", 0.6) - best("muon", "inpainting") > 0.2
    assert best("adam", "inpainting", 0.6) - best("adam", "inpainting") < -0.2


def test_the_queue_has_every_row_of_a_profile_of_one_fold_first_once_for_three_seeds():
    rows = list(queue(profile="muon", dataset="celeba", build="build"))
    profile = PROFILES["muon"]
    names = [(run.task, run.method, run.seed) for _, run in rows]
    assert len(names) == len(set(names))
    wanted = {(task, m, seed) for task in TASK_ORDER for m in profile.methods[task] for seed in (0, 1, 2)}
    assert set(names) == wanted
    for name, start in profile.starts.items():  # what a row starts from stands before it
        for task, method, seed in names:
            if method == name:
                assert names.index((task, start, seed)) < names.index((task, method, seed))


@pytest.mark.parametrize("task", ["denoising", "inpainting"])
def test_the_best_trial_stands_beside_the_recorded_solvers(task):
    recorded, trials = results.load(), compute.trials()
    best, *others = compute.beside_recorded(recorded, trials, task)
    ended = [t for t in trials.values() if t["trial"]["task"] == task and not t["diverged"]]
    assert best["Validation, dB"] == max(t["curve"][-1][1] for t in ended)
    assert {"GLOW", "U-Net", "ResNet"} <= {row["Solver"] for row in others}
    assert all(20 < row["Validation, dB"] < 40 and row["Minutes"] > 0 for row in others)
    assert compute.beside_recorded(recorded, {}, task) == others
