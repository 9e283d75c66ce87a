"""Invertible backpropagation through a chain of flow steps: memory does not grow with their number.

Only the chain's output is kept. Going back, each step's input is recomputed from its output; the coupling
net, which is all the work, is evaluated once for both this and its gradient (Putzky & Welling 2019).

A step is h = W x + b, y = (s h_a + t, h_b), (log s, t) = NN(h_b). With v' for ∂loss/∂v, l' for that of
log_det, J for the Jacobian of NN, and sums over the batch and its n pixels, h_a = (y_a - t) / s and then
x = M h + c, M = W⁻¹, go with::

    h_a' = s y_a',  (log s)' = h_a' h_a + l',  t' = y_a',  h_b' = y_b' + Jᵀ ((log s)', t'),
    W' = Σ h' xᵀ + n Σ l' W⁻ᵀ,  b' = Σ h',  x' = Wᵀ h'

Back through the inverse of a step, h = W x + b and then y_a = s h_a + t, these go with::

    M' = Σ x' hᵀ + n Σ l' M⁻ᵀ,  c' = Σ x',  h' = Mᵀ x',
    y_a' = h_a' / s,  (log s)' = -h_a' h_a - l',  t' = -y_a',  y_b' = h_b' + Jᵀ ((log s)', t')"""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flowlib.fused import Fused, conv1x1, fuse
from flowlib.layers import FlowStep, Mapped


class _ReversibleChain(torch.autograd.Function):
    """steps in order (or, with inverse, their inverses in reverse) on x. The parameters are inputs, so that
    hooks on them, as of DistributedDataParallel, fire once."""

    @staticmethod
    def forward(ctx, x, steps, inverse, *parameters):
        ctx.steps, ctx.inverse = steps, inverse
        x, log_det = run_chain(steps, x, inverse)
        # The parameters too, so that a change in place before the backward pass is seen.
        ctx.save_for_backward(x, *parameters)
        return x, log_det

    @staticmethod
    def backward(ctx, grad, grad_log_det):
        if torch.is_grad_enabled():
            raise RuntimeError("'reversible' has no second derivatives: use set_memory(model, 'checkpoint')")
        output, *parameters = ctx.saved_tensors
        _check_same(parameters, ctx.steps, "reversible")
        gradients, signed = {}, -grad_log_det if ctx.inverse else grad_log_det
        parts = [_back_through_affine, _back_through_coupling]
        with torch.autocast(output.device.type, enabled=False):
            for step in ctx.steps if ctx.inverse else reversed(ctx.steps):
                with torch.enable_grad():
                    [fused] = fuse([step])
                for back in parts if ctx.inverse else reversed(parts):
                    output, grad = back(step, fused, ctx.inverse, output, grad, signed, gradients)
        return grad, None, None, *[gradients.get(p) for p in parameters]


def run_chain(
    steps: Iterable[FlowStep],
    x: Tensor,
    inverse: bool = False,
    memory: str = "reversible",
    fused: list[Fused] | None = None,
    log_det: bool = True,
) -> Mapped:
    """(y, log_det or None) of the steps on x (B, C, H, W), or of their inverses in reverse. fused: their
    weights from fuse, for the memory mode "plain"; the others: see set_memory. Their backward pass raises
    RuntimeError after functional_call, that of "reversible" also for second derivatives."""
    steps, total = list(steps), x.new_zeros(x.shape[0]) if log_det else None
    if memory == "reversible" and torch.is_grad_enabled():
        return _ReversibleChain.apply(x, steps, inverse, *[p for step in steps for p in step.parameters()])
    for i in reversed(range(len(steps))) if inverse else range(len(steps)):
        run, inputs = steps[i].inverse if inverse else steps[i], (x, fused and fused[i], log_det)
        if memory == "checkpoint" and torch.is_grad_enabled():
            run = partial(checkpoint, _again, run, steps[i], list(steps[i].parameters()), use_reentrant=False)
        x, step_log_det = run(*inputs)
        total = total + step_log_det if log_det else None
    return x, total


def _again(run, step, parameters, *inputs):
    """run(*inputs), in the backward pass too."""
    _check_same(parameters, [step], "checkpoint")
    return run(*inputs)


def _check_same(parameters, steps, memory):
    """RuntimeError where the steps have other parameters than when they ran, as after functional_call:
    gradients would be of the wrong weights."""
    present = [p for step in steps for p in step.parameters()]
    if any(then is not now for then, now in zip(parameters, present)):
        raise RuntimeError(f"{memory!r} knows no functional_call: use set_memory(model, 'plain')")


def _back_through_affine(step, fused, inverse, output, grad, grad_log_det, gradients):
    """The input of the step's affine map, or its inverse, and its gradient; gradients of the parameters go
    into `gradients`."""
    maps = fused.affine, fused.inverse_affine
    (weight, bias), undo = reversed(maps) if inverse else maps
    x = conv1x1(output, *(v.detach() for v in undo))
    grad_weight = torch.einsum("bohw,bihw->oi", grad, x)
    grads = grad_weight, grad.sum(dim=(0, 2, 3))[:, None], grad_log_det.sum() * x.shape[2:].numel()
    _add_gradients(gradients, step, (weight, bias, fused.log_det), grads)
    return x, conv1x1(grad, weight.detach().T, grad.new_zeros(len(weight), 1))


def _back_through_coupling(step, fused, inverse, output, grad, grad_log_det, gradients):
    """The same for the step's coupling."""
    (a, b), (grad_a, grad_b) = output.chunk(2, dim=1), grad.chunk(2, dim=1)
    with torch.enable_grad():
        b = b.detach().requires_grad_()
        log_s, t = step.coupling.log_scale_and_shift(b, fused.convs)
    s, shift, grad_log_det = log_s.detach().exp(), t.detach(), grad_log_det[:, None, None, None].to(a.dtype)
    if inverse:
        x_a, grad_x = a * s + shift, grad_a / s
        grads = -grad_a * a + grad_log_det, -grad_x
    else:
        x_a, grad_x = (a - shift) / s, grad_a * s
        grads = grad_x * x_a + grad_log_det, grad_a
    through = _add_gradients(gradients, step.coupling, (log_s, t), grads, b)
    return torch.cat([x_a, b.detach()], dim=1), torch.cat([grad_x, grad_b + through], dim=1)


def _add_gradients(gradients, module, outputs, grads, x=None):
    """Adds the gradients of the module's trained parameters to `gradients`; returns that of x. Outputs
    without a graph depend only on frozen parameters."""
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
