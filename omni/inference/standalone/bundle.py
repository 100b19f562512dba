"""Copy classes of omni, with the source of all that they use, into files that do not import omni.

What is exported runs the code that omni runs, definition by definition: no second implementation
has to be kept equal. Each module of omni that is reached becomes one file in a flat folder, which
is what transformers can load, and holds only the definitions that are used.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omni import __version__

_PACKAGE = "omni."
_IMPORT = re.compile(r"^(\s*)from omni\.([\w.]+) import", re.MULTILINE)
_WIDTH = 100  # characters of a line
_Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


class BundleError(RuntimeError):
    """The source has a form that cannot be copied; the message names module and line."""


@dataclass(frozen=True)
class _Import:
    """A name that a module imports. module: None for `import source`."""

    module: str | None
    source: str
    alias: str | None
    only_typing: bool

    @property
    def of_omni(self) -> bool:
        return self.module is not None and self.module.startswith(_PACKAGE)

    @property
    def clause(self) -> str:
        """Return the part of the import statement after `import`."""
        return self.source if self.alias is None else f"{self.source} as {self.alias}"


@dataclass
class _Module:
    """Source of a module, what it binds, and the names among them that are copied."""

    name: str
    lines: list[str]
    docstring: str
    imports: dict[str, _Import] = field(default_factory=dict)
    definitions: dict[str, _Definition] = field(default_factory=dict)
    documented: dict[int, int] = field(default_factory=dict)
    """Last line of the string after an assignment, by the last line of the assignment."""
    needed: set[str] = field(default_factory=set)

    @property
    def file(self) -> str:
        return f"{_flat(self.name)}.py"


def bundle(
    roots: Mapping[str, Collection[str]],
    *,
    omit: Collection[str] = (),
    types: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the source of each file by its name.

    roots: names to copy, by module. omit: methods to leave out, as module:Class.method; what only
    they use is not copied. types: names for annotations that stand for another class there, as
    module:Class, both. Raises BundleError.
    """
    types = types or {}
    modules: dict[str, _Module] = {}
    waiting = [(module, name) for module, names in roots.items() for name in names]
    while waiting:
        module, name = waiting.pop()
        if f"{module}:{name}" in types:
            continue
        if module not in modules:
            modules[module] = _read(module)
        found = modules[module]
        if name in found.needed:
            continue
        found.needed.add(name)
        if name in found.imports:
            source = found.imports[name]
            if source.of_omni and source.module is not None:
                waiting.append((source.module, source.source))
            continue
        if name not in found.definitions:
            raise BundleError(f"{module}: no definition of {name}")
        for node in _kept(found.definitions[name], f"{module}:{name}", omit):
            waiting += _uses(found, node)
    return {found.file: _write(found, omit, types) for found in modules.values()}


def _read(name: str) -> _Module:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise BundleError(f"{name}: no source")
    text = Path(spec.origin).read_text(encoding="utf-8")
    tree = ast.parse(text)
    found = _Module(name, text.splitlines(), ast.get_docstring(tree, clean=False) or "")
    previous: ast.stmt | None = None
    for statement in tree.body:
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
            for inner in statement.body:
                _bind_imports(found, inner, only_typing=True)
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            _bind_imports(found, statement, only_typing=False)
        elif isinstance(statement, ast.FunctionDef | ast.ClassDef):
            found.definitions[statement.name] = statement
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for node in (n for target in targets for n in ast.walk(target)):
                if isinstance(node, ast.Name):
                    found.definitions[node.id] = statement
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            if isinstance(previous, ast.Assign | ast.AnnAssign):
                found.documented[previous.end_lineno or 0] = statement.end_lineno or 0
        else:
            raise BundleError(f"{name}:{statement.lineno}: expected imports and definitions only")
        previous = statement
    return found


def _bind_imports(found: _Module, statement: ast.stmt, only_typing: bool) -> None:
    if isinstance(statement, ast.ImportFrom) and not statement.level:
        for alias in statement.names:
            made = _Import(statement.module, alias.name, alias.asname, only_typing)
            found.imports[alias.asname or alias.name] = made
    elif isinstance(statement, ast.Import):
        for alias in statement.names:
            bound = alias.asname or alias.name.partition(".")[0]
            found.imports[bound] = _Import(None, alias.name, alias.asname, only_typing)
    else:
        raise BundleError(f"{found.name}:{statement.lineno}: expected an absolute import")


def _kept(definition: _Definition, path: str, omit: Collection[str]) -> Iterator[ast.AST]:
    """Yield a definition, or the parts of a class that are not omitted."""
    if not isinstance(definition, ast.ClassDef):
        yield definition
        return
    yield from (*definition.bases, *definition.keywords, *definition.decorator_list)
    for node in definition.body:
        if not isinstance(node, ast.FunctionDef) or f"{path}.{node.name}" not in omit:
            yield node


def _uses(found: _Module, node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield what a definition uses, as (module, name)."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            if inner.id in found.definitions or inner.id in found.imports:
                yield found.name, inner.id
        elif isinstance(inner, ast.ImportFrom) and (inner.module or "").startswith(_PACKAGE):
            yield from ((str(inner.module), alias.name) for alias in inner.names)


def _write(found: _Module, omit: Collection[str], types: Mapping[str, str]) -> str:
    head = [*_origin(found), "", "from __future__ import annotations"]
    outside, inside, typing = _import_lines(found, types)
    parts = ["\n".join(head), "\n".join(outside), "\n".join(inside)]
    if typing:
        parts.append("\n".join(["if TYPE_CHECKING:", *(f"    {line}" for line in typing)]))
    kept = {id(d): (name, d) for name, d in found.definitions.items() if name in found.needed}
    segments = [_segment(found, name, d, omit) for name, d in kept.values()]
    text = "\n\n".join(part for part in parts if part)
    for (_, definition), segment in zip(kept.values(), segments, strict=True):
        text += "\n\n\n" if isinstance(definition, ast.FunctionDef | ast.ClassDef) else "\n\n"
        text += segment
    return _IMPORT.sub(lambda m: f"{m[1]}from .{_flat(_PACKAGE + m[2])} import", text) + "\n"


def _origin(found: _Module) -> list[str]:
    path = f"{found.name.replace('.', '/')}.py"
    whole = found.definitions.keys() <= found.needed
    return [
        f'"""{found.docstring}"""' if whole else f'"""The definitions of {path} that are used."""',
        "",
        f"# Copied from {path} of omni {__version__} by `omni export`.",
        "# Copyright (c) 2026 The omni authors. MIT licence: see LICENSE.omni.",
    ]


def _import_lines(
    found: _Module, types: Mapping[str, str]
) -> tuple[list[str], list[str], list[str]]:
    """Return the imports of other packages, of files of the folder, and those for annotations."""
    groups: dict[tuple[int, str | None], list[str]] = {}
    for name, source in found.imports.items():
        if name not in found.needed:
            continue
        module, clause = source.module, source.clause
        replaced = types.get(f"{module}:{source.source}")
        if replaced is not None:
            module, _, other = replaced.partition(":")
            clause = f"{other} as {name}"
        only_typing = source.only_typing or replaced is not None
        kind = 2 if only_typing else 1 if source.of_omni else 0
        groups.setdefault((kind, module), []).append(clause)
    if any(kind == 2 for kind, _ in groups):
        names = groups.setdefault((0, "typing"), [])
        names += [] if "TYPE_CHECKING" in names else ["TYPE_CHECKING"]
    lines: tuple[list[str], list[str], list[str]] = ([], [], [])
    for kind, module in sorted(groups, key=lambda key: (key[0], key[1] is not None, key[1] or "")):
        clauses = sorted(groups[kind, module])
        if module is None:
            lines[kind].extend(f"import {clause}" for clause in clauses)
            continue
        line = f"from {module} import {', '.join(clauses)}"
        if len(line) > _WIDTH:
            line = "\n".join([f"from {module} import (", *(f"    {c}," for c in clauses), ")"])
        lines[kind].append(line)
    return lines


def _segment(found: _Module, name: str, definition: _Definition, omit: Collection[str]) -> str:
    """Return the lines of a definition, with the comments above it and the string below it."""
    first, last = _span(found, definition)
    skipped: set[int] = set()
    if isinstance(definition, ast.ClassDef):
        for node in definition.body:
            path = f"{found.name}:{name}.{getattr(node, 'name', '')}"
            if isinstance(node, ast.FunctionDef) and path in omit:
                begin, end = _span(found, node)
                while begin > first and not found.lines[begin - 2].strip():
                    begin -= 1
                skipped.update(range(begin, end + 1))
    return "\n".join(found.lines[n - 1] for n in range(first, last + 1) if n not in skipped)


def _span(found: _Module, node: _Definition) -> tuple[int, int]:
    """Return the first and last line of a definition, counted from 1."""
    decorators: Sequence[ast.expr] = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    while first > 1 and found.lines[first - 2].lstrip().startswith("#"):
        first -= 1
    last = node.end_lineno or node.lineno
    return first, found.documented.get(last, last)


def _flat(module: str) -> str:
    """Return the name of a module's file in the folder, without its ending."""
    parts = module.removeprefix(_PACKAGE).split(".")
    return parts[-1] if parts[:2] == ["inference", "standalone"] else "_".join(parts)
