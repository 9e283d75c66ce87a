"""Runs: what is made is found again, what is kept is restored where it fits, and nothing stale is shown."""

import ast
import json
import os
import shutil
import subprocess
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch

import data
from companion import book, compute, figures, front, locks, paths, records, runs, settings, tables, training
from companion.__main__ import main
from companion.experiment import Experiment
from companion.training import model_path
from flowlib.checkpoints import load_checkpoint, load_tensors, save_checkpoint
from flowlib.training import Training
from tests.conftest import ROOT
from tests.test_flow import randomize


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A results folder of our own."""
    folder = tmp_path / "results"
    for module in (paths, records, runs, tables):
        monkeypatch.setattr(module, "RESULTS", folder)
    folder.mkdir()
    shutil.copy(ROOT / "results/paper.csv", folder)
    (folder / "benchmarks").mkdir()
    shutil.copy(ROOT / "results/benchmarks/learning_rates.json", folder / "benchmarks")
    return folder


@pytest.fixture
def smoke(tmp_path, results):
    experiment = Experiment("smoke", build=tmp_path / "build")
    data.prepare_synthetic(experiment.build / "data" / "synthetic", num_images=40)
    return experiment


def forbid_training(monkeypatch):
    def train(*_):
        raise AssertionError("nothing is to be trained here")

    monkeypatch.setattr(runs, "train", train)


def test_a_finished_run_is_found_again(smoke, monkeypatch):
    run = smoke.solver("denoising", "resnet")
    record = runs.ensure(smoke, run)
    assert record["settings_hash"] == run.settings_hash and record["settings"] == run.as_dict()
    assert not (smoke.directory(run) / "resume.safetensors").exists()
    forbid_training(monkeypatch)
    assert runs.ensure(smoke, run) == record and runs.is_finished(smoke, run)


def test_a_model_that_was_deleted_is_made_again(smoke, monkeypatch):
    run = smoke.solver("denoising", "resnet")
    record = runs.ensure(smoke, run)
    path = model_path(smoke, run)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="model.safetensors .*truncated.*: delete it"):
        runs.load(smoke, run)
    path.unlink()
    assert runs.ensure(smoke, run)["psnr"] == record["psnr"] and path.exists()
    runs.publish(smoke, run, ship=True)
    path.unlink()
    forbid_training(monkeypatch)  # what is kept with the code is restored
    assert runs.ensure(smoke, run)["kept"] and path.exists()


def test_a_second_process_says_that_it_waits(tmp_path, capsys):
    path, order = tmp_path / "inpainting-glow-0123456789" / "lock", []

    def second():
        with runs._locked(path):
            order.append("second")

    with runs._locked(path):
        assert not capsys.readouterr().err
        thread = threading.Thread(target=second)
        thread.start()
        while "waiting" not in (told := capsys.readouterr().err):
            assert thread.is_alive()
        order.append("first")
    thread.join()
    assert "another process is making inpainting-glow-0123456789" in told and order == ["first", "second"]


def test_a_finished_run_is_read_without_a_right_to_write(smoke, monkeypatch):
    """By another user, in a clone that is not theirs."""
    run = smoke.solver("denoising", "glow")
    record = runs.ensure(smoke, run)

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    for module, name in ((runs, "locked"), (locks, "open"), (os, "mkdir"), (os, "replace")):
        monkeypatch.setattr(module, name, refused, raising=False)
    assert runs.ensure(smoke, run) == record and runs.load(smoke, run)


def test_everything_is_trained_anew_when_asked(smoke, monkeypatch):
    """With RETRAIN=1, what is finished too; a build that was killed at it goes on; the next one without it
    leaves all as it is."""
    flow, run = smoke.flow(), smoke.solver("denoising", "glow")
    trained, choice = [], dict(smoke.names, build=str(smoke.build))

    def train(experiment, run):
        trained.append(run.name)
        return training.train(experiment, run)

    def snakemake(command, env, **_):
        if "--unlock" not in command:
            assert env["RETRAIN"] == os.environ["RETRAIN"]
            for asked in (flow, run)[: snakemake.until]:
                runs.ensure(smoke, asked)
        return subprocess.CompletedProcess(command, int(snakemake.until < 2))

    monkeypatch.setattr(runs, "train", train)
    monkeypatch.setattr(book, "subprocess", SimpleNamespace(run=snakemake, DEVNULL=None))
    wanted = [("0", 2, ["flow", "denoising-glow"]), ("0", 2, []), ("1", 2, ["flow", "denoising-glow"])]
    wanted += [("1", 1, ["flow"]), ("1", 2, ["denoising-glow"]), ("0", 2, []), ("", 2, [])]
    for value, snakemake.until, expected in wanted:
        monkeypatch.setenv("RETRAIN", value)
        trained.clear()
        (smoke.build / "executed").mkdir(exist_ok=True)
        assert book.build_book(**choice) == int(snakemake.until < 2)
        assert trained == expected, (value, snakemake.until)
        assert (smoke.build / "executed").exists() != (value == "1" and "flow" in expected)
    monkeypatch.setenv("RETRAIN", "yes")
    with pytest.raises(ValueError, match="^RETRAIN='yes': give 1"):
        book.build_book(**choice)


def test_other_settings_are_another_run(smoke):
    run = smoke.solver("inpainting", "glow")
    for overrides in (
        dict(lr=1e-4),
        dict(num_steps=5),
        dict(num_folds=2),
        dict(flow=dict(num_levels=2, num_steps=2)),
    ):
        other = Experiment("smoke", build=smoke.build, **overrides).solver("inpainting", "glow")
        assert other.settings_hash != run.settings_hash and smoke.directory(other) != smoke.directory(run)
    # A changed flow is another start of those that start from it, and of no others.
    other = Experiment("smoke", build=smoke.build, flow=dict(num_levels=2, num_steps=2))
    assert (
        other.solver("inpainting", "unet").settings_hash == smoke.solver("inpainting", "unet").settings_hash
    )
    # How often a run saves itself changes no number.
    saved_often = replace(run, training=replace(run.training, checkpoint_minutes=1))
    assert saved_often.settings_hash == run.settings_hash


def test_changed_code_is_another_run_changed_metrics_another_evaluation(smoke, monkeypatch):
    run = smoke.solver("denoising", "resnet")
    before = runs.ensure(smoke, run)
    monkeypatch.setattr(runs, "evaluation_code", lambda: "new metrics")
    monkeypatch.setattr(records, "evaluation_code", lambda: "new metrics")
    with monkeypatch.context() as inner:
        forbid_training(inner)
        again = runs.ensure(smoke, run)
    assert again["evaluation_code"] == "new metrics" and again["psnr"] == before["psnr"]
    folder = smoke.directory(run)
    monkeypatch.setattr(settings, "training_code", lambda: "new prox")
    assert smoke.directory(run) != folder and not runs.is_finished(smoke, run)


def test_comments_and_docstrings_are_no_code(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "ROOT", tmp_path)
    path = tmp_path / "a.py"

    def hash_of(text):
        path.write_text(text)
        return settings._code_hash(["a.py"])

    first = hash_of('"""Doc."""\ndef f(x):\n    """Doc."""\n    return x + 1\n')
    assert hash_of("def f(x):  # comment\n\n    return x + 1\n") == first
    assert hash_of("def f(x):\n    return x + 2\n") != first


def test_other_images_are_trained_on_anew(smoke):
    run = smoke.solver("denoising", "resnet")
    before = runs.ensure(smoke, run)
    data.prepare_synthetic(smoke.build / "data" / "synthetic", num_images=40, seed=1)
    assert not runs.is_finished(smoke, run)
    after = runs.ensure(smoke, run)
    assert (
        after["data"]["pixels_sha256"] != before["data"]["pixels_sha256"] and after["psnr"] != before["psnr"]
    )


def test_kept_models_are_restored_where_they_fit(smoke, results, monkeypatch):
    run = smoke.solver("denoising", "resnet")
    record = runs.ensure(smoke, run)
    runs.publish(smoke, run, ship=True)
    forget = lambda: shutil.rmtree(smoke.build / "runs")  # noqa: E731
    forget()
    with monkeypatch.context() as inner:
        forbid_training(inner)
        restored = runs.ensure(smoke, run)
        assert restored["kept"] and restored["psnr"] == record["psnr"] and model_path(smoke, run).exists()
        # Other settings do not fit.
        with pytest.raises(AssertionError, match="nothing is to be trained"):
            runs.ensure(smoke, replace(run, seed=1))
        # Nor do other images, nor is anything kept used with RETRAIN=1.
        inner.setenv("RETRAIN", "1")
        with pytest.raises(AssertionError, match="nothing is to be trained"):
            runs.ensure(smoke, run)
        inner.delenv("RETRAIN")
        forget()
        data.prepare_synthetic(smoke.build / "data" / "synthetic", num_images=40, seed=1)
        with pytest.raises(AssertionError, match="nothing is to be trained"):
            runs.ensure(smoke, run)


def test_verify_tells_what_does_not_give_its_number(smoke, results, capsys):
    run = smoke.solver("denoising", "resnet")
    for shipped in (smoke.flow(), run):
        runs.ensure(smoke, shipped)
        runs.publish(smoke, shipped, ship=True)
    assert main(["verify", "--build", str(smoke.build)]) == 0
    path, _ = runs.kept_place(smoke, run)
    record = json.loads(path.read_text())
    record["psnr"]["mean"] += 0.03
    path.write_text(json.dumps(record))
    assert main(["verify", "--build", str(smoke.build)]) == 1
    assert "False" in capsys.readouterr().out
    data.prepare_synthetic(smoke.build / "data" / "synthetic", num_images=40, seed=1)
    main(["verify", "--build", str(smoke.build)])
    assert "not evaluated: these are other images" in capsys.readouterr().out
    shutil.rmtree(results / "checkpoints")
    assert main(["verify", "--build", str(smoke.build)]) == 2
    assert "no model is kept here" in capsys.readouterr().err


def test_images_that_are_not_there_are_no_failure(smoke, results, tmp_path, monkeypatch):
    run = smoke.solver("denoising", "resnet")
    runs.ensure(smoke, run)
    path = runs.publish(smoke, run, ship=True)
    record = json.loads(path.read_text())
    record["experiment"]["dataset"] = "celeba"
    path.write_text(json.dumps(record))
    monkeypatch.setenv("FLOWLIB_DATA", str(tmp_path))
    [row] = records.verify(tmp_path / "other")
    assert "not evaluated: no celeba images" in row["found"]


def test_a_solver_is_published_with_its_flow(smoke, results):
    """Or not at all: it is kept as differences to the flow."""
    flow, run = smoke.flow(), smoke.solver("denoising", "glow")
    runs.ensure(smoke, run)
    publish = ["publish", "--profile", "smoke", "--build", str(smoke.build), "--ship"]
    before = sorted(results.rglob("*"))
    with pytest.raises(ValueError, match="its flow, which is not kept: --ship flow denoising-glow"):
        main([*publish, "denoising-glow"])
    with pytest.raises(FileNotFoundError, match="inpainting-unet is not finished"):
        main([*publish, "flow", "inpainting-unet"])
    assert sorted(results.rglob("*")) == before
    main([*publish, "flow", "denoising-glow"])
    assert runs.kept_model(smoke, run)
    main([*publish, "flow"])  # the same one
    path = model_path(smoke, flow)
    save_checkpoint(path, randomize(load_checkpoint(path)), **load_tensors(path)[1]["info"])
    (_, kept), kept_content = runs.kept_place(smoke, flow), runs.kept_place(smoke, flow)[1].read_bytes()
    with pytest.raises(ValueError, match="denoising-glow: counted from the flow kept now: --ship them too"):
        main([*publish, "flow"])
    assert kept.read_bytes() == kept_content and runs.kept_model(smoke, run)
    main([*publish, "flow", "denoising-glow"])
    assert kept.read_bytes() != kept_content and runs.kept_model(smoke, run)
    forgotten = smoke.directory(run) / "record.json"
    records.write(forgotten, json.loads(forgotten.read_text()) | {"date": "another training"})
    with pytest.raises(ValueError, match="denoising-glow.safetensors is of another training: --ship"):
        main(publish[:-1])


def test_a_full_disk_leaves_flow_and_solver_together(smoke, results, monkeypatch):
    pair = [smoke.flow(), smoke.solver("denoising", "glow")]
    runs.ensure(smoke, pair[1])
    runs.publish_all(smoke, pair, pair)
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    path, packed = model_path(smoke, pair[0]), runs.pack
    save_checkpoint(path, randomize(load_checkpoint(path)), **load_tensors(path)[1]["info"])

    def full(model, *args, **options):
        if "denoising" in str(model):
            raise OSError(28, "No space left on device")
        packed(model, *args, **options)

    monkeypatch.setattr(runs, "pack", full)
    with pytest.raises(OSError, match="No space left"):
        runs.publish_all(smoke, pair, pair)
    assert {path: path.read_bytes() for path in results.rglob("*") if path.is_file()} == before


def test_an_unfinished_run_is_not_published(smoke):
    with pytest.raises(FileNotFoundError, match="denoising-resnet is not finished"):
        runs.publish(smoke, smoke.solver("denoising", "resnet"))
    with pytest.raises(ValueError, match="unknown run 'inpainting'; choose one of: flow, "):
        main(["publish", "--profile", "smoke", "--build", str(smoke.build), "--ship", "inpainting"])


def test_a_full_disk_leaves_what_was_published(smoke, results, monkeypatch):
    """The record and the model are of one run: both old, or both new."""
    run = smoke.solver("denoising", "resnet")
    runs.ensure(smoke, run)
    runs.publish(smoke, run, ship=True)
    record_path, kept = runs.kept_place(smoke, run)
    record = json.loads(record_path.read_text())
    record_path.write_text(json.dumps(record | {"name": "old"}))
    kept.write_bytes(b"old")
    before = sorted(results.rglob("*"))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for module, name in ((runs.records, "write"), (runs, "pack")):
        with monkeypatch.context() as inner:
            inner.setattr(module, name, full)
            with pytest.raises(OSError, match="No space left"):
                runs.publish(smoke, run, ship=True)
        assert json.loads(record_path.read_text())["name"] == "old" and kept.read_bytes() == b"old"
        assert sorted(results.rglob("*")) == before
    runs.publish(smoke, run, ship=True)
    assert json.loads(record_path.read_text()) == record
    assert runs.kept_model(smoke, run) and sorted(results.rglob("*")) == before


def test_a_kill_while_evaluating_does_not_throw_the_training_away(smoke, monkeypatch):
    run = smoke.solver("denoising", "resnet")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as inner:
        inner.setattr(records, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            runs.ensure(smoke, run)
    _, header = load_tensors(smoke.directory(run) / "resume.safetensors")
    assert header["finished"]
    steps = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: steps.append(1))
    assert runs.ensure(smoke, run)["training"]["steps"] == 4 and not steps


def test_records_hold_what_the_tables_need(smoke):
    data.prepare_synthetic(smoke.build / "data" / "synthetic-ood", num_images=6, style="ood")
    flow, glow, unet = (
        runs.ensure(smoke, run)
        for run in (smoke.flow(), smoke.solver("denoising", "glow"), smoke.solver("denoising", "unet"))
    )
    assert len(glow["psnr"]["values"]) == 8 and glow["training"]["images_seen"] == 16
    assert glow["psnr_measurement"]["mean"] == pytest.approx(14, abs=0.3)  # noise of 0.2: -20 log10(0.2) dB
    assert glow["folds"][-1]["psnr"] == pytest.approx(glow["psnr"]["mean"], abs=1e-3)
    assert glow["ood_measurements"]["psnr"]["mean"] < glow["psnr"]["mean"] + 1
    assert len(glow["ood_images"]["psnr"]["values"]) == 6
    rows = {r["Method"]: r for r in tables.table("III", "v2", [glow]) if r["Task"] == "denoising"}
    assert rows["GLOW prox"]["Ours, dB"] == tables.plus_minus(glow["ood_measurements"]["psnr"])
    assert rows["GLOW prox"]["Setting"] == "σₙ = 0.25" and rows["U-Net prox"]["Ours, dB"] == "not run"
    assert rows["GLOW prox"]["Seeds"] == "1" and rows["U-Net prox"]["Seeds"] == "–"
    assert rows["GLOW prox"]["Record"] == tables.record_of(glow) and rows["U-Net prox"]["Record"] == "–"
    repeated = {r["Task"] for r in tables.table("III", "v2", [glow]) if "repeats table I" in r["Remark"]}
    assert repeated == {"deblurring"}  # of blurs with 3 taps, σ_b 5 and 8 hardly differ
    tables.tabulate(smoke)
    row = next(r for r in tables.table("I", "v2", runs.records_of_build(smoke)) if r["Method"] == "GLOW prox")
    assert row["Paper, dB"] == "28.24" and row["Ours, dB"].startswith(f"{glow['psnr']['mean']:.2f}\u00a0±")
    for run in (smoke.flow(), smoke.solver("denoising", "glow"), smoke.solver("denoising", "unet")):
        runs.publish(smoke, run)
    kept = {r["name"]: r for r in records.recorded()}
    assert sorted(kept) == ["denoising-glow", "denoising-unet", "flow"]
    chosen = records.comparison(list(kept.values()), "v2")
    assert {r["name"] for r in chosen} == {"denoising-glow", "denoising-unet"}
    row = tables.overview("v2", chosen)[0]
    assert row["First over second"] == "GLOW over U-Net" and row["inpainting, W = 19"] == "–"
    assert row["denoising, σₙ = 0.2"].endswith("(+0.06)") and row["deblurring, σ_b = 5"] == "–"
    (smoke.directory(smoke.solver("denoising", "unet")) / "record.json").write_text("{")
    with pytest.raises(ValueError, match="is no result record"):
        runs.records_of_build(smoke)


def solver_record(method, psnr, measurement=20.0, seed=0, profile="cpu", images_seen=100, task="denoising"):
    """The part of a record that tables compare."""
    quality = records.statistics([psnr + d for d in (-0.1, 0.0, 0.1)])
    return dict(
        kind="solver",
        name=f"{task}-{method}",
        task=task,
        method=method,
        experiment=dict(profile=profile, dataset="celeba", edition="v2", seed=seed),
        psnr=quality,
        ssim=records.statistics([0.8, 0.9]),
        psnr_measurement=records.statistics([measurement] * 3),
        training=dict(images_seen=images_seen),
        settings_hash="0123456789",
        data=dict(pixels_sha256="x"),
    )


def test_verdicts():
    def verdict(first, second, **options):
        pair = [solver_record("glow", first, **options), solver_record("unet", second, **options)]
        return tables.verdict(tables.compare(pair, "I", "v2", "denoising"))

    assert verdict(28, 25) == "same sign"  # the paper: +0.06
    pair = tables.Comparison(
        0.1, 0.05, 0.06, (1, 1), "", ("", ""), 0.01
    )  # the paper's difference within ±, or not
    assert tables.verdict(pair) == "size replicated"
    assert tables.verdict(pair._replace(half_width=0.03)) == "same sign"
    assert tables.verdict(pair._replace(difference=-0.1)) == "the opposite"
    assert set(tables.MARKS) < set(tables.VERDICTS)
    assert verdict(25, 28) == "the opposite"
    assert verdict(28, 28) == "not distinguishable"
    assert verdict(28, 19) == "no claim: U-Net below its measurement"


def test_seeds_widen_the_interval():
    one = [solver_record("glow", 28), solver_record("unet", 27), solver_record("resnet", 20.5)]
    two = [*one, solver_record("unet", 27.5, seed=1)]
    single, both = (tables.compare(r, "I", "v2", "denoising") for r in (one, two))
    assert single.num_seeds == (1, 1) and both.num_seeds == (1, 2)
    assert both.difference == pytest.approx(0.75)
    # Student's interval of two samples, of one and two: t(1) s sqrt(1 + 1/2), with s² = 0.5² / 2
    of_seeds = 12.706 * np.sqrt(0.5**2 / 2 * 1.5)
    assert both.half_width == pytest.approx(np.hypot(single.half_width, of_seeds), rel=1e-3)
    # The spread of one method tells of another of the same task.
    beside = tables.compare(two, "I", "v2", "denoising", "glow", "resnet")
    assert beside.half_width == pytest.approx(12.706 * np.sqrt(0.5**2 / 2 * 2), rel=1e-2)
    assert single.spread == ("", "") and single.text.endswith("¹")
    assert beside.spread == ("pooled", "pooled") and not beside.text.endswith("¹")
    assert "over test images alone" in figures.in_short("I", "v2", "denoising", one)
    short = figures.in_short("I", "v2", "denoising", two)
    assert "over seeds (1 of GLOW, pooled; 2 of U-Net, pooled; 1 of ResNet, pooled; their spread is" in short


def test_a_page_compares_nothing_with_a_solver_below_its_measurement():
    here = [solver_record(m, v) for m, v in (("glow", 28), ("unet", 18), ("resnet", 27))]
    told = figures.on_this_page("I", "v2", "denoising", [], here).data
    assert "GLOW is 1.00 ± 0.00 dB above ResNet; not compared: U-Net below its measurement." in told
    below = [*here[:2], solver_record("resnet", 19)]
    told = figures.on_this_page("I", "v2", "denoising", [], below).data
    assert "GLOW is" not in told and "U-Net below its measurement; ResNet below its measurement." in told


def test_seeds_stand_beside_the_interval_over_images():
    found = [solver_record("unet", 27 + seed, seed=seed) for seed in (0, 1, 2)]
    (merged,) = records.merged(found)
    assert tables.with_seeds(merged).endswith("(seeds 27.00 to 29.00)")
    assert tables.with_seeds(found[0]) == tables.plus_minus(found[0]["psnr"])
    (row,) = front._results([merged, solver_record("resnet", 19)], "denoising").split("\n")
    assert row == "– / 28.00 / 19.00? dB"


def test_what_each_compared_run_was_given():
    found = records.recorded()
    rows = compute.fairness(found)
    solvers = [r for e in ("v2", "v1") for r in records.comparison(found, e) if r["kind"] == "solver"]
    trained = [r for r in solvers if not settings.METHODS[r["method"]].frozen]
    assert len(rows) == sum(len(records.of_seeds(r)) for r in trained)
    flow = next(r for r in found if r["name"] == "flow" and r["experiment"]["profile"] == "cpu")
    for row in rows:
        if row["Method"] == "GLOW":
            assert row["On"] == "a CPU core" and row["Rates tried"].count(",") == 2
            extra = float(row["With pre-training, min"]) - float(row["Solver, min"])
            assert extra == pytest.approx(tables.minutes(flow), abs=1)
    assert any(row["Restarts at half the rate"] != "–" for row in rows if row["Method"] == "GLOW")
    assert {row["On"] for row in rows} == {"a CPU core", "H100"}


def test_many_tests_are_corrected_for():
    assert tables.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert tables.holm([0.9, 0.8]) == pytest.approx([1, 1]) and len(tables.holm([])) == 0
    difference, half_width, p = tables.over_images_and_seeds([1, 2, 4], [0, 0, 0], [])
    assert p == pytest.approx(scipy.stats.ttest_1samp([1, 2, 4], 0).pvalue)
    assert (p < 0.05) == (abs(difference) > half_width)
    rows = [solver_record(m, v) for m, v in (("glow", 28), ("unet", 25), ("resnet", 19))]
    rows = [row for row in tables.every_claim(rows) if row["Verdict"] != "not run"]
    assert [row["p, Holm"] for row in rows] == ["0.000", "–"]  # no claim, no test
    assert tables.survivors(rows).startswith("Of 1 orders tested, 1 signs are told at 5 % each; 1 of them")


def test_three_seeds_have_a_spread_of_their_own():
    found = [solver_record("glow", 28), solver_record("resnet", 27)]
    found += [solver_record("unet", 27 + shift, seed=k) for k, shift in enumerate((-0.1, 0.0, 0.1))]
    found.append(solver_record("resnet", 29, seed=1))
    pair = tables.compare(found, "I", "v2", "denoising")
    assert pair.spread == ("pooled", "own")
    pooled, own = (2 + 2 * 0.01) / 3, 0.01 / 3  # variances of 3 and 2 degrees of freedom
    freedom = (pooled + own) ** 2 / (pooled**2 / 3 + own**2 / 2)
    expected = scipy.stats.t.ppf(0.975, freedom) * np.sqrt(pooled + own)
    assert pair.half_width == pytest.approx(expected, rel=1e-3)


def test_v1_takes_the_spread_of_v2():
    """Of the same kind of task, and says so; it has one seed of each."""
    two = [solver_record("glow", 28)] + [solver_record("unet", 27 + k, seed=k) for k in (0, 1)]
    one = [solver_record(m, value, task="denoising-0.1") for m, value in (("glow", 30), ("unet", 29))]
    for record in one:
        record["experiment"] |= {"edition": "v1"}
    rows = [r for r in tables.claims("I", "v1", one, two) if r["Verdict"] != "not run"]
    assert [(r["Seeds"], r["Spread"]) for r in rows] == [("1 and 1", "pooled of v2 cpu and pooled of v2 cpu")]
    assert rows[0]["Verdict"] == "not distinguishable" and rows[0]["Ours, dB"].endswith("²")
    assert "² One seed of each" in figures.verdicts("I", "v1", "denoising-0.1", one, two)
    (row,) = [r for r in tables.claims("I", "v1", one) if r["Verdict"] != "not run"]
    assert row["Verdict"] == "same sign" and row["Ours, dB"].endswith("¹") and row["Spread"] == "–"


def test_recorded_orders_of_one_seed_each_are_counted():
    found = records.recorded()
    rows = tables.every_claim(found)
    assert not any("¹" in r["Ours, dB"] for r in rows)  # v2 has a spread for every task
    single = sum(r["Seeds"] == "1 and 1" for r in rows)
    assert f"Of these orders {single} come from one seed each" in front.how_sure(found)


def test_seeds_are_merged():
    found = [solver_record("unet", 27 + seed, seed=seed) for seed in (2, 0, 1)]
    (row,) = [r for r in tables.table("I", "v2", found) if r["Ours, dB"] not in ("not run", "–")]
    assert row["Ours, dB"].startswith("28.00") and row["Seeds"] == "3: 27.00, 28.00, 29.00"
    assert row["Record"] == tables.record_of(found[1])  # of the lowest
    (merged,) = records.merged(found)
    assert records.merged([merged]) == [merged] and records.of_seeds(merged) == [found[i] for i in (1, 2, 0)]
    found[0]["training"] |= dict(restarts=[{"step": 900, "reason": ""}], best_step=600, steps=1000)
    (merged,) = records.merged(found)
    told = "no better since it broke down"
    assert tables.too_little_training(merged, []) == told
    assert tables.remark(merged, []).endswith("of seed 2 broke down at step 900, went on at half the rate")
    found.append(solver_record("unet", 0, seed=3) | {"kind": "failed"})
    assert tables.too_little_training(records.merged(found)[0], []) == "diverged"


def test_profiles_are_not_mixed_within_a_task():
    short = [solver_record(m, 25, profile="short") for m in ("glow", "unet", "resnet", "glow-frozen")]
    long = [solver_record(m, 28, images_seen=1000) for m in ("glow", "unet")]
    assert records.comparison(short + long, "v2") == short  # the longer one has no ResNet yet
    long.append(solver_record("resnet", 28, images_seen=1000))
    assert records.comparison(short + long, "v2") == long


def test_what_a_profile_lacks_is_looked_for_in_others():
    cpu = [solver_record(m, 32, task="inpainting") for m in ("glow", "unet", "resnet")]
    short = [solver_record(m, 30, profile="short", task="inpainting") for m in ("unet", "unet-denoiser")]
    claims = {r["Claim"]: r for r in tables.claims("I", "v2", cpu, cpu + short) if "inpainting" in r["Task"]}
    assert claims["GLOW over U-Net"]["Profile"] == "cpu"
    assert claims["U-Net, denoiser over U-Net"]["Profile"] == "short"  # both of one profile
    assert claims["U-Net, denoiser over U-Net"]["Ours, dB"].startswith("+0.00")
    assert claims["ResNet, denoiser over ResNet"]["Verdict"] == "not run"
    rows = {r["Method"]: r for r in tables.table("I", "v2", cpu, others=short) if r["Task"] == "inpainting"}
    row = rows["U-Net prox (pre-trained denoiser)"]
    assert row["Ours, dB"] == "not run" and row["Remark"].startswith("profile short: 30.00")
    assert row["Record"] == tables.record_of(short[1])
    (row,) = [r for r in tables.every_number(cpu, short) if r["Remark"].startswith("profile short: 30.00")]
    assert row["Ours, dB"] == "not run" and row["Record"] == tables.record_of(short[1])
    classical = solver_record("tv", 25, profile="short", task="inpainting") | {"kind": "classical"}
    cells = [r["inpainting, W = 19"] for r in tables.overview("v2", [*cpu, classical], cpu + short)]
    assert [cell.endswith(", short") for cell in cells[:3]] == [False, False, True]


def test_pages_answer_as_the_tables_do():
    """From the profile compared where it has both methods, else from another one, which is named."""
    first = dict(profile="cpu", dataset="celeba", edition="v1", seed=0)
    cpu = [solver_record(m, 32) | {"experiment": first} for m in ("glow", "unet", "resnet")]
    short = [
        solver_record(m, value) | {"experiment": first | {"profile": "short"}}
        for m, value in (("glow", 30), ("glow-scratch", 31))
    ]
    scratch = solver_record("glow-scratch", 30) | {"experiment": first}
    for found, profile, told in (
        (cpu + short, "short", "1.00 ± 0.00 dB below GLOW, scratch (**the opposite**)"),
        ([*cpu, scratch, *short], "cpu", "2.00 ± 0.00 dB above GLOW, scratch (**same sign**)"),
    ):
        kept = records.comparison(found, "v1")
        (row,) = [r for r in tables.claims("III", "v1", kept, found) if "σₙ = 0.2" in r["Task"]]
        text = figures.in_short("III", "v1", "denoising", kept, found)
        assert row["Profile"] == profile and f"profile `{profile}`" in text and told in text
    assert "no answer yet" in figures.in_short("III", "v1", "denoising", cpu)


def test_both_readings_of_the_smaller_hole_are_told():
    found = []
    for method, last, everywhere in (("glow", 34, 27), ("unet", 30, 31), ("resnet", 32, 33)):
        record = solver_record(method, 32, task="inpainting")
        for key, value in (("ood_measurements_last_fold", last), ("ood_measurements", everywhere)):
            record[key] = {"psnr": records.statistics([value, value])}
        found.append(record)
    rows = [r for r in tables.claims("III", "v2", found) if r["Verdict"] != "not run"]
    assert [r["Ours, dB"] for r in rows] == [
        "+4.00 ± 0.00¹ (all folds told: −4.00)",
        "+2.00 ± 0.00¹ (all folds told: −6.00)",
    ]
    assert "with all folds told the flow is last (GLOW 27.00 dB" in figures.all_told_sentence(found)


def test_a_training_that_fell_apart_is_told_of():
    fell, found = solver_record("unet", 28), solver_record("glow", 30)
    fell["training"] |= dict(restarts=[{"step": 1500, "reason": ""}], best_step=2000, steps=6000)
    assert tables.remark(fell, []) == "training broke down at step 1,500, went on at half the rate"
    assert tables.verdict(tables.compare([found, fell], "I", "v2", "denoising")) == "same sign"
    fell["training"]["restarts"].append({"step": 6000, "reason": ""})  # and there was no step left
    assert tables.remark(fell, []).startswith("no better since it broke down")
    assert tables.verdict(tables.compare([found, fell], "I", "v2", "denoising")).startswith("no claim: U-Net")
    # A U-Net whose BatchNorm misled validation: its training loss was as before.
    rows = [dict(step=300, loss=0.009), dict(step=600, loss=0.003), dict(step=900, loss=0.1)]
    fell["training"] |= dict(restarts=[{"step": 600, "reason": ""}], best_step=6000, history=rows)
    assert tables.remark(fell, []).endswith("was set back at step 600, went on at half the rate")
    verdict = tables.verdict(tables.compare([found, fell], "I", "v2", "denoising"))
    assert verdict == "no claim: U-Net set back without need"
    fell["training"]["restarts"] = [{"step": 900, "reason": ""}]
    assert tables.remark(fell, []).startswith("training broke down at step 900")
    assert tables.remark(found, []) == "–"


def test_what_is_not_finite_is_counted():
    found = records.statistics([30.0, float("inf"), 31.0, float("nan")])
    assert found["not_finite"] == 2 and found["mean"] == 30.5 and found["values"][1] is None
    json.dumps(found, allow_nan=False)
    assert records.statistics([30.0])["half_width"] is None
    assert "2 not finite" in tables.plus_minus(found)


def test_records_that_are_kept_have_what_the_book_asks_of_them():
    for record in records.read(sorted((ROOT / "results/runs").rglob("*.json"))):
        experiment = Experiment(**record["experiment"])
        assert record["evaluation_code"] and "task" in record, record["name"]
        if record["kind"] != "classical":
            run = experiment.runs()[record["name"]]
            assert record["settings_hash"] == run.settings_hash and record["method"] == run.method, run.name
            assert record["settings"] == run.as_dict()


def test_hashes_of_recorded_runs_stay():
    """A setting that is new must leave them as they are: records and kept models are found by them."""
    for record in records.recorded():
        if "settings_hash" in record:
            run = Experiment(**record["experiment"]).runs()[record["name"]]
            assert run.settings_hash == record["settings_hash"], record["name"]


def test_a_new_setting_counts_where_it_is_not_its_default(smoke):
    @dataclass(frozen=True)
    class Newer(Training):
        novelty: float = 0.5

    run = smoke.solver("inpainting", "unet")
    of_run = asdict(run.training)
    assert replace(run, training=Newer(**of_run)).settings_hash == run.settings_hash
    assert replace(run, training=Newer(**of_run, novelty=0.6)).settings_hash != run.settings_hash
    assert replace(run, blind_sigma=None).settings_hash == run.settings_hash
    assert replace(run, blind_sigma=0.3).settings_hash != run.settings_hash


@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_other_versions_of_python_have_the_same_hash_of_the_code(version):
    """Or every run would be trained again after a change of Python."""
    found = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}*/bin/python")]
    works = [p for p in found if p and not subprocess.run([p, "-c", ""], capture_output=True).returncode]
    if not works:
        pytest.skip(f"no Python {version} here")
    text = (ROOT / "companion" / "settings.py").read_text(encoding="utf-8")
    parts = ["import ast, functools, hashlib, json, pathlib", f"ROOT = pathlib.Path({str(ROOT)!r})"]
    for name in ("_digest", "training_code", "_code_hash", "_plain", "_is_docstring"):
        node = next(n for n in ast.parse(text).body if getattr(n, "name", None) == name)
        parts.append(ast.unparse(node))
    script = "\n".join([*parts, "print(training_code())"])
    done = subprocess.run([works[0], "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == settings.training_code()
