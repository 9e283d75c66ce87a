"""flowlib: deep unfolding with normalizing-flow priors for inverse problems (arXiv:2107.02848)."""

__version__ = "0.1.0"

from flowlib.checkpoints import load_checkpoint, save_checkpoint
from flowlib.glow import Glow, set_memory
from flowlib.glowip import load_glowip
from flowlib.map import map_estimate
from flowlib.metrics import psnr, ssim
from flowlib.operators import Blur, Denoising, Inpainting, LinearOperator
from flowlib.precision import set_compute_dtype
from flowlib.products import set_coupling
from flowlib.prox import GlowProx, Prox, ResNetProx, UNetProx
from flowlib.solver import UnfoldedPGD

__all__ = ["Blur", "Denoising", "Glow", "GlowProx", "Inpainting", "LinearOperator", "Prox", "ResNetProx"]
__all__ += ["UNetProx", "UnfoldedPGD", "load_checkpoint", "load_glowip", "map_estimate", "psnr"]
__all__ += ["save_checkpoint", "set_compute_dtype", "set_coupling", "set_memory", "ssim"]
