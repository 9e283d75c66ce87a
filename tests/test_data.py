"""Packing, splitting and drawing images: properties, and every error a user can meet."""

import io
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import data
from flowlib import images as image_tensors


def write_images(folder, count=3, size=(20, 30), mode="RGB"):
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for i in range(count):
        pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i:03d}.png")
    return folder


def write_zip(path, folder, extra=()):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"images/{file.name}")
        for name, content in extra:
            archive.writestr(name, content)
    return path


def files_in(out):
    return sorted(p.name for p in out.iterdir()) if out.exists() else []


# Packing


def test_folder_and_zip_give_the_same_pixels_and_a_manifest(tmp_path):
    folder = write_images(tmp_path / "faces")
    extra = [
        ("__MACOSX/images/._000.png", b"junk"),
        ("images/.hidden.png", b"junk"),
        ("images/notes.txt", b"hello"),
    ]
    archive = write_zip(tmp_path / "faces.zip", folder, extra)
    a = data.load(data.prepare(folder, tmp_path / "a", size=16))
    b = data.load(data.prepare(archive, tmp_path / "b", size=16, name="mine"))
    assert len(a) == len(b) == 3 and a.images.shape == (3, 16, 16, 3) and a.images.dtype == np.uint8
    assert np.array_equal(a.images, b.images)
    assert (a.name, b.name) == ("faces", "mine")
    assert a.manifest["pixels_sha256"] == b.manifest["pixels_sha256"]
    assert (b.manifest["source"], b.manifest["first_file"]) == ("faces.zip", "images/000.png")
    assert str(tmp_path) not in json.dumps([a.manifest, b.manifest])  # no absolute path
    assert files_in(tmp_path / "a") == ["images.npy", "manifest.json"]


def test_images_are_sorted_by_name_whatever_the_archive_order(tmp_path):
    folder = write_images(tmp_path / "faces")
    with zipfile.ZipFile(tmp_path / "back.zip", "w") as archive:
        for file in sorted(folder.iterdir(), reverse=True):
            archive.write(file, file.name)
    forwards = data.load(data.prepare(folder, tmp_path / "a", size=8))
    backwards = data.load(data.prepare(tmp_path / "back.zip", tmp_path / "b", size=8))
    assert np.array_equal(forwards.images, backwards.images)


def test_source_hash_of_a_folder_sees_names_and_contents(tmp_path):
    folder = write_images(tmp_path / "faces")
    before = data.load(data.prepare(folder, tmp_path / "out", size=8)).manifest["source_sha256"]
    (folder / "000.png").rename(folder / "0000.png")
    after = data.load(data.prepare(folder, tmp_path / "out", size=8)).manifest["source_sha256"]
    assert before != after


def test_celeba_crop_is_fractional_and_centred(tmp_path):
    """On a linear ramp, resizing the box [7.5, 81.5] x [17.5, 91.5] samples it at known places."""
    (tmp_path / "ramp").mkdir()
    x, y = np.meshgrid(np.arange(89), np.arange(109))
    Image.fromarray(np.stack([2 * x, 2 * y, 0 * x], -1).astype(np.uint8)).save(tmp_path / "ramp" / "ramp.png")
    image = (
        data.load(data.prepare(tmp_path / "ramp", tmp_path / "out", crop="celeba")).images[0].astype(float)
    )
    centres = (np.arange(64) + 0.5) * 74 / 64  # of the output pixels, from the box's edge
    inner = slice(4, -4)  # the filter is cut off at the box's edge
    assert np.abs(image[:, :, 0] - 2 * (7.5 + centres - 0.5))[:, inner].max() <= 0.75
    assert np.abs(image[:, :, 1].T - 2 * (17.5 + centres - 0.5))[:, inner].max() <= 0.75
    # Rounding the box to whole pixels would shift the ramp by a whole grey level; on average ours is exact.
    assert abs(np.mean(image[:, inner, 0] - 2 * (7.5 + centres[inner] - 0.5))) < 0.2
    assert abs(np.mean(image[inner, :, 1].T - 2 * (17.5 + centres[inner] - 0.5))) < 0.2


def test_square_crop_keeps_the_centre(tmp_path):
    (tmp_path / "wide").mkdir()
    pixels = np.zeros((8, 20, 3), np.uint8)
    pixels[:, 6:14] = 200
    Image.fromarray(pixels).save(tmp_path / "wide" / "a.png")
    assert (data.load(data.prepare(tmp_path / "wide", tmp_path / "out", size=8)).images == 200).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    folder = write_images(tmp_path / "faces", mode=mode)
    assert data.load(data.prepare(folder, tmp_path / "out", size=16)).images.shape == (3, 16, 16, 3)


def test_transparent_pixels_are_white_and_16_bit_grey_keeps_its_range(tmp_path):
    folder = tmp_path / "faces"
    folder.mkdir()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(folder / "0.png")
    Image.fromarray(np.full((8, 8), 0x8000, np.uint16)).save(folder / "1.png")
    images = data.load(data.prepare(folder, tmp_path / "out", size=8)).images
    assert (images[0] == 255).all() and (images[1] == 128).all()


# Errors: each names the file and the fix, and leaves nothing behind


def bad_source(tmp_path, case):
    folder = write_images(tmp_path / "faces")
    if case == "corrupt":
        (folder / "001.png").write_bytes(b"not an image")
    elif case == "truncated":
        (folder / "001.png").write_bytes((folder / "001.png").read_bytes()[:200])
    elif case == "empty folder":
        (tmp_path / "none").mkdir()
        return tmp_path / "none"
    elif case == "empty zip":
        return write_zip(tmp_path / "a.zip", write_images(tmp_path / "none", 0))
    elif case == "no images":
        return write_zip(tmp_path / "a.zip", write_images(tmp_path / "none", 0), [("notes.txt", b"hello")])
    elif case == "not a zip":
        (tmp_path / "a.zip").write_bytes(b"PK but not really")
        return tmp_path / "a.zip"
    elif case == "parent member":
        return write_zip(tmp_path / "a.zip", folder, [("images/../../evil.png", b"x")])
    elif case == "absolute member":
        return write_zip(tmp_path / "a.zip", folder, [("/etc/evil.png", b"x")])
    elif case == "damaged member":
        archive = write_zip(tmp_path / "a.zip", folder)
        content = bytearray(archive.read_bytes())
        content[100:130] = bytes(30)
        archive.write_bytes(content)
        return archive
    return folder


@pytest.mark.parametrize(
    "case, message",
    [
        ("corrupt", r"001\.png in .*faces is not a readable image.*replace or remove it"),
        ("truncated", r"001\.png in .*faces is not a readable image.*replace or remove it"),
        ("empty folder", r"none holds no images"),
        ("empty zip", r"a\.zip holds no images"),
        ("no images", r"a\.zip holds no images \(avif/bmp/gif"),
        ("not a zip", r"a\.zip is neither a folder nor a zip"),
        ("parent member", r"a\.zip: member 'images/\.\./\.\./evil\.png' points outside"),
        ("absolute member", r"a\.zip: member '/etc/evil\.png' points outside"),
        ("damaged member", r"cannot read images/000\.png in .*a\.zip.*make the zip again"),
    ],
)
def test_bad_source_is_named_and_nothing_is_left(tmp_path, case, message):
    source, out = bad_source(tmp_path, case), tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        data.prepare(source, out, size=8)
    assert files_in(out) == []


def test_a_failing_prepare_keeps_the_earlier_set(tmp_path):
    folder, out = write_images(tmp_path / "faces"), tmp_path / "out"
    before = data.load(data.prepare(folder, out, size=8))
    (folder / "002.png").write_bytes(b"")
    with pytest.raises(ValueError, match="002.png"):
        data.prepare(folder, out, size=8)
    assert data.load(out).manifest == before.manifest and files_in(out) == ["images.npy", "manifest.json"]


def test_missing_source_and_unknown_crop(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: give a folder or a .zip"):
        data.prepare(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ValueError, match="unknown crop 'round': choose one of square, celeba"):
        data.prepare(write_images(tmp_path / "faces"), tmp_path / "out", crop="round")


def test_decompression_bomb(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "faces")
    for limit in (400, 100):  # 600 pixels: a warning of PIL's, then its error
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match="000.png in .* is too large to decode safely"):
            data.prepare(folder, tmp_path / "out")


# Loading


def packed(tmp_path):
    return data.prepare_synthetic(tmp_path / "data" / "synthetic", 4, size=16)


def test_load_is_memory_mapped(tmp_path):
    assert isinstance(data.load(packed(tmp_path)).images, np.memmap)


def test_truncated_or_foreign_files_are_named(tmp_path):
    out = packed(tmp_path)
    content = (out / "images.npy").read_bytes()
    for wrong in (content[:-10], content[:20], b"", b"foreign"):
        (out / "images.npy").write_bytes(wrong)
        with pytest.raises(
            ValueError, match=r"images\.npy is truncated.*again with: python -m companion prepare syn"
        ):
            data.load(out)
    for wrong in (np.zeros((3, 16, 16, 3), np.uint8), np.zeros((4, 16, 16, 3), np.float32)):
        np.save(out / "images.npy", wrong)
        with pytest.raises(
            ValueError, match=r"images\.npy holds .* where manifest\.json says .*prepare it again"
        ):
            data.load(out)
    for wrong in ("", "{}", "[1]", '{"name": '):
        (out / "manifest.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"manifest\.json is not a manifest.*prepare it again"):
            data.load(out)
    (out / "manifest.json").unlink()
    for folder, command in {
        "data/synthetic": f"python -m companion prepare synthetic --build {tmp_path}$",
        "my build/data/mine": "companion prepare PATH_TO_YOUR_IMAGES --name mine --build '.*my build'$",
        "packed": r"data.prepare\(PATH_TO_YOUR_IMAGES, '.*/packed'\)",
    }.items():
        with pytest.raises(FileNotFoundError, match="manifest.json does not exist; .* with: .*" + command):
            data.load(tmp_path / folder)


# Named sets


def test_named_sets_are_found_in_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWLIB_DATA", str(tmp_path))
    assert data.data_dir() == tmp_path
    for name in ("celeba", "anime"):
        with pytest.raises(
            FileNotFoundError, match=rf"{name}\*\.zip, {name}/.*data/README\.md.*FLOWLIB_DATA"
        ) as error:
            data.prepare_named(name, tmp_path / "out")
        assert str(tmp_path) in str(error.value)
    with pytest.raises(FileNotFoundError, match="'nothing' is neither a known set"):
        data.prepare_named("nothing", tmp_path / "out")
    write_images(tmp_path / "celeba_hq")
    assert (
        data.load(data.prepare_named("celeba", tmp_path / "out")).manifest["crop"] == "square"
    )  # already cropped
    write_zip(tmp_path / "celeba-small.zip", tmp_path / "celeba_hq")
    found = data.load(data.prepare_named("celeba", tmp_path / "out")).manifest
    assert (found["name"], found["source"], found["crop"]) == ("celeba", "celeba-small.zip", "celeba")
    write_images(tmp_path / "anime")
    assert data.load(data.prepare_named("anime", tmp_path / "out")).manifest["crop"] == "square"
    assert len(data.load(data.prepare_named(str(tmp_path / "celeba_hq"), tmp_path / "out"))) == 3


def test_default_data_folder(monkeypatch):
    monkeypatch.delenv("FLOWLIB_DATA", raising=False)
    assert str(data.data_dir()) == "data"


def test_real_celeba(tmp_path, monkeypatch):
    found = sorted(data.data_dir().glob("celeba*.zip"))
    if not found:
        pytest.skip(f"no celeba*.zip in {data.data_dir()} (FLOWLIB_DATA)")
    with zipfile.ZipFile(found[0]) as archive, zipfile.ZipFile(tmp_path / "celeba.zip", "w") as first:
        for name in sorted(n for n in archive.namelist() if n.endswith(".jpg"))[:20]:
            first.writestr(name, archive.read(name))
    monkeypatch.setenv("FLOWLIB_DATA", str(tmp_path))
    faces = data.load(data.prepare_named("celeba", tmp_path / "out"))
    assert len(faces) == 20 and faces.images.std() > 30


# Synthetic faces


@pytest.mark.parametrize("style", ["natural", "ood"])
def test_a_face_depends_on_its_index_alone(style):
    together = data.draw_faces(range(20), style)
    alone = np.concatenate([data.draw_faces([i], style) for i in (17, 3, 11)])
    assert np.array_equal(alone, together[[17, 3, 11]])
    assert np.array_equal(data.draw_faces(range(5, 20), style), together[5:])


def test_faces_differ_by_index_seed_and_style():
    faces = {
        key: data.draw_faces(range(24), *key).astype(float)
        for key in [("natural", 0), ("natural", 1), ("ood", 0)]
    }
    everything = np.concatenate(list(faces.values())).reshape(72, -1)
    distance = np.sqrt(np.mean(np.square(everything[:, None] - everything[None]), -1))
    assert distance[~np.eye(72, dtype=bool)].min() > 15  # grey levels, root mean square: no two alike
    assert data.draw_faces([0], size=32).shape == (1, 32, 32, 3)
    assert data.draw_faces([]).shape == (0, 64, 64, 3)
    with pytest.raises(ValueError, match="unknown style 'cubist': choose one of natural, ood"):
        data.draw_faces([0], "cubist")


def test_synthetic_sets_have_the_manifest_of_real_ones(tmp_path):
    real = data.load(data.prepare(write_images(tmp_path / "faces"), tmp_path / "a", size=16)).manifest
    drawn = data.load(data.prepare_named("synthetic-ood", tmp_path / "b", num_images=3))
    assert real.keys() == drawn.manifest.keys()
    assert drawn.name == "synthetic-ood" and np.array_equal(drawn.images, data.draw_faces(range(3), "ood"))


# Splits


def test_splits_are_disjoint_seeded_and_nested():
    v1 = image_tensors.split_indices(10_000, 992, 200, 200, held_out=500)
    v2 = image_tensors.split_indices(10_000, 9_000, 500, 500)
    for split in (v1, v2):
        assert set(split) == {"pretrain", "train", "val", "test"}
        assert set(split["train"]) <= set(split["pretrain"])
        parts = np.concatenate([split["pretrain"], split["val"], split["test"]])
        assert len(set(parts.tolist())) == len(parts)
    assert [len(v1[k]) for k in ("pretrain", "train", "val", "test")] == [9_000, 992, 200, 200]
    assert set(v1["test"]) <= set(v2["test"]) and set(v1["val"]) <= set(v2["val"])
    assert np.array_equal(v1["pretrain"], v2["pretrain"])
    again, other = (
        image_tensors.split_indices(10_000, 9_000, 500, 500),
        image_tensors.split_indices(10_000, 9_000, 500, 500, seed=1),
    )
    assert all(np.array_equal(v2[k], again[k]) for k in v2)
    assert not np.array_equal(v2["test"], other["test"])


def test_split_errors():
    with pytest.raises(
        ValueError, match=r"100 images are there, 140 are needed \(100 train \+ 2 x 20.*prepare more"
    ):
        image_tensors.split_indices(100, 100, 10, 20)
    with pytest.raises(ValueError, match="held_out=5 cannot hold val=10 or test=20 images: enlarge"):
        image_tensors.split_indices(100, 10, 10, 20, held_out=5)


# Pixels and tensors


def test_tensor_round_trip():
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(2, 8, 16, 3)
    tensor = image_tensors.to_tensor(images)
    assert tensor.shape == (2, 3, 8, 16) and tensor.dtype == torch.float32
    assert tensor.min() == -0.5 and tensor.max() == 0.5
    assert np.array_equal(image_tensors.to_uint8(tensor), images)
    assert np.array_equal(
        image_tensors.to_uint8(torch.tensor([[[[-9.0]], [[9.0]], [[0.0]]]])).ravel(), [0, 255, 128]
    )


def test_dequantized_pixels_stay_in_their_bins():
    images = np.arange(256, dtype=np.uint8).repeat(3 * 64).reshape(4, 64, 64, 3)
    x = image_tensors.dequantize(images, torch.Generator().manual_seed(0))
    assert x.dtype == torch.float32 and x.min() >= -0.5 and x.max() < 0.5
    bins = torch.floor((x.double() + 0.5) * 256).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(bins, images)
    assert torch.equal(x, image_tensors.dequantize(images, torch.Generator().manual_seed(0)))
    assert abs(((x + 0.5) * 256).double().mean() - (127.5 + 0.5)) < 0.01


# Reports from public trackers, each with the right behaviour (names and places, silent losses).


def png(colour=90, size=(12, 12)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (colour, colour, colour)).save(buffer, "png")
    return buffer.getvalue()


def zipped(path, *names):
    with zipfile.ZipFile(path, "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(name, png(10 * i))
    return path


def test_a_zip_of_macos_and_windows_tar(tmp_path):
    source = zipped(tmp_path / "x.zip", "./img/b.png", "./img/a.png", ".", "./")
    found = data.load(data.prepare(source, tmp_path / "out", size=8))
    assert found.manifest["first_file"] == "img/a.png" and len(found) == 2


def test_a_colon_is_no_drive(tmp_path):
    assert (
        len(data.load(data.prepare(zipped(tmp_path / "x.zip", "12:30:05.png"), tmp_path / "out", size=8)))
        == 1
    )
    with pytest.raises(ValueError, match="points outside the archive"):
        data.prepare(zipped(tmp_path / "y.zip", "C:/a.png"), tmp_path / "out", size=8)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_one_name_twice_in_a_zip(tmp_path):
    with pytest.raises(ValueError, match="holds a.png twice"):
        data.prepare(zipped(tmp_path / "x.zip", "a.png", "./a.png"), tmp_path / "out", size=8)


def test_names_that_are_not_utf8_and_linked_folders(tmp_path):
    (tmp_path / "faces/sub").mkdir(parents=True)
    (Path(os.fsdecode(os.fsencode(tmp_path / "faces") + b"/caf\xe9.png"))).write_bytes(png())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.png").write_bytes(png(60))
    (tmp_path / "faces/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "faces/sub/round").symlink_to(tmp_path / "faces")  # a loop
    found = data.load(data.prepare(tmp_path / "faces", tmp_path / "out", size=8))
    assert len(found) == 2 and found.manifest["last_file"] == "linked/a.png"


def test_what_pillow_opens_is_packed_and_the_rest_is_named(tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i, name in enumerate(("a.png", "b.tif", "c.gif", "d.jfif")):
        Image.new("RGB", (9, 9), (50 * i, 0, 0)).save(
            folder / name, {"jfif": "jpeg", "tif": "tiff"}.get(name[2:], name[2:])
        )
    for name in ("notes.txt", "more.txt", "raw.cr2"):
        (folder / name).write_text("no image")
    with pytest.warns(UserWarning, match="left out .* 1 .cr2, 2 .txt"):
        assert len(data.load(data.prepare(folder, tmp_path / "out", size=8))) == 4


def test_images_do_not_turn_white(tmp_path):
    grey = Image.fromarray(np.full((9, 9), 256 * 90, np.uint16))
    grey.save(tmp_path / "a.png", transparency=7)
    assert (data.decode((tmp_path / "a.png").read_bytes(), "a", size=8) == 90).all()
    unused = Image.fromarray(np.dstack([np.full((9, 9, 3), 90, np.uint8), np.zeros((9, 9, 1), np.uint8)]))
    unused.save(tmp_path / "b.bmp")
    assert (data.decode((tmp_path / "b.bmp").read_bytes(), "b", size=8) == 90).all()


@pytest.mark.parametrize(
    "dtype, low, high, expected",
    [
        (np.uint16, 0, 65535, (0, 255)),
        (np.int32, 0, 65535, (0, 255)),
        (np.float32, 0, 1, (0, 255)),
        (np.float32, 0, 0.5, (0, 128)),
        (np.uint16, 0, 4095, "from 0 to 4095: scale it"),
        (np.uint16, 0, 16383, "from 0 to 16383: scale it"),
        (np.int32, 0, 255, "from 0 to 255: scale it"),
        (np.int32, -1, 9000, "from -1 to 9000: scale"),
        (np.int32, 0, 65536, "from 0 to 65536: scale"),
        (np.float32, 0, 255, "from 0.0 to 255.0: scale"),
        (np.float32, -0.5, 0.5, "from -0.5 to 0.5: scale"),
    ],
)
def test_grey_of_more_than_8_bits_keeps_its_range_or_is_refused(dtype, low, high, expected):
    grey = np.full((8, 8), low, dtype)
    grey[:, 4:] = high
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "tiff")
    if isinstance(expected, tuple):
        decoded = data.decode(file.getvalue(), "a.tif", size=8)
        assert (decoded[0, 0, 0], decoded[-1, -1, -1]) == expected
    else:
        with pytest.raises(ValueError, match=f"^a.tif is not a readable image .its .*values go {expected}"):
            data.decode(file.getvalue(), "a.tif", size=8)


def test_names_of_data_sets(tmp_path):
    for version in ("photos.v1", "photos.v2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "a.png").write_bytes(png())
        assert data.prepare_into(str(tmp_path / version), tmp_path / "data").name == version
    for name in ("../../x", "a/b", ".", ".."):
        with pytest.raises(ValueError, match="is no name for a data set"):
            data.prepare_into(str(tmp_path / "photos.v1"), tmp_path / "data", name=name)


def test_sources_that_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "photo.png").write_bytes(png())
    for name in ("pipe", "photo.png"):
        with pytest.raises(ValueError, match=f"{name} is neither .*: give a folder or a .zip of images"):
            data.prepare(tmp_path / name, tmp_path / "out")
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.png", "w") as member:
        for _ in range(257):
            member.write(bytes(2**20))
    with pytest.raises(ValueError, match="unpacks to 257 MB"):
        data.prepare(bomb, tmp_path / "out")


@pytest.mark.parametrize("kind", ["pipe", "broken link", "folder"])
def test_what_is_no_file_in_a_folder_is_named(tmp_path, kind):
    folder = write_images(tmp_path / "faces")
    if kind == "pipe":
        os.mkfifo(folder / "z.png")
    elif kind == "broken link":
        (folder / "z.png").symlink_to(tmp_path / "nowhere")
    else:
        (folder / "z.png").mkdir()  # whatever it is called, a folder
        assert len(data.load(data.prepare(folder, tmp_path / "out", size=8))) == 3
        return
    with pytest.raises(ValueError, match=r"z\.png is no file \(a broken link, or a pipe\): remove it"):
        data.prepare(folder, tmp_path / "out", size=8)
    assert files_in(tmp_path / "out") == []


def test_what_a_killed_preparation_left_is_cleaned(tmp_path):
    out, host = tmp_path / "out", socket.gethostname()
    gone = subprocess.Popen(["true"])
    gone.wait()
    # Of one that still runs, or may still run on another machine, nothing is taken away.
    left = {f".preparing-{host}.{os.getppid()}-abc", f".preparing-elsewhere.{gone.pid}-abc"}
    for name in (f".preparing-{host}.{gone.pid}-abc", f".preparing-{host}.abc", *left):
        (out / name).mkdir(parents=True)
        (out / name / "images.npy").write_bytes(bytes(100))
    data.prepare_synthetic(out, 2, size=16)
    assert set(files_in(out)) == {*left, "images.npy", "manifest.json"}


def test_names_can_be_shown(tmp_path):
    """Not UTF-8: marked in the manifest; refused as the name of a set, where they would break each page."""
    source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    write_images(source)
    (source / "000.png").rename(Path(os.fsdecode(os.fsencode(source) + b"/\xe9.png")))
    manifest = data.load(data.prepare(source, tmp_path / "out", size=8)).manifest
    assert manifest["name"] == manifest["source"] == "caf\ufffd" and manifest["last_file"] == "\ufffd.png"
    with pytest.raises(ValueError, match="is no name for a data set.*in UTF-8"):
        data.prepare_into(str(source), tmp_path / "data")
    assert data.prepare_into(str(source), tmp_path / "data", name="café").name == "café"
    with zipfile.ZipFile(tmp_path / "old.zip", "w") as archive:  # as old tools write it: no mark of UTF-8
        archive.writestr("caf_.png", png())
    content = (tmp_path / "old.zip").read_bytes().replace(b"caf_", b"caf\xe9")
    (tmp_path / "old.zip").write_bytes(content)
    assert len(data.load(data.prepare(tmp_path / "old.zip", tmp_path / "out", size=8))) == 1


def test_replaced_pixels_are_noticed(tmp_path):
    out = packed(tmp_path)
    images = np.load(out / "images.npy")
    images[1, 2, 3, 0] ^= 1
    np.save(out / "images.npy", images)
    with pytest.raises(ValueError, match=r"images\.npy is damaged: .* prepare it again"):
        data.load(out)


# Colour: the numbers are those that Chromium's canvas gives for the same files


def fixed(*numbers):
    return b"".join(struct.pack(">i", round(n * 65536)) for n in numbers)


def icc(space, pcs, **tags):
    """A colour profile, built from its tags."""
    tags = {"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"x" + bytes(80)} | tags
    tags |= {"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249), "cprt": b"text\0\0\0\0none\0\0\0\0"}
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        place = 132 + 12 * len(tags) + len(body)
        table += name.encode() + struct.pack(">II", place, len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(
        ">I4xI4s4s4s12x4s", 128 + len(table) + len(body), 0x02400000, b"mntr", space, pcs, b"acsp"
    )
    return (head + bytes(28) + fixed(0.9642, 1, 0.8249)).ljust(128, b"\0") + table + body


def matrix_icc(curve, *columns):
    xyz = {f"{c}XYZ": b"XYZ \0\0\0\0" + fixed(*column) for c, column in zip("rgb", columns)}
    return icc(b"RGB ", b"XYZ ", **xyz, **{f"{c}TRC": curve for c in "rgb"})


def gamma_curve(gamma):
    return b"curv" + bytes(4) + struct.pack(">IHxx", 1, round(gamma * 256))


SRGB_CURVE = b"para\0\0\0\0\0\3\0\0" + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
DISPLAY_P3 = matrix_icc(
    SRGB_CURVE, (0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407)
)
ADOBE_RGB = matrix_icc(
    gamma_curve(2.2), (0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)
)
SRGB = matrix_icc(
    SRGB_CURVE, (0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141)
)
LINEAR_GREY = icc(b"GRAY", b"XYZ ", kTRC=gamma_curve(1))
# Every ink is neutral and takes away half of the lightness; black all of it.
CMYK_GRID = [(max(0, 255 - 127 * (c + m + y)) * (1 - k), 128, 128) for c, m, y, k in np.ndindex(2, 2, 2, 2)]
CMYK = icc(
    b"CMYK",
    b"Lab ",
    A2B0=b"mft1\0\0\0\0\4\3\2\0"
    + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    + bytes(range(256)) * 4
    + bytes(np.uint8(CMYK_GRID).ravel())
    + bytes(range(256)) * 3,
)
RED = (200, 80, 60)


def saved(image, kind, **options):
    file = io.BytesIO()
    lossless = {"jpeg": {"quality": 100}, "webp": {"lossless": True}, "avif": {"quality": 100}}.get(kind, {})
    image.save(file, kind, **lossless, **options)
    return file.getvalue()


def colour(content):
    pixels = data.decode(content, "a", size=8)
    assert (pixels == pixels[0, 0]).all()
    return pixels[0, 0].astype(int)


def assert_near(content, expected, tolerance=3):
    assert np.abs(colour(content) - expected).max() <= tolerance, (colour(content), expected)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "avif"])
def test_colour_profiles_become_srgb(kind):
    image = Image.new("RGB", (16, 16), RED)
    assert_near(saved(image, kind, icc_profile=DISPLAY_P3), (216, 69, 50))
    assert_near(saved(image, kind, icc_profile=ADOBE_RGB), (230, 79, 56))
    assert np.array_equal(
        colour(saved(image, kind, icc_profile=SRGB)), colour(saved(image, kind, icc_profile=None))
    )


def test_colour_profiles_of_other_kinds_of_images():
    red = Image.new("RGB", (16, 16), RED)
    assert_near(saved(red.quantize(4), "png", icc_profile=DISPLAY_P3), (216, 69, 50))
    half = red.convert("RGBA")
    half.putalpha(128)  # over white
    assert_near(saved(half, "png", icc_profile=DISPLAY_P3), (236, 162, 152))
    for mode in ("L", "LA"):
        grey = Image.new("L", (16, 16), 100).convert(mode)
        assert_near(saved(grey, "png", icc_profile=LINEAR_GREY), (168, 168, 168), 1)
    assert_near(saved(Image.new("L", (16, 16), 100), "jpeg", icc_profile=DISPLAY_P3), (100, 100, 100), 1)
    deep = Image.fromarray(np.full((16, 16), 100 * 257, np.uint16))
    assert_near(saved(deep, "png", icc_profile=LINEAR_GREY), (168, 168, 168), 1)
    inks = Image.new("CMYK", (16, 16), (255, 0, 0, 0))  # L* = 50 by the profile; cyan without it
    assert_near(saved(inks, "jpeg"), (0, 255, 255))
    assert_near(saved(inks, "jpeg", icc_profile=CMYK), (119, 119, 119))


@pytest.mark.parametrize(
    "profile",
    [b"junk" * 50, DISPLAY_P3[:200], LINEAR_GREY, CMYK, DISPLAY_P3.replace(b"RGB ", b"RGB\xf7")],
    ids=["junk", "truncated", "grey", "cmyk", "no ASCII"],
)
def test_a_profile_that_does_not_fit_counts_as_srgb(profile):
    image = Image.new("RGB", (16, 16), RED)
    assert np.array_equal(colour(saved(image, "png", icc_profile=profile)), RED)
    inks = Image.new("CMYK", (16, 16), (0, 200, 180, 10))
    assert_near(saved(inks, "jpeg", icc_profile=DISPLAY_P3), (245, 52, 72))


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize(
    "chunks, expected",
    [
        ([chunk(b"gAMA", struct.pack(">I", 100_000))], (229, 152, 133)),
        ([chunk(b"gAMA", struct.pack(">I", 45_455))], RED),
        ([chunk(b"sRGB", b"\0"), chunk(b"gAMA", struct.pack(">I", 100_000))], RED),
        ([chunk(b"gAMA", bytes(4))], RED),
    ],
)
def test_the_gamma_of_a_png_is_used(chunks, expected):
    content = saved(Image.new("RGB", (16, 16), RED), "png")
    assert_near(content[:33] + b"".join(chunks) + content[33:], expected, 1)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "avif"])
def test_photos_stand_upright(kind):
    image, exif = Image.new("RGB", (16, 16), "red"), Image.Exif()
    image.paste("blue", (0, 0, 16, 8))
    exif[274] = 6  # the top of the scene is at the right
    pixels = data.decode(saved(image, kind, exif=exif), "a", size=8).astype(int)
    assert (pixels[:, 7, 2] > 200).all() and (pixels[:, 0, 0] > 200).all()


# Samples of more than 8 bits


def ramp(dtype, high, channels=3):
    return np.linspace(0, high, 16 * 16 * channels).reshape(16, 16, channels).squeeze().astype(dtype)


def png16(pixels):
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    kind = {2: 4, 3: 2, 4: 6}[pixels.shape[2]]
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *pixels.shape[1::-1], 16, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(pixels, photometric="rgb", **options):
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, photometric=photometric, **options)
    return file.getvalue()


@pytest.mark.parametrize("high", [1023, 4095, 16383, 65535])
@pytest.mark.parametrize(
    "encode",
    [
        lambda high: png16(ramp("u2", high)),
        lambda high: png16(np.dstack([ramp("u2", high), np.full((16, 16), 65535)])),
        lambda high: png16(np.dstack([ramp("u2", high, 1), np.full((16, 16), 65535)])),
        lambda high: tiff(ramp("u2", high)),
        lambda high: tiff(ramp("u2", high), byteorder=">"),
        lambda high: tiff(ramp("u2", high), compression="zlib"),
        lambda high: tiff(ramp("u2", high, 1), "minisblack"),
    ],
    ids=["png", "png with alpha", "grey png with alpha", "tiff", "big-endian", "compressed", "grey tiff"],
)
def test_one_rule_for_16_bits_in_grey_and_colour(encode, high):
    if high == 65535:
        pixels = data.decode(encode(high), "a")
        assert pixels.min() <= 2 and pixels.max() >= 253
    else:
        with pytest.raises(ValueError, match=f"^a is not .*its 16-bit values go from 0 to {high}: scale it"):
            data.decode(encode(high), "a")


@pytest.mark.parametrize(
    "content, message",
    [
        (tiff(ramp("i2", 32767, 1), "minisblack"), "holds signed integers, which Pillow misreads"),
        (tiff(ramp("i1", 127, 1), "minisblack"), "holds signed integers, which Pillow misreads"),
        (tiff(np.moveaxis(ramp("u2", 65535), 2, 0).copy(), planarconfig="separate"), "in separate planes"),
        (tiff(ramp("u2", 65535, 1), "miniswhite"), "holds 16 bits with white as 0"),
        (tiff(ramp("f4", 1)), "samples that Pillow does not read.*: save it as 8-bit PNG or JPEG"),
        (
            b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
            "unknown format, such as HEIC.*: save it as 8-bit PNG or JPEG",
        ),
        (b"", r"\(empty\).*replace or remove it"),
    ],
    ids=["int16", "int8", "planes", "white is 0", "float colour", "HEIC", "empty"],
)
def test_what_would_be_misread_is_refused(content, message):
    with pytest.raises(ValueError, match=f"^a is not a readable image .*{message}"):
        data.decode(content, "a")


# Twins


def test_equal_images_are_packed_once_and_like_ones_are_named(tmp_path):
    folder = tmp_path / "faces"
    (folder / "faces").mkdir(parents=True)
    faces = data.draw_faces(range(5), size=256)
    for i, face in enumerate(faces):
        Image.fromarray(face).save(folder / f"{i}.png")
    (folder / "faces/1.png").write_bytes((folder / "1.png").read_bytes())
    Image.fromarray(faces[2]).save(folder / "2.bmp")
    Image.fromarray(faces[3]).save(folder / "3.jpg", quality=60)
    Image.fromarray(faces[4]).resize((130, 130)).save(folder / "small.webp")
    with pytest.warns(UserWarning) as told:
        packed = data.load(data.prepare(folder, tmp_path / "out"))
    assert [str(t.message) for t in told] == [
        f"left out of {folder}, with the pixels of other images: 2, such as 2.png (as 2.bmp), "
        "faces/1.png (as 1.png)",
        f"alike in {folder} (remove one of each two, or training may see test images): 2, such as "
        "3.png (as 3.jpg), small.webp (as 4.png)",
    ]
    assert len(packed) == packed.manifest["num_images"] == 7 and packed.manifest["left_out"] == 2
    assert packed.manifest["alike"] == [["3.png", "3.jpg"], ["small.webp", "4.png"]]
    assert len({image.tobytes() for image in packed.images}) == 7


@pytest.mark.filterwarnings("ignore:left out")
def test_names_that_look_the_same_are_twins_too(tmp_path):
    for byte in (b"\xe8", b"\xe9", b"\xea"):
        (tmp_path / "faces").mkdir(exist_ok=True)
        Path(os.fsdecode(os.fsencode(tmp_path / "faces") + b"/" + byte + b".png")).write_bytes(png())
    packed = data.load(data.prepare(tmp_path / "faces", tmp_path / "out", size=8))
    assert len(packed) == 1 and packed.manifest["left_out"] == 2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("style", ["natural", "ood"])
def test_different_images_are_not_taken_for_twins(tmp_path, style):
    (tmp_path / "faces").mkdir()
    for i, face in enumerate(data.draw_faces(range(200), style)):
        Image.fromarray(face).save(tmp_path / f"faces/{i}.png")
    checks = np.uint8(np.indices((64, 64)).sum(0) // 4 % 2 * 255)  # two that no blurred copy tells apart
    for name, pixels in {
        "checks": checks,
        "inverse": 255 - checks,
        "grey": checks // 255 + 127,
    }.items():
        Image.fromarray(pixels).save(tmp_path / f"faces/{name}.png")
    assert len(data.load(data.prepare(tmp_path / "faces", tmp_path / "out"))) == 203


# Folders and zips of other people


def test_heic_is_not_passed_over(tmp_path):
    folder = write_images(tmp_path / "faces")
    for name in ("IMG_2.HEIC", "IMG_1.heic"):
        (folder / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"faces holds 2 images that .*IMG_1\.heic\): convert them to JPEG"):
        data.prepare(folder, tmp_path / "out")


def test_linked_folders_have_the_same_names_on_every_machine(tmp_path):
    for i in range(8):
        (tmp_path / f"faces/z{i}").mkdir(parents=True)
        (tmp_path / f"faces/z{i}/a.png").write_bytes(png(20 * i))
        (tmp_path / f"faces/a{i}").symlink_to(tmp_path / f"faces/z{i}")
    assert (
        data.load(data.prepare(tmp_path / "faces", tmp_path / "out", size=8)).manifest["last_file"]
        == "a7/a.png"
    )


def test_the_suffix_of_a_zip_is_in_any_case(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWLIB_DATA", str(tmp_path))
    write_zip(tmp_path / "celeba.ZIP", write_images(tmp_path / "faces"))
    assert data.sources_of("celeba") == [str(tmp_path / "celeba.ZIP")]


def test_one_enormous_file_in_a_folder(tmp_path):
    folder = write_images(tmp_path / "faces")
    with open(folder / "x.tif", "wb") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(ValueError, match=r"x\.tif has 256 MB: remove it"):
        data.prepare(folder, tmp_path / "out", size=8)


@pytest.mark.parametrize("what", ["faces", "faces/sub", "faces/sub/a.png", "faces.zip", "hidden/faces.zip"])
def test_what_may_not_be_read_is_named(what):
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are root's alone, where root runs it
        place = Path(place)
        (place / "faces/sub").mkdir(parents=True)
        (place / "faces/sub/a.png").write_bytes(png())
        (place / "hidden").mkdir()
        for name in ("faces.zip", "hidden/faces.zip"):
            zipped(place / name, "a.png")
        locked = place / what if what != "hidden/faces.zip" else place / "hidden"
        place.chmod(0o777)
        locked.chmod(0)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)
            source = place / (what if what.endswith("zip") else "faces")
            with pytest.raises(
                ValueError, match=f"cannot read {place / what} .Permission denied.: correct its"
            ):
                data.prepare(source, place / "out")
        finally:
            os.seteuid(user)
            locked.chmod(0o755)


def test_a_full_disk_leaves_the_earlier_set(tmp_path):
    folder, out = write_images(tmp_path / "faces", 3), tmp_path / "out"
    before = data.load(data.prepare(folder, out, size=8))
    code = """
import resource, sys, data
resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))
try:
    data.prepare(*sys.argv[1:])
except OSError as error:
    sys.exit(f"errno {error.errno}")
"""
    full = os.environ | {"TMPDIR": "/nowhere"}
    done = subprocess.run([sys.executable, "-c", code, folder, out], env=full, capture_output=True, text=True)
    assert "errno 27" in done.stderr
    assert data.load(out).manifest == before.manifest and files_in(out) == ["images.npy", "manifest.json"]
