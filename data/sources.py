"""From a folder or zip of images to one packed array on disk, and back as an `ImageSet`."""

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import tempfile
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from .synthetic import draw_faces

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".jp2", ".avif"}
LARGEST = 2**28  # bytes of one image file in a zip: more is no photograph
CROPS = ("square", "celeba")
NAMED = ("celeba", "anime", "synthetic", "synthetic-ood")
IMAGES, MANIFEST = "images.npy", "manifest.json"


@dataclass(frozen=True)
class ImageSet:
    """A packed set: `images` is uint8 (N, size, size, 3), memory-mapped; `manifest` tells its origin."""

    name: str
    images: np.ndarray
    manifest: dict

    def __len__(self):
        return len(self.images)


def data_dir():
    """The folder in which the user's zips and folders lie: $FLOWLIB_DATA, or `data`."""
    return Path(os.environ.get("FLOWLIB_DATA", "data"))


def prepare(source, out, crop="square", size=64, name=None):
    """Pack a folder or .zip of images into `out`: images.npy (uint8, N x size x size x 3) and manifest.json.

    Images are taken in the order of their names, at any depth. crop="square": the largest centred square;
    crop="celeba": a centred square of 148/178 of the width. Raises FileNotFoundError (no such source) or
    ValueError (not a zip, no images, unsafe member, corrupt image); then nothing in `out` has changed.
    """
    source = Path(source)
    if crop not in CROPS:
        raise ValueError(f"unknown crop {crop!r}: choose one of {', '.join(CROPS)}")
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: give a folder or a .zip of images")
    with _open_source(source) as (names, read):
        if not names:
            kinds = "/".join(sorted(s[1:] for s in SUFFIXES))
            raise ValueError(f"{source} holds no images ({kinds}): put some in it, or name another source")
        contents = hashlib.sha256()

        def images():
            for member in names:
                data = read(member)
                contents.update(f"{member}\0{len(data)}\0".encode(errors="surrogateescape") + data)
                yield decode(data, f"{member} in {source}", crop, size)[None]

        manifest = {
            "name": name or _readable(source.stem),
            "source": _readable(source.name),
            "source_sha256": None,
            "crop": crop,
            "size": size,
            "resample": "Lanczos (PIL, antialiased)",
            "first_file": _readable(names[0]),
            "last_file": _readable(names[-1]),
        }

        def finish():
            if source.is_dir():
                return manifest | {"source_sha256": contents.hexdigest()}
            with open(source, "rb") as file:
                return manifest | {"source_sha256": hashlib.file_digest(file, "sha256").hexdigest()}

        return _pack(out, images(), len(names), size, finish)


def _readable(name):
    """A file's name with a mark for each byte that is not UTF-8, which a notebook cannot show."""
    return name.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="replace")


def prepare_synthetic(out, num_images, style="natural", seed=0, size=64):
    """Pack `num_images` drawn faces (see `draw_faces`) into `out`, in the format of `prepare`."""
    parts = (range(start, min(start + 128, num_images)) for start in range(0, num_images, 128))
    chunks = (draw_faces(part, style, seed, size) for part in parts)
    source = f"draw_faces(range({num_images}), style={style!r}, seed={seed}, size={size})"
    manifest = {
        "name": "synthetic" if style == "natural" else f"synthetic-{style}",
        "source": source,
        "source_sha256": hashlib.sha256(source.encode()).hexdigest(),
        "crop": "none",
        "size": size,
        "resample": "none",
        "first_file": "0",
        "last_file": str(num_images - 1),
    }
    return _pack(out, chunks, num_images, size, lambda: manifest)


def _folders(name):
    return (name, "celeba_hq") if name == "celeba" else (name,)


def sources_of(name):
    """The zip or folder that a known set is prepared from, as a list of one path, or of none."""
    if name not in ("celeba", "anime"):
        return []
    folders = [data_dir() / folder for folder in _folders(name)]
    found = sorted(data_dir().glob(f"{name}*.zip")) + [folder for folder in folders if folder.is_dir()]
    return [str(path) for path in found[:1]]


def prepare_named(name, out, num_images=None):
    """Pack "celeba", "anime", "synthetic", "synthetic-ood" or any path into `out`.

    FileNotFoundError says what was looked for, where, and how to get it. `num_images` counts drawn faces
    (default 2,000); a set of files is always packed whole."""
    if name in ("synthetic", "synthetic-ood"):
        return prepare_synthetic(out, num_images or 2000, "ood" if name.endswith("ood") else "natural")
    if name in ("celeba", "anime"):
        found = sources_of(name)
        if found:
            # Aligned CelebA shows shoulders and background; CelebA-HQ is already a square around the face.
            aligned = name == "celeba" and "hq" not in Path(found[0]).stem.lower()
            return prepare(found[0], out, crop="celeba" if aligned else "square", name=name)
        looked = f"{name}*.zip, " + ", ".join(f"{folder}/" for folder in _folders(name))
        raise FileNotFoundError(
            f"no {name} images: looked for {looked} in {data_dir().resolve()}. data/README.md says how to "
            "get them; set FLOWLIB_DATA to look in another folder"
        )
    if Path(name).exists():
        return prepare(name, out)
    raise FileNotFoundError(
        f"{name!r} is neither a known set (celeba, anime, synthetic, synthetic-ood) nor a folder or .zip; "
        f"known sets are looked for in {data_dir().resolve()} (FLOWLIB_DATA), see data/README.md"
    )


def check_name(name):
    """ValueError for a name of a data set that folders, Snakemake or a shell would misread."""
    if not re.fullmatch(r"[\w(][\w .,+@()-]{0,99}", name) or name.endswith(" "):
        raise ValueError(
            f"{name!r} is no name for a data set: choose one of at most 100 letters, digits, spaces and"
            " .,+-_@(), in UTF-8 (--name)"
        )


def prepare_into(source, folder, name=None, crop="square", num_images=None):
    """Pack a known set, or the folder or zip at a path, into folder/name; the path that it went to.

    The name is by default the source's, a zip's without its suffix. Raises ValueError where it is no name of
    a folder."""
    path = Path(source)
    name = name or (
        source if source in NAMED else path.stem if path.suffix.lower() == ".zip" else path.resolve().name
    )
    check_name(name)
    if source in NAMED:
        return prepare_named(source, Path(folder) / name, num_images)
    return prepare(path, Path(folder) / name, crop, name=name)


def load(out):
    """Open a packed set. FileNotFoundError if there is none, ValueError if it is damaged or foreign."""
    images_path, manifest_path = Path(out) / IMAGES, Path(out) / MANIFEST
    again = f"prepare it again with: {_command(Path(out))}"
    for path in (manifest_path, images_path):
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; {again}")
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        name, num_images, size = str(manifest["name"]), manifest["num_images"], manifest["size"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{manifest_path} is not a manifest of flowlib ({error!r}); {again}") from error
    try:
        images = np.load(images_path, mmap_mode="r")
    except Exception as error:  # damaged headers raise anything
        raise ValueError(f"{images_path} is truncated or no .npy file ({error}); {again}") from error
    if images.shape != (num_images, size, size, 3) or images.dtype != np.uint8:
        raise ValueError(
            f"{images_path} holds {images.dtype} {images.shape} where {MANIFEST} says "
            f"uint8 {(num_images, size, size, 3)}; {again}"
        )
    written = images_path.stat()
    if _pixels_sha256(images_path, written.st_mtime_ns, written.st_size) != manifest.get("pixels_sha256"):
        raise ValueError(f"{images_path} is damaged: its pixels do not fit the hash in {MANIFEST}; {again}")
    return ImageSet(name, images, manifest)


def _command(out):
    """The one that prepares out, the folder of a packed set, which in a build is data/NAME."""
    if out.parent.name != "data":
        return f"data.prepare(PATH_TO_YOUR_IMAGES, {str(out)!r})"
    name = shlex.quote(out.name)
    source = name if out.name in NAMED else f"PATH_TO_YOUR_IMAGES --name {name}"
    return f"python -m companion prepare {source} --build {shlex.quote(str(out.parent.parent))}"


@functools.cache
def _pixels_sha256(images_path, *written):
    """Of the pixels of a packed set. Read once a command, unless the file is written again."""
    return hashlib.sha256(np.ascontiguousarray(np.load(images_path, mmap_mode="r"))).hexdigest()


@contextlib.contextmanager
def _open_source(source):
    """Yield (sorted image names, function from a name to its bytes) of a folder or zip."""
    if source.is_dir():
        yield _image_names(_files(source), source), lambda name: _read_file(source / name)
        return
    if not source.is_file() or not zipfile.is_zipfile(source):
        what = f"{source} is neither a folder nor a zip file"
        raise ValueError(f"{what}: give a folder or a .zip of images; a broken download, fetch again")
    with zipfile.ZipFile(source) as archive:
        members = {}
        for member in archive.infolist():
            # Nothing is extracted, so no harm is done; but such an archive is not what it claims to be.
            path = PurePosixPath(member.filename.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", str(path)):
                raise ValueError(
                    f"{source}: member {member.filename!r} points outside the archive: do not trust it"
                )
            if member.is_dir() or not path.parts:
                continue
            if str(path) in members:
                raise ValueError(
                    f"{source} holds {path} twice: one image must not be in training and test, repack it"
                )
            members[str(path)] = member
        yield _image_names(members, source), lambda name: _read_member(archive, members[name], source)


def _files(folder):
    """Names of the files of a folder at any depth, through links too, each folder once."""

    def unreadable(error):
        raise ValueError(
            f"cannot read {error.filename} ({error.strerror}): correct its rights, or move it away"
        )

    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        if os.path.realpath(root) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        yield from (Path(root, name).relative_to(folder).as_posix() for name in files)


def _image_names(names, source):
    """Those that are images, sorted; what is left out is named, with a count."""
    shown = [
        p
        for p in map(PurePosixPath, names)
        if not any(part.startswith((".", "__MACOSX")) for part in p.parts)
    ]
    left_out = Counter(
        p.suffix.lower() or "without a suffix" for p in shown if p.suffix.lower() not in SUFFIXES
    )
    if left_out:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(left_out.items()))
        warnings.warn(f"left out of {source}, as no images: {kinds}", stacklevel=4)
    return sorted(str(p) for p in shown if p.suffix.lower() in SUFFIXES)


def _read_file(path):
    if not path.is_file():  # reading a pipe would never end
        raise ValueError(f"{path} is no file (a broken link, or a pipe): remove it")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"cannot read {path} ({error.strerror}): correct its rights, or move it away"
        ) from error


def _read_member(archive, member, source):
    if member.file_size > LARGEST:
        raise ValueError(
            f"{member.filename} in {source} unpacks to {member.file_size / 2**20:.0f} MB: remove it"
        )
    try:
        return archive.read(member)
    except Exception as error:  # bad checksum, password, unknown compression
        raise ValueError(
            f"cannot read {member.filename} in {source} ({error}): fetch or make the zip again"
        ) from error


def decode(data, where, crop="square", size=64):
    """Bytes of one image file -> uint8 (size, size, 3); transparent pixels are laid over white. crop: the
    middle "square", "celeba" as there, or (x, y, zoom): a square zoom times smaller than the largest, x and y
    from 0 (left, top) to 1. ValueError, naming `where` it came from, for what is no image."""
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            file = Image.open(io.BytesIO(data))
            image = ImageOps.exif_transpose(file)
            if image.mode[0] in "IF":  # grey of more than 8 bits, which convert() would clip to 255
                image = Image.fromarray(_eight_bits(np.asarray(image)))
            elif "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                # In 32-bit BMPs the fourth byte may be unused, and is 0 then.
                if file.format != "BMP" or image.getchannel("A").getextrema()[1]:
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            box = _crop_box(*image.size, crop)
            return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS, box=box))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{where} is too large to decode safely ({error}): shrink or remove it") from error
    except UnidentifiedImageError as error:  # whose message is about the buffer
        raise ValueError(f"{where} is not a readable image (unknown format): replace or remove it") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error and more
        raise ValueError(f"{where} is not a readable image ({error}): replace or remove it") from error


def _eight_bits(grey):
    """uint8 of floats from 0 to 1, or of 16-bit grey. ValueError for others, such as 12 bits in 16, which
    would turn out black."""
    low, high = grey.min(), grey.max()
    if grey.dtype.kind == "f" and 0 <= low <= high <= 1:
        return (grey * 255).round().astype(np.uint8)
    if grey.dtype.kind != "f" and 0 <= low and 4096 <= high < 65536:
        return (grey >> 8).astype(np.uint8)
    raise ValueError(f"its grey goes from {low} to {high}: scale it, integers to 65535 or floats to 1")


def _crop_box(width, height, crop):
    """Square (left, top, right, bottom) in pixels; 89 x 109, "celeba": side 74 from (7.5, 17.5)."""
    x, y, zoom = (0.5, 0.5, 1) if isinstance(crop, str) else crop
    side = min(width * 148 / 178, height) if crop == "celeba" else min(width, height) / zoom
    left, top = x * (width - side), y * (height - side)
    return left, top, left + side, top + side


def _is_running(pid):
    """Whether a process lives, where it can be asked."""
    try:
        os.name == "posix" and os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def _pack(out, chunks, num_images, size, finish):
    """Stream uint8 (n, size, size, 3) chunks into `out`; the manifest comes last and marks it complete."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for left in out.glob(".preparing-*"):
        if not _is_running(left.name.split("-")[1]):
            shutil.rmtree(left, ignore_errors=True)
    pixels = hashlib.sha256()
    with tempfile.TemporaryDirectory(dir=out, prefix=f".preparing-{os.getpid()}-") as temporary:
        images_path, manifest_path = Path(temporary) / IMAGES, Path(temporary) / MANIFEST
        with open(images_path, "wb") as file, tqdm(total=num_images, unit="image", desc=str(out)) as bar:
            # Plain writes rather than a memory map: a full disk is then an error, not a crash.
            header = {"descr": "|u1", "fortran_order": False, "shape": (num_images, size, size, 3)}
            np.lib.format.write_array_header_1_0(file, header)
            for chunk in chunks:
                data = chunk.tobytes()
                pixels.update(data)
                file.write(data)
                bar.update(len(chunk))
        manifest = finish() | {
            "num_images": num_images,
            "pixels_sha256": pixels.hexdigest(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        manifest_path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        (out / MANIFEST).unlink(missing_ok=True)  # never an old manifest beside new pixels
        os.replace(images_path, out / IMAGES)
        os.replace(manifest_path, out / MANIFEST)
    return out
