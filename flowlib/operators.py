"""Linear measurement operators y = A x + noise, equation (1). All map (B, C, H, W) -> (B, C, H, W)."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from flowlib.images import Size, floating, height_and_width, standard_normal
from flowlib.precision import as_double, without_autocast


class LinearOperator(nn.Module):
    """Base of all operators: subclasses give `A(x)` and `A_adjoint(y)`, with <A x, y> = <x, A_adjoint y>.
    sigma: standard deviation of the measurement noise, on the scale of the image (range 1). `second @ first`
    composes. A solver's step_size should start near 1 / ‖A‖²: see norm_squared. Raises ValueError for a
    negative sigma, and for images of integers."""

    def __init__(self, sigma: float = 0.0) -> None:
        super().__init__()
        if not sigma >= 0:
            raise ValueError(f"the noise level sigma must be >= 0, got {sigma}")
        self.sigma = sigma

    def A(self, x: Tensor) -> Tensor:
        """A x."""
        raise NotImplementedError

    def A_adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y."""
        raise NotImplementedError

    def noise(self, y: Tensor, generator: Generator | None = None) -> Tensor:
        """Gaussian noise of standard deviation sigma, of y's shape, drawn with the generator."""
        return self.sigma * standard_normal(y.shape, y, generator)

    def measure(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """y = A x + noise, the noise drawn with the generator."""
        with without_autocast(x):
            y = self.A(floating(x))
            return y + self.noise(y, generator) if self.sigma else y

    @torch.no_grad()
    def norm_squared(self, like: Tensor, num_steps: int = 50) -> float:
        """‖A‖², the largest eigenvalue of AᵀA, by num_steps of the power iteration from seeded noise: at most
        a few per cent too small. like: images (B, C, H, W), such as x0, that give size, type and device."""
        x = standard_normal(like.shape, like, torch.Generator().manual_seed(0))
        with without_autocast(x):
            for _ in range(num_steps):
                x = self.A_adjoint(self.A(F.normalize(x, dim=(1, 2, 3))))
        return float(x.flatten(1).norm(dim=1).max())

    def __matmul__(self, first: "LinearOperator") -> "Composition":
        return Composition(self, first)


class Composition(LinearOperator):
    """second @ first: A x = A_second(A_first(x)); the noise is that of the second operator."""

    def __init__(self, second: LinearOperator, first: LinearOperator) -> None:
        nn.Module.__init__(self)
        self.second, self.first = second, first

    @property
    def sigma(self) -> float:
        """The second operator's."""
        return self.second.sigma

    @sigma.setter
    def sigma(self, value: float) -> None:
        self.second.sigma = value

    def A(self, x: Tensor) -> Tensor:
        return self.second.A(self.first.A(x))

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self.first.A_adjoint(self.second.A_adjoint(y))

    def noise(self, y: Tensor, generator: Generator | None = None) -> Tensor:
        return self.second.noise(y, generator)


class Denoising(LinearOperator):
    """A is the identity: only the noise, of standard deviation sigma, must be removed."""

    def __init__(self, sigma: float = 0.2) -> None:
        super().__init__(sigma)

    def A(self, x: Tensor) -> Tensor:
        return floating(x)

    A_adjoint = A


class Inpainting(LinearOperator):
    """Blocks the centre mask_size x mask_size pixels of images of size image_size (one number, or (H, W)).
    Noise of standard deviation sigma falls on measured pixels only. Raises ValueError where the mask is not
    binary or does not fit the images."""

    def __init__(self, mask_size: int = 19, image_size: Size = 64, sigma: float = 0.0) -> None:
        super().__init__(sigma)
        height, width = height_and_width(image_size)
        if not 0 < mask_size <= min(height, width):
            raise ValueError(f"mask_size {mask_size} does not fit an image of {height}x{width}")
        top, left = (height - mask_size) // 2, (width - mask_size) // 2
        self.register_buffer("mask", torch.ones(height, width))
        self.mask[top : top + mask_size, left : left + mask_size] = 0

    @classmethod
    def from_mask(cls, mask: Tensor, sigma: float = 0.0) -> "Inpainting":
        """Of any binary mask (H, W), (1 or C, H, W) or (B or 1, 1 or C, H, W): 1 where measured."""
        mask = torch.as_tensor(mask)
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("the mask must be binary: 1 where a pixel is measured, 0 where it is blocked")
        operator = cls(1, tuple(mask.shape[-2:]), sigma)
        operator.mask = mask.float().clone()
        return operator

    def A(self, x: Tensor) -> Tensor:
        missing = x.ndim - self.mask.ndim
        fits = missing >= 0 and all(m in (1, n) for m, n in zip(self.mask.shape, x.shape[missing:]))
        if not fits or x.shape[-2:] != self.mask.shape[-2:]:
            raise ValueError(f"images {tuple(x.shape)} do not fit the mask {tuple(self.mask.shape)}")
        return torch.where(self.mask.to(x.device).bool(), floating(x), 0.0)  # 0 * NaN would be NaN

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self.A(y)

    def noise(self, y: Tensor, generator: Generator | None = None) -> Tensor:
        return self.A(super().noise(y, generator))


class Blur(LinearOperator):
    """Convolution with a truncated, normalised Gaussian of standard deviation sigma_b pixels.

    kernel_size: odd number of taps a side; the paper gives none; 3 is our choice (notebook "blur").
    boundary: the rule beyond the edge: "circular" (the image repeats), "zero", or "reflect" (mirrored about
    the centre of the edge pixel). sigma: standard deviation of the noise. The Gaussian is separable:
    A x = B_H x B_Wᵀ with a small band matrix B for each axis, and the adjoint is exact. Raises ValueError for
    an even kernel, a sigma_b that is not positive, an unknown boundary, or a kernel larger than the image."""

    BOUNDARIES = {"circular": "circular", "zero": "constant", "reflect": "reflect"}

    def __init__(
        self, sigma_b: float = 5.0, kernel_size: int = 3, boundary: str = "circular", sigma: float = 0.0
    ) -> None:
        super().__init__(sigma)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        if not sigma_b > 0:
            raise ValueError(f"the blur's standard deviation sigma_b must be positive, got {sigma_b}")
        if boundary not in self.BOUNDARIES:
            raise ValueError(f"unknown boundary {boundary!r}; choose one of {', '.join(self.BOUNDARIES)}")
        self.boundary = boundary
        offsets = as_double(torch.arange(kernel_size) - kernel_size // 2)
        kernel = torch.exp(-0.5 * (offsets / sigma_b) ** 2)
        self.register_buffer("kernel", kernel / kernel.sum())

    def _apply(self, fn, recurse=True):
        try:
            return super()._apply(fn, recurse)
        except TypeError:  # a device without float64
            self.kernel = self.kernel.float()
            return super()._apply(fn, recurse)

    def matrix(self, size: int, like: Tensor) -> Tensor:
        """The blur along one axis as a matrix (size, size), with the type and on the device of `like`."""
        taps, radius = len(self.kernel), len(self.kernel) // 2
        if radius >= size:
            raise ValueError(f"a kernel of {taps} pixels reaches beyond an image side of {size} pixels")
        impulses = torch.eye(size, dtype=self.kernel.dtype, device=self.kernel.device)[None]
        padded = F.pad(impulses, (radius, radius), mode=self.BOUNDARIES[self.boundary])[0]
        return (padded.unfold(1, taps, 1) @ self.kernel).T.contiguous().to(floating(like))

    def A(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            return self.matrix(x.shape[-2], x) @ x @ self.matrix(x.shape[-1], x).T

    def A_adjoint(self, y: Tensor) -> Tensor:
        with without_autocast(y):
            return self.matrix(y.shape[-2], y).T @ y @ self.matrix(y.shape[-1], y)
