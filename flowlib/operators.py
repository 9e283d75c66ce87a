"""Linear measurement operators y = A x + noise, equation (1). All map (B, C, H, W) -> (B, C, H, W)."""

import torch
from torch import nn


class LinearOperator(nn.Module):
    """Base of all operators: subclasses give `A(x)` and `A_adjoint(y)`, with <A x, y> = <x, A_adjoint y>.

    sigma: standard deviation of the measurement noise, on the scale of the image (range 1)."""

    def __init__(self, sigma=0.0):
        super().__init__()
        if not sigma >= 0:
            raise ValueError(f"the noise level sigma must be >= 0, got {sigma}")
        self.sigma = sigma

    def A(self, x):
        raise NotImplementedError

    def A_adjoint(self, y):
        raise NotImplementedError

    def noise(self, y, generator=None):
        """Gaussian noise of standard deviation sigma, of y's shape, drawn with the generator."""
        return self.sigma * torch.randn(y.shape, generator=generator, dtype=y.dtype).to(y.device)

    def measure(self, x, generator=None):
        """y = A x + noise."""
        y = self.A(x)
        return y + self.noise(y, generator) if self.sigma else y

    def __matmul__(self, first):
        return Composition(self, first)


class Composition(LinearOperator):
    """second @ first: A x = A_second(A_first(x)); the noise is that of the second operator."""

    def __init__(self, second, first):
        super().__init__(second.sigma)
        self.second, self.first = second, first

    def A(self, x):
        return self.second.A(self.first.A(x))

    def A_adjoint(self, y):
        return self.first.A_adjoint(self.second.A_adjoint(y))

    def noise(self, y, generator=None):
        return self.second.noise(y, generator)


class Denoising(LinearOperator):
    """A is the identity; everything to undo is the noise."""

    def __init__(self, sigma=0.2):
        super().__init__(sigma)

    def A(self, x):
        return x

    def A_adjoint(self, y):
        return y


class Inpainting(LinearOperator):
    """Blocks the centre mask_size x mask_size pixels of images of size image_size (one number, or (H, W)).

    `Inpainting.from_mask(mask)` takes any binary mask (H, W) or (1 or C, H, W): 1 where a pixel is measured.
    Noise, if any, falls on measured pixels only. Raises ValueError where the mask is not binary or does not fit."""

    def __init__(self, mask_size=19, image_size=64, sigma=0.0):
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if not 0 < mask_size <= min(height, width):
            raise ValueError(f"mask_size {mask_size} does not fit an image of {height}x{width}")
        mask = torch.ones(height, width)
        top, left = (height - mask_size) // 2, (width - mask_size) // 2
        mask[top : top + mask_size, left : left + mask_size] = 0
        self._set(mask, sigma)

    @classmethod
    def from_mask(cls, mask, sigma=0.0):
        operator = cls.__new__(cls)
        operator._set(mask, sigma)
        return operator

    def _set(self, mask, sigma):
        super().__init__(sigma)
        mask = torch.as_tensor(mask)
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("the mask must be binary: 1 (or True) where a pixel is measured, 0 where it is blocked")
        self.register_buffer("mask", mask.float())

    def A(self, x):
        if x.shape[-2:] != self.mask.shape[-2:]:
            raise ValueError(f"images of {tuple(x.shape[-2:])} do not fit the mask of {tuple(self.mask.shape[-2:])}")
        return x * self.mask.to(x.dtype)

    def A_adjoint(self, y):
        return self.A(y)

    def noise(self, y, generator=None):
        return self.A(super().noise(y, generator))


class Blur(LinearOperator):
    """Convolution with a truncated, normalised Gaussian of standard deviation sigma_b pixels.

    kernel_size: odd number of taps a side; the paper gives none, and 3 is what fits its numbers (notebooks/11_blur).
    boundary: what lies outside the image: "circular" (it repeats), "zero", or "reflect" (mirrored about the centre of the
    edge pixel). The Gaussian is separable, so A x = B_H x B_W^T with one small band matrix B for each axis; the adjoint is
    exact for every boundary: B_H^T y B_W.

    Raises ValueError for an even kernel, an unknown boundary, or a kernel that reaches further than the image."""

    BOUNDARIES = ("circular", "zero", "reflect")

    def __init__(self, sigma_b=5.0, kernel_size=3, boundary="circular", sigma=0.0):
        super().__init__(sigma)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        if boundary not in self.BOUNDARIES:
            raise ValueError(f"unknown boundary {boundary!r}; choose one of {', '.join(self.BOUNDARIES)}")
        self.boundary = boundary
        offsets = torch.arange(kernel_size, dtype=torch.float64) - kernel_size // 2
        kernel = torch.exp(-0.5 * (offsets / sigma_b) ** 2)
        self.register_buffer("kernel", kernel / kernel.sum())

    def matrix(self, size, like):
        """The blur along one axis as a matrix (size, size)."""
        radius = len(self.kernel) // 2
        if radius >= size:
            raise ValueError(f"a kernel of {len(self.kernel)} pixels reaches beyond an image side of {size} pixels")
        row = torch.arange(size, device=self.kernel.device)[:, None].expand(size, len(self.kernel))
        column = row + torch.arange(-radius, radius + 1, device=self.kernel.device)
        value = self.kernel.expand(size, -1)
        if self.boundary == "circular":
            column = column % size
        elif self.boundary == "reflect":
            column = (size - 1) - ((size - 1) - column.abs()).abs()
        else:
            value = value * ((column >= 0) & (column < size))
            column = column.clamp(0, size - 1)
        matrix = self.kernel.new_zeros(size, size).index_put_((row, column), value, accumulate=True)
        return matrix.to(like)

    def A(self, x):
        return self.matrix(x.shape[-2], x) @ x @ self.matrix(x.shape[-1], x).T

    def A_adjoint(self, y):
        return self.matrix(y.shape[-2], y).T @ y @ self.matrix(y.shape[-1], y)
