"""The list of the kernel's names is whole, every name has a place or a reason, and the page says what the docstrings say."""

import re
from functools import cache
from pathlib import Path

import pytest

import dmabuf
from tools.kernel_headers import HEADERS, main, names
from tools.kernel_names import NOT_YET, PAGE, Names, Place, page, problems, read_list, read_places

HEADER = """
#ifndef _A_H
#define _A_H
struct outside;
#define SOME_LIMIT 3
#define for_each_thing(x) \\
\tfor (;;)
enum colour { RED = 1, /* BLUE, */ GREEN };
typedef void (*thing_func_t)(struct thing *t);
typedef u64 cookie_t;
struct thing {
\tspinlock_t *lock;
\tint (*go)(struct thing *, int (*)(void));
\tunion {
\t\tstruct list_head list;
\t\tktime_t when;
\t};
\tstruct thing_cb {
\t\tint left;
\t} in, out;
\tchar name[32], other;
\tstruct thing_cb cbs[] __counted_by(left);
};
extern const struct thing_ops default_ops;
int thing_go(struct thing *t,
\t     bool (*how)(void));
static inline bool __must_check thing_is_red(struct thing *t)
{
\tif (t) { return true; }
\treturn false;
}
int __thing_inside(void); // thing_old()
#endif
"""


def test_a_header_gives_its_public_names_and_their_kinds() -> None:
    assert {name.name: name.kind for name in names(HEADER)} == {
        "SOME_LIMIT": "constant", "RED": "constant", "GREEN": "constant", "for_each_thing": "macro", "colour": "type",
        "thing_func_t": "type", "cookie_t": "type", "thing": "type", "thing_cb": "type", "thing.lock": "field", "thing.go": "op",
        "thing.list": "field", "thing.when": "field", "thing.in": "field", "thing.out": "field", "thing_cb.left": "field",
        "thing.name": "field", "thing.other": "field", "thing.cbs": "field", "default_ops": "variable", "thing_go": "function",
        "thing_is_red": "function",
    }  # fmt: skip


def test_headers_of_another_kernel_are_compared_by_name_and_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for header in HEADERS:
        (tmp_path / header).write_text("")
    (tmp_path / "sync_file.h").write_text("#define sync_file_create(fence) fence\nint sync_file_new(void);\n")
    assert main([str(tmp_path)]) == 1
    told = capsys.readouterr().out.splitlines()
    assert "sync_file.h: sync_file_create: macro, listed as function" in told
    assert "sync_file.h: sync_file_new: not in the list" in told
    assert "dma-buf.h: dma_buf_get: not in the header" in told


def test_the_list_has_every_header_and_only_public_names() -> None:
    listed = read_list().kinds
    assert tuple(listed) == HEADERS
    # Counted by hand in the headers of Linux 6.8.
    assert {header: len(kinds) for header, kinds in listed.items()} == {
        "dma-buf.h": 85, "dma-fence.h": 70, "dma-fence-array.h": 16, "dma-fence-chain.h": 16, "dma-fence-unwrap.h": 8, "dma-resv.h": 52,
        "iosys-map.h": 21, "sync_file.h": 12,
    }  # fmt: skip


@cache
def claimed() -> dict[str, list[Place]]:
    return read_places()


def test_every_name_has_a_place_or_a_reason_and_every_place_is_there() -> None:
    assert problems(read_list(), claimed()) == []


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(read_list(), claimed()), "run: python -m tools.kernel_names"


def places_of_page() -> list[str]:
    """Of the page and not of the docstrings, which take a second to read in each process that collects the tests."""
    columns = (line.split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `"))
    return sorted({place for _, _, where in columns if where[0] == "`" for place in re.findall("`[^`]+`", where)})


@pytest.mark.parametrize("place", places_of_page())
def test_a_place_can_be_reached_by_its_name(place: str) -> None:
    path = re.sub(r"\(.*\)", "", place.strip("`"))
    top, *rest = path.removeprefix("dmabuf.").split(".")
    found = getattr(dmabuf, top)
    for part in rest:
        known = getattr(found, "__annotations__", {})
        found = getattr(found, part) if hasattr(found, part) else known[part]


def test_every_reason_is_a_clause_and_no_name_has_two() -> None:
    for reason in read_list().reasons.values():  # two reasons are refused by read_list
        assert len(reason.removeprefix(NOT_YET)) > 5
        assert not reason.endswith(".")


def listed(*kernel: str, **reasons: str) -> Names:
    return Names({"a.h": dict.fromkeys(kernel, "function")}, reasons)


PLACE = Place("`dmabuf.there()`", True)


def test_a_name_without_place_and_reason_is_told() -> None:
    (line,) = problems(listed("go", "stop"), {"go": [PLACE]})
    assert line.startswith("stop: neither")


def test_a_name_that_no_header_has_is_told() -> None:
    (line,) = problems(listed("go"), {"go": [PLACE], "gone": [PLACE]})
    assert line.startswith("gone: a docstring claims it")


def test_place_and_reason_contradict_unless_it_was_only_not_built() -> None:
    (line,) = problems(listed("go", "stop", go="nobody needs it", stop="not yet: later"), {"go": [PLACE], "stop": [PLACE]})
    assert line.startswith("go: has a place")


def test_an_attribute_that_is_not_there_is_told() -> None:
    (line,) = problems(listed("go"), {"go": [Place("`Thing.go`", False)]})
    assert line == "go: `Thing.go` is not there"


def source(tmp_path: Path, text: str) -> dict[str, list[Place]]:
    package = tmp_path / "dmabuf"
    package.mkdir()
    (package / "__init__.py").write_text("from dmabuf.thing import Thing, go\n")
    (package / "thing.py").write_text(text)
    return read_places(tmp_path)


def test_docstrings_give_places_as_a_reader_writes_them(tmp_path: Path) -> None:
    found = source(
        tmp_path,
        '''
class Thing:
    """A thing.

    Kernel: thing (lock, name as label), thing_go as
    go, thing.gone as gone, thing_label as text.
    """

    __slots__ = ("lock",)
    lock: int

    def __init__(self, text: str) -> None:
        self.label = text

    def go(self) -> None:
        """Go. Kernel: thing_walk. Not a sentence of it."""

    @property
    def red(self) -> bool:
        """Kernel: thing_is_red."""

def go(flags: int) -> None:
    """Kernel: info (flags)."""

def inside() -> None:
    """Kernel: thing_inside."""
''',
    )
    assert {name: [tuple(place) for place in places] for name, places in found.items()} == {
        "thing": [("`Thing`", True)],
        "thing.lock": [("`Thing.lock`", True)],
        "thing.name": [("`Thing.label`", True)],
        "thing_go": [("`Thing.go()`", True)],
        "thing.gone": [("`Thing.gone`", False)],
        "thing_label": [("`Thing(text=…)`", True)],
        "thing_walk": [("`Thing.go()`", True)],
        "thing_is_red": [("`Thing.red`", True)],
        "info": [("`dmabuf.go()`", True)],
        "info.flags": [("`dmabuf.go(flags=…)`", True)],
        "thing_inside": [("`dmabuf.thing.inside()`", True)],
    }


@pytest.mark.parametrize("sentence", ["thing-go", "thing (a b)", "thing (a like b)", "thing (a", "thing as"])
def test_a_sentence_that_cannot_be_read_names_its_place(tmp_path: Path, sentence: str) -> None:
    with pytest.raises(ValueError, match=r"thing\.py: go"):
        source(tmp_path, f'def go() -> None:\n    """Kernel: {sentence}."""\n')


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ('["a.h"]\nfunction = ["go", "go"]', "a name twice"),
        ('["a.h"]\nfunctions = ["go"]', "an unknown kind"),
        ('["a.h"]\nfunction = ["go"]\n[[none]]\nnames = ["gone"]\nwhy = "because"', "gone"),
        ('["a.h"]\nfunction = ["go"]\n[[none]]\nnames = ["go"]\nwhy = "a"\n[[none]]\nnames = ["go"]\nwhy = "b"', "two reasons"),
    ],
)
def test_a_list_that_contradicts_itself_is_refused(tmp_path: Path, text: str, wrong: str) -> None:
    path = tmp_path / "names.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=wrong):
        read_list(path)
