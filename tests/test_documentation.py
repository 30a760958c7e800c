"""What the documents say against what is there: files, messages, links, examples."""

import ast
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and MkDocs both make of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(found), f"{page.name} links to {target}"


def test_readme_is_read_in_four_minutes():
    assert len((ROOT / "README.md").read_text().split()) <= 1200


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_are_as_wide_as_the_formatter_allows(page):
    """But for tables, pictures, what is shown as code, and words without a space to break them at."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    wide = [
        line
        for line in text.splitlines()
        if len(line) > 119 and not line.startswith(("|", "![", "<")) and " " in line[:119].strip()
    ]
    assert wide == []


def test_docstrings_have_the_layout_that_the_reference_is_made_from():
    """An entry of Args or Raises begins with its name and a colon, and its further lines, like any sentence's, are where they belong."""
    entry = {"Args:": r"\*{0,2}\w+.*?:( |$)", "Raises:": r"[A-Z][\w.]*(, [\w.]+)*: "}
    for path in (ROOT / "trl_offpolicy").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            documented = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module)
            section, before = "", ""
            for line in (documented and ast.get_docstring(node) or "").splitlines():
                if line and not line.startswith(" "):
                    section = line
                elif section in entry and re.match(r" {4}\S", line):
                    assert re.match(entry[section], line.strip()), f"{path}: {line}"
                elif re.match(r"[\w`].*[\w.`]$", before):
                    assert not line.strip(), f"{path}: {line}"
                before = line


def test_every_file_is_in_the_architecture_and_every_page_in_the_menu():
    listed = (ROOT / "docs" / "architecture.md").read_text()
    rooms = listed[listed.index("trl_offpolicy/\n") : listed.index("examples/\n")]
    there = {}
    for line in rooms.splitlines()[1:]:
        names = re.match(r"\s*([\w./]+(?:, [\w./]+)*)", line)[1].split(", ")
        if names[0].endswith("/"):
            room = names[0].rstrip("/")
            there[room] = {"__init__.py"}
        else:
            there[room].update(names)
    package = ROOT / "trl_offpolicy"
    there["cli"].add("__main__.py")
    assert there == {
        path.parent.name: {file.name for file in path.parent.glob("*.py")} for path in package.glob("*/__init__.py")
    }
    for name in re.findall(r"^  (\w[\w/]*\.py)", listed.replace(rooms, ""), flags=re.M):
        assert any((ROOT / folder / name).exists() for folder in ("trl_offpolicy", "examples", "benchmarks")), name
    assert re.findall(r"`(\w+)`", (ROOT / "README.md").read_text().split("[Architecture]")[1].split("·")[0]) == list(
        there
    )
    menu = str(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    for page in (ROOT / "docs").rglob("*.md"):
        assert page.relative_to(ROOT / "docs").as_posix() in menu


def test_messages_in_troubleshooting_are_those_that_users_meet():
    """Each is a piece of a message; the code may break it into several literals."""
    source = " ".join(path.read_text() for path in (ROOT / "trl_offpolicy").rglob("*.py"))
    source = re.sub(r'["\']\s*\n\s*(?:\+ )?f?["\']', "", source)
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| \*(.+?)\* \|", text, flags=re.M)
    assert len(messages) >= 20
    for message in messages:
        assert message in source, message


def test_examples_in_contributing_work(tmp_path, monkeypatch):
    """An objective, a verifier and an engine of a contributor's own, used together as the text says."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.S):
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    import torch

    from trl_offpolicy import DataRewriter, RewriteConfig

    assert names["args"].objective is names["confident_only"]
    assert names["confident_only"](torch.tensor([[0.5, 0.05]]).log()).tolist() == [[1, 0]]
    assert names["ParityVerifier"]().verify(["so it is even", "odd"], ["even", "even"]) == ["correct", "wrong"]
    rows = [{"problem": f"problem {i}", "solution": rf"\boxed{{{i}}}", "answer": str(i)} for i in (41, 42)]
    rewriter = DataRewriter(
        "constant", RewriteConfig(str(tmp_path / "run"), num_generations=1), sampler=names["ConstantSampler"]()
    )
    assert rewriter.rewrite(rows)["source"] == ["expert", "self"]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """Cell by cell, with fewer problems, in a copy of the folder that it is run from."""
    import matplotlib

    matplotlib.use("Agg")
    for name in ("quickstart_policy", "quickstart_task.py"):
        (tmp_path / name).symlink_to(ROOT / "examples" / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    cells = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]).replace("problems(48", "problems(12"), cell["id"], "exec"), names)
    assert len(names["table"]) == 12 and set(names["table"]["source"]) <= {"self", "guided", "expert"}
    first = next(line for line in names["trainer"].state.log_history if "weight/self" in line)
    assert first["step"] == 1 and first["weight/self"] == pytest.approx(1, abs=1e-4)
    assert (tmp_path / "runs" / "notebook" / "gap.png").stat().st_size > 5000


def test_versions_agree():
    from trl_offpolicy import __version__

    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    assert f"({__version__})" in (ROOT / "CHANGELOG.md").read_text()
    assert (
        "py.typed"
        in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["trl_offpolicy"]
    )
