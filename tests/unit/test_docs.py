"""Citations of the semantics, links between pages and headings of the FAQ are right, and the checks find what is wrong."""

import ast
import re
from pathlib import Path

import pytest

from tools import citations, links
from tools.citations import ROOT

PAGE = '<a id="2"></a>\n\n# 2. dma-buf\n\n<a id="2.1"></a>\n\n## 2.1 dma_buf_export(exp_info)\n\n<a id="2.13a"></a>\n\n## 2.13a Matrix\n'


def faults(root: Path, page: str, source: str) -> list[str]:
    """What the check of citations says about one page of the semantics and one module."""
    (root / "docs" / "semantics").mkdir(parents=True)
    (root / "docs" / "semantics" / "2.md").write_text(page)
    (root / "src").mkdir()
    (root / "src" / "module.py").write_text(source)
    return [fault.text for fault in citations.check(root)]


@pytest.mark.parametrize(
    "cited", ["semantics 2.1", "semantics 2.1, 2.13a", "semantics 2.1–2.13a", "Semantics 2 and 2.1", "semantics\n2.1, step 6"]
)
def test_citation_of_section_that_exists_is_no_fault(tmp_path: Path, cited: str) -> None:
    assert faults(tmp_path, PAGE, cited) == []


@pytest.mark.parametrize(
    ("cited", "number"),
    [("semantics 2.2", "2.2"), ("semantics 2.1, 2.3", "2.3"), ("semantics 2.1-2.4", "2.4"), ("appendix A.1", "A.1")],
)
def test_citation_of_missing_section_is_fault(tmp_path: Path, cited: str, number: str) -> None:
    (fault,) = faults(tmp_path, PAGE, cited)
    assert fault.startswith(f"semantics {number}: ")


def test_citation_of_spec_is_fault(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path, PAGE, "sp" + "ec 2.1")
    assert fault.endswith('cite it as "semantics"')


def test_section_without_anchor_is_fault(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path, PAGE + "\n## 2.14 dma_buf_move_notify\n", "")
    assert 'needs <a id="2.14">' in fault


def test_citations_in_this_repository_name_sections() -> None:
    assert citations.check() == []


def test_command_prints_where_section_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert citations.main(["2.13"]) == 0
    assert capsys.readouterr().out == "docs/semantics/2-dma-buf.md#2.13\n"
    assert citations.main(["2.99"]) == 1


@pytest.mark.parametrize("link", ["other.md", "other.md#a-b-c", "#own-heading", "other.md#2.1", "https://example.org", "."])
def test_link_that_leads_somewhere_is_no_fault(tmp_path: Path, link: str) -> None:
    (tmp_path / "other.md").write_text('# A `b`: c\n\n<a id="2.1"></a>\n')
    (tmp_path / "page.md").write_text(f"# Own heading\n\n[text]({link})\n")
    assert links.check(tmp_path) == []


@pytest.mark.parametrize("link", ["gone.md", "other.md#d", "#c"])
def test_link_that_leads_nowhere_is_fault(tmp_path: Path, link: str) -> None:
    (tmp_path / "other.md").write_text("# A `b`: c\n")
    (tmp_path / "page.md").write_text(f"# Own heading\n\n```sh\n[[ x ]](not a link)\n```\n\n[text]({link})\n")
    (fault,) = links.check(tmp_path)
    assert (fault.path, fault.line) == ("page.md", 7)


@pytest.mark.parametrize("name", ["core/fence.py", "fence.py", "core/*.py", "dmabuf.core.fence", "dmabuf.allocate", "include/a.h"])
def test_name_of_file_or_module_that_exists_is_no_fault(tmp_path: Path, name: str) -> None:
    assert named(tmp_path, name) == []


@pytest.mark.parametrize("name", ["core/gone.py", "gone.py", "gone/*.py", "dmabuf.core.gone", "dmabuf.gone"])
def test_name_of_missing_file_or_module_is_fault(tmp_path: Path, name: str) -> None:
    (fault,) = named(tmp_path, name)
    assert fault.startswith(name)


def named(root: Path, name: str) -> list[str]:
    """What the check says about a page that names this."""
    package = root / "src" / "dmabuf"
    (package / "core").mkdir(parents=True)
    (package / "__init__.py").write_text("def allocate(): ...\n")
    (package / "core" / "__init__.py").write_text("")
    (package / "core" / "fence.py").write_text("")
    (root / "page.md").write_text(f"See `{name}`.\n")
    return [fault.text for fault in links.check(root)]


def test_links_in_this_repository_lead_somewhere() -> None:
    assert links.check() == []


def source_texts() -> str:
    """Every string of the package with the parts of f-strings that vary as ``…``, and the messages of the C extension and of make."""
    found = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    others = [*sorted((ROOT / "native").rglob("*.c")), ROOT / "tools" / "check_machine.sh"]
    return "\n".join([*found, *(re.sub(r'"\s*\n\s*"', "", path.read_text(encoding="utf-8")) for path in others)])


@pytest.mark.parametrize(("page", "lines"), [("FAQ.md", r"^### (.*)$"), ("docs/cli.md", r"^\| (`.*\(E[A-Z]+\)`.*) \| 1 \|$")])
def test_messages_that_page_quotes_are_in_the_source(page: str, lines: str) -> None:
    """A quoted message is split where it is put together: at names and numbers, at the errno, at ``:`` and at ``;``."""
    texts = source_texts()
    missing = []
    found = re.findall(lines, (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert found
    for line in found:
        for quoted in re.findall(r"`([^`]+)`", line):
            parts = (part.strip(" ,") for part in re.split(r"…|\(E[A-Z]+\)|[:;] ", quoted))
            missing += [f"{part!r} in {quoted!r}" for part in parts if part and part not in texts]
    assert missing == [], f"change {page} together with the messages"
