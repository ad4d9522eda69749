import tracemalloc
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import event
from vodpoller.router import Router


@dataclass(frozen=True)
class Route:
    sinks: tuple = ("archive",)
    event_types: tuple | None = None
    sources: tuple | None = None
    where: str | None = None
    name: str = "r"


def routed(*routes, **more):
    return Router(routes).route(event(**more))


def test_an_event_that_no_route_takes_is_unrouted():
    assert routed(Route(event_types=("Other",))).is_unrouted
    assert routed().is_unrouted


@pytest.mark.parametrize(
    ("where", "more"),
    [
        ("length(Missing)", {}),
        ("starts_with(EventType, `1`)", {}),
        ("avg(Numbers) > `1`", {"Numbers": [10**400, 1]}),
        ("sort(Mixed)", {"Mixed": [1, "a", None]}),
        ("max_by(Mixed, &a)", {"Mixed": [{"a": 1}, {"a": "b"}]}),
        ("join('', Mixed)", {"Mixed": [1]}),
    ],
)
def test_a_failing_where_rejects_the_event_only_for_its_sinks(where, more):
    result = routed(Route(sinks=("a", "b"), where=where), Route(sinks=("c",)), **more)
    assert result.sinks == ("c",)
    assert set(result.failed) == {"a", "b"}
    assert "`where` cannot be evaluated" in str(result.failed["a"])
    assert not result.is_unrouted


def test_a_failing_where_does_not_affect_a_sink_of_another_route():
    result = routed(Route(sinks=("a",), where="length(Missing)"), Route(sinks=("a",)))
    assert result.sinks == ("a",)
    assert result.failed == {}


@pytest.mark.parametrize(
    ("where", "holds"),
    [
        ("FileUploadEvent.FileId == '7'", True),
        ("FileUploadEvent.FileId == '8'", False),
        ("Missing", False),
        ("`0`", True),
        ("`false`", False),
        ("''", False),
        ("`[]`", False),
        ("`{}`", False),
        ("`null`", False),
        ("EventType", True),
        ("!Missing", True),
        ("FileUploadEvent", True),
    ],
)
def test_where_holds_if_jmespath_counts_its_value_as_true(where, holds):
    assert routed(Route(where=where), number=7).is_unrouted is not holds


@pytest.mark.parametrize(
    ("globs", "event_type", "matches"),
    [
        (("NewFileUpload",), "NewFileUpload", True),
        (("NewFileUpload",), "NewFileUploads", False),
        (("newfileupload",), "NewFileUpload", False),
        (("New*",), "NewFileUpload", True),
        (("*Complete",), "CreateSnapshotByTimeOffsetComplete", True),
        (("Other", "N?wFileUpload"), "NewFileUpload", True),
        (("Other", "File"), "FileDeleted", False),
        (("*",), "", True),
        (("",), "", True),
        (("*",), "two\nlines", True),
        (("Ne[wx]*",), "NewFileUpload", True),
        (("New",), "New\n", False),
    ],
)
def test_event_types_are_globs_of_the_whole_type(globs, event_type, matches):
    assert routed(Route(event_types=globs), event_type=event_type).is_unrouted is not matches


def test_a_route_takes_the_events_of_its_sources_only():
    router = Router([Route(sources=("main",))])
    assert router.route(event(source="main")).sinks == ("archive",)
    assert router.route(event(source="other")).is_unrouted


def test_an_event_goes_to_a_sink_once_in_the_order_of_the_routes():
    result = routed(Route(sinks=("b", "a")), Route(sinks=("a", "c")), Route(sinks=("b",)))
    assert result.sinks == ("b", "a", "c")


def test_the_cache_of_an_event_type_leaves_out_the_result_of_where():
    router = Router([Route(where="FileUploadEvent.FileId == '7'"), Route(sinks=("all",), event_types=("A",))])
    assert router.route(event(7)).sinks == ("archive",)
    assert router.route(event(8)).is_unrouted
    assert router.route(event(7, event_type="A")).sinks == ("archive", "all")
    assert router.route(event(8, event_type="A")).sinks == ("all",)


@pytest.mark.system
@pytest.mark.long
def test_very_many_event_types_do_not_fill_the_memory():
    router = Router([Route()])
    tracemalloc.start()
    try:
        for number in range(20_000):
            assert router.route(event(event_type=f"T{number:0100}")).sinks == ("archive",)
        kept_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept_bytes < 1_000_000


@pytest.mark.parametrize(
    ("glob", "event_type"),
    [("CreateSnapshotByTimeOffsetCompleted", "CreateSnapshotByTimeOffsetComplete"), ("FileUpload*", "NewFileUpload")],
)
def test_a_similar_pattern_is_named_only_for_its_sources(glob, event_type):
    router = Router([Route(event_types=(glob,), sources=("main",)), Route(event_types=("FileDeleted",))])
    assert router.similar_routed("main", event_type) == glob
    assert router.similar_routed("other", event_type) is None
    assert router.similar_routed("main", "HologramRender") is None


def test_very_long_event_types_are_not_kept():
    router = Router([Route(event_types=("New*",))])
    tracemalloc.start()
    try:
        for number in range(20):
            event_type = f"{number}" + "x" * 1_000_000
            assert router.route(event(event_type=event_type)).is_unrouted
            assert router.similar_routed("main", event_type) is None
        del event_type
        kept_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept_bytes < 1_000_000


# --- judgements for the operator --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "why_not"),
    [
        (Route(sources=("b", "a")), "it takes events of other sources only: a, b"),
        (Route(sources=("a",), event_types=("Other",)), "it takes events of other sources only: a"),
        (Route(event_types=("Other", "N?")), "its event_types do not match: Other, N?"),
        (Route(where="Missing"), "its `where` does not hold: Missing is null"),
        (Route(where="`false`"), "its `where` does not hold: `false` is false"),
        (Route(where="Missing || ''"), "its `where` does not hold: Missing || '' is \"\""),
        (Route(where="length(Missing)"), "`where` cannot be evaluated on this event: In function length(), "),
        (Route(), ""),
        (Route(sources=("main",), event_types=("New*",), where="EventType"), ""),
    ],
)
def test_a_judgement_names_why_a_route_does_not_take_an_event(route, why_not):
    (judgement,) = Router([route]).judge(event())
    assert judgement.why_not.startswith(why_not)
    assert judgement.takes == (why_not == "")
    assert judgement.sinks == route.sinks


ROUTES = st.builds(
    Route,
    sinks=st.sampled_from([("a",), ("b",), ("a", "b")]),
    event_types=st.sampled_from([None, ("New*",), ("Other",), ("*",)]),
    sources=st.sampled_from([None, ("main",), ("second",)]),
    where=st.sampled_from([None, "Wanted", "length(Wanted)", "!Wanted"]),
    name=st.sampled_from(["r", "s", "t"]),
)


@given(
    routes=st.lists(ROUTES, max_size=5),
    source=st.sampled_from(["main", "second"]),
    event_type=st.sampled_from(["NewFileUpload", "Other", "Third"]),
    wanted=st.sampled_from([None, 0, "", "x", [], [1]]),
)
def test_the_judgements_agree_with_the_routing(routes, source, event_type, wanted):
    router = Router(routes)
    given_event = event(source=source, event_type=event_type, Wanted=wanted)
    routed = router.route(given_event)
    judged = list(router.judge(given_event))
    assert routed.routes == tuple(judgement.route for judgement in judged if judgement.takes)
    assert routed.sinks == tuple(dict.fromkeys(sink for it in judged if it.takes for sink in it.sinks))
    assert {judgement.route for judgement in judged if judgement.takes} <= {*router.routes_for(source, event_type)}


def test_the_routes_for_a_type_are_named_whatever_their_where():
    routes = [
        Route(name="one", event_types=("File*",), where="Missing"),
        Route(name="two", event_types=("Other",)),
        Route(name="three", sources=("second",)),
        Route(name="four"),
    ]
    assert Router(routes).routes_for("main", "FileDeleted") == ["one", "four"]
