"""Checkpoints: whole or not there, the last two kept, damage passed over and named."""

import json

import numpy as np
import pytest

from portnet import checkpoint
from portnet.errors import CheckpointError


def arrays(step):
    return {
        "conv1.weight": np.full((2, 3), step, np.float32),
        "velocity.conv1.weight": np.full((2, 3), -step, np.float64),
    }


def save(folder, step, **content):
    return checkpoint.save(folder, step, arrays(step), {"progress": {"step": step}, **content})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_comes_back_in_its_own_precision(tmp_path):
    save(tmp_path / "run", 7, where={"backend": "cpu"})
    found, damaged = checkpoint.latest(tmp_path / "run")
    assert (found.step, damaged, found.content["where"]) == (7, [], {"backend": "cpu"})
    for name, value in arrays(7).items():
        assert found.arrays[name].dtype == value.dtype
        np.testing.assert_array_equal(found.arrays[name], value)


def test_none_where_nothing_was_saved(tmp_path):
    assert checkpoint.latest(tmp_path / "no folder") == (None, [])
    assert checkpoint.latest(tmp_path) == (None, [])


def test_the_last_two_are_kept(tmp_path):
    for step in (2, 4, 10):
        save(tmp_path, step)
    assert names(tmp_path) == [f"step-{n:010d}.{kind}" for n in (4, 10) for kind in ("json", "safetensors")]
    assert checkpoint.latest(tmp_path)[0].step == 10


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["safetensors", "json"])
@pytest.mark.parametrize("damage", [truncate, flip, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_a_damaged_one_is_passed_over_by_name_and_the_one_before_it_taken(tmp_path, kind, damage):
    for step in (4, 10):
        save(tmp_path, step)
    damage(tmp_path / f"step-0000000010.{kind}")
    found, damaged = checkpoint.latest(tmp_path)
    assert found.step == 4
    # Without its manifest there is no such checkpoint.
    manifest = tmp_path / "step-0000000010.json"
    assert len(damaged) == manifest.exists()
    assert all(str(manifest) in line for line in damaged)


def test_arrays_of_another_step_are_no_checkpoint_of_this_one(tmp_path):
    for step in (4, 10):
        save(tmp_path, step)
    (tmp_path / "step-0000000004.safetensors").replace(tmp_path / "step-0000000010.safetensors")
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* is whole.*not those that it was written for"):
        checkpoint.latest(tmp_path)


def test_a_manifest_of_something_else_is_named(tmp_path):
    path = save(tmp_path, 4)
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": "portnet.checkpoint/9"}))
    with pytest.raises(CheckpointError, match=r"it is no manifest of portnet.checkpoint/1"):
        checkpoint.latest(tmp_path)


def test_what_killed_writers_left_is_removed(tmp_path):
    for step in (4, 10):
        save(tmp_path, step)
    whole = names(tmp_path)
    (tmp_path / ".step-0000000012.safetensors.abc.tmp").write_bytes(b"half")
    (tmp_path / "step-0000000012.safetensors").write_bytes(b"arrays without a manifest")
    (tmp_path / "notes.txt").write_text("somebody's own")
    checkpoint.clear_unfinished(tmp_path)
    assert names(tmp_path) == ["notes.txt", *whole]


def test_the_folder_must_be_one(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot make the folder"):
        save(tmp_path / "file", 1)
