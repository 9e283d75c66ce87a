"""From folders and zips of images to packed sets, and drawn faces for a machine that has none. This folder is
also where the user's own images lie; git ignores those."""

from data.sources import (
    NAMED,
    ImageSet,
    check_name,
    data_dir,
    decode,
    load,
    open_source,
    prepare,
    prepare_into,
    prepare_named,
    prepare_synthetic,
    sources_of,
)
from data.synthetic import draw_faces

__all__ = [
    "NAMED",
    "ImageSet",
    "check_name",
    "data_dir",
    "decode",
    "draw_faces",
    "load",
    "open_source",
    "prepare",
    "prepare_into",
    "prepare_named",
    "prepare_synthetic",
    "sources_of",
]
