"""What the paper's tables cost on a card."""

import pytest

from companion import records, scale
from companion.settings import METHODS


def test_rates_are_those_of_recorded_trainings_of_the_papers_size():
    rates = scale.throughput(records.recorded())
    assert set(rates) == {"flow", "glow", "unet", "resnet"}
    for record in rates.values():
        assert "thread" not in record["trained"]["hardware"]
        training = record["training"]
        folds = record["settings"].get("num_folds") or 1
        assert record["rate"] == pytest.approx(training["images_seen"] * folds / training["seconds"])
    others = [r for r in records.recorded() if r["experiment"]["profile"] == "cpu"]
    assert scale.throughput(others) == {}


def test_tables_have_the_trainings_of_the_paper_and_each_start_once():
    runs = scale.trainings("v2", "I")
    assert len(runs) == 13  # three methods for denoising, five for each other task
    assert all(METHODS[run.method].num_folds is None and not run.frozen for run in runs)
    assert sorted(run.name for run in scale.starts(runs)) == ["denoiser-resnet", "denoiser-unet", "flow"]
    assert {run.training.num_steps for run in runs} == {100_000}


def test_hours_grow_with_folds_and_images():
    run = next(run for run in scale.trainings("v2", "I") if run.name == "inpainting-glow")
    assert scale.hours(run, {"glow": {"rate": 1000}}) == pytest.approx(100_000 * 8 * 4 / 1000 / 3600)


def test_cards_take_the_longest_training_first():
    assert scale.finished_after([1, 3, 2, 2], 2) == 4
    assert scale.finished_after([1, 3, 2, 2], 1) == 8
    assert scale.finished_after([1, 3, 2, 2], 9) == 3
