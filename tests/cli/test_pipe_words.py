"""The words of `dmabuf pipe`: what they mean, and what is refused, without starting a process."""

import pytest

from dmabuf.errors import InvalidError
from dmabuf.pipe.plan import Spec, planned


def plan_of(text: str) -> dict[str, Spec]:
    return {spec.name: spec for spec in planned(text.split()).stages}


def refusal(text: str) -> str:
    with pytest.raises(InvalidError) as caught:
        planned(text.split())
    return str(caught.value)


def test_chain_is_read_from_the_left():
    plan = plan_of("test count=5 ! m:edges workers=2 threshold=40 ! pkg.m:Detector policy=latest restart=on-failure:7 ! out.mp4 rate=30")
    assert [(spec.side, spec.kind, spec.target, spec.after) for spec in plan.values()] == [
        ("source", "test", "test", None),
        ("function", "function", "m:edges", "test"),
        ("function", "function", "pkg.m:Detector", "edges"),
        ("sink", "video", "out.mp4", "Detector"),
    ]
    assert plan["edges"].workers == 2
    assert plan["edges"].own == {"threshold": "40"}
    assert (plan["Detector"].policy, plan["Detector"].restarts) == ("latest", 7)
    assert plan["out"].own == {"rate": "30"}


def test_raw_takes_its_options_behind_commas(tmp_path):
    plan = plan_of("raw:frames.bin,width=64,height=48,format=gray frames=3 ! raw:out.bin")
    assert plan["raw"].own == {"width": "64", "height": "48", "format": "gray", "frames": "3"}
    assert (plan["raw-2"].side, plan["raw-2"].target) == ("sink", "out.bin")


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("'frames/*.png'", "images"),
        ("camera", "camera"),
        ("camera:/dev/video7", "camera"),
        ("m:frames", "function"),
        ("x.py:f", "function"),
    ],
)
def test_sources_are_recognized(target, kind):
    (source, _) = plan_of(f"{target} ! null").values()
    assert (source.side, source.kind) == ("source", kind)


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("out-%05d.png", "images"),
        ("x/out.mkv", "video"),
        ("raw:x", "raw"),
        ("null", "null"),
        ("show", "show"),
        ("./edges.py:f", "function"),
    ],
)
def test_stages_and_sinks_are_recognized(target, kind):
    (_, last) = plan_of(f"test ! {target}").values()
    assert last.kind == kind


def test_branches_begin_with_the_name_of_a_stage():
    plan = plan_of("test name=in ! m:f ! null @in ! m:g ! show @f ! m:f ! null")
    assert {name: spec.after for name, spec in plan.items()} == {
        "in": None,
        "f": "in",
        "null": "f",
        "g": "in",
        "show": "g",
        "f-2": "f",
        "null-2": "f-2",
    }


def test_stream_has_a_buffer_for_each_reader_and_two_more():
    plan = plan_of("test ! m:f workers=5 ! null @test ! null")
    assert plan["test"].buffers == 8
    assert plan["f"].buffers == 4


def test_way_of_merged_frames_is_the_stages_with_workers():
    plan = planned("test ! m:a ! m:b workers=2 ! m:c workers=2 ! m:d ! null".split())
    assert [spec.name for spec in plan.way(plan.stage("d"))] == ["b", "c"]
    assert plan.way(plan.stage("c")) == plan.way(plan.stage("a")) == plan.way(plan.stage("null")) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a pipeline: it has no stages"),
        ("! null", "!: no stage before it"),
        ("test ! ! null", "!: two ! in a row"),
        ("test !", "!: no stage after it"),
        ("test", "test: nothing reads it"),
        ("test null", "test null: it is not an option (EINVAL); write key=value, or ! before the next stage: ! null"),
        ("test ! null @", "@: it names no stage"),
        ("test ! null @test", "@test: nothing reads it"),
        ("test ! null @test show", "@test show: no ! before the next stage"),
        ("test ! null @other ! show", "@other: no stage has this name (EINVAL); use one of: test, null, show"),
        ("test ! null @null ! show", "@null: a sink gives no frames"),
        ("@f ! m:f ! null", "f: its frames come from itself"),
        ("null ! test", "null: it is a sink (EINVAL); put it after a stage"),
        ("test ! null ! show", "null: a sink gives no frames, and a stage follows it"),
        ("test ! test", "test: it is a source (EINVAL); put it first"),
        ("test ! camera", "camera: a camera gives frames and takes none"),
        ("none.mp4 ! null", "none.mp4: it is no source: there is no such file"),
        ("test ! out", "out: it is neither a function, nor a file to write"),
        ("test ! no/where:f:g", "no/where:f:g: it is neither a function nor a file"),
        ("test ! out.png", "out.png: one image for all frames (EINVAL); number the images: out-%05d.png"),
        ("test ! out-%d.webm", "images can't be written as .webm"),
        ("test ! raw:", "raw:: it names no file"),
        (
            "test ! null color=red",
            "null color=red: a null sink has no such option (EINVAL); use one of: checksum, kill_at, name, policy, restart",
        ),
        ("test workers=2 ! null", "test workers=2: a test source has no such option"),
        ("test ! m:f workers=0 ! null", "m:f workers=0: it is not such a number (EINVAL); use a number: 1 to 16"),
        ("test ! m:f workers=many ! null", "m:f workers=many: it is not such a number"),
        ("test ! m:f policy=oldest ! null", "m:f policy=oldest: there is no such choice (EINVAL); use one of: queue, latest"),
        ("test when_full=grow ! null", "test when_full=grow: there is no such choice (EINVAL); use one of: wait, drop"),
        ("test buffers=1 ! null", "test buffers=1: it is not such a number (EINVAL); use a number: 2 to 64"),
        ("test buffers=3 ! m:f workers=4 ! null", "test buffers=3: its readers are 4 processes (EINVAL); use buffers=6 or more"),
        (
            "test ! m:f restart=always ! null",
            "m:f restart=always: there is no such choice (EINVAL); use never, on-failure, or on-failure:N",
        ),
        ("test ! m:f restart=on-failure:0 ! null", "m:f restart=on-failure:0: it is not such a number"),
        ("test ! out.mp4 restart=on-failure", "out.mp4 restart=: a file that was begun can't be continued"),
        ("test ! m:f workers=16 ! null @test ! m:g workers=15 ! null", "test: it needs 33 readers, and a stream has 32"),
        ("test ! m:f workers=2 ! m:g workers=3 ! null", "g: it has 3 workers, and f before it 2"),
        ("test ! m:f policy=latest checksum=yes ! null", "m:f: checksum= of frames of which some are left out"),
        ("test name=a ! null name=a", "null name=a: it is no name, or another stage has it"),
        ("test count=1 count=2 ! null", "test count=2: count= was given already"),
    ],
)
def test_words_that_make_no_sense_are_refused(text, words):
    found = refusal(text)
    assert found.startswith(f"pipe: {words}") or words in found
    assert "(EINVAL); " in found
