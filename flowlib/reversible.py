"""Invertible backpropagation through a chain of flow steps: memory does not grow with their number.

Only the chain's output is kept. Going back, each step's input is recomputed from its output; the coupling net, which
is all the work, is evaluated once for both the recomputation and its gradient (Putzky & Welling 2019)."""

import torch
import torch.nn.functional as F


class _ReversibleChain(torch.autograd.Function):
    """steps in order (or, with inverse, their inverses in reverse) on x. The parameters are inputs, so that hooks on
    them, such as those of DistributedDataParallel, fire once and as usual."""

    @staticmethod
    def forward(ctx, x, steps, inverse, *parameters):
        ctx.steps, ctx.inverse = steps, inverse
        log_det = x.new_zeros(len(x))
        for step in reversed(steps) if inverse else steps:
            x, step_log_det = step.inverse(x) if inverse else step(x)
            log_det = log_det + step_log_det
        ctx.save_for_backward(x)
        return x, log_det

    @staticmethod
    def backward(ctx, grad, grad_log_det):
        (output,) = ctx.saved_tensors
        back = _back_through_inverse if ctx.inverse else _back_through_forward
        gradients = [None] * len(ctx.steps)
        order = range(len(ctx.steps)) if ctx.inverse else reversed(range(len(ctx.steps)))
        for i in order:
            output, grad, gradients[i] = back(ctx.steps[i], output, grad, grad_log_det)
        return grad, None, None, *[g for step in gradients for g in step]


def run_chain(steps, x, inverse=False):
    """(y, log_det) of the steps on x (B, C, H, W), or of their inverses in reverse, with memory constant in len(steps)."""
    steps = list(steps)
    return _ReversibleChain.apply(x, steps, inverse, *[p for step in steps for p in step.parameters()])


def _back_through_forward(step, y, grad_y, grad_log_det):
    """The input x of y = step(x), the gradient with respect to it, and those of the step's parameters."""
    y_a, y_b = y.chunk(2, dim=1)
    grad_a, grad_b = grad_y.chunk(2, dim=1)
    net = list(step.coupling.net.parameters())
    with torch.enable_grad():
        y_b = y_b.detach().requires_grad_()
        log_s, t = step.coupling.log_scale_and_shift(y_b)
    s, detached_t = log_s.detach().exp(), t.detach()
    h_a = (y_a - detached_t) / s
    grad_ha = grad_a * s
    through, *net_grads = torch.autograd.grad(
        (log_s, t), [y_b, *net], (grad_ha * h_a + grad_log_det[:, None, None, None], grad_a)
    )
    h, grad_h = torch.cat([h_a, y_b.detach()], dim=1), torch.cat([grad_ha, grad_b + through], dim=1)

    linear = [step.actnorm.bias, step.actnorm.log_scale, step.invconv.weight]
    with torch.enable_grad():
        weight, bias = step.linear()
        log_det = step.linear_log_det(y)
    inverse_weight, inverse_bias = step.inverse_linear()
    x = F.conv2d(h, inverse_weight[:, :, None, None], inverse_bias)
    grad_x = F.conv2d(grad_h, weight.detach().T[:, :, None, None])
    linear_grads = torch.autograd.grad(
        (weight, bias, log_det), linear, (_outer(grad_h, x), grad_h.sum(dim=(0, 2, 3)), grad_log_det.sum())
    )
    return x, grad_x, _in_order(step, linear + net, [*linear_grads, *net_grads])


def _back_through_inverse(step, x, grad_x, grad_log_det):
    """The input y of x = step.inverse(y), the gradient with respect to it, and those of the step's parameters."""
    weight, bias = step.linear()
    h_a, h_b = F.conv2d(x, weight[:, :, None, None], bias).chunk(2, dim=1)
    linear = [step.actnorm.bias, step.actnorm.log_scale, step.invconv.weight]
    net = list(step.coupling.net.parameters())
    with torch.enable_grad():
        h_b = h_b.detach().requires_grad_()
        log_s, t = step.coupling.log_scale_and_shift(h_b)
        inverse_weight, inverse_bias = step.inverse_linear()
        log_det = step.linear_log_det(x)
    s = log_s.detach().exp()
    h = torch.cat([h_a, h_b.detach()], dim=1)
    grad_h = F.conv2d(grad_x, inverse_weight.detach().T[:, :, None, None])
    linear_grads = torch.autograd.grad(
        (inverse_weight, inverse_bias, log_det),
        linear,
        (_outer(grad_x, h), grad_x.sum(dim=(0, 2, 3)), -grad_log_det.sum()),
    )
    grad_ha, grad_hb = grad_h.chunk(2, dim=1)
    grad_a = grad_ha / s
    through, *net_grads = torch.autograd.grad(
        (log_s, t), [h_b, *net], (-grad_ha * h_a - grad_log_det[:, None, None, None], -grad_a)
    )
    y = torch.cat([h_a * s + t.detach(), h_b.detach()], dim=1)
    return y, torch.cat([grad_a, grad_hb + through], dim=1), _in_order(step, linear + net, [*linear_grads, *net_grads])


def _outer(grad, x):
    """The gradient of a 1x1 convolution's matrix: sum over batch and pixels of grad x^T."""
    return torch.einsum("bohw,bihw->oi", grad, x)


def _in_order(step, parameters, gradients):
    by_parameter = dict(zip(map(id, parameters), gradients))
    return [by_parameter[id(p)] for p in step.parameters()]
