"""From a folder or zip of images to one packed array on disk, and back as an `ImageSet`."""

import contextlib
import functools
import glob
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import socket
import tempfile
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from data.synthetic import draw_faces

SUFFIXES = set(".png .jpg .jpeg .jpe .jfif .webp .bmp .tif .tiff .gif .jp2 .avif".split())
UNREADABLE = {".heic", ".heif", ".hif", ".jxl"}  # images, but Pillow reads none of them
LARGEST = 2**28  # bytes of one image file: more is no photograph
SAMPLES = {"GRAY": "L", "RGB ": "RGB", "CMYK": "CMYK"}  # from a colour profile's space to Pillow's mode
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
    return Path(os.environ.get("FLOWLIB_DATA") or "data")


def prepare(source, out, crop="square", size=64, name=None):
    """Pack a folder or .zip of images into `out`: images.npy (uint8, N x size x size x 3) and manifest.json.

    Images are taken in the order of their names, at any depth. crop="square": the largest centred square;
    crop="celeba": a centred square of 148/178 of the width. Of images with equal pixels the first is packed;
    pairs that look like one photo are packed and named in the manifest. Raises FileNotFoundError (no such
    source) or ValueError (not a zip, no images, unsafe member, corrupt image); then `out` has not changed.
    """
    source = Path(source)
    if crop not in CROPS:
        raise ValueError(f"unknown crop {crop!r}: choose one of {', '.join(CROPS)}")
    with _reading(source):
        exists = source.exists()
    if not exists:
        raise FileNotFoundError(f"{source} does not exist: give a folder or a .zip of images")
    with open_source(source) as (names, read):
        if not names:
            kinds = "/".join(sorted(s[1:] for s in SUFFIXES))
            raise ValueError(f"{source} holds no images ({kinds}): put some in it, or name another source")
        contents, packed, twins = hashlib.sha256(), {}, []

        def images():
            for member in names:
                data = read(member)
                contents.update(f"{member}\0{len(data)}\0".encode(errors="surrogateescape") + data)
                image = decode(data, f"{member} in {source}", crop, size)
                first = packed.setdefault(hashlib.sha256(image).digest(), member)
                if first == member:
                    yield image[None]
                else:
                    twins.append((_readable(member), _readable(first)))

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

        def finish(images_path):
            shown = [_readable(member) for member in packed.values()]
            alike = [(shown[a], shown[b]) for a, b in _look_alikes(images_path)]
            _tell(twins, f"left out of {source}, with the pixels of other images")
            _tell(alike, f"alike in {source} (remove one of each two, or training may see test images)")
            digest = contents
            if not source.is_dir():
                with open(source, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256")
            return manifest | {"source_sha256": digest.hexdigest(), "left_out": len(twins), "alike": alike}

        return _pack(out, images(), len(names), size, finish)


def _tell(pairs, what):
    if pairs:
        some = ", ".join(f"{a} (as {b})" for a, b in pairs[:3])
        warnings.warn(f"{what}: {len(pairs)}, such as {some}", stacklevel=5)


def _look_alikes(images_path):
    """Pairs of rows of a packed file that show one photo, encoded or scaled twice: they differ by less than
    25 % of their contrast. CelebA's first 10,000 have five such pairs; others differ by 35 %."""
    from scipy.spatial import cKDTree  # slow to import

    images = np.load(images_path, mmap_mode="r")
    half = images.shape[1] // 2
    contrast = np.array([max(image.std(), 1) for image in images])
    quarters = [i[: 2 * half, : 2 * half].reshape(2, half, 2, half, 3).mean((1, 3)).ravel() for i in images]
    tree = cKDTree(np.array(quarters) / contrast[:, None])
    pairs = set()
    for row, nearest in enumerate(tree.query(tree.data, k=2)[1]):  # itself and the nearest other
        other = nearest[nearest != row][0]
        if other < len(images):  # else there is one image only
            difference = images[row].astype(np.float32) - images[other]
            if np.sqrt(np.square(difference).mean()) < 0.25 * contrast[row]:
                pairs.add((max(row, int(other)), min(row, int(other))))
    return sorted(pairs)


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
        "left_out": 0,
        "alike": [],
    }
    return _pack(out, chunks, num_images, size, lambda _: manifest)


def _folders(name):
    return (name, "celeba_hq") if name == "celeba" else (name,)


def sources_of(name):
    """The zip or folder that a known set is prepared from, as a list of one path, or of none."""
    if name not in ("celeba", "anime"):
        return []
    folders = [data_dir() / folder for folder in _folders(name)]
    zips = (path for path in data_dir().glob(f"{name}*") if path.suffix.lower() == ".zip")
    found = sorted(zips) + [folder for folder in folders if folder.is_dir()]
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
    """The command that prepares out, the folder of a packed set, which in a build is data/NAME."""
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
def open_source(source):
    """A context: (sorted image names, function from a name to its bytes) of the folder or zip at a Path."""
    if source.is_dir():
        yield _image_names(_files(source), source), lambda name: _read_file(source / name)
        return
    with _reading(source):
        is_zip = source.is_file() and source.open("rb").close() is None and zipfile.is_zipfile(source)
    if not is_zip:
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
        with _reading(error.filename):
            raise error

    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        if os.path.realpath(root) in seen:
            folders.clear()
            continue
        folders.sort()  # so that a folder with a link to it has the same name everywhere
        seen.add(os.path.realpath(root))
        yield from (Path(root, name).relative_to(folder).as_posix() for name in files)


def _image_names(names, source):
    """The image names among these, sorted; files left out are named, with a count."""
    shown = [
        p
        for p in map(PurePosixPath, names)
        if not any(part.startswith((".", "__MACOSX")) for part in p.parts)
    ]
    unreadable = sorted(str(p) for p in shown if p.suffix.lower() in UNREADABLE)
    if unreadable:
        raise ValueError(
            f"{source} holds {len(unreadable)} images that cannot be read (HEIC or JPEG XL; the first is "
            f"{unreadable[0]}): convert them to JPEG, or move them away"
        )
    left_out = Counter(
        p.suffix.lower() or "without a suffix" for p in shown if p.suffix.lower() not in SUFFIXES
    )
    if left_out:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(left_out.items()))
        warnings.warn(f"left out of {source}, as no images: {kinds}", stacklevel=4)
    return sorted(str(p) for p in shown if p.suffix.lower() in SUFFIXES)


def _read_file(path):
    with _reading(path):
        if not path.is_file():  # reading a pipe would never end
            raise ValueError(f"{path} is no file (a broken link, or a pipe): remove it")
        _check_size(path.stat().st_size, path)
        return path.read_bytes()


@contextlib.contextmanager
def _reading(path):
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"cannot read {path} ({error.strerror}): correct its rights, or move it away"
        ) from error


def _check_size(num_bytes, where, has="has"):
    if num_bytes > LARGEST:
        raise ValueError(f"{where} {has} {num_bytes / 2**20:.0f} MB: remove it")


def _read_member(archive, member, source):
    _check_size(member.file_size, f"{member.filename} in {source}", "unpacks to")
    try:
        return archive.read(member)
    except Exception as error:  # bad checksum, password, unknown compression
        raise ValueError(
            f"cannot read {member.filename} in {source} ({error}): fetch or make the zip again"
        ) from error


def decode(data, where, crop="square", size=64):
    """Bytes of one image file -> uint8 (size, size, 3) in sRGB; transparent pixels are laid over white. crop:
    the middle "square", "celeba" as there, or (x, y, zoom): a square zoom times smaller than the largest, x
    and y from 0 (left, top) to 1. ValueError, naming `where` it came from, if it is no image."""
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            file = Image.open(io.BytesIO(data))
            _check_samples(file)
            sixteen = re.search(";16[BLN]", str(file.tile))  # Pillow takes the upper eight of the 16 bits
            image = ImageOps.exif_transpose(file)
            grey = image.mode in ("1", "L", "LA") or image.mode[0] in "IF"
            if image.mode[0] in "IF":  # grey of more than 8 bits, which convert() would clip to 255
                image = Image.fromarray(_eight_bits(np.asarray(image)))
            elif sixteen:
                colours = np.asarray(image.convert("RGB"))
                _check_range(256 * int(colours.min()), 256 * int(colours.max()) + 255)
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                # In 32-bit BMPs the fourth byte may be unused, and is 0 then.
                if file.format != "BMP" or image.getchannel("A").getextrema()[1]:
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            mode = "L" if grey else "CMYK" if image.mode == "CMYK" else "RGB"
            mode, to_srgb = _to_srgb(file.info.get("icc_profile") or b"", mode)
            box = _crop_box(*image.size, crop)
            small = image.convert(mode).resize((size, size), Image.Resampling.LANCZOS, box=box)
            return np.asarray(to_srgb(small) if to_srgb else _without_gamma(small, file.info))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{where} is too large to decode safely ({error}): shrink or remove it") from error
    except UnidentifiedImageError as error:  # whose message is about the buffer
        what = "empty" if not data else "unknown format, such as HEIC, or samples that Pillow does not read"
        raise ValueError(
            f"{where} is not a readable image ({what}): save it as 8-bit PNG or JPEG, replace or remove it"
        ) from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error and more
        raise ValueError(f"{where} is not a readable image ({error}): replace or remove it") from error


def _check_samples(file):
    """ValueError for TIFFs that Pillow opens without a word and decodes wrongly."""
    tags = getattr(file, "tag_v2", {})
    bits = max(tags.get(258) or (8,))
    for what, found in {
        "signed integers": 2 in tags.get(339, ()) and bits < 32,
        "16 bits in separate planes": bits > 8 and len(file.mode) > 2 and ";16" not in str(file.tile),
        "16 bits with white as 0": bits > 8 and tags.get(262) == 0,
    }.items():
        if found:
            raise ValueError(f"it holds {what}, which Pillow misreads: save it as PNG")


@functools.lru_cache(maxsize=8)
def _to_srgb(profile, mode):
    """(mode to convert to, function from there to sRGB) for a file's colour profile. The function is None
    without a profile, and for a broken one or that of another kind of image, as in browsers."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        takes = SAMPLES.get(source.profile.xcolor_space)
        if takes == mode or (takes, mode) == ("RGB", "L"):
            transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), takes, "RGB")
            return takes, lambda image: ImageCms.applyTransform(image, transform)
    except (OSError, ValueError, ImageCms.PyCMSError):
        pass
    return "RGB", None


def _without_gamma(image, info):
    """In sRGB, from the gamma that a PNG states (1: linear), if it is another than that of screens."""
    gamma = info.get("gamma")
    if not gamma or "srgb" in info or abs(gamma - 1 / 2.2) < 0.01:
        return image
    linear = (np.arange(256) / 255) ** (1 / gamma)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return image.point(list((encoded * 255).round().astype(int)) * 3)


def _eight_bits(grey):
    """uint8 of floats from 0 to 1, or of 16-bit grey. ValueError for others."""
    low, high = grey.min(), grey.max()
    if grey.dtype.kind == "f" and 0 <= low <= high <= 1:
        return (grey * 255).round().astype(np.uint8)
    if grey.dtype.kind == "f" or low < 0 or high > 65535:
        raise ValueError(f"its values go from {low} to {high}: scale integers to 65535 or floats to 1")
    _check_range(low, high)
    return (grey >> 8).astype(np.uint8)


def _check_range(low, high):
    """ValueError for 10, 12 or 14 bits stored in 16, grey or colour: they would turn out dark."""
    if high < 2**14:
        raise ValueError(
            f"its 16-bit values go from {low} to {high}: scale it to 65535, or save a dark photo with 8 bits"
        )


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
    mine = f".preparing-{socket.gethostname()}."  # of other machines nobody here knows whether they still run
    for left in out.glob(f"{glob.escape(mine)}*"):
        if not _is_running(left.name.removeprefix(mine).split("-")[0]):
            shutil.rmtree(left, ignore_errors=True)
    pixels = hashlib.sha256()
    with tempfile.TemporaryDirectory(dir=out, prefix=f"{mine}{os.getpid()}-") as temporary:
        images_path, manifest_path = Path(temporary) / IMAGES, Path(temporary) / MANIFEST
        with open(images_path, "wb") as file, tqdm(total=num_images, unit="image", desc=str(out)) as bar:
            # Plain writes rather than a memory map: a full disk is then an error, not a crash.
            header = {"descr": "|u1", "fortran_order": False, "shape": (0, size, size, 3)}
            np.lib.format.write_array_header_1_0(file, header)
            packed = 0
            for chunk in chunks:
                data = chunk.tobytes()
                pixels.update(data)
                file.write(data)
                packed += len(chunk)
                bar.update(len(chunk))
            file.seek(0)  # the header leaves room for any number
            np.lib.format.write_array_header_1_0(file, header | {"shape": (packed, size, size, 3)})
        manifest = finish(images_path) | {
            "num_images": packed,
            "pixels_sha256": pixels.hexdigest(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        manifest_path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        (out / MANIFEST).unlink(missing_ok=True)  # never an old manifest beside new pixels
        os.replace(images_path, out / IMAGES)
        os.replace(manifest_path, out / MANIFEST)
    return out
