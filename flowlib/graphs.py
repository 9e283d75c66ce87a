"""A training step as one CUDA graph: a flow is thousands of small kernels, and the launch of one takes
longer than its run."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, ...]
Step = Callable[[Batch], tuple[Tensor, ...]]


def capture(update: Step, batch: Batch, model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """update, a training step of model and optimizer, captured: later calls take batches of the same shapes,
    and their results are overwritten by the next call. Model and optimizer are left as they were."""
    inputs, weights = [value.clone() for value in batch], copy.deepcopy(model.state_dict())
    moments = {p: copy.deepcopy(state) for p, state in optimizer.state.items()}
    torch.backends.cuda.preferred_linalg_library("cusolver")  # the others cannot be captured
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
        with torch.cuda.stream(stream):
            for _ in range(3):  # in which libraries choose their kernels, and the optimizer makes its moments
                update(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            outputs = update(inputs)
    model.load_state_dict(weights)
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            value.copy_(moments[parameter][key]) if parameter in moments else value.zero_()

    def replay(batch):
        for own, new in zip(inputs, batch):
            own.copy_(new)
        graph.replay()
        return outputs

    return replay
