"""What is said about the repository is true: who imports whom, what the README shows, what the
package must never contain.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "daybreak"
MODULES = sorted(PACKAGE.rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))

# Who may import whom. These are free for all, and import only one another.
ANYONE = {"failure", "train/dice", "train/health", "train/ledger", "train/log", "train/parallel"}
ANYONE |= {"data/disk", "host", "model/flow", "train/accelerator", "train/facts"}
ANYONE |= {"train/rendezvous", "train/stop"}
EVERYTHING = {"data", "model", "objective", "optim", "generate", "evaluate", "config", "doctor"}
MAY_IMPORT = {
    "failure": set[str](),
    "doctor": set[str](),
    "data": {"data"},
    "optim": {"optim"},
    "model": {"model"},
    "objective": {"model"},  # a term knows no other term;
    "objective/objective": {"model", "objective"},  # their sum knows them all
    "generate": {"generate", "model"},
    "evaluate": {"evaluate", "generate", "model", "data"},
    "config": {"data", "model", "objective", "optim", "generate", "evaluate"},
    "train": EVERYTHING | {"train"},
    "web": EVERYTHING | {"train", "web"},
    "terminal": {"data", "doctor"},
    "cli": EVERYTHING | {"train", "web", "terminal"},
    "__main__": {"cli"},
}

BANNED_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve"}
BANNED_CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.load"}
BANNED_ATTRIBUTES = {"torch.hub", "extractall"}
BANNED_KEYWORDS = {("shell", True), ("trust_remote_code", True), ("weights_only", False)}
BANNED_NAMES = {"utils", "util", "common", "base", "manager", "helper", "helpers"}


def name_of(path: Path) -> str:
    """`data/images` of daybreak/data/images.py."""
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


NAMES = {name_of(path) for path in MODULES}


def imports(path: Path) -> Iterator[str]:
    """The modules of ours a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            source = node.module or ""
            found = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in found:
            if module.split(".")[0] == "daybreak":
                place = module.split(".")[1:]
                while place and "/".join(place) not in NAMES:
                    place.pop()  # a name inside a module
                yield "/".join(place)


def test_imports_point_one_way() -> None:
    wrong = []
    for path in MODULES:
        name = name_of(path)
        folder = name if name in MAY_IMPORT else name.split("/")[0]
        for other in imports(path):
            if name in ANYONE:
                allowed = other in ANYONE
            else:
                allowed = other in ANYONE or other.split("/")[0] in MAY_IMPORT.get(folder, set())
            if not allowed and other:
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_every_module_has_its_place_in_the_table() -> None:
    folders = {name.split("/")[0] for name in NAMES if not name.endswith("__init__")}
    assert folders - ANYONE <= MAY_IMPORT.keys()


def test_the_free_modules_are_there() -> None:
    assert ANYONE <= NAMES


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.name == "__init__.py":
        assert text == "", "importing daybreak.train.dice must cost nothing"
    else:
        assert ast.get_docstring(ast.parse(text))
        assert text.startswith('"""')


def test_no_file_has_a_name_that_says_nothing() -> None:
    assert [name for name in NAMES if BANNED_NAMES & set(name.split("/"))] == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_load(path: Path) -> None:
    from daybreak import config

    assert config.load(path) == config.load(path.stem)


def test_there_are_recipes() -> None:
    assert "quickstart" in {path.stem for path in RECIPES}


def banned(text: str) -> list[str]:
    """What in a source text must never be in the package."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in BANNED_MODULES]
            found += [a.name for a in node.names if a.name in BANNED_ATTRIBUTES]
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            found += [source] if source.split(".")[0] in BANNED_MODULES else []
            names = {f"{source}.{alias.name}" for alias in node.names}
            found += sorted(names & (BANNED_ATTRIBUTES | BANNED_CALLS))
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            found += [name] if {name, node.attr} & BANNED_ATTRIBUTES else []
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] if name in BANNED_CALLS else []
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if (keyword.arg, value) in BANNED_KEYWORDS:
                    found.append(f"{keyword.arg}={value!r}")
            safe = any(keyword.arg == "weights_only" for keyword in node.keywords)
            found += (
                ["torch.load without weights_only"] if name == "torch.load" and not safe else []
            )
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_runs_code_from_data(path: Path) -> None:
    assert banned(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import dill.source",
        "eval('1')",
        "exec('1')",
        "import yaml; yaml.load(text)",
        "from yaml import load",
        "subprocess.run('ls', shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "torch.hub.load('a')",
        "from torch import hub",
        "import torch.hub",
        "tar.extractall('.')",
        "torch.load(file, weights_only=False)",
        "torch.load(file)",
        "os.system('ls')",
    ],
)
def test_the_search_for_dangers_finds_them(text: str) -> None:
    assert banned(text)


def test_the_search_for_dangers_lets_the_harmless_pass() -> None:
    assert banned("model.eval(); torch.load(f, weights_only=True); run(shell=False)") == []


def tracked() -> list[Path]:
    """The files of the repository, or of the source archive where there is no git."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    else:
        paths = [
            path
            for path in ROOT.rglob("*")
            if not {".venv", "runs", "__pycache__"} & set(path.relative_to(ROOT).parts)
        ]
    return [path for path in paths if path.is_file()]


def test_nothing_names_a_place_on_somebodys_machine() -> None:
    place = re.compile(r"(?<![\w.~$}])/(?:work|root|home|Users)/[\w.]")
    found = []
    for path in tracked():
        text = path.read_bytes().decode(errors="ignore")
        if path.suffix not in {".png", ".ico", ".safetensors"}:
            found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in place.finditer(text)]
    assert found == []


def test_nothing_in_it_is_large() -> None:
    """Two records of whole runs have a megabyte; a wheel or weights have more."""
    large = [path for path in tracked() if path.stat().st_size > 1.1 * 2**20]
    assert [str(path.relative_to(ROOT)) for path in large] == []


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.stem)
def test_links_of_the_docs_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_files_the_readme_names_exist() -> None:
    text = readme()
    named = set(re.findall(r"`([\w./-]+(?:\.(?:py|toml|md)|/))`", text))
    named |= set(re.findall(r"-> ([\w./-]+\.py)", text))
    named |= set(re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text))
    named |= set(re.findall(r"(?:src|href)=\"([^\":#]+)\"", text))
    made = ("runs/",)  # by the commands the README shows
    missing = [
        name
        for name in sorted(named)
        if not name.startswith(made)
        and not (ROOT / name).exists()
        and not (PACKAGE / name).exists()
    ]
    assert missing == []
    assert named


def test_the_tree_in_the_readme_is_the_package() -> None:
    """A fenced block that begins with `daybreak/`; deeper lines are indented, folders end in /."""
    blocks = re.findall(r"```\w*\n(daybreak/.*?)```", readme(), flags=re.DOTALL)
    assert len(blocks) == 1, "the README shows the package tree once"
    shown = set()
    open_folders: list[tuple[int, str]] = []
    for line in blocks[0].splitlines()[1:]:
        entry = line.split()[0] if line.split() else ""
        if not entry.endswith((".py", "/")):
            continue  # an empty line, or the rest of a remark
        indent = len(line) - len(line.lstrip())
        while open_folders and open_folders[-1][0] >= indent:
            open_folders.pop()
        name = "".join(folder for _, folder in open_folders) + entry
        if entry.endswith("/"):
            open_folders.append((indent, entry))
        else:
            shown.add(name)
    there = {f"{name}.py" for name in NAMES if not name.endswith(("__init__", "__main__"))}
    assert shown == there


def test_commands_the_readme_shows_exist() -> None:
    import typer.main

    from daybreak import cli

    command = typer.main.get_command(cli.app)
    verbs = set(getattr(command, "commands", {}))
    shown = set(re.findall(r"^\s*(?:\$ )?daybreak ([a-z]+)\b", readme(), flags=re.MULTILINE))
    assert shown <= verbs
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"^\s*(?:\$ )?make ([a-z-]+)", readme(), flags=re.MULTILINE)) <= targets


def test_help_is_instant_and_does_not_import_torch() -> None:
    start = os.times()
    done = subprocess.run(
        [sys.executable, "-m", "daybreak", "--help"], cwd=ROOT, capture_output=True, check=True
    )
    end = os.times()
    assert b"train" in done.stdout
    used = end.children_user - start.children_user + end.children_system - start.children_system
    assert used < 1.0, "seconds of a core, whatever else runs on the machine"
    traced = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "daybreak", "--help"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in traced.stderr.splitlines()}
    assert "typer" in loaded
    assert not {"torch", "diffusers", "transformers", "numpy", "scipy"} & loaded
