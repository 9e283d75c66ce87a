"""Runs: what is made is found again, what is kept is restored where it fits, and nothing stale is shown."""

import ast
import csv
import json
import os
import shutil
import subprocess
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
from companion import book, locks, paths, records, runs, settings, tables, training, words
from companion.__main__ import main
from companion.experiment import Experiment
from companion.links import record_of
from companion.results import load as load_results
from companion.settings import Training
from companion.training import model_path
from flowlib.checkpoints import load_checkpoint, load_tensors, save_checkpoint
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
    of_table = tables.table(load_results([glow]), "III", "v2")
    rows = {r["Method"]: r for r in tables.as_text(of_table) if r["Task"] == "denoising"}
    assert rows["GLOW prox"]["Ours, dB"] == words.plus_minus(glow["ood_measurements"]["psnr"])
    assert rows["GLOW prox"]["Setting"] == "σₙ = 0.25" and rows["U-Net prox"]["Ours, dB"] == "not run"
    assert rows["GLOW prox"]["Seeds"] == "1" and rows["U-Net prox"]["Seeds"] == "–"
    assert rows["GLOW prox"]["Record"] == record_of(glow).text and rows["U-Net prox"]["Record"] == "–"
    repeated = {r["Task"] for r in of_table if "repeats table I" in r["Remark"]}
    assert repeated == {"deblurring"}  # of blurs with 3 taps, σ_b 5 and 8 hardly differ
    tables.tabulate(smoke)
    with open(smoke.build / "tables/table1.csv", encoding="utf-8") as file:
        row = next(r for r in csv.DictReader(file) if r["Method"] == "GLOW prox")
    assert row["Paper, dB"] == "28.24" and row["Ours, dB"].startswith(f"{glow['psnr']['mean']:.2f}\u00a0±")
    assert 'href="../records/this-build/v2/denoising-glow.json"' in row["Record"]
    assert json.loads((smoke.build / "records/this-build/v2/denoising-glow.json").read_text()) == glow
    for run in (smoke.flow(), smoke.solver("denoising", "glow"), smoke.solver("denoising", "unet")):
        runs.publish(smoke, run)
    kept = {r["name"]: r for r in records.recorded()}
    assert sorted(kept) == ["denoising-glow", "denoising-unet", "flow"]
    found = load_results(kept.values())
    assert set(found.compared("v2").name) == {"denoising-glow", "denoising-unet"}
    row = tables.overview(found, "v2")[0]
    assert row["First over second"] == "GLOW over U-Net" and row["inpainting, W = 19"] is None
    assert row["denoising, σₙ = 0.2"].endswith("(+0.06)") and row["deblurring, σ_b = 5"] is None
    (smoke.directory(smoke.solver("denoising", "unet")) / "record.json").write_text("{")
    with pytest.raises(ValueError, match="is no result record"):
        runs.records_of_build(smoke)


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
