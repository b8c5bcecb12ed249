"""Figures by hand, and those of Intel's P3 Analysis Library on its own published data."""

import csv
import io
import json
import sys
from itertools import pairwise
from math import inf, nan
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portnet import portability
from portnet.errors import InputError, Unavailable
from portnet.portability import UNSUPPORTED, Result

P3 = Path(__file__).with_name("data") / "p3"
BABELSTREAM = {"problem": "name", "application": "language", "platform": "arch"}
PLATFORMS = [f"Platform {letter}" for letter in "ABCDEFGHIJK"]
LANGUAGES = [f"Language {i}" for i in range(5)]

# What the P3 Analysis Library gives on tests/data/p3, in full digits: application_efficiency, pp and divergence of
# p3analysis.metrics (commits 02bd2297 and 84038c9f) were run on pandas 3.1.1, after its projection of name, language
# and arch. None is an efficiency that it leaves NaN or makes 0, for a language that does not run there.
# fmt: off
EFFICIENCY = {
    "lower": [
        [0.4047219512195122, 0.6327433628318584, 0.9959677419354839, 0.9526315789473684, 0.991869918699187,
         0.8595943396226415, 1.0, 1.0, 0.9963833634719711, 1.0, 1.0],
        [0.4768275862068965, 0.9407894736842105, 0.988, 1.0, 1.0, 1.0, None, 0.9473684210526315, 0.9892280071813285,
         0.9347826086956522, 0.9530685920577617],
        [None, None, None, None, None, None, None, 0.96, 0.9981884057971014, 0.929171668667467, 0.9496402877697842],
        [1.0, 0.6441441441441441, 1.0, 0.7042801556420234, None, None, None, None, 0.9981884057971014,
         0.9336550060313631, 0.9513513513513514],
        [0.7754018691588785, 1.0, None, None, None, None, None, 0.9536423841059603, 1.0, 0.9225268176400476,
         0.9530685920577617],
    ],
    "higher": [
        [1.0, 1.0, 0.992, 0.7392996108949417, 1.0, 1.0, 1.0, 0.9473684210526315, 0.992818671454219, 0.9225268176400476,
         0.9496402877697842],
        [0.848780487804878, 0.672566371681416, 1.0, 0.7042801556420234, 0.991869918699187, 0.8595943396226415, None,
         1.0, 1.0, 0.9868891537544696, 0.9964028776978417],
        [None, None, None, None, None, None, None, 0.9868421052631579, 0.9910233393177738, 0.9928486293206198, 1.0],
        [0.4047219512195122, 0.9823008849557522, 0.988, 1.0, None, None, None, None, 0.9910233393177738,
         0.9880810488676997, 0.9982014388489209],
        [0.5219512195121951, 0.6327433628318584, None, None, None, None, None, 0.993421052631579, 0.9892280071813285,
         1.0, 0.9964028776978417],
    ],
}
# Under "higher" its pp raises on the NaN of a language that does not run; they were filled with 0 first.
PP = {"lower": [0.8283014037835933, 0, 0, 0, 0], "higher": [0.951516386066121, 0, 0, 0, 0]}
# Its pp of the rows above 0 alone.
PP_SUPPORTED = {
    "lower": [0.8283014037835933, 0.880457500707686, 0.9586029148010154, 0.8645873709184068, 0.9271439891038232],
    "higher": [0.951516386066121, 0.8870498316285803, 0.9926557901024435, 0.8212185612767222, 0.7981451799932445],
}
# Its pp of the first one, two, three rows of Language 0, sorted by efficiency.
CASCADE = {
    "lower": [1.0, 1.0, 1.0, 1.0, 0.9992745738121146, 0.9987219110914879, 0.9977372646721823, 0.9918668375777329,
              0.9751934338137391, 0.925124335807487, 0.8283014037835933],
    "higher": [1.0, 1.0, 1.0, 1.0, 1.0, 0.9987959060806743, 0.9978193670967648, 0.9915313195702442, 0.9864220487071627,
               0.9796369743180985, 0.951516386066121],
}
# Its divergence of each language over platforms; then, language and arch exchanged, of each platform over languages.
DIVERGENCE = [0.057906074967686315, 0.0, 0.0, 0.0, 0.0]
DIVERGENCE_OVER_LANGUAGES = dict.fromkeys(PLATFORMS, 0.5079929287737753) | dict.fromkeys(
    ["Platform A", "Platform C", "Platform D", "Platform E"], 0.49992924677179146
)
# fmt: on


def close(value):
    """Equal to 12 digits."""
    return pytest.approx(value, rel=1e-12, abs=1e-15)


@pytest.fixture(scope="module")
def babelstream():
    return portability.read_performance((P3 / "performance.csv").read_text(), columns=BABELSTREAM)


@pytest.fixture(scope="module")
def coverage():
    return portability.read_coverage((P3 / "coverage.csv").read_text())


def results(*rows):
    """Rows of application, platform and figure of merit, for one problem."""
    return [Result(problem="p", application=a, platform=h, fom=fom) for a, h, fom in rows]


# The P3 Analysis Library's own figures.


def test_its_published_data_are_read(babelstream):
    assert len(babelstream) == 55
    assert babelstream[3] == Result(
        problem="BabelStream",
        application="Language 3",
        platform="Platform A",
        fom=82968e6,
        coverage_key="a34213cb9b955c4ff00847783b58d16b07089219a0d1a5bc91b4053ef957dcbb",
    )
    assert sum(r.fom == UNSUPPORTED for r in babelstream) == 17


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_application_efficiency_agrees(babelstream, better):
    found = portability.application_efficiency(babelstream, better=better)
    assert list(found) == [("BabelStream", language) for language in LANGUAGES]
    for efficiencies, expected in zip(found.values(), EFFICIENCY[better], strict=True):
        assert list(efficiencies) == PLATFORMS
        for value, theirs in zip(efficiencies.values(), expected, strict=True):
            assert value == (UNSUPPORTED if theirs is None else close(theirs))


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_performance_portability_agrees(babelstream, better):
    found = portability.application_efficiency(babelstream, better=better)
    pps = [portability.pp(efficiencies, PLATFORMS) for efficiencies in found.values()]
    assert [p.pp for p in pps] == close(PP[better])
    assert [p.pp_supported for p in pps] == close(PP_SUPPORTED[better])


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_the_cascade_agrees(babelstream, better):
    found = portability.application_efficiency(babelstream, better=better)
    steps = portability.cascade(found["BabelStream", "Language 0"], PLATFORMS)
    assert [s.pp for s in steps] == close(CASCADE[better])
    assert [s.efficiency for s in steps] == close(sorted(EFFICIENCY[better][0], reverse=True))


def test_code_divergence_agrees(babelstream, coverage):
    for language, theirs in zip(LANGUAGES, DIVERGENCE, strict=True):
        lines = {r.platform: coverage[r.coverage_key] for r in babelstream if r.application == language}
        found = portability.divergence(lines)
        assert found.divergence == close(theirs)
        assert found.convergence == close(1 - theirs)
    for platform, theirs in DIVERGENCE_OVER_LANGUAGES.items():
        lines = {r.application: coverage[r.coverage_key] for r in babelstream if r.platform == platform}
        assert portability.divergence(lines).divergence == close(theirs)


# Where it gives no figure, or one that misleads. What it does is as seen when running it.


def test_a_missing_figure_of_merit_is_unsupported_whichever_is_better():
    # There: 0 under "lower", but NaN under "higher", and its pp then raises that there is not exactly one efficiency.
    for better in ("lower", "higher"):
        given = results(("a", "x", 1.0), ("b", "x", 2.0), ("a", "y", UNSUPPORTED), ("b", "y", 1.0))
        found = portability.application_efficiency(given, better=better)
        assert found["p", "a"]["y"] == UNSUPPORTED
        assert portability.pp(found["p", "a"], ["x", "y"]).pp == 0


def test_what_was_not_measured_is_not_zero():
    # There: a missing row is unsupported, and pp is 0.
    found = portability.application_efficiency(
        results(("a", "x", 1.0), ("b", "x", 2.0), ("b", "y", 1.0), ("b", "z", None)), better="lower"
    )
    a = portability.pp(found["p", "a"], ["x", "y"])
    assert (a.pp, a.pp_supported, a.supported, a.not_measured) == (None, 1.0, ("x",), ("y",))
    b = portability.pp(found["p", "b"], ["x", "y", "z"])
    assert (b.pp, b.supported, b.unsupported, b.not_measured) == (None, ("x", "y"), (), ("z",))


@pytest.mark.parametrize("fom", [0.0, -1.0, inf, nan])
@pytest.mark.parametrize("better", ["lower", "higher"])
def test_a_figure_of_merit_that_is_none(fom, better):
    # There: under "lower", 0 raises ZeroDivisionError and -1 gives an efficiency of 1, and its rival one of -0.5; under
    # "higher", infinity gives NaN, and its rival 0: unsupported.
    with pytest.raises(InputError, match=r"'a' for 'p' on 'x' is (0.0|-1.0|inf|nan); .* 'unsupported'"):
        portability.application_efficiency(results(("a", "x", fom), ("b", "x", 2.0)), better=better)


def test_problems_are_kept_apart():
    # There: pp raises that there is not exactly one efficiency, as it leaves the problem out of account.
    given = [
        Result(problem=p, application=a, platform="x", fom=fom)
        for p, a, fom in [("p", "a", 1.0), ("p", "b", 2.0), ("q", "a", 8.0), ("q", "b", 4.0)]
    ]
    found = portability.application_efficiency(given, better="lower")
    assert found == {("p", "a"): {"x": 1}, ("p", "b"): {"x": 0.5}, ("q", "a"): {"x": 0.5}, ("q", "b"): {"x": 1}}


def test_a_problem_has_its_own_platforms():
    # There: pp is 0 for both, each being taken to be unsupported on the other problem's platform.
    given = [Result(problem=p, application="a", platform=h, fom=1.0) for p, h in [("p", "x"), ("q", "y")]]
    found = portability.application_efficiency(given, better="lower")
    assert portability.pp(found["p", "a"], ["x"]).pp == portability.pp(found["q", "a"], ["y"]).pp == 1


def test_a_platform_counts_once():
    # There: two rows of one efficiency count twice, and pp of 0.5, 0.5 and 1 on two platforms is 0.6.
    with pytest.raises(InputError, match="two results of 'a' for 'p' on 'x'"):
        portability.application_efficiency(results(("a", "x", 1.0), ("a", "x", 1.0)), better="lower")
    with pytest.raises(InputError, match="'x' is given twice"):
        portability.pp({"x": 0.5, "y": 1.0}, ["x", "x", "y"])
    assert portability.pp({"x": 0.5, "y": 1.0}, ["x", "y"]).pp == close(2 / 3)


def test_better_has_no_default(babelstream):
    # There: "lower". Its own case study leaves it at that, though BabelStream's are bandwidths.
    with pytest.raises(TypeError):
        portability.application_efficiency(babelstream)
    with pytest.raises(InputError, match="better is 'more'"):
        portability.application_efficiency(babelstream, better="more")


def test_divergence_of_one_platform_is_not_measured():
    # There: 0, which is perfect convergence.
    found = portability.divergence({"x": {1, 2}})
    assert (found.divergence, found.convergence, found.distances, found.common) == (None, None, {}, 2)
    assert found.costs == {"x": portability.Cost(total=2, own=None, shared=None)}


def test_a_platform_without_lines_is_refused():
    # There: it is left out of the mean in silence; of two platforms, the divergence is then 0.
    with pytest.raises(InputError, match="no line ran on 'y'"):
        portability.divergence({"x": {1, 2}, "y": set()})


def test_a_coverage_key_that_comes_twice_is_refused():
    # There: each row that has it becomes two platforms.
    text = portability.coverage_csv({"k": {("f", "1", 1)}})
    with pytest.raises(InputError, match="line 3: coverage_key 'k' comes twice"):
        portability.read_coverage(text + text.splitlines()[1])


@pytest.mark.parametrize("platforms", [("x", "X"), ("cuda", "CUDA")])
def test_names_that_differ_in_case_alone(platforms):
    # There: two platforms, and pp is 0 for every application that is spelt in one way only.
    rows = "".join(f"p,a,{platform},1\n" for platform in platforms)
    with pytest.raises(InputError, match=f"line 3: platform '{platforms[1]}' was '{platforms[0]}' before"):
        portability.read_performance("problem,application,platform,fom\n" + rows)


# Performance portability by hand.


def test_three_states():
    def pp(**efficiencies):
        return portability.pp(efficiencies, ["x", "y"])

    assert pp(x=0.5, y=0.25).pp == close(1 / 3)
    assert (pp(x=0.5, y=UNSUPPORTED).pp, pp(x=0.5, y=UNSUPPORTED).pp_supported) == (0, 0.5)
    assert (pp(x=0.5).pp, pp(x=0.5, y=None).pp) == (None, None)
    assert pp(x=0.5) == pp(x=0.5, y=None, z=UNSUPPORTED)
    nothing = pp()
    assert (nothing.pp, nothing.pp_supported, nothing.not_measured) == (None, None, ("x", "y"))


def test_one_unsupported_platform_settles_it():
    """Whatever the platform that was not measured would have given, PP is 0."""
    found = portability.pp({"x": 0.5, "y": UNSUPPORTED}, ["x", "y", "z"])
    assert (found.pp, found.pp_supported) == (0, 0.5)
    assert (found.supported, found.unsupported, found.not_measured) == (("x",), ("y",), ("z",))


@pytest.mark.parametrize(("value", "hint"), [(0.0, "'unsupported'"), (1.06, "ceiling"), (87.0, "by 100"), (-0.1, "")])
def test_what_is_no_efficiency(value, hint):
    with pytest.raises(InputError, match=rf"efficiency on 'y' is {value}; expected a share in \(0, 1\].*{hint}"):
        portability.pp({"x": 0.5, "y": value}, ["x", "y"])


@pytest.mark.parametrize("value", [nan, inf])
def test_an_efficiency_is_finite(value):
    with pytest.raises(InputError, match="efficiency on 'x'"):
        portability.pp({"x": value}, ["x"])


def test_noise_above_one_is_let_pass_and_not_clamped():
    # There: pp raises at 1.0000001.
    assert portability.pp({"x": 1.04, "y": 1.0}, ["x", "y"]).pp == close(2 / (1 / 1.04 + 1))


def test_no_platforms():
    with pytest.raises(InputError, match="no platforms"):
        portability.pp({"x": 1.0}, [])


def test_a_cascade_by_hand():
    efficiencies = {"a": 0.25, "b": UNSUPPORTED, "c": 1.0, "d": 0.5, "e": None}
    steps = portability.cascade(efficiencies, ["e", "b", "a", "d", "c"])
    assert [s.platform for s in steps] == ["c", "d", "a", "b", "e"]
    assert [s.efficiency for s in steps] == [1.0, 0.5, 0.25, UNSUPPORTED, None]
    assert [s.pp for s in steps] == [1.0, close(2 / 3), close(3 / 7), 0, 0]
    assert portability.cascade({"a": 0.5}, ["b", "a"])[1].pp is None


@given(st.dictionaries(st.text(min_size=1), st.floats(0.01, 1), min_size=1))
def test_a_cascade_falls_to_pp(efficiencies):
    steps = portability.cascade(efficiencies, list(efficiencies))
    pps = [s.pp for s in steps]
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(pps))
    assert pps[-1] == close(portability.pp(efficiencies, list(efficiencies)).pp)
    assert min(efficiencies.values()) * (1 - 1e-12) <= pps[-1] <= max(efficiencies.values()) * (1 + 1e-12)


# Code divergence by hand.


def test_divergence_by_hand():
    # 1 and 2 are common; 3 is x's and y's, 4 x's own, 5 and 6 are y's, 7 is z's, 8 is y's and z's.
    found = portability.divergence({"x": {1, 2, 3, 4}, "y": {1, 2, 3, 5, 6, 8}, "z": {1, 2, 7, 8}})
    distances = {("x", "y"): 1 - 3 / 7, ("x", "z"): 1 - 2 / 6, ("y", "z"): 1 - 3 / 7}
    assert found.distances == {k: close(v) for k, v in distances.items()}
    assert found.divergence == close(sum(distances.values()) / 3)
    assert found.common == 2
    assert {k: (c.total, c.own, c.shared) for k, c in found.costs.items()} == {
        "x": (4, 1, 3),
        "y": (6, 2, 4),
        "z": (4, 1, 3),
    }


@pytest.mark.parametrize(("other", "expected"), [({1, 2}, 0), ({3, 4}, 1)])
def test_the_ends_of_divergence(other, expected):
    found = portability.divergence({"x": {1, 2}, "y": other})
    assert (found.divergence, found.convergence) == (expected, 1 - expected)


def test_divergence_of_nothing():
    with pytest.raises(InputError, match="no platforms"):
        portability.divergence({})


# Files for P3.


def test_results_come_back(babelstream):
    text = portability.performance_csv(babelstream)
    assert text.splitlines()[0] == "problem,application,platform,fom,coverage_key"
    assert portability.read_performance(text) == babelstream


def test_the_columns_without_coverage():
    given = results(("a", "x", 0.1 + 0.2), ("a", "y", UNSUPPORTED), ("a", "z", None))
    assert portability.performance_csv(given) == (
        "problem,application,platform,fom\np,a,x,0.30000000000000004\np,a,y,\n"
    )


def test_what_is_no_result_is_not_written():
    with pytest.raises(InputError, match="'a' for 'p' on 'x' is nan"):
        portability.performance_csv(results(("a", "x", nan)))


def test_lines_come_back(coverage):
    text = portability.coverage_csv(coverage)
    assert text.splitlines()[0] == "coverage_key,coverage"
    assert portability.read_coverage(text) == coverage


def test_lines_are_written_as_they_were_published(coverage):
    rows = csv.reader(io.StringIO((P3 / "coverage.csv").read_text()))
    published = {key: json.loads(text) for key, text in list(rows)[1:]}
    for key, lines in coverage.items():
        written = json.loads(portability.coverage_json(lines))
        assert written == sorted(published[key], key=lambda entry: entry["file"])


def test_a_long_program_fits():
    """Python's reader refuses fields above 128 KiB, and its limit is everyone's."""
    before = csv.field_size_limit()
    lines = {"k": frozenset(("f", "1", i) for i in range(100_000))}
    assert portability.read_coverage(portability.coverage_csv(lines)) == lines
    assert csv.field_size_limit() == before


def test_columns_whatever_their_case_and_order():
    text = "\ufeffFOM , Platform,note,Problem,application\n1e3,x,n,p,a\n\nNaN,y ,n,p,a\n,z,n,p,a\n"
    assert portability.read_performance(text) == results(
        ("a", "x", 1000.0), ("a", "y", UNSUPPORTED), ("a", "z", UNSUPPORTED)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs one column 'problem'; its columns: none"),
        ("problem,application,platform\np,a,x\n", "f.csv needs one column 'fom'; its columns: problem, application"),
        ("problem,application,platform,fom,FOM\np,a,x,1,2\n", "needs one column 'fom'"),
        ("problem,application,platform,fom\np,a,x,fast\n", "f.csv, line 2: fom is 'fast'"),
        ("problem,application,platform,fom\np,a,x,1\np,a,y,0\n", "f.csv, line 3: .* on 'y' is 0.0"),
        ("problem,application,platform,fom\np,a,,1\n", "line 2: platform is empty"),
        ("problem,application,platform,fom\np,a,x\n", "line 2: 3 fields; expected 4"),
        ('problem,application,platform,fom\np,a,"x,1\n', "line 2: unexpected end of data"),
    ],
)
def test_bad_performance_data(text, message):
    with pytest.raises(InputError, match=message):
        portability.read_performance(text, name="f.csv")


@pytest.mark.parametrize(
    "coverage",
    [
        "no JSON",
        "3",
        '[{"file": "f", "lines": [1]}]',
        '[{"file": "f", "id": "1", "lines": [[1, 2]]}]',
        '[{"file": "f", "id": "1", "lines": [true]}]',
        '[{"file": "f", "id": "1", "lines": "12"}]',
        '[{"file": "f", "regions": [[1, 2, 2]]}]',
    ],
)
def test_bad_coverage_data(coverage):
    with pytest.raises(InputError, match=r"f\.csv, line 2: coverage is not a list of file, id and lines"):
        portability.read_coverage(portability._write_csv(portability.COVERAGE, [("k", coverage)]), name="f.csv")


# DataFrames.


def test_a_frame_has_p3s_columns(babelstream):
    pandas = pytest.importorskip("pandas")
    found = portability.frame([*babelstream, Result(problem="p", application="a", platform="x", fom=None)])
    assert list(found.columns) == ["problem", "application", "platform", "fom", "coverage_key"]
    assert pandas.api.types.is_float_dtype(found["fom"])
    read = pandas.read_csv(io.StringIO(portability.performance_csv(babelstream)))
    assert len(found) == 55
    assert found["fom"].isna().sum() == 17
    assert found["fom"].equals(read["fom"])


def test_a_frame_without_pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(Unavailable, match=r"a DataFrame needs pandas .*; pip install 'portnet\[pandas\]'"):
        portability.frame([])
