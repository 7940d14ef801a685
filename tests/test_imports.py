"""Who may import whom (CONTRIBUTING.md). Read from the source, so that an import inside a function counts too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"equiav", "streaming", "launch", "monitoring"}

# Longest matching name decides. A module may import itself, and of ours only what is named.
MAY_IMPORT = {
    "streaming": set(),
    "monitoring": set(),
    "launch": {
        "equiav.config",
        "equiav.commands",
        "equiav.evaluate.settings",
        "equiav.known",
        "streaming",
        "monitoring",
    },
    "equiav.known": {"equiav.config", "equiav.terminal", "streaming"},
    "equiav": OURS,
    "equiav.config": set(),
    "equiav.data": {"equiav.config", "equiav.augment", "streaming"},
    "equiav.data.synthetic": set(),
    "equiav.data.clips": {"equiav.config"},
    "equiav.augment": {"equiav.config"},
    "equiav.model": {"equiav.config"},
    "equiav.objective": {"equiav.config"},
    "equiav.parallel": set(),
    "equiav.ending": set(),
    "equiav.tasks": {"equiav.config", "equiav.augment", "equiav.model", "equiav.objective"},
    "equiav.terminal": set(),
    "equiav.train": OURS,
    "equiav.evaluate.settings": {"equiav.config", "equiav.data"},
    "equiav.commands": OURS,
    "equiav.commands.settings": {
        "equiav.config",
        "equiav.data.synthetic",
        "equiav.evaluate.settings",
        "equiav.vectors",
    },
}
IN_THE_NODE = ("launch.agent", "launch.server")  # which is no laptop: torch is there, and it starts once
PURE = ("equiav.augment", "equiav.model", "equiav.objective", "equiav.tasks")


def modules():
    for package in sorted(OURS):
        for path in sorted((ROOT / package).rglob("*.py")):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name, package):
    return name == package or name.startswith(package + ".")


def violations(module, tree):
    rule = max((package for package in MAY_IMPORT if within(module, package)), key=len)
    for name in imports(tree):
        allowed = {rule, *MAY_IMPORT[rule]}
        ours = name.split(".")[0] in OURS and not (module == "launch.agent" and within(name, "equiav.cli"))
        if ours and not any(within(name, package) for package in allowed):
            yield f"{module} imports {name}"
        if within(name, "equiav.cli") and module not in ("equiav.cli", "equiav.__main__", "launch.agent"):
            yield f"{module} imports the command line"
        settings = within(name, "equiav.commands.settings") and within(module, "equiav.commands")
        if within(name, "equiav.commands") and not (settings or module == "equiav.cli" or within(module, "launch")):
            yield f"{module} imports a command"
        if module.startswith(PURE) and (
            within(name, "torch.distributed") or name.split(".")[0] in ("os", "pathlib", "io", "random")
        ):
            yield f"{module} imports {name}: no processes, no files, no global state"
        if (
            (within(module, "launch") and module not in IN_THE_NODE) or module == "equiav.commands.settings"
        ) and name.split(".")[0] in ("torch", "torchvision", "timm"):
            yield f"{module} imports torch"
    if within(module, "launch") and module not in IN_THE_NODE:
        for name in imports(ast.Module([one for one in tree.body if not later(one)], [])):
            if name.split(".")[0] in OURS - {"launch"}:
                yield f"{module} imports {name} when it is imported: `torchx run` would start slowly"


def later(node):
    """What is not executed when a module is imported."""
    types_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return types_only or isinstance(node, ast.FunctionDef | ast.ClassDef)


def impurities(module, tree):
    """Files, module state that changes, and the global random generator, in the modules that must be pure."""
    if not module.startswith(PURE):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "open",
            "torch.load",
            "torch.save",
            "torch.manual_seed",
        ):
            yield f"{module}:{node.lineno} calls {ast.unparse(node.func)}"
        if isinstance(node, ast.Global | ast.Nonlocal):
            yield f"{module}:{node.lineno} has global state"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "torch.rand",
            "torch.randn",
            "torch.randint",
            "torch.randperm",
        ):
            yield f"{module}:{node.lineno} draws from a generator with state"


@pytest.mark.parametrize(("module", "path"), [pytest.param(m, p, id=m) for m, p in modules()])
def test_rules_hold(module, path):
    tree = ast.parse(path.read_text())
    assert not [*violations(module, tree), *impurities(module, tree)]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("equiav.model.encoder", "import torch.distributed as dist"),
        ("equiav.model.encoder", "from torch import distributed"),
        ("equiav.model.head", "from equiav.train import loop"),
        ("equiav.augment.views", "def f():\n    from equiav.model import EquiAV"),
        ("equiav.objective", "import equiav.train"),
        ("equiav.commands.smoke", "from equiav.cli import main"),
        ("equiav.commands.smoke", "from equiav.commands.pretrain import run_pretrain"),
        ("equiav.commands.settings", "import torch"),
        ("equiav.commands.settings", "from equiav.train import train"),
        ("equiav.config.settings", "from equiav import model"),
        ("equiav.data.stream", "from equiav.train import train"),
        ("equiav.model.head", "x = torch.load('f')"),
        ("equiav.augment.draws", "torch.manual_seed(0)"),
        ("equiav.augment.draws", "u = torch.rand(3)"),
        ("streaming.order", "from equiav.config import Config"),
        ("launch.pretrain", "import torch"),
        ("launch.pretrain", "def f():\n    import torch"),
        ("launch.pretrain", "from equiav.config import load"),
        ("launch.pretrain", "def f():\n    from equiav.train import run"),
        ("launch.node", "def f():\n    from equiav.cli import main"),
    ],
)
def test_breaking_a_rule_is_seen(module, source):
    tree = ast.parse(source)
    assert [*violations(module, tree), *impurities(module, tree)]
