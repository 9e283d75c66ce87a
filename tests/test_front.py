"""The front page and the pictures of the two faces, from models and records that are kept with the code."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from companion import finetune, front, gallery, paths, records, results, tables
from companion.map import beside_flow
from companion.results import Verdict
from companion.words import lead, say
from data.portraits import portraits
from flowlib import psnr
from flowlib.checkpoints import load_tensors
from tests.test_results import in_short, solver_record

KEPT = bool(gallery.kept_records("inpainting"))
needs_kept = pytest.mark.skipif(not KEPT, reason="no model is kept in results/checkpoints")


def three(task, glow, unet, resnet):
    values = dict(glow=glow, unet=unet, resnet=resnet)
    return [solver_record(method, value, task=task) for method, value in values.items()]


def test_the_bottom_line_follows_the_records():
    found = three("inpainting", 33, 32, 31) + three("deblurring", 34, 30, 35) + three("denoising", 19, 25, 26)
    found = results.load(found)
    first, last = front.paragraphs(found)  # one size alone
    assert "restores best in inpainting, but not in deblurring (the ResNet is ahead).**" in first
    assert first.endswith("Undecided: denoising.")  # below its own measurement
    assert f"have {{doc}}`{len(found.claims)} orders <" in last and "1 seed, like its rivals" in last
    # The paper has the flow above a U-Net or ResNet in 31 of them, above a pre-trained one in 4.
    above, pre_trained, others = front.for_the_flow(found.claims)
    assert (len(above), len(pre_trained)) == (31, 4)
    assert len(above + pre_trained + others) == len(found.claims)
    counted = "3 *same sign*, 1 *the opposite*, 2 *no claim*, 25 *not run*"
    assert f"Of the 31 in which the flow is above a U-Net or ResNet: {counted}." in last
    assert f"Of the other {len(others)}: {len(others)} *not run*." in last


def test_more_training_may_change_the_verdict(monkeypatch):
    found = three("inpainting", 33, 32, 31) + three("deblurring", 34, 30, 35) + three("denoising", 19, 25, 26)
    found, tasks = results.load(found), ("inpainting", "deblurring")
    pairs = {task: found.compare("I", "v2", task) for task in tasks}
    assert not any("more training" in text for text in front.paragraphs(found))  # none of these has gone on
    now = {"inpainting": replace(pairs["inpainting"], verdict=Verdict.UNDECIDED, half_width=2.0)}
    now["deblurring"] = replace(
        pairs["deblurring"], verdict=Verdict.OPPOSITE, second="resnet", difference=-0.5
    )
    monkeypatch.setattr(front.finetune, "outcome", lambda _, task: now.get(task))
    told = front.paragraphs(found)[1]
    assert told.startswith("**With more training inpainting is *not distinguishable*.**")
    assert told.endswith(
        "+1.00 ± 2.00¹ dB (U-Net) in inpainting and −0.50 ± 0.00¹ dB (ResNet) in deblurring."
    )
    del now["inpainting"]
    assert front.paragraphs(found)[1].startswith("**The same with more training.**")


def test_solvers_that_went_on_are_recorded_ones():
    found, every = results.load(), records.recorded()
    for task in front.MAIN_TASKS:
        assert set(finetune.above(found, task)) == {"unet", "resnet"}
        for row, (method, went_on) in zip(finetune.table(found, task), finetune.gone_on(found, task).items()):
            start = next(r for r in every if r.get("settings_hash") == went_on["settings_hash"])
            assert start["method"] == method and went_on["fixed_norms"] == (method != "glow")
            assert went_on["before"]["mean"] == pytest.approx(start["psnr"]["mean"], abs=0.02)
            assert went_on["images_seen"] > start["training"]["images_seen"]
            assert (row["GLOW above it, dB"] is None) == (method not in finetune.above(found, task))


def test_what_the_main_claim_survives():
    """On the page of verdicts: the same comparisons as on the front page."""
    found = results.load()
    shown = front.survival(found)
    assert len(shown) == len(front.MAIN_TASKS)
    for task, row in zip(front.MAIN_TASKS, shown):
        c = front.decided(found, list(front.SENTENCES)[0], task)
        assert row["As compared"].startswith(f"{c.verdict.mark} {lead(c)}, ")
        assert f"{lead(finetune.outcome(found, task))}, " in row["All trained for longer"]
    few = front.survival(results.load(three("inpainting", 33, 32, 31)))
    assert [row["As compared"] for row in few] == ["✓ +1.00 ± 0.00¹, U-Net", "not run", "not run"]
    assert all(row["All trained for longer"] == "not recorded" for row in few)


def test_the_bottom_line_leads_to_its_numbers():
    found = three("inpainting", 33, 32, 31) + three("deblurring", 34, 30, 35) + three("denoising", 19, 25, 26)
    lines = front.front(results.load(found)).split("\n")
    heads, _, best, *others = [line for line in lines if line.startswith("|")][: 2 + len(front.SENTENCES)]
    assert heads.count("|") == best.count("|") == 5 and len(others) == len(front.SENTENCES) - 1
    assert "✓ {doc}`+1.00 ± 0.00¹ <../notebooks/in_distribution-inpainting>` (+0.77) U-Net" in best
    assert "✗ {doc}`−1.00 ± 0.00¹ <../notebooks/in_distribution-deblurring>` (+4.99) ResNet" in best
    assert "? {doc}`" in best and all("not run" in row for row in others)
    assert any("orders <../notebooks/tables>`" in line for line in lines)


def test_without_recorded_runs_the_front_page_says_so():
    assert front.front(results.load([])).count("No run on real faces is recorded yet; {doc}`build`") == 1


def test_the_flow_is_held_against_rivals_that_are_pre_trained_too():
    found = three("inpainting", 33, 32, 31)
    assert "pre-trained" not in front.paragraphs(results.load(found))[0]
    values = {"unet-denoiser": 33, "resnet-denoiser": 32}
    more = [*found, *(solver_record(method, value, task="inpainting") for method, value in values.items())]
    both, pre_trained = results.load(more), list(front.SENTENCES)[1]
    assert front.decided(both, pre_trained, "inpainting").verdict is Verdict.UNDECIDED
    assert front.decided(both, pre_trained, "denoising") is None  # the paper has none
    told = "pre-trained as denoisers it is +0.00 ± 0.00¹ dB in inpainting (U-Net, denoiser: *not"
    assert told in front.paragraphs(both)[0]
    assert "above U-Net, denoiser" in in_short("I", "v2", "inpainting", more)


def test_one_rival_ahead_is_enough():
    def verdict(found):
        return front.decided(results.load(found), next(iter(front.SENTENCES)), "inpainting").outcome

    assert verdict(three("inpainting", 33, 19, 34)) == "the opposite"  # the U-Net learnt nothing
    assert verdict(three("inpainting", 33, 19, 31)).startswith("no claim")
    assert verdict(three("inpainting", 33, 32, 33)) == "not distinguishable"
    assert verdict(three("inpainting", 33, 32, 31)) == "same sign"
    assert verdict(three("inpainting", 33, 32, 31)[:2]) == "not run"


def test_every_number_leads_to_its_record():
    for row in tables.every_number(results.load()):
        if row["Record"]:
            place = row["Record"].href.removeprefix("../records/")
            assert (records.RESULTS / "runs" / place).exists(), place


def test_what_is_said_of_batchnorm_is_what_its_records_say():
    text = (paths.ROOT / "book/choices.md").read_text(encoding="utf-8")

    def record(name):
        return json.loads((paths.RESULTS / "benchmarks" / name).read_text(encoding="utf-8"))

    found = {name: record(f"deblurring-unet-{name}.json") for name in ("set-back", "recalibrated")}
    for name in ("set-back", "recalibrated"):
        assert f"ended at {found[name]['psnr']['mean']:.2f} dB" in text
        for restart in found[name]["training"]["restarts"]:
            assert f"{restart['step']:,}" in text
    on = record("finetune/cpu-celeba-s0/deblurring-unet-fixed-norms.json")
    assert f"from the {on['before']['mean']:.2f} dB" in text and f"end at {on['psnr']['mean']:.2f} dB" in text
    assert on["before"]["mean"] == pytest.approx(found["set-back"]["psnr"]["mean"], abs=0.01)
    losses = [row["val_loss"] for row in on["training"]["history"]]
    assert losses == sorted(losses, reverse=True)  # it never leaps
    solvers = [r for r in records.recorded() if r["kind"] == "solver" and r["experiment"]["profile"] == "cpu"]
    leaps = [leap for r in solvers if (leap := largest_leap(r)) > 1.5 and not r["training"]["restarts"]]
    assert "Four other recorded U-Nets leapt" in text and len(leaps) == 4
    assert f"rose to {min(leaps):.1f} to {max(leaps):.1f} times its best" in text
    rates = {
        r["lr"]: r["psnr"]["200"] for r in record("learning_rates.json")["rows"] if r["method"] == "unet"
    }
    assert min(rates, key=rates.get) == 1e-3
    assert f"ended last of its three, {max(rates.values()) - rates[1e-3]:.1f} dB below the best" in text


def largest_leap(record):
    """How many times its best so far the validation error of a training that has BatchNorm rose to."""
    losses = [row["val_loss"] for row in record["training"]["history"] if row["val_loss"]]
    if record["settings"]["network"] == "glow" or len(losses) < 2:
        return 0.0
    return max(loss / min(losses[:i]) for i, loss in enumerate(losses) if i)


def test_portraits_are_two_faces_in_colour():
    faces = portraits()
    assert faces.shape == (2, 64, 64, 3) and faces.dtype == np.uint8
    assert portraits(128).shape == (2, 128, 128, 3)
    assert all(image.std() > 30 and np.ptp(image.mean(axis=(0, 1))) > 5 for image in faces)


@needs_kept
def test_kept_solvers_restore_the_faces():
    for task in ("inpainting", "denoising", "deblurring"):
        y, estimates = gallery.restored(task)
        before = psnr(y, gallery.faces())
        for method, x_hat in estimates.items():
            gain = psnr(x_hat, gallery.faces()) - before
            assert (gain > 2).all(), (task, method, gain)


@needs_kept
def test_a_picture_stands_for_a_solver(tmp_path, monkeypatch):
    (record,) = [r for r in gallery.kept_records("inpainting").values() if r["method"] == "resnet"]
    other = record | {"method": "unet", "name": "inpainting-unet"}
    monkeypatch.setattr(gallery, "RESULTS", tmp_path)
    monkeypatch.setattr(gallery, "recorded", lambda: [other])
    gallery.keep_picture(other, gallery.solver(record))
    assert gallery.pictured("inpainting") == {"unet": other} and gallery.pictured("denoising") == {}
    (x_hat,) = gallery._restored_faces({"unet": other}).values()
    torch.testing.assert_close(x_hat, gallery.restored("inpainting")[1]["resnet"], atol=1e-3, rtol=0)
    titles = [axis.get_title() for axis in gallery.examples("inpainting").axes]
    assert "U-Net" in titles
    assert gallery.paper_size("inpainting") is None  # of another profile


def test_pictures_are_of_their_records():
    """A run that is recorded anew needs a new picture."""
    made = {gallery._picture(r): r["trained"] for r in records.recorded() if "trained" in r}
    for path in (paths.RESULTS / "pictures").rglob("*.safetensors"):
        assert load_tensors(path)[1] == made[path]


@needs_kept
def test_pictures_name_their_records():
    for task in ("inpainting", "denoising", "deblurring"):
        places = re.findall(r'href="\.\./records/([^"]+)"', gallery.sources(task))
        assert len(places) == len(gallery.kept_records(task) | gallery.pictured(task))
        assert all((records.RESULTS / "runs" / place).exists() for place in places)


@needs_kept
def test_figure_1_is_drawn_as_lines_and_letters():
    diagram = gallery.folds_figure("inpainting").data
    assert "<svg" in diagram and diagram.count("<image") == 3 + 2 * 4  # y, x_0, original; two a fold


@needs_kept
def test_the_plugged_in_solver_is_its_record_and_the_kept_flow():
    frozen = [r for r in records.recorded() if r["method"] == "glow-frozen" and r["task"] == "inpainting"]
    record = next(r for r in frozen if r["experiment"]["profile"] == "cpu")
    solver = gallery.plugged_in(record)
    assert solver.step_size.tolist() == pytest.approx([fold["step_size"] for fold in record["folds"]])
    assert len({id(prox.glow) for prox in solver.proxes}) == 1
    y, estimates = gallery.restored("inpainting", solvers={"glow-frozen": solver})
    found = psnr(estimates["glow-frozen"], gallery.faces()).mean().item()
    assert abs(found - record["psnr"]["mean"]) < 6 and torch.isfinite(estimates["glow-frozen"]).all()


@needs_kept
def test_hero_shows_three_tasks():
    wide, narrow = gallery.hero().values()
    titles = [axis.get_title() for axis in wide.axes if axis.get_title()]
    assert titles == [
        "a hole",
        "a hole, restored",
        "noise",
        "noise, restored",
        "blur",
        "blur, restored",
        "original",
    ]


def test_told_of_the_new_blur_no_small_kernel_is_excluded():
    found = json.loads((paths.RESULTS / "benchmarks/blur.json").read_text(encoding="utf-8"))["rows"]
    misfits = {}
    for row in (row for row in found if row["boundary"] == "circular" and row["kernel_size"] <= 7):
        changes = [(m, m["paper"]["8.0"] - m["paper"]["5.0"]) for m in row["transferred"].values()]
        for key in ("8.0", "told"):
            away = np.mean([abs(m[key] - m["5.0"] - paper) for m, paper in changes])
            misfits.setdefault(key, []).append(away)
    assert misfits["8.0"][0] < 1 < min(misfits["8.0"][1:])
    assert max(misfits["told"]) < 1 and misfits["told"][2] < misfits["told"][1]


def test_the_front_page_leads_with_what_is_so():
    """A task whose lead falls where rivals get the same care is too close to call; the words follow."""
    told = front.lead(results.load())
    assert told.startswith("**The flow's lead did not survive here: ") and told.count(".**") == 1
    front_text = front.front(results.load())
    assert front_text.index(told) < 5

    def comparison(verdict, task, second="resnet"):
        return results.Comparison("I", "v2", task, "glow", second, 1.0, verdict, pair=(1, 2))

    def lead(verdicts, longer):
        main = {task: comparison(v, task) for task, v in zip(front.MAIN_TASKS, verdicts)}
        longer = {task: comparison(v, task) for task, v in zip(front.MAIN_TASKS, longer)}
        return say("lead", main=main, pre_trained=dict.fromkeys(main), longer=longer, sizes=[])

    same, size, close, opposite = "same sign", "size replicated", "not distinguishable", "the opposite"
    same, size, close, opposite = map(Verdict, (same, size, close, opposite))
    assert "lead is replicated here: it restores best in" in lead([same, size, same], [same, same, size])
    told = lead([same, size, opposite], [close, same, opposite])
    assert "holds in part here: it restores best in {doc}`denoising" in told
    assert "inpainting <../notebooks/in_distribution-inpainting>` is too close to call" in told
    assert "a rival is ahead in {doc}`deblurring" in told and "(the ResNet)" in told


def test_what_is_said_of_acceleration_is_recorded():
    found = beside_flow(records.recorded())
    told = say("untested", estimates=found)
    for task, one in found.items():
        assert f"{one['faster']:.0f} times as fast in {task} ({one['images']} images)" in told
    assert found["denoising"]["difference"] > found["denoising"]["half_width"]
    assert "Two claims are not tested" in say("untested", estimates={})
