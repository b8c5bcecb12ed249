"""The same pixels every way: a reduced form of `benchmarks/loader.py`, which also times them."""

import importlib.util
import sys
from pathlib import Path

import pytest

import portnet
from portnet import shards

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "loader.py"


@pytest.fixture(scope="module")
def loader():
    spec = importlib.util.spec_from_file_location("loader_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # Its processes find it by its name.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]


def test_the_same_pixels_every_way(loader, tmp_path, capsys):
    loader.make(tmp_path / "folder", 450)
    made = shards.pack(tmp_path / "folder", tmp_path / "shards", shard_bytes=2**22, skip_unreadable=True)
    assert {Path(path).stem for path in made.skipped} == {"000037", "000111", "000222", "000333", "000437"}
    folder, packed = (portnet.load_data(tmp_path / n, skip_unreadable=True) for n in ("folder", "shards"))
    assert folder.skipped == packed.skipped == made.skipped
    # More than an epoch of 356.
    assert loader.same(folder.train, packed.train, 50)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert len({line.rpartition(" ")[2] for line in lines}) == 1


def test_torchs_way_gives_what_the_network_takes(loader, tmp_path):
    """What it is held against does the work, too."""
    loader.make(tmp_path / "folder", 50)
    paths = sorted(map(str, (tmp_path / "folder").rglob("*.jpg")))[:20]
    batch, labels = next(loader.torchs_batches(loader.Torchs(paths * 4, list(range(80)), (124.0, 117.0, 104.0)), 0))
    assert batch.shape == (64, 3, 224, 224)
    assert len(set(labels.tolist())) == 64
    assert 0.3 < batch.std() < 2
    assert abs(batch.mean()) < 1.5
