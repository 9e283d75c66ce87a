"""Which scale rule survives inputs that are no images? Pre-trains one flow for each rule on the same images
and steps, inverts what it maps, shrinks its latents, and starts unfolded training from it.

Run, in a build with prepared images: python -m benchmarks.stability --dataset celeba --build build"""

import argparse
import math
from dataclasses import asdict, replace
from pathlib import Path

import torch

from companion.experiment import Experiment
from companion.files import write_json
from companion.paths import RESULTS
from companion.provenance import provenance
from companion.runs import ensure, load
from companion.settings import Training
from companion.training import model_path, train
from flowlib import Blur, GlowProx, Inpainting, load_checkpoint, set_memory
from flowlib.checkpoints import load_tensors
from flowlib.images import dequantize
from flowlib.training import Diverged, generator_for

# The candidates by name: settings of the flow, and of its pre-training.
RULES = {
    "sigmoid": (dict(scale="sigmoid"), {}),
    "exp": (dict(scale="exp"), {}),
    "tanh-1": (dict(max_log_scale=1.0), {}),
    "tanh-1-weight-decay": (dict(max_log_scale=1.0), dict(weight_decay=0.5)),
    "tanh-0.5": (dict(max_log_scale=0.5), {}),
    "tanh-0.25": (dict(max_log_scale=0.25), {}),
}
FLOW = dict(num_levels=3, num_steps=8, hidden_channels=64, last_level_steps=8)
PRETRAINING = Training(num_steps=1200, batch_size=16, lr=1e-3, validate_every=500, patience=100)
SHRINKAGES = (0.001, 0.01, 0.1)
TASKS = ("denoising", "inpainting", "deblurring")
# Deliberately without the profiles' safeguards: λ from 0.1, one learning rate, clipping at 1.
UNFOLDED = Training(
    num_steps=40, batch_size=8, lr=2e-4, warmup_steps=50, cosine=False, validate_every=20, val_images=50
)


def inputs(x):
    """Inputs that a solver may give to the flow, by name: each like x, (B, 3, 64, 64)."""
    generator = generator_for(0, "stability")
    noise = torch.randn(x.shape, generator=generator)
    return {
        "natural": x,
        "centre masked": Inpainting(19).A(x),
        **{f"noise σ = {sigma}": x + sigma * noise for sigma in (0.1, 0.2, 0.5)},
        "blurred": Blur(5.0, 9).A(x),
        "constant": torch.zeros_like(x),
        "uniform random": torch.rand(x.shape, generator=generator) - 0.5,
        "range × 2": 2 * x,
    }


@torch.no_grad()
def describe(glow, x):
    """For every kind of input: the largest error of g(f(x)) in float32, the rms of the finest latents, and
    the rms change of the image for each unit of λ when its latents are divided by 1 + λ."""
    rows = {}
    for name, image in inputs(x).items():
        latents, _ = glow(image)

        def change(shrinkage, latents=latents, image=image):
            return glow.inverse([z / (1 + shrinkage) for z in latents])[0] - image

        response = {str(lam): finite(change(lam).square().mean().sqrt() / lam) for lam in SHRINKAGES}
        latent_rms = finite(latents[0].square().mean().sqrt())
        rows[name] = {
            "round_trip": finite(change(0.0).abs().max()),
            "latent_rms": latent_rms,
            "response": response,
        }
    return rows


def finite(value):
    """A number for JSON, which knows neither NaN nor infinity: None stands for both."""
    return value.item() if torch.isfinite(value) else None


def conditioning(glow):
    """Largest condition number of a 1x1 convolution, and largest |log scale| of an ActNorm between them."""
    steps = [step for level in glow.levels for step in level]
    return {
        "condition_number": max(float(torch.linalg.cond(step.invconv.weight.detach())) for step in steps),
        "actnorm_log_scale": max(float(step.actnorm.log_scale.detach().abs().max()) for step in steps),
    }


def unfolded(experiment, run):
    """{"psnr": of the validation images after the last step}, or {"diverged": at which step, "reason"}."""
    try:
        _, summary = train(experiment, run)
    except Diverged as error:
        return {"diverged": error.summary["steps"], "reason": str(error)}
    return {"psnr": -10 * math.log10(summary["history"][-1]["val_loss"])}


def gradient_errors(glow, x):
    """Relative differences of all gradients of one proximal step on noisy x, by plain and by invertible
    backpropagation: of each in float32 to plain in float64, and between the two in float64."""
    noisy = x + 0.2 * torch.randn(x.shape, generator=generator_for(0, "gradients"))
    gradients = {}
    for dtype in (torch.float32, torch.float64):
        glow.to(dtype)
        for mode in ("plain", "reversible"):
            set_memory(glow, mode)
            glow.zero_grad()
            (GlowProx(glow)(noisy.to(dtype), 0.1) - x.to(dtype)).square().mean().backward()
            gradients[mode, dtype] = torch.cat([p.grad.flatten().double() for p in glow.parameters()])
    glow.float()
    exact = gradients["plain", torch.float64]
    names = {
        "plain, float32": ("plain", torch.float32),
        "reversible, float32": ("reversible", torch.float32),
        "reversible, float64": ("reversible", torch.float64),
    }
    return {name: ((gradients[key] - exact).norm() / exact.norm()).item() for name, key in names.items()}


def longer(path, x):
    """The measurements of a flow that was trained longer, or is larger."""
    glow, info = load_checkpoint(path), load_tensors(path)[1]["info"]
    about = {"config": glow.config, "num_parameters": sum(p.numel() for p in glow.parameters())}
    about |= {"images_seen": info["summary"]["images_seen"], "gradient_errors": gradient_errors(glow, x[:2])}
    return about | conditioning(glow) | {"inputs": describe(glow, x)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--steps", type=int, default=PRETRAINING.num_steps)
    parser.add_argument("--build", default="build")
    parser.add_argument(
        "--flows", nargs="*", default=[], help="model.safetensors of other flows, described beside them"
    )
    parser.add_argument(
        "--paper-steps", type=int, default=0, help="also train a flow of the paper's size so long"
    )
    args = parser.parse_args()
    experiment, rows = Experiment("short", args.dataset, "v1", build=args.build), []
    test = dequantize(experiment.split("test"), generator_for(0, "test"))
    for rule, (config, overrides) in RULES.items():
        settings = replace(PRETRAINING, num_steps=args.steps, **overrides)
        flow = replace(experiment.flow(), config=FLOW | config, training=settings)
        record = ensure(experiment, flow)
        if record["kind"] == "failed":
            rows.append({"rule": rule, "diverged": record["reason"]})
            continue
        glow = load(experiment, flow).requires_grad_(True)
        with torch.no_grad():
            bits = torch.cat([glow.bits_per_dim(batch) for batch in test.split(50)]).mean().item()
        row = {"rule": rule, "bits_per_dim": bits, **conditioning(glow), "inputs": describe(glow, test[:32])}
        solvers = {
            task: replace(
                experiment.solver(task, "glow"), start=flow, config=FLOW | config, training=UNFOLDED
            )
            for task in TASKS
        }
        rows.append(row | {"unfolded": {task: unfolded(experiment, run) for task, run in solvers.items()}})
        print(rows[-1])
    record = {"rows": rows, "num_images": args.steps * 16, "unfolded_training": asdict(UNFOLDED)}
    record |= {"num_parameters": sum(p.numel() for p in glow.parameters()), "split": experiment.split_sizes}
    flows = [Path(path) for path in args.flows]
    if args.paper_steps:
        paper = Experiment("paper", args.dataset, "v1", build=args.build)
        settings = Training(
            num_steps=args.paper_steps, batch_size=8, lr=3e-4, validate_every=100, val_images=50
        )
        run = replace(paper.flow(), training=settings)
        ensure(paper, run)
        flows.append(model_path(paper, run))
    record["longer"] = [longer(path, test[:32]) for path in flows]
    write_json(
        RESULTS / "benchmarks" / "stability.json",
        record | {"arguments": {"dataset": args.dataset, "steps": args.steps}} | provenance(),
    )


if __name__ == "__main__":
    main()
