"""Lines that really ran, taken with coverage.py; and what is made of such lines, by hand."""

import csv
import hashlib
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from portnet import cli, errors, lines
from portnet.errors import InputError, Unavailable
from portnet.lines import File, Lines

pytest.importorskip("coverage")

STRANGER = '''\
"""A plug-in of somebody else's."""
import functools

CONSTANT = 1


def called(flag):
    """What it does."""
    text = (
        "two lines, one statement"
    )
    if flag:
        return never()

    @functools.cache
    def inner():
        return text

    return inner()  # pragma: no cover


def never():
    return 2


def short(): return 3


class Thing:
    field = 4

    def method(self):
        return self.field
'''
# By their first lines: the assignment, the condition, the decorator, the nested def, its return and the last return;
# and the method's. The docstrings are no statements, and the short function runs with its def as far as can be seen.
CALLED, IMPORTED = (9, 12, 15, 16, 17, 19, 33), (2, 4, 7, 22, 26, 29, 30, 32)


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
    """The data file of a run of PortNet and a plug-in, and the plug-in's file."""
    folder = tmp_path_factory.mktemp("taken")
    plugin = folder / "stranger" / "inner" / "plugin.py"
    plugin.parent.mkdir(parents=True)
    for package in (plugin.parent, plugin.parent.parent):
        (package / "__init__.py").touch()
    plugin.write_text(STRANGER)
    (folder / "run.py").write_text(
        "from portnet.errors import UnknownName\nfrom stranger.inner.plugin import Thing, called\n"
        "import portnet_backends.reference\nUnknownName('layer', 'x', ['y'])\ncalled(False)\nThing().method()\n"
    )
    run(folder, "--source=portnet,portnet_backends,stranger", "run.py")
    return folder / ".coverage", plugin


def run(folder, *arguments):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}
    command = [sys.executable, "-m", "coverage", "run", *arguments]
    subprocess.run(command, cwd=folder, check=True, env=environment | {"PYTHONPATH": str(folder)}, timeout=100)


def portnet(*arguments, **environment):
    ran = CliRunner().invoke(cli.main, ["divergence", *map(str, arguments)], env={"COLUMNS": "100"} | environment)
    assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
    return ran


# Collecting.


def test_what_ran_is_collected(taken):
    found = lines.collect("mine", str(taken[0]))
    plugin = found.files["stranger/inner/plugin.py"]
    assert (plugin.called, plugin.imported) == (CALLED, IMPORTED)
    assert plugin.digest == hashlib.sha256(STRANGER.encode()).hexdigest()
    own = found.files["portnet/errors.py"]
    content = Path(errors.__file__).read_bytes()
    assert own.digest == hashlib.sha256(content).hexdigest()
    numbered = dict(enumerate(content.decode().splitlines(), 1))
    ran = [numbered[n].strip() for n in own.called]
    assert "known = sorted(known)" in ran
    assert "self.remedy = remedy" not in ran
    assert "def __init__(self, reason: str, remedy: str):" in [numbered[n].strip() for n in own.imported]


def test_names_are_the_same_on_every_machine(taken):
    found = lines.collect("mine", str(taken[0]))
    assert {"portnet/errors.py", "portnet_backends/reference.py"} <= found.files.keys()
    assert {name.split("/")[0] for name in found.files} == {"portnet", "portnet_backends", "stranger"}
    assert str(Path(errors.__file__).parent) not in found.to_json()


def test_files_that_did_not_run_are_left_out(taken):
    assert "portnet/model.py" not in lines.collect("mine", str(taken[0])).files


def test_collecting_from_the_command_line(taken, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = portnet("--collect", "mine", COVERAGE_FILE=str(taken[0]))
    assert ran.exit_code == 0, ran.output
    found = lines.collect("mine", str(taken[0]))
    assert lines.read(tmp_path / "coverage-mine.json") == found
    assert f"{len(found.called)} lines inside functions, {len(found.imported)} on import" in ran.output
    elsewhere = tmp_path / "elsewhere.json"
    assert portnet("--collect", "a/b", "--out", elsewhere, COVERAGE_FILE=str(taken[0])).exit_code == 0
    assert lines.read(elsewhere).backend == "a/b"


def test_a_file_that_changed_since(taken):
    data, plugin = taken
    os.utime(plugin, (data.stat().st_mtime + 10,) * 2)
    with pytest.raises(InputError, match=r"plugin\.py was changed after .*\.coverage was taken"):
        lines.collect("mine", str(data))
    os.utime(plugin, (data.stat().st_mtime - 10,) * 2)


def test_without_data(tmp_path):
    with pytest.raises(InputError, match=r"no coverage data in .*none; take them: coverage run .* check cuda"):
        lines.collect("cuda", str(tmp_path / "none"))


def test_damaged_data(tmp_path):
    (tmp_path / "damaged").write_text("no data")
    with pytest.raises(InputError, match=r"damaged cannot be read .*; take it again: coverage run"):
        lines.collect("cuda", str(tmp_path / "damaged"))


def test_data_of_something_else(tmp_path):
    (tmp_path / "other.py").write_text("x = 1\n")
    run(tmp_path, "--source=.", "other.py")
    with pytest.raises(InputError, match="holds no line of PortNet; take them: coverage run"):
        lines.collect("cuda", str(tmp_path / ".coverage"))


def test_without_coverage(monkeypatch):
    monkeypatch.setitem(sys.modules, "coverage", None)
    with pytest.raises(Unavailable, match=r"needs coverage\.py .*; pip install 'portnet\[coverage\]'"):
        lines.collect("cpu")


# Joining.


def of(backend, python="3.11.7", **files):
    """Lines of files a.py, b.py: (inside functions, on import)."""
    return Lines(
        backend=backend,
        portnet="0.1.0",
        python=python,
        files={f"{k}.py": File(digest=k, called=called, imported=imported) for k, (called, imported) in files.items()},
    )


X = of("x", a=((2, 3, 5), (1, 4)), b=((8,), ()))
Y = of("y", a=((2, 3), (1, 4)), c=((2, 6, 7), (1,)))
Z = of("z", a=((2,), (1, 4)))


def test_figures_by_hand():
    found = lines.told([X, Y, Z])
    distances = {("x", "y"): 1 - 2 / 7, ("x", "z"): 1 - 1 / 4, ("y", "z"): 1 - 1 / 5}
    assert {(d["a"], d["b"]): d["distance"] for d in found["distances"]} == pytest.approx(distances)
    assert found["divergence"] == pytest.approx(sum(distances.values()) / 3)
    assert found["convergence"] == pytest.approx(1 - sum(distances.values()) / 3)
    assert (found["common"], found["any"]) == (1, 7)
    counts = ("lines", "own", "shared", "imported", "own_files")
    assert {k: tuple(p[c] for c in counts) for k, p in found["platforms"].items()} == {
        "x": (4, 2, 2, 2, {"a.py": 1, "b.py": 1}),
        "y": (5, 3, 2, 3, {"c.py": 3}),
        "z": (1, 0, 1, 2, {}),
    }
    every = 1 - (4 / 10 + 3 / 6 + 3 / 8) / 3
    assert found["with_imported"]["divergence"] == pytest.approx(every)
    assert found["with_imported"]["common"] == 3
    assert found["notes"] == []


def test_of_one_backend_divergence_is_not_measured():
    found = lines.told([X])
    assert (found["divergence"], found["convergence"], found["distances"]) == (None, None, [])
    assert (found["platforms"]["x"]["own"], found["platforms"]["x"]["own_files"]) == (None, None)
    assert found["platforms"]["x"]["lines"] == 4
    assert "'x' alone" in found["notes"][0]


def test_different_pythons_are_told():
    (note,) = lines.told([X, Y, of("w", python="3.14.0", a=((2,), ()))])["notes"]
    assert "Python 3.11 and 3.14" in note
    assert lines.told([X, replace(Y, python="3.11.9")])["notes"] == []


def test_files_that_differ_are_refused_by_name():
    other = replace(Y, files={**Y.files, "a.py": replace(Y.files["a.py"], digest="other")})
    with pytest.raises(InputError, match=r"a\.py differs between 'x' and 'y'; collect both with one version"):
        lines.join([X, other])
    third = replace(other, backend="third", files={**other.files, "c.py": replace(Y.files["c.py"], digest="other")})
    with pytest.raises(InputError, match=r"a\.py \(and 1 more\) differs between 'x' and 'third'"):
        lines.join([X, Y, third])


def test_a_backend_twice_is_refused():
    with pytest.raises(InputError, match="'x' is given twice"):
        lines.join([X, Y, X])


def test_nothing_to_join():
    with pytest.raises(InputError, match="no lines"):
        lines.join([])


def test_the_csv_for_p3():
    rows = list(csv.DictReader(io.StringIO(lines.p3([X, Y]))))
    assert [(r["problem"], r["application"], r["platform"]) for r in rows] == [
        ("conformance", "PortNet", "x"),
        ("conformance", "PortNet", "y"),
    ]
    assert json.loads(rows[0]["coverage"]) == [
        {"file": "a.py", "id": "a", "lines": [2, 3, 5]},
        {"file": "b.py", "id": "b", "lines": [8]},
    ]


# Files.


def test_lines_come_back(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(X.to_json())
    assert lines.read(path) == X


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"meta": {"format": 3}, "files": {}}', r"is coverage\.py's own report; expected portnet-lines-1"),
        ('{"schema": "portnet-lines-2"}', "is something else; expected portnet-lines-1"),
        ("[]", "is something else"),
        ("{", "cannot be read .* collect it again"),
        (X.to_json().replace("[2, 3, 5]", '"235"'), "cannot be read .*above 0"),
        (X.to_json().replace("[2, 3, 5]", "[2, -3]"), "cannot be read .*above 0"),
        (X.to_json().replace('"called"', '"other"'), "cannot be read .KeyError"),
        (X.to_json().replace('"files": {', '"files": [{').replace("}}}", "}}]}"), "cannot be read"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(InputError, match=rf"x\.json {message}"):
        lines.read(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"none\.json cannot be read .FileNotFoundError"):
        lines.read(tmp_path / "none.json")


# The command.


@pytest.fixture
def written(tmp_path):
    for one in (X, Y, Z):
        (tmp_path / f"{one.backend}.json").write_text(one.to_json())
    return [tmp_path / f"{name}.json" for name in "xyz"]


def test_the_command_for_programs(written):
    ran = portnet(*written, "--json")
    assert ran.exit_code == 0
    assert json.loads(ran.output) == lines.told([X, Y, Z])


def test_the_command_for_people(written):
    ran = portnet(*written)
    assert ran.exit_code == 0
    told = lines.told([X, Y, Z])
    text = " ".join(ran.output.split())
    assert f"Code divergence {told['divergence']:.3f}, convergence {told['convergence']:.3f};" in text
    assert "y 5 3 2 3 " in text
    assert "Own lines of x: a.py 1, b.py 1. Own lines of y: c.py 3. Lines:" in text
    assert "y 0.714 0 0.800" in text
    assert "Ran on all of them: 1 lines of 7." in text


def test_the_command_for_one(written):
    ran = portnet(written[0])
    assert ran.exit_code == 0
    text = " ".join(ran.output.split())
    assert "x 4 not measured not measured 2" in text
    assert "Code divergence: not measured. Divergence is between backends, and there is 'x' alone." in text
    assert "Distance" not in text


def test_the_command_for_p3(written, tmp_path):
    ran = portnet(*written, "--p3", tmp_path / "p3.csv")
    assert ran.exit_code == 0
    assert (tmp_path / "p3.csv").read_text() == lines.p3([X, Y, Z])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the files"),
        (["--collect", "a/b"], "give --out"),
        (["--collect", ""], "give --out"),
        (["--collect", "x", "x.json"], "join files in a second call"),
        (["--collect", "x", "--json"], "join files in a second call"),
        (["x.json", "--out", "y.json"], "--out goes with --collect"),
        (["missing.json"], "cannot be read"),
    ],
)
def test_mistakes(arguments, message):
    ran = portnet(*arguments)
    assert ran.exit_code == 2
    assert message in ran.output
