"""README and docs/: links lead somewhere, commands can be typed, claims name tests that exist, figures are those of a command."""

import re
import shlex
from pathlib import Path

import pytest

from benchmarks.__main__ import BENCHMARKS
from equiav import cli
from equiav.commands import settings
from equiav.config import Config, ConfigError, from_dict
from equiav.config.reading import read_line
from equiav.model.arithmetic import count

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
HISTORY = ("LOG.md",)  # what was tried, as it was typed then


def named(path):
    return pytest.param(path, id=path.name)


def test_the_readme_is_read_in_three_minutes():
    assert len((ROOT / "README.md").read_text().split()) < 900


@pytest.mark.parametrize("path", map(named, DOCS))
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" not in link:
            file, _, anchor = link.partition("#")
            there = path.parent / file if file else path
            assert there.exists(), link
            heads = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE) if anchor else []
            assert not anchor or anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, (
                link
            )


def typed(path):
    """Each `equiav ...` of a page, in a line of its own or between backquotes, without what follows a comment or a pipe."""
    text = path.read_text().replace("\\\n", " ")
    fenced = [
        line
        for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    quoted = re.findall(r"`([^`]+)`", re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    for line in [*fenced, *(" ".join(one.split()) for one in quoted)]:
        found = re.match(r"(?:\$ )?(?:.*-m )?equiav ([a-z]+) ?(.*)", line)
        if found and found[1] != "module":
            yield found[1], re.split(r"\s#|\s[|>&]\s|;", found[2])[0]


@pytest.mark.parametrize("path", [named(path) for path in DOCS if path.name not in HISTORY])
def test_what_is_to_be_typed_can_be(path):
    """Every option of every command is one. Values in capitals, and dots, stand for something."""
    for command, rest in typed(path):
        assert command in cli.COMMANDS, (command, rest)
        for option in re.findall(r"(?<!\S)--[\w.\-]+", rest):
            kind = getattr(settings, cli.COMMANDS[command].settings)
            assert not unknown(kind, option), (command, option)


def unknown(kind, option):
    try:
        read_line(kind, [option])
    except ConfigError as error:
        return "there is no" in str(error)
    return False


def test_claims_name_tests_that_are_there():
    rows = [line for line in (ROOT / "docs" / "claims.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 50
    for row in rows:
        shown = re.findall(r"`([^`]+)`", row.rpartition(" | ")[2])
        assert shown, row
        for command in shown:
            words = shlex.split(command)
            if words[0] == "pytest":
                wanted = words[words.index("-k") + 1] if "-k" in words else ""
                paths = [ROOT / word for word in words[1:] if word.startswith("tests")]
                assert paths, row
                assert all(one.exists() for one in paths), row
                text = "".join(
                    one.read_text() for path in paths for one in ([path] if path.is_file() else path.rglob("*.py"))
                )
                assert all(word in text for word in wanted.split() if word != "or"), row
            elif words[0] == "make":
                assert set(words[1:]) <= TARGETS, row
            elif words[:3] == ["python", "-m", "benchmarks"]:
                assert set(words[3:]) <= BENCHMARKS.keys(), row
            else:
                assert words[0] == "equiav", row
                assert words[1] in cli.COMMANDS, row


def test_the_tree_has_every_file_of_the_core():
    tree = (ROOT / "docs" / "tree.md").read_text()
    for folder in ("equiav", "streaming", "launch", "monitoring"):
        for path in (ROOT / folder).rglob("*.py"):
            assert path.name in tree or path.name in ("__init__.py", "__main__.py"), path
    for name in re.findall(r"\b(\w+\.py)\b", tree):
        assert list(ROOT.glob(f"*/{name}")) or list(ROOT.glob(f"equiav/*/{name}")), name


def test_the_multiply_adds_of_the_method_are_what_plan_prints():
    said = re.search(r"Ours counts\s+([\d.]+) and ([\d.]+):", (ROOT / "docs" / "method.md").read_text())
    config = from_dict(Config, {}, "test")
    assert said
    assert [f"{side.baseline / 1e9:.2f}" for side in count(config.model, config.objective)] == list(said.groups())


def test_the_glossary_names_what_is_there():
    rows = [line for line in (ROOT / "docs" / "glossary.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    for row in rows:
        paths = re.findall(r"`([\w/]+\.py)`(?: `(\w+)`)?", row.split(" | ")[2])
        assert paths, row
        for path, name in paths:
            text = (ROOT / path).read_text()
            assert not name or re.search(rf"^(class|def) {name}\b|^{name} =", text, re.MULTILINE), row
