"""House rules that a program can check, over all sources.

The rules are about text, so the checks read text: imports, sizes, docstrings, and what compiled
functions may contain. A rule that has to be broken somewhere is listed here with its reason.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

from dataplane import context
from shm import schema

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("shm", "flows", "dataplane", "control")  # imports go left only
LINE_MAX, FUNCTION_MAX, FILE_MAX = 100, 70, 600

# The other side of every conversation must not share code with what it checks.
INDEPENDENT = (
    "backend", "conftest", "driver", "formats", "guest", "judge", "minitcp", "offload",
    "packeddevice", "packets", "vring", "vring_packed", "world",
)  # fmt: skip
PRIVATE = ("CONTEXT", "RING", "REGION", "RXBUF", "RXFRAME", "LISTENER")
SECTIONS = ("Theory", "Limits", "Ownership")


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path) -> Iterator[str]:
    """Every module a file imports anywhere; `from a import b` counts as a and a.b."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def decorators(function: ast.FunctionDef) -> set[str]:
    """Names of the decorators, calls and attributes taken off: jit, entry, property."""
    names = set()
    for node in function.decorator_list:
        node = node.func if isinstance(node, ast.Call) else node
        names.add(node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", ""))
    return names


def is_compiled(function: ast.FunctionDef) -> bool:
    return bool(decorators(function) & {"jit", "inlined", "entry", "handler"})


PRODUCT = python_files(*ROOMS)
TESTS = python_files("tests", "benchmarks")
COMPILED = [path for path in PRODUCT if any(map(is_compiled, functions(path)))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def offenders(paths: list[Path], check: Callable[[Path], Iterable[object]]) -> list[str]:
    """What `check` says of each file, with the file's name."""
    return [f"{name_of(path)}: {found}" for path in paths for found in check(path)]


def report(found: list[str]) -> None:
    if found:
        pytest.fail("\n".join(found), pytrace=False)


# --- who may import what --------------------------------------------------------------------------


def test_imports_go_left_only():
    def check(path: Path) -> Iterable[str]:
        room = path.relative_to(ROOT).parts[0]
        right = {*ROOMS[ROOMS.index(room) + 1 :], "tests", "benchmarks"}
        return {name for name in imported(path) if name.split(".")[0] in right}

    report(offenders(PRODUCT, check))


ONLY_IN = {
    "ir": "shm/mem.py",
    "binding": "shm/code.py",
    "njit": "shm/jit.py",
    "ExternalFunction": "shm/libc.py",
    "posix_ipc": "shm/segment.py",
    "pickle": "shm/mailbox.py",
}


@pytest.mark.parametrize("word", ONLY_IN)
def test_one_file_knows(word):
    """Each of these is dangerous or hard: one file has it, the others use that file."""
    users = set()
    for path in PRODUCT:
        names = {part for name in imported(path) for part in name.split(".")}
        if word in names or word in names_used(path):
            users.add(name_of(path))
    assert users == {ONLY_IN[word]}


def test_control_never_imports_the_compiler():
    """Control answers its first message within 0.2 s of exec; numba alone takes longer to import.

    Measured, not read: every module of control is imported in a fresh process.
    """
    modules = [
        name_of(path.with_suffix("")).replace("/", ".")
        for path in python_files("control")
        if path.stem not in ("__init__", "__main__")
    ]
    code = f"import sys, importlib\nfor m in {modules}: importlib.import_module(m)\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "print(*sys.modules)"],
        cwd=ROOT, text=True, capture_output=True, check=True,
    )  # fmt: skip
    loaded = set(done.stdout.split())
    assert len(modules) > 5 and set(modules) <= loaded
    forbidden = {"numba", "llvmlite", "numpy", "shm.jit", "shm.mem", "shm.access", "shm.libc"}
    forbidden |= {name_of(path.with_suffix("")).replace("/", ".") for path in COMPILED}
    assert not loaded & forbidden


def test_the_other_side_shares_no_code():
    paths = [path for path in TESTS if path.stem in INDEPENDENT]
    assert {path.stem for path in paths} == set(INDEPENDENT)
    shared = offenders(
        paths, lambda path: {name for name in imported(path) if name.split(".")[0] in ROOMS}
    )
    report(shared)


def test_no_package_of_tests():
    """An __init__.py below tests/ would shadow the rooms."""
    assert not list((ROOT / "tests").rglob("__init__.py"))


# --- sizes and words ------------------------------------------------------------------------------


def test_sizes():
    def check(path: Path) -> Iterator[str]:
        lines = path.read_text().splitlines()
        if len(lines) > FILE_MAX:
            yield f"{len(lines)} lines"
        for number, line in enumerate(lines, 1):
            if len(line) > LINE_MAX:
                yield f"line {number} has {len(line)} characters"
        for function in functions(path):
            size = (function.end_lineno or 0) - function.lineno + 1
            if size > FUNCTION_MAX:
                yield f"{function.name} has {size} lines"

    report(offenders(PRODUCT + TESTS, check))


# Marks of unfinished work, paths of one machine, tabs, blanks at line ends.
BANNED = re.compile(
    r"\b(?:TO[D]O|FIX[M]E|XX[X])\b|breakpoint[(]|[/]work/|[/]tmp/w\b|\t|[^\S\n]$", re.MULTILINE
)


def test_nothing_left_behind():
    assert BANNED.search("TO" + "DO") and BANNED.search("a  \nb")
    report(offenders(PRODUCT + TESTS, lambda path: BANNED.findall(path.read_text())))


# --- docstrings and types -------------------------------------------------------------------------


def test_every_module_says_what_it_is():
    """In the product as `name.py - what it is`."""

    def check(path: Path) -> Iterator[str]:
        text = ast.get_docstring(tree_of(path)) or ""
        name = path.parent.name if path.stem == "__init__" else path.name
        if not text:
            yield "no docstring"
        elif path in PRODUCT and path.stem != "__main__" and not text.startswith(f"{name} - "):
            yield text.splitlines()[0]

    report(offenders([path for path in PRODUCT + TESTS if path.read_text()], check))


def test_data_plane_modules_have_their_sections():
    def check(path: Path) -> Iterator[str]:
        text = ast.get_docstring(tree_of(path)) or ""
        for word in SECTIONS:
            if not re.search(rf"^{word} ", text, re.MULTILINE):
                yield f"no {word}"

    report(offenders([path for path in COMPILED if "dataplane" in path.parts], check))


def test_public_things_have_docstrings():
    """But for methods of one statement, whose name and type say it all."""

    def check(path: Path) -> Iterator[str]:
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.ClassDef | ast.Module):
                continue
            for member in node.body:
                public = isinstance(member, ast.FunctionDef | ast.ClassDef)
                plain = isinstance(node, ast.ClassDef) and len(getattr(member, "body", "")) == 1
                if public and not plain and not member.name.startswith("_"):
                    if not ast.get_docstring(member):
                        yield member.name

    report(offenders(PRODUCT, check))


def test_plain_python_is_typed():
    """Everything but compiled functions, whose values are all int64, and their Python twins."""

    def check(path: Path) -> Iterator[str]:
        compiled = {function.name for function in functions(path) if is_compiled(function)}
        for function in functions(path):
            if function.name in compiled:
                continue
            given = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
            bare = [a for a in given if a.annotation is None and a.arg not in ("self", "cls")]
            if bare or (function.returns is None and function.name != "__init__"):
                yield function.name

    report(offenders(PRODUCT, check))


# --- compiled functions ---------------------------------------------------------------------------

NOT_COMPILED = (
    ast.While, ast.Try, ast.With, ast.Raise, ast.Lambda, ast.JoinedStr, ast.List, ast.Dict,
    ast.Set, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp, ast.Yield, ast.YieldFrom,
    ast.Await, ast.Global, ast.Nonlocal, ast.Delete, ast.Import, ast.ImportFrom, ast.ClassDef,
    ast.Starred, ast.Pow, ast.Div, ast.MatMult, ast.Subscript,
)  # fmt: skip


def forbidden_in(function: ast.FunctionDef) -> Iterator[str]:
    """Whatever makes a compiled function unbounded, or makes it hold anything but int64 values."""
    for node in ast.walk(function):
        where = f"{function.name}, line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Subscript) and ast.unparse(node) == "_errno_location()[0]":
            continue  # the one pointer that is read without mem.py
        if isinstance(node, NOT_COMPILED):
            yield f"{type(node).__name__} in {where}"
        if isinstance(node, ast.FunctionDef) and node is not function:
            yield f"function in {where}"
        if isinstance(node, ast.Constant) and isinstance(node.value, float):
            yield f"float in {where}"
        if isinstance(node, ast.For) and not isinstance(node.iter, ast.Tuple):
            if not (isinstance(node.iter, ast.Call) and ast.unparse(node.iter.func) == "range"):
                yield f"loop over something else in {where}"
        if isinstance(node, ast.Assert) and not isinstance(node.msg, ast.Constant):
            yield f"assert without a constant in {where}"


def test_what_compiled_functions_may_contain():
    def check(path: Path) -> Iterator[str]:
        for function in filter(is_compiled, functions(path)):
            yield from forbidden_in(function)

    report(offenders(COMPILED, check))


@pytest.mark.parametrize(
    "body",
    [
        "while x: x -= 1", "try: y = x\n except ValueError: pass", "y = [x]", "y = f'{x}'",
        "y = 0.5 * x", "y = x / 2", "y = x[0]", "for y in x: pass", "assert x, x", "def f(): pass",
    ],
)  # fmt: skip
def test_forbidden_things_are_found(body):
    (function,) = ast.parse(f"def leaf(x):\n {body}").body
    assert isinstance(function, ast.FunctionDef) and list(forbidden_in(function))


def test_no_leaf_has_the_name_of_an_entry():
    """shm/jit.py leaves the machine code of leaves out, by name."""
    names: dict[str, set[str]] = {"jit": set(), "inlined": set(), "entry": set()}
    for path in COMPILED:
        for function in functions(path):
            for kind in decorators(function) & set(names):
                names[kind].add(function.name)
    assert all(names.values()) and not (names["jit"] | names["inlined"]) & names["entry"]


# --- nothing dead ---------------------------------------------------------------------------------


@cache
def names_used(path: Path) -> Counter[str]:
    """How often each name is read, taken as an attribute, or imported in a file."""
    names: Counter[str] = Counter()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Name):
            names[node.id] += 1
        elif isinstance(node, ast.Attribute):
            names[node.attr] += 1
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.name for alias in node.names)
    return names


def members_used(path: Path) -> Iterator[tuple[str, str]]:
    """(module, member) for whatever a file takes from other modules, by whatever local name."""
    modules: dict[str, str] = {}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield node.module or "", alias.name
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield modules.get(node.value.id, ""), node.attr


def test_every_function_has_a_user():
    """Nothing is kept for later. What only tests call belongs to the tests."""
    taken = {pair for path in PRODUCT for pair in members_used(path)}

    def check(path: Path) -> Iterator[str]:
        module = name_of(path.with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for node in tree_of(path).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "main":
                if (module, node.name) not in taken and not names_used(path)[node.name]:
                    yield node.name

    report(offenders(PRODUCT, check))


def test_every_shared_word_is_written_and_read():
    """A field nobody reads, or nobody writes, is a promise of the schema that nothing keeps."""
    text = "\n".join(path.read_text() for path in PRODUCT if path.name != "schema.py")
    dead = []
    for struct in (*schema.STRUCTS, *(getattr(context, name) for name in PRIVATE)):
        for field in struct.fields.values():
            by_name = f'"{field.name}"' in text
            read = by_name or f"{struct.name}.{field.name}(" in text
            written = by_name or f"{struct.name}.set_{field.name}(" in text or field.count
            if not (read and written):
                dead.append(f"{struct.name}.{field.name}")
    report(dead)
