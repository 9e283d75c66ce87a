"""Invertible backpropagation through a chain of flow steps: memory does not grow with their number.

Only the chain's output is kept. Going back, each step's input is recomputed from its output; the coupling
net, which is all the work, is evaluated once for both this and its gradient (Putzky & Welling 2019)."""

from collections.abc import Iterable

import torch
from torch import Tensor

from flowlib.layers import FlowStep, fold, pixelwise


class _ReversibleChain(torch.autograd.Function):
    """steps in order (or, with inverse, their inverses in reverse) on x. The parameters are inputs, so that
    hooks on them, as of DistributedDataParallel, fire once."""

    @staticmethod
    def forward(ctx, x, steps, inverse, *parameters):
        ctx.steps, ctx.inverse = steps, inverse
        log_det = x.new_zeros(len(x))
        for step in reversed(steps) if inverse else steps:
            x, step_log_det = step.inverse(x) if inverse else step(x)
            log_det = log_det + step_log_det
        ctx.save_for_backward(
            x, *parameters
        )  # these too, so that a change in place before the backward pass is seen
        return x, log_det

    @staticmethod
    def backward(ctx, grad, grad_log_det):
        if torch.is_grad_enabled():
            advice = "use set_memory(model, 'plain') or 'checkpoint'"
            raise RuntimeError(f"the memory mode 'reversible' has no second derivatives: {advice}")
        output, *parameters = ctx.saved_tensors
        gradients = {}
        back = _back_through_inverse if ctx.inverse else _back_through_forward
        with torch.autocast(output.device.type, enabled=False):
            for step in ctx.steps if ctx.inverse else reversed(ctx.steps):
                output, grad = back(step, output, grad, grad_log_det, gradients)
        return grad, None, None, *[gradients.get(p) for p in parameters]


def run_chain(steps: Iterable[FlowStep], x: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """(y, log_det) of the steps on x (B, C, H, W), or of their inverses in reverse, in memory constant in
    len(steps). Its backward pass raises RuntimeError where second derivatives are asked for."""
    steps = list(steps)
    return _ReversibleChain.apply(x, steps, inverse, *[p for step in steps for p in step.parameters()])


def _back_through_forward(step, y, grad_y, grad_log_det, gradients):
    """The input x of y = step(x) and its gradient; those of the step's parameters go into gradients."""
    y_a, y_b = y.chunk(2, dim=1)
    grad_a, grad_b = grad_y.chunk(2, dim=1)
    with torch.enable_grad():
        [folded] = fold([step])
        y_b = y_b.detach().requires_grad_()
        log_s, t = step.coupling.log_scale_and_shift(y_b, folded.convs)
    s = log_s.detach().exp()
    h_a = (y_a - t.detach()) / s
    grad_ha = grad_a * s
    grad_log_s = grad_ha * h_a + grad_log_det[:, None, None, None].to(y.dtype)
    through = _add_gradients(gradients, step.coupling, (log_s, t), (grad_log_s, grad_a), y_b)
    h, grad_h = torch.cat([h_a, y_b.detach()], dim=1), torch.cat([grad_ha, grad_b + through], dim=1)

    x = pixelwise(h, *(v.detach() for v in folded.inverse_linear))
    grads = _outer(grad_h, x), grad_h.sum(dim=(0, 2, 3))[:, None], grad_log_det.sum() * y.shape[2:].numel()
    _add_gradients(gradients, step, (*folded.linear, folded.log_det), grads)
    return x, _transposed(folded.linear[0], grad_h)


def _back_through_inverse(step, x, grad_x, grad_log_det, gradients):
    """The input y of x = step.inverse(y) and its gradient; those of the parameters go into gradients."""
    with torch.enable_grad():
        [folded] = fold([step])
    h_a, h_b = pixelwise(x, *(v.detach() for v in folded.linear)).chunk(2, dim=1)
    with torch.enable_grad():
        h_b = h_b.detach().requires_grad_()
        log_s, t = step.coupling.log_scale_and_shift(h_b, folded.convs)
    s = log_s.detach().exp()
    h = torch.cat([h_a, h_b.detach()], dim=1)
    grads = _outer(grad_x, h), grad_x.sum(dim=(0, 2, 3))[:, None], -grad_log_det.sum() * x.shape[2:].numel()
    _add_gradients(gradients, step, (*folded.inverse_linear, folded.log_det), grads)
    grad_ha, grad_hb = _transposed(folded.inverse_linear[0], grad_x).chunk(2, dim=1)
    grad_a = grad_ha / s
    grad_log_s = -grad_ha * h_a - grad_log_det[:, None, None, None].to(x.dtype)
    through = _add_gradients(gradients, step.coupling, (log_s, t), (grad_log_s, -grad_a), h_b)
    y = torch.cat([h_a * s + t.detach(), h_b.detach()], dim=1)
    return y, torch.cat([grad_a, grad_hb + through], dim=1)


def _add_gradients(gradients, module, outputs, grads, x=None):
    """Adds to gradients those of the module's trained parameters; returns that of x. Outputs without a graph
    are of frozen parameters alone."""
    inputs = [p for p in module.parameters() if p.requires_grad] + ([] if x is None else [x])
    wanted = [(output, grad) for output, grad in zip(outputs, grads) if output.requires_grad]
    if not wanted:
        return None
    outputs, grads = zip(*wanted)
    found = torch.autograd.grad(outputs, inputs, grads, retain_graph=True, allow_unused=True)
    for parameter, grad in zip(inputs, found):
        if parameter is not x and grad is not None:
            gradients[parameter] = gradients[parameter] + grad if parameter in gradients else grad
    return found[-1]


def _transposed(weight, grad):
    """The gradient of a matrix product's input."""
    return pixelwise(grad, weight.detach().T, grad.new_zeros(len(weight), 1))


def _outer(grad, x):
    """The gradient of its matrix: sum over batch and pixels of grad x^T."""
    return torch.einsum("bohw,bihw->oi", grad, x)
