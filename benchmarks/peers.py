"""The same flow steps in other packages: time as ratios in one run, minima over alternating repeats.

Every package runs a chain of Glow steps at the first level of the paper's flow (12 channels, 32x32 pixels):
ActNorm, 1x1 convolution, one-sided affine coupling with a network of 3x3, 1x1 and 3x3 convolutions and hidden
channels as given.

Run: pip install -r benchmarks/requirements.txt, then python -m benchmarks.peers"""

import argparse

import FrEIA.framework
import FrEIA.modules
import memcnn
import normflows
import torch
from torch import nn

from benchmarks.speed import alternate
from companion.files import write_json
from companion.paths import RESULTS
from companion.provenance import provenance
from flowlib.layers import FlowStep
from flowlib.reversible import run_chain

BATCH, CHANNELS, SIZE = 8, 12, 32


class ChannelAffine(nn.Module):
    """ActNorm after its initialisation, as users of these packages write it."""

    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x):
        return (x + self.bias) * self.log_scale.exp()


def coupling_net(hidden, memory_format=torch.channels_last):
    """The coupling network for FrEIA and memcnn: Glow's, with its two ActNorms."""

    def make(channels_in, channels_out):
        last = nn.Conv2d(hidden, channels_out, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        layers = [
            *(nn.Conv2d(channels_in, hidden, 3, padding=1), ChannelAffine(hidden), nn.ReLU(inplace=True)),
            *(nn.Conv2d(hidden, hidden, 1), ChannelAffine(hidden), nn.ReLU(inplace=True)),
            last,
        ]
        return nn.Sequential(*layers).to(memory_format=memory_format)

    return make


class Chain(nn.Module):
    """flowlib's steps, run plainly or with invertible backpropagation."""

    def __init__(self, steps, hidden, reversible=False):
        super().__init__()
        self.steps = nn.ModuleList(FlowStep(CHANNELS, hidden) for _ in range(steps)).to(
            memory_format=torch.channels_last
        )
        self.reversible = reversible

    def forward(self, x):
        if self.reversible and torch.is_grad_enabled():
            return run_chain(self.steps, x)
        log_det = 0
        for step in self.steps:
            x, step_log_det = step(x)
            log_det = log_det + step_log_det
        return x, log_det


class NormflowsChain(nn.Module):
    def __init__(self, steps, hidden):
        super().__init__()
        self.flows = nn.ModuleList(
            normflows.flows.GlowBlock(CHANNELS, hidden, net_actnorm=True, use_lu=False) for _ in range(steps)
        ).to(memory_format=torch.channels_last)

    def forward(self, x):
        log_det = 0
        for flow in self.flows:
            x, step_log_det = flow.inverse(x)
            log_det = log_det + step_log_det
        return x, log_det


def freia_chain(steps, hidden, memory_format):
    chain = FrEIA.framework.SequenceINN(CHANNELS, SIZE, SIZE)
    for _ in range(steps):
        chain.append(FrEIA.modules.ActNorm)
        chain.append(FrEIA.modules.Fixed1x1Conv, M=torch.linalg.qr(torch.randn(CHANNELS, CHANNELS))[0])
        chain.append(
            FrEIA.modules.AffineCouplingOneSided, subnet_constructor=coupling_net(hidden, memory_format)
        )
    return chain


class MemcnnStep(nn.Module):
    """A one-sided coupling in memcnn's own wrapper, which brings the invertible backpropagation; it keeps no
    log-determinant."""

    def __init__(self, hidden):
        super().__init__()
        self.net = coupling_net(hidden)(CHANNELS // 2, CHANNELS)
        self.linear = nn.Parameter(torch.linalg.qr(torch.randn(CHANNELS, CHANNELS))[0])

    def forward(self, x):
        h = nn.functional.conv2d(x, self.linear[:, :, None, None])
        h_a, h_b = h.chunk(2, dim=1)
        log_s, t = self.net(h_b).chunk(2, dim=1)
        return torch.cat([h_a * torch.tanh(log_s).exp() + t, h_b], dim=1)

    def inverse(self, y):
        y_a, y_b = y.chunk(2, dim=1)
        log_s, t = self.net(y_b).chunk(2, dim=1)
        h = torch.cat([(y_a - t) * (-torch.tanh(log_s)).exp(), y_b], dim=1)
        return nn.functional.conv2d(h, torch.linalg.inv(self.linear)[:, :, None, None])


class MemcnnChain(nn.Module):
    def __init__(self, steps, hidden):
        super().__init__()
        self.steps = nn.ModuleList(
            memcnn.InvertibleModuleWrapper(MemcnnStep(hidden), keep_input=False, keep_input_inverse=False)
            for _ in range(steps)
        )

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x, 0


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(BATCH, CHANNELS, SIZE, SIZE)
    chains = {
        "flowlib": Chain(args.steps, args.hidden),
        "flowlib, reversible": Chain(args.steps, args.hidden, reversible=True),
        "normflows": NormflowsChain(args.steps, args.hidden),
        "FrEIA": freia_chain(args.steps, args.hidden, torch.contiguous_format),
        "FrEIA, channels_last": freia_chain(args.steps, args.hidden, torch.channels_last),
        "memcnn, reversible": MemcnnChain(args.steps, args.hidden),
    }
    functions = {}
    for name, chain in chains.items():

        def train(chain=chain):
            chain.zero_grad()
            # A copy, as memcnn frees what it is given.
            z, log_det = chain(x.clone().requires_grad_())
            (z.square().sum() - torch.as_tensor(log_det).sum()).backward()

        functions[f"{name}: training"] = train
        if "reversible" not in name:
            functions[f"{name}: forward"] = torch.no_grad()(lambda chain=chain: chain(x))
    seconds = {name: min(values) for name, values in alternate(functions, args.repeats).items()}
    rows = []
    for key, value in seconds.items():
        name, what = key.split(": ")
        ours = seconds[f"flowlib, reversible: {what}" if name.startswith("memcnn") else f"flowlib: {what}"]
        rows.append(
            {
                "package": name,
                "what": what,
                "ms": round(1000 * value, 1),
                "times_flowlib": round(value / ours, 2),
            }
        )
        print(rows[-1])
    write_json(
        RESULTS / "benchmarks" / "peers.json",
        {"rows": rows, "arguments": vars(args), "batch": BATCH, **provenance()},
    )


if __name__ == "__main__":
    main()
