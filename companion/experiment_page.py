"""What the notebooks of the experiments share: how their trainings ended, and checks of their solvers."""

import math

import torch

from companion import records
from companion.experiment import Experiment
from companion.runs import load
from companion.settings import Run
from companion.training import device
from companion.words import plus_minus
from flowlib import psnr
from flowlib.images import to_tensor

NUM = 6  # images that a page shows and checks


def trained(here: list[dict]) -> dict[str, dict]:
    """{method: record} of the solvers among these records; prints how each training ended."""
    for record in here:
        if record["kind"] == "failed":
            print(f"{record['method']:15} diverged: {record['reason']}")
        else:
            assert math.isfinite(record["training"]["best_val_loss"])
            best = -10 * math.log10(record["training"]["best_val_loss"])
            test = plus_minus(record["psnr"])
            print(f"{record['method']:15} {best:6.2f} dB in validation, {test} dB on test images")
    return {record["method"]: record for record in here if record["kind"] == "solver"}


def check_psnr(record: dict, statistics: dict, found: torch.Tensor) -> None:
    """AssertionError unless the PSNRs found on the first images equal those of the record, to 0.01 dB each. A
    model that is kept with the code in few bits: to 0.1 dB in the mean, and 0.3 dB each."""
    expected, kept = torch.tensor(statistics["values"][: len(found)]), record.get("kept")
    torch.testing.assert_close(found, expected, atol=0.3 if kept else 0.01, rtol=0)
    torch.testing.assert_close(found.mean(), expected.mean(), atol=0.1 if kept else 0.01, rtol=0)


def checked(experiment: Experiment, task: str, runs: dict[str, Run], of: dict[str, dict]):
    """(x, y, solvers, estimates): all test images x (N, C, H, W) and their measurements y, the trained solver
    of each record in of, and its estimates of the first NUM. AssertionError where a solver does not match
    its record, or got other measurements."""
    x = to_tensor(experiment.split("test"))
    y, operator = records.measured(task, x, experiment.seed)
    solvers = {method: load(experiment, runs[method]).to(device()) for method in of}
    estimates = {}
    for method, record in of.items():
        estimates[method] = records.reconstruct(solvers[method], operator, y[:NUM])[0]
        check_psnr(record, record["psnr"], psnr(estimates[method], x[:NUM]))
        of_measurement = torch.tensor(record["psnr_measurement"]["values"])
        torch.testing.assert_close(of_measurement, psnr(y.cpu(), x), atol=1e-3, rtol=0)
    print(f"the measurement itself has {psnr(y.cpu(), x).mean():.2f} dB")
    return x, y, solvers, estimates
