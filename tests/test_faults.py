"""Flipped bits, hostile files and kills: an error that names the file, or the result of the whole one."""

import resource
import shutil

import pytest

from benchmarks import faults
from tests.conftest import ROOT


def flip(folder, kind, count):
    found = faults.flip_bits(kind, folder, count)
    assert sum(found.values()) == count and set(found) <= {faults.NAMED, faults.SAME}
    assert found[faults.NAMED] > 0.8 * count


@pytest.mark.parametrize("kind", faults.FILES)
def test_flipped_bits(tmp_path, kind):
    flip(tmp_path, kind, 50 if kind in faults.KEPT else 500)


@pytest.mark.long
@pytest.mark.parametrize("kind", faults.KEPT)
def test_many_flipped_bits_of_large_files(tmp_path, kind):
    flip(tmp_path, kind, faults.flips(kind, 500))


@pytest.mark.parametrize("name", faults.HOSTILE)
def test_hostile_files(tmp_path, name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert faults.hostile(name, tmp_path) == faults.NAMED
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes


def kill(folder, count, method):
    found = faults.kill_runs(folder, count, method)
    assert found["killed"] == count and set(found) == {"killed", "the same record"}


def test_a_killed_run_is_gone_on_with(tmp_path):
    kill(tmp_path, 3, "resnet")


@pytest.mark.long
def test_thirty_kills(tmp_path):
    kill(tmp_path, 30, "glow")


def test_a_killed_unpacking_is_done_again(tmp_path):
    assert faults.kill_unpacking(tmp_path, 5) == {"the same model": 5}


@pytest.mark.long
def test_a_build_killed_in_every_stage():
    """The next `make book` just goes on: no lock to take away, nothing half made."""
    build = ROOT / "build/killed-book"
    shutil.rmtree(build, ignore_errors=True)
    found = faults.disturb_build(build, faults.kill, 2)
    assert found.pop("at the end") == "a whole book"
    assert all("nothing happened" not in told for told in found.values()), found


@pytest.mark.long
def test_a_disk_full_in_every_stage(tmp_path):
    """Said in one sentence; with space again, the next `make book` goes on."""
    try:
        with faults.small_disk(tmp_path) as place:
            found = faults.disturb_build(place, faults.fill)
    except PermissionError as error:
        pytest.skip(str(error))
    assert found.pop("at the end") == "a whole book"
    for stage, (told,) in found.items():
        assert "No space left on device" in told and "free some space" in told.splitlines()[-1], stage


def test_counts_go_on_where_they_were_stopped(tmp_path, monkeypatch):
    called, disk = [], ["no right to mount"]
    names = ("_flipped", "_hostile", "_killed_unpacking", "_killed_runs", "_killed_builds", "_full_disk")
    for name in names:

        def attempt(folder, *how, name=name):
            called.append((name, *map(str, how)))
            if name == "_full_disk" and disk:
                raise PermissionError(disk.pop())
            return 3, "as hoped (3)"

        monkeypatch.setattr(faults, name, attempt)
    monkeypatch.setattr(faults, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["faults"])
    with pytest.raises(PermissionError):
        faults.main()
    faults.main()
    assert len(set(called)) == len(called) - 1 and called[-1] == called[-2] == ("_full_disk",)
    rows = (tmp_path / "benchmarks/faults.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == len(called) and rows[0] == "Tried,Times,What came of it"
    monkeypatch.setattr("sys.argv", ["faults", "--kills", "2"])  # other counts are made anew
    faults.main()
    assert ("_killed_runs", "2") in called
