"""All regular expressions of the library, and texts that make slow ones slow."""

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

import hicom

ROOT = Path(hicom.__file__).parent
FUNCTIONS = {"compile", "sub", "subn", "split", "match", "fullmatch", "search", "findall", "finditer"}
ANCHORED = {"match", "fullmatch"}


@dataclass(frozen=True)
class Found:
    """A regular expression, and where it is.

    Attributes:
        where: module and line, or the name of a module's constant.
        pattern: compiled.
        is_anchored: it is only matched at one place of a text.
    """

    where: str
    pattern: re.Pattern[str]
    is_anchored: bool


def all_patterns(names: dict[str, Any]) -> Iterator[Found]:
    """Yield every regular expression that the library's files hold.

    Args:
        names: examples for what is only known when a function runs, by name.
    """
    for path in sorted(ROOT.rglob("*.py")):
        text = path.read_text("utf-8")
        if "import re\n" not in text:
            continue
        tree = ast.parse(text)
        space = _namespace(path, tree)
        where = path.relative_to(ROOT).as_posix()
        for name, value in space.items():
            for pattern in _inside(value):
                yield Found(f"{where} {name}", pattern, _only_anchored(tree, name))
        for node in ast.walk(tree):
            call = node.func if isinstance(node, ast.Call) else None
            is_re = isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name) and call.value.id == "re"
            if not (is_re and call.attr in FUNCTIONS):
                continue
            if call.attr == "compile" and space and _is_constant(tree, node):
                continue  # found above
            source = ast.unparse(node.args[0])
            if source == "pattern":  # of a constant, found above, or built in the line before
                continue
            scope = {"re": re} | names | space | names
            try:
                pattern = eval(source, scope)
            except NameError as error:
                raise AssertionError(f"{where}:{node.lineno}: {error}; give an example of it") from error
            flags = re.MULTILINE if "MULTILINE" in ast.unparse(node) else re.NOFLAG
            flags |= re.DOTALL if "DOTALL" in ast.unparse(node) else re.NOFLAG
            flags |= re.IGNORECASE if "IGNORECASE" in ast.unparse(node) else re.NOFLAG
            if isinstance(pattern, str):
                yield Found(f"{where}:{node.lineno}", re.compile(pattern, flags), call.attr in ANCHORED)


def _is_constant(tree: ast.Module, node: ast.Call) -> bool:
    """Return whether a call is outside of all functions and classes."""
    lines = (
        range(each.lineno, each.end_lineno + 1)
        for each in tree.body
        if isinstance(each, ast.FunctionDef | ast.ClassDef)
    )
    return not any(node.lineno in each for each in lines)


def _namespace(path: Path, tree: ast.Module) -> dict[str, Any]:
    """Return the names of a module; those that need no other package where it cannot be imported."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    try:
        return dict(vars(importlib.import_module(".".join(parts))))
    except ImportError:
        return {}


def _inside(value: Any) -> list[re.Pattern[str]]:
    if isinstance(value, re.Pattern):
        return [value]
    return [each for part in value for each in _inside(part)] if isinstance(value, tuple) else []


def _only_anchored(tree: ast.Module, name: str) -> bool:
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name
    }
    return bool(used) and used <= ANCHORED


def attacks(pattern: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """Return beginnings that a pattern goes along with, and pieces to repeat behind them."""
    tree = _parser.parse(pattern.pattern, pattern.flags)
    starts = dict.fromkeys(["", "x", *_prefixes(list(tree), "")])
    pieces = dict.fromkeys([" ", "\n", "\n ", "x", "x ", *_pieces(list(tree))])
    return _spread([*starts], 8), _spread([each for each in pieces if each], 14)


def _spread(texts: list[str], number: int) -> list[str]:
    """Return some of many texts, evenly."""
    return texts[:: max(1, -(-len(texts) // number))]


def _parts(item: Any) -> list[list[Any]]:
    """Return the sequences that an item of a parsed pattern is made of."""
    kind, value = item
    if kind is ops.BRANCH:
        return [list(each) for each in value[1]]
    if kind is ops.SUBPATTERN:
        return [list(value[3])]
    if kind in (ops.MAX_REPEAT, ops.MIN_REPEAT, ops.POSSESSIVE_REPEAT):
        return [list(value[2])]
    if kind in (ops.ASSERT, ops.ASSERT_NOT):
        return [list(value[1])]
    return [list(value)] if kind is ops.ATOMIC_GROUP else []


def _sample(items: list[Any]) -> str:
    """Return a text that a sequence matches, or nearly."""
    found = ""
    for kind, value in items:
        if kind is ops.LITERAL:
            found += chr(value)
        elif kind in (ops.NOT_LITERAL, ops.ANY):
            found += "x"
        elif kind is ops.IN:
            found += _of_class(value)
        elif kind in (ops.MAX_REPEAT, ops.MIN_REPEAT, ops.POSSESSIVE_REPEAT):
            found += _sample(list(value[2])) * max(1, min(value[0], 3))
        elif kind is not ops.ASSERT_NOT and (parts := _parts((kind, value))):
            found += _sample(parts[0])
    return found


def _of_class(items: list[Any]) -> str:
    if items[0][0] is ops.NEGATE:
        return next(each for each in "x; \n1" if not any(_has(item, each) for item in items[1:]))
    kind, value = items[0]
    if kind is ops.LITERAL:
        return chr(value)
    if kind is ops.RANGE:
        return chr(value[0])
    return {ops.CATEGORY_SPACE: " ", ops.CATEGORY_DIGIT: "1", ops.CATEGORY_WORD: "x"}.get(value, ";")


def _has(item: Any, letter: str) -> bool:
    kind, value = item
    if kind is ops.LITERAL:
        return bool(value == ord(letter))
    if kind is ops.RANGE:
        return bool(value[0] <= ord(letter) <= value[1])
    tests = {ops.CATEGORY_SPACE: r"\s", ops.CATEGORY_DIGIT: r"\d", ops.CATEGORY_WORD: r"\w"}
    tests |= {ops.CATEGORY_NOT_SPACE: r"\S", ops.CATEGORY_NOT_DIGIT: r"\D", ops.CATEGORY_NOT_WORD: r"\W"}
    return re.match(tests[value], letter) is not None


def _prefixes(items: list[Any], before: str) -> Iterator[str]:
    for number, item in enumerate(items):
        start = before + _sample(items[:number])
        yield start
        for part in _parts(item):
            yield from _prefixes(part, start)
    yield before + _sample(items)


def _pieces(items: list[Any]) -> Iterator[str]:
    for number, item in enumerate(items):
        yield _sample([item])
        yield _sample(items[:number])
        for part in _parts(item):
            yield from _pieces(part)
    yield _sample(items)
