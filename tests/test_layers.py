"""Imports may only point down, entries of one folder never import one another, and other rules of the structure."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "auto_round"
ORDER = [
    "core",
    "codecs",
    "stacks",
    "models",
    "formats",
    "sources",
    "steps",
    "backends",
    "jobs",
    "inference",
    "recipes",
    "options",
    "planning",
    "samples",
    "rotating",
    "assembly",
    "material",
    "outputs",
    "spread",
    "api",
    "evaluation",
    "compat",
    "cli",
]
ENTRY_FOLDERS = {"codecs", "formats", "steps", "backends"}
SHARED = {"base", "blocks", "elements", "reading"}


def imports(file: Path):
    """(line, dotted module below auto_round) of every import of our own package in `file`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("auto_round."):
            yield node.lineno, node.module.split(".")[1:]


def files():
    """All source files, with their path below the package."""
    return [(file, file.relative_to(PACKAGE).with_suffix("").parts) for file in sorted(PACKAGE.rglob("*.py"))]


def test_imports_point_down():
    wrong = []
    for file, here in files():
        for line, there in imports(file):
            if here[0] in ORDER and there[0] in ORDER and ORDER.index(there[0]) > ORDER.index(here[0]):
                wrong.append(f"{file}:{line} imports {'.'.join(there)}")
    assert not wrong, "\n".join(wrong)


def test_entries_never_import_their_siblings():
    wrong = []
    for file, here in files():
        for line, there in imports(file):
            sibling = here[0] == there[0] in ENTRY_FOLDERS and len(there) > 1 and there[1] not in SHARED
            if sibling and here[1] != there[1]:
                wrong.append(f"{file}:{line} imports {'.'.join(there)}")
    assert not wrong, "\n".join(wrong)


def test_core_imports_only_torch_and_the_standard_library():
    allowed = {"torch", "auto_round", "__future__"}
    for file in (PACKAGE / "core").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            foreign = {n.split(".")[0] for n in names} - allowed - set(__import__("sys").stdlib_module_names)
            assert not foreign, f"{file} imports {foreign}"


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("steps", ("integer", '"int"')),
        ("codecs", ("sign_round", "SignRound")),
        ("formats", (".round(", "round(")),
    ],
)
def test_folders_do_not_name_what_they_must_not_know(folder, words):
    for file in (PACKAGE / folder).glob("*.py"):
        code = ast.unparse(_without_docstrings(ast.parse(file.read_text())))
        for word in words:
            assert word not in code.replace("auto_round", ""), f"{file} mentions {word}"


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0] = ast.Pass()
    return tree


def test_the_loop_names_no_data_type_format_or_algorithm():
    text = (PACKAGE / "jobs" / "quantize.py").read_text()
    code = ast.unparse(_without_docstrings(ast.parse(text)))
    for word in ("int4", "gptq", "awq", "SignRound", "Search", "fake"):
        assert word not in code, word
    loop = next(n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == "quantize")
    assert sum(isinstance(node, ast.If) for node in ast.walk(loop)) <= 3


def test_only_settings_reads_the_environment():
    readers = [
        file for file, _ in files() if "os.environ.get" in file.read_text() or "getenv" in file.read_text()
    ]
    assert readers == [PACKAGE / "core" / "settings.py"]


def test_the_library_prints_nothing():
    for file, here in files():
        calls = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)]
        named = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id in ("print", "exit", "quit")]
        assert not named or here[0] == "cli", f"{file} prints or exits"


def test_the_readme_file_map_is_true():
    readme = (PACKAGE.parent / "README.md").read_text()
    map_text = readme.split("<!-- file map -->")[1].split("<!-- /file map -->")[0]
    for file, here in files():
        if file.name != "__init__.py":
            assert f"{'/'.join(here)}.py" in map_text, f"{file} is missing from the file map"
