"""Results: which runs are compared, how claims come out, and what tables and sentences make of them."""

import json
import re

import numpy as np
import pytest
import scipy.stats

from companion import compute, front, records, results, statistics, tables, words
from companion.links import record_of
from companion.results import Verdict


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
        ssim=records.statistics([0.8, 0.9, 0.9]),
        psnr_measurement=records.statistics([measurement] * 3),
        training=dict(images_seen=images_seen),
        settings_hash="0123456789",
        data=dict(pixels_sha256="x"),
    )


def test_verdicts():
    def verdict(first, second, **options):
        pair = [solver_record("glow", first, **options), solver_record("unet", second, **options)]
        return results.load(pair).compare("I", "v2", "denoising").outcome

    assert verdict(28, 25) == "same sign"  # the paper: +0.06
    # The paper's difference within ±, or not.
    assert results.decide(0.1, 0.05, paper=0.06) is Verdict.SIZE
    assert results.decide(0.1, 0.03, paper=0.06) is Verdict.SAME_SIGN
    assert results.decide(-0.1, 0.05, paper=0.06) is Verdict.OPPOSITE
    assert results.decide(0.1, 0.05, 0.06, doubt="diverged") is Verdict.NO_CLAIM
    assert len({v.mark for v in Verdict}) == 5  # no claim and not run share theirs
    assert verdict(25, 28) == "the opposite"
    assert verdict(28, 28) == "not distinguishable"
    assert verdict(28, 19) == "no claim: U-Net below its measurement"


def in_short(table, edition, task, found):
    return words.say("in_short", results=results.load(found), table=table, edition=edition, task=task)


def test_seeds_widen_the_interval():
    one = [solver_record("glow", 28), solver_record("unet", 27), solver_record("resnet", 20.5)]
    two = [*one, solver_record("unet", 27.5, seed=1)]
    single, both = (results.load(r).compare("I", "v2", "denoising") for r in (one, two))
    assert single.num_seeds == (1, 1) and both.num_seeds == (1, 2)
    assert both.difference == pytest.approx(0.75)
    # Student's interval of two samples, of one and two: t(1) s sqrt(1 + 1/2), with s² = 0.5² / 2
    of_seeds = 12.706 * np.sqrt(0.5**2 / 2 * 1.5)
    assert both.half_width == pytest.approx(np.hypot(single.half_width, of_seeds), rel=1e-3)
    # The spread of one method tells of another of the same task.
    beside = results.load(two).compare("I", "v2", "denoising", "glow", "resnet")
    assert beside.half_width == pytest.approx(12.706 * np.sqrt(0.5**2 / 2 * 2), rel=1e-2)
    assert single.spread == ("", "") and words.lead(single).endswith("¹")
    assert beside.spread == ("pooled", "pooled") and not words.lead(beside).endswith("¹")
    assert "over test images alone" in in_short("I", "v2", "denoising", one)
    short = in_short("I", "v2", "denoising", two)
    assert "over seeds (1 of GLOW, pooled; 2 of U-Net, pooled; 1 of ResNet, pooled; their spread is" in short


def test_a_page_compares_nothing_with_a_solver_below_its_measurement():
    here = [solver_record(m, v) for m, v in (("glow", 28), ("unet", 18), ("resnet", 27))]
    none, about = results.load([]).settings, ("I", "v2", "denoising")
    told = words.on_this_page(none, results.load(here), *about)
    assert "GLOW is 1.00 ± 0.00 dB above ResNet; not compared: U-Net below its measurement." in told
    below = [*here[:2], solver_record("resnet", 19)]
    told = words.on_this_page(none, results.load(below), *about)
    assert "GLOW is" not in told and "U-Net below its measurement; ResNet below its measurement." in told
    found = results.load(here)
    assert words.on_this_page(found.settings, found, *about) == "The runs of this page are the recorded ones."
    assert words.on_this_page(none, results.load(here[1:]), *about) == ""


def test_seeds_stand_beside_the_interval_over_images():
    found = [solver_record("unet", 27 + seed, seed=seed) for seed in (0, 1, 2)]
    (merged,) = results.rows(results.load(found).settings)
    assert tables.with_seeds(merged).endswith("(seeds 27.00 to 29.00)")
    (single,) = results.rows(results.load(found[:1]).settings)
    assert tables.with_seeds(single) == words.plus_minus(found[0]["psnr"])
    both = results.load([*found, solver_record("resnet", 19)])
    reached = front._reached(both, results.rows(both.settings))
    assert [mark for _, mark in reached] == ["", "", "?"]
    assert [value for value, _ in reached] == pytest.approx([None, 28, 19])


def test_what_each_compared_run_was_given():
    found = results.load()
    rows = compute.fairness(found)
    solvers = [r for e in ("v2", "v1") for r in results.rows(found.compared(e)) if r.kind == "solver"]
    assert len(rows) == sum(len(r.seeds) for r in solvers if not r.frozen)
    (flow,) = found.runs.query("name == 'flow' and profile == 'cpu'").itertuples()
    for row in rows:
        if row["Method"] == "GLOW":
            assert row["On"] == "a CPU core" and row["Rates tried"].count(",") == 2
            extra = row["With pre-training, min"] - row["Solver, min"]
            assert extra == pytest.approx(flow.minutes)
    assert any(row["Restarts at half the rate"] for row in rows if row["Method"] == "GLOW")
    assert {row["On"] for row in rows} == {"a CPU core", "H100"}


def test_many_tests_are_corrected_for():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == pytest.approx([1, 1]) and len(statistics.holm([])) == 0
    difference, half_width, p = statistics.over_images_and_seeds([1, 2, 4], [0, 0, 0], [])
    assert p == pytest.approx(scipy.stats.ttest_1samp([1, 2, 4], 0).pvalue)
    assert (p < 0.05) == (abs(difference) > half_width)
    rows = [solver_record(m, v) for m, v in (("glow", 28), ("unet", 25), ("resnet", 19))]
    claims = [c for c in results.load(rows).claims if c.run]
    rows = tables.as_text(tables.claim_rows(claims))
    assert [row["p, Holm"] for row in rows] == ["0.000", "–"]  # no claim, no test
    told = words.say("survivors", claims=claims)
    assert told.startswith("Of 1 orders tested, 1 signs are told at 5 % each; 1 of them")


def test_three_seeds_have_a_spread_of_their_own():
    found = [solver_record("glow", 28), solver_record("resnet", 27)]
    found += [solver_record("unet", 27 + shift, seed=k) for k, shift in enumerate((-0.1, 0.0, 0.1))]
    found.append(solver_record("resnet", 29, seed=1))
    pair = results.load(found).compare("I", "v2", "denoising")
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

    def claims(found):
        return [r for r in tables.claim_rows(found.claims_in("I", "v1")) if r["Verdict"] != "not run"]

    rows = claims(results.load(one + two))
    assert [(r["Seeds"], r["Spread"]) for r in rows] == [("1 and 1", "pooled of v2 cpu and pooled of v2 cpu")]
    assert rows[0]["Verdict"] == "not distinguishable" and rows[0]["Ours, dB"].endswith("²")
    assert "² One seed of each" in tables.verdicts(results.load(one + two), "I", "v1", "denoising-0.1")
    (row,) = tables.as_text(claims(results.load(one)))
    assert row["Verdict"] == "same sign" and row["Ours, dB"].endswith("¹") and row["Spread"] == "–"


def test_recorded_orders_of_one_seed_each_are_counted():
    found = results.load()
    ran = [c for c in found.claims if c.run]
    assert not any(c.mark == "¹" for c in ran)  # v2 has a spread for every task
    single = sum(c.num_seeds == (1, 1) for c in ran)
    assert f"Of these orders {single} come from one seed each" in front.paragraphs(found)[-1]


def test_seeds_are_merged():
    found = [solver_record("unet", 27 + seed, seed=seed) for seed in (2, 0, 1)]
    (row,) = [r for r in tables.table(results.load(found), "I", "v2") if r["Ours, dB"] != "not run"]
    assert row["Ours, dB"].mean == pytest.approx(28) and row["Seeds"] == "3: 27.00, 28.00, 29.00"
    assert row["Record"] == record_of(found[1])  # of the lowest
    (merged,) = results.rows(results.load(found).settings)
    assert [r.seed for r in merged.seeds] == [0, 1, 2]
    found[0]["training"] |= dict(restarts=[{"step": 900, "reason": ""}], best_step=600, steps=1000)
    doubt, told = doubt_and_remark(found)
    assert doubt == "no better since it broke down"
    assert told.endswith("of seed 2 broke down at step 900, went on at half the rate")
    found.append(solver_record("unet", 0, seed=3) | {"kind": "failed"})
    assert doubt_and_remark(found)[0] == "diverged"


def doubt_and_remark(found):
    """Of the only setting in these records."""
    found = results.load(found)
    (merged,) = results.rows(found.settings)
    return found.doubt(merged), tables.remark(found, merged)


def test_profiles_are_not_mixed_within_a_task():
    short = [solver_record(m, 25, profile="short") for m in ("glow", "unet", "resnet", "glow-frozen")]
    long = [solver_record(m, 28, images_seen=1000) for m in ("glow", "unet")]

    def compared():
        return set(results.load(short + long).compared("v2").profile)

    assert compared() == {"short"}  # the longer one has no ResNet yet
    long.append(solver_record("resnet", 28, images_seen=1000))
    assert compared() == {"cpu"}


def test_what_a_profile_lacks_is_looked_for_in_others():
    cpu = [solver_record(m, 32, task="inpainting") for m in ("glow", "unet", "resnet")]
    short = [solver_record(m, 30, profile="short", task="inpainting") for m in ("unet", "unet-denoiser")]
    found = results.load(cpu + short)
    rows = tables.as_text(tables.claim_rows(found.claims_in("I", "v2", "inpainting")))
    claims = {row["Claim"]: row for row in rows}
    assert claims["GLOW over U-Net"]["Profile"] == "cpu"
    assert claims["U-Net, denoiser over U-Net"]["Profile"] == "short"  # both of one profile
    assert claims["U-Net, denoiser over U-Net"]["Ours, dB"].startswith("+0.00")
    assert claims["ResNet, denoiser over ResNet"]["Verdict"] == "not run"
    rows = {r["Method"]: r for r in tables.table(found, "I", "v2") if r["Task"] == "inpainting"}
    row = rows["U-Net prox (pre-trained denoiser)"]
    assert row["Ours, dB"] == "not run" and row["Remark"].startswith("profile short: 30.00")
    assert row["Record"] == record_of(short[1])
    (row,) = [r for r in tables.every_number(found) if "profile short: 30.00" in (r["Remark"] or "")]
    assert row["Ours, dB"] == "not run" and row["Record"] == record_of(short[1])
    classical = solver_record("tv", 25, profile="short", task="inpainting") | {"kind": "classical"}
    overview = tables.overview(results.load([*cpu, classical, *short]), "v2")
    cells = [row["inpainting, W = 19"] for row in overview]
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
        (row,) = tables.claim_rows(results.load(found).claims_in("III", "v1", "denoising"))
        text = in_short("III", "v1", "denoising", found)
        assert row["Profile"] == profile and f"profile `{profile}`" in text and told in text
    assert "no answer yet" in in_short("III", "v1", "denoising", cpu)


def test_both_readings_of_the_smaller_hole_are_told():
    found = []
    for method, last, everywhere in (("glow", 34, 27), ("unet", 30, 31), ("resnet", 32, 33)):
        record = solver_record(method, 32, task="inpainting")
        for key, value in (("ood_measurements_last_fold", last), ("ood_measurements", everywhere)):
            record[key] = {"psnr": records.statistics([value, value])}
        found.append(record)
    found = results.load(found)
    rows = [r for r in tables.claim_rows(found.claims) if r["Verdict"] != "not run" and "III" in r["Table"]]
    assert [r["Ours, dB"] for r in rows] == [
        "+4.00 ± 0.00¹ (all folds told: −4.00)",
        "+2.00 ± 0.00¹ (all folds told: −6.00)",
    ]
    assert "with all folds told the flow is last (GLOW 27.00 dB" in words.say(
        "all_told", settings=found.settings
    )


def test_a_training_that_fell_apart_is_told_of():
    fell, found = solver_record("unet", 28), solver_record("glow", 30)
    fell["training"] |= dict(restarts=[{"step": 1500, "reason": ""}], best_step=2000, steps=6000)

    def outcome():
        return results.load([found, fell]).compare("I", "v2", "denoising").outcome

    def remark(record):
        return doubt_and_remark([record])[1]

    assert remark(fell) == "training broke down at step 1,500, went on at half the rate"
    assert outcome() == "same sign"
    fell["training"]["restarts"].append({"step": 6000, "reason": ""})  # and there was no step left
    assert remark(fell).startswith("no better since it broke down")
    assert outcome().startswith("no claim: U-Net")
    # A U-Net whose BatchNorm misled validation: its training loss was as before.
    rows = [dict(step=300, loss=0.009), dict(step=600, loss=0.003), dict(step=900, loss=0.1)]
    fell["training"] |= dict(restarts=[{"step": 600, "reason": ""}], best_step=6000, history=rows)
    assert remark(fell).endswith("was set back at step 600, went on at half the rate")
    assert outcome() == "no claim: U-Net set back without need"
    fell["training"]["restarts"] = [{"step": 900, "reason": ""}]
    assert remark(fell).startswith("training broke down at step 900")
    assert remark(found) == ""


def test_what_is_not_finite_is_counted():
    found = records.statistics([30.0, float("inf"), 31.0, float("nan")])
    assert found["not_finite"] == 2 and found["mean"] == 30.5 and found["values"][1] is None
    json.dumps(found, allow_nan=False)
    assert records.statistics([30.0])["half_width"] is None
    assert "2 not finite" in words.plus_minus(found)


def test_every_template_is_whole_and_used():
    folders = {"companion": "*.py", "notebooks": "*.ipynb", "book/_templates/words": "*.md"}
    files = [path for folder, kind in folders.items() for path in (words.ROOT / folder).rglob(kind)]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    text = re.sub(r'\\n",\s*"', "\n", text)  # a notebook has each line of code as a string
    for path in words.TEMPLATES.glob("*.md"):
        words.environment.get_template(path.name)
        calls = rf'(say|page)\(\s*\\?["\']{path.stem}\\?["\']|(include|import) "{path.name}"'
        assert re.search(calls, text), path.name
