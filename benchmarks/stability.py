"""Which scale rule survives inputs that are no images? Trains one small flow for each rule on the same data and steps, then
inverts what it maps, and starts unfolded training from it. Run: python benchmarks/stability.py --dataset celeba"""

import argparse
import dataclasses
from pathlib import Path

import torch

from flowlib import data
from flowlib.checkpoints import load_checkpoint
from flowlib.experiments import TASKS, Experiment
from flowlib.files import write_json
from flowlib.operators import Blur, Inpainting
from flowlib.provenance import provenance
from flowlib.results import RESULTS
from flowlib.training import generator_for, pretrain, train_unfolded

RULES = ("tanh", "sigmoid", "exp")


def inputs(x):
    """What a solver may hand to the flow: (B, 3, 64, 64) each."""
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
def round_trips(glow, x):
    """For every kind of input: largest error of g(f(x)) in float32, and the rms of the latents of the finest level."""
    rows = {}
    for name, image in inputs(x).items():
        latents, _ = glow(image)
        error = (glow.inverse(latents)[0] - image).abs().max().item()
        rows[name] = {"error": error, "latent_rms": latents[0].square().mean().sqrt().item()}
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--unfolded-steps", type=int, default=30)
    parser.add_argument("--build", default="build/stability")
    parser.add_argument("--mid-flow", help="a trained flow's model.safetensors, whose round trips are added")
    args = parser.parse_args()
    rows = []
    for rule in RULES:
        experiment = Experiment("demo", args.dataset, "v1", build=Path(args.build) / rule)
        out = experiment.build / "data" / args.dataset
        if not (out / "manifest.json").exists():
            data.prepare_named(args.dataset, out, num_images=2400)
        profile = experiment.profile
        glow_training = profile.unfolding["glow"]
        experiment.profile = dataclasses.replace(
            profile,
            flow=profile.flow | {"scale": rule},
            pretraining=dataclasses.replace(profile.pretraining, num_steps=args.steps, patience=100),
            unfolding={"glow": dataclasses.replace(glow_training, num_steps=args.unfolded_steps, validate_every=10)},
        )
        if not (experiment.flow_directory() / "model.safetensors").exists():
            pretrain(experiment)
        glow = load_checkpoint(experiment.flow_directory() / "model.safetensors")
        row = {"rule": rule, "num_steps": args.steps, "unfolded": {}}
        x = data.to_tensor(experiment.split("test"))
        with torch.no_grad():
            row["bits_per_dim"] = torch.cat([glow.bits_per_dim(b) for b in x.split(32)]).mean().item()
        row["round_trips"] = round_trips(glow, x[:16])
        for task in ("denoising", "inpainting", "deblurring"):
            try:
                train_unfolded(experiment, task, "glow")
                model = load_checkpoint(experiment.directory(task, "glow") / "model.safetensors")
                operator = TASKS[task].make_operator(64)
                with torch.no_grad():
                    x_hat = model(operator.measure(x[:32], generator_for(0, "stability")), operator)
                error = (x_hat - x[:32]).square().mean().item()
                row["unfolded"][task] = (
                    f"alive after {args.unfolded_steps} steps, {-10 * torch.tensor(error).log10():.1f} dB"
                )
            except FloatingPointError as error:
                row["unfolded"][task] = str(error).split(". Lower")[0]
        print(row)
        rows.append(row)
    mid = {}
    if args.mid_flow:
        glow = load_checkpoint(args.mid_flow)
        mid = {"config": glow.config, "round_trips": round_trips(glow, x[:16])}
        print(mid)
    record = {"rows": rows, "mid": mid, "arguments": vars(args), **provenance()}
    write_json(RESULTS / "benchmarks" / "stability.json", record)


if __name__ == "__main__":
    main()
