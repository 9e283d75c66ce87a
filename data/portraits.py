"""Two real faces in colour that come with packages we install, both in the public domain: they stand for the
reader's own where no data set is at hand."""

import matplotlib.cbook
import numpy as np
import skimage.data
from PIL import Image

# (left, top, right, bottom): eyes and mouth where aligned CelebA, cropped as prepare() crops it, has them.
BOXES = {"Eileen Collins (NASA)": (142, 15, 309, 182), "Grace Hopper (US Navy)": (104, 22, 422, 340)}


def portraits(size: int = 64) -> np.ndarray:
    """uint8 (2, size, size, 3): the astronaut of scikit-image and the admiral of matplotlib's sample data."""
    admiral = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    pictures = Image.fromarray(skimage.data.astronaut()), Image.open(admiral)
    crops = [
        picture.convert("RGB").resize((size, size), Image.Resampling.LANCZOS, box)
        for picture, box in zip(pictures, BOXES.values())
    ]
    return np.stack([np.asarray(crop) for crop in crops])
