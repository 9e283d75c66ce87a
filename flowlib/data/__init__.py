"""Images: packed sets on disk, splits, tensors, and synthetic faces for a machine that has nothing."""

from .sources import ImageSet, data_dir, decode, load, prepare, prepare_named, prepare_synthetic
from .splits import dequantize, split_indices, to_tensor, to_uint8
from .synthetic import draw_faces

__all__ = [
    "ImageSet",
    "data_dir",
    "decode",
    "dequantize",
    "draw_faces",
    "load",
    "prepare",
    "prepare_named",
    "prepare_synthetic",
    "split_indices",
    "to_tensor",
    "to_uint8",
]
