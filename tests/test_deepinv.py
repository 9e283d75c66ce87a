"""flowlib and deepinv in each other's place, with the real deepinv where it is installed."""

import importlib.util
import json
import sys

import pytest

from companion.paths import RESULTS, ROOT

REASON = "deepinv is not installed, and no requirement: pip install 'deepinv==0.5.*' 'torchvision==0.28.*'"


def check(differences):
    assert set(differences) >= {"their PGD with our flow and blur", "our solver with their blur"}
    assert max(differences.values()) < 1e-5


def test_the_recorded_run_agreed():
    record = json.loads((RESULTS / "benchmarks/deepinv.json").read_text(encoding="utf-8"))
    assert record["deepinv"].startswith("0.5.")
    check(record["differences"])


@pytest.mark.skipif(importlib.util.find_spec("deepinv") is None, reason=REASON)
def test_both_ways_agree(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "book/examples")])
    import deepinv_both_ways

    check(deepinv_both_ways.differences())
    physics = deepinv_both_ways.ToDeepinv(deepinv_both_ways.Blur(sigma_b=5.0, sigma=0.1))
    x = deepinv_both_ways.torch.rand(1, 3, 64, 64) - 0.5
    assert abs(physics.adjointness_test(x)) < 1e-4
    noise = physics(x) - physics.A(x)
    assert abs(noise.std() - 0.1) < 0.01
