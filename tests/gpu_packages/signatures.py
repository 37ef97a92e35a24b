"""Signatures of the real GPU packages, read from their sources without importing them (their kernels are not there).

`make setup` lays the sources into ``.venv/gpu_sources``: Transformer Engine's Python from its wheel, mamba_ssm and
causal-conv1d from their source packages, each with its hash in ``requirements/gpu_sources.lock``.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Callable
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

#: Where the source of a stand-in is: its package's folder, its file, and its name there. Further names are those of
#: the base classes that take what is left over (``**kwargs``).
REAL: dict[str, tuple[str, ...]] = {
    "Linear.__init__": ("transformer_engine", "pytorch/module/linear.py:Linear.__init__"),
    "Linear.forward": ("transformer_engine", "pytorch/module/linear.py:Linear.forward"),
    "LayerNormLinear.__init__": ("transformer_engine", "pytorch/module/layernorm_linear.py:LayerNormLinear.__init__"),
    "LayerNormLinear.forward": ("transformer_engine", "pytorch/module/layernorm_linear.py:LayerNormLinear.forward"),
    "GroupedLinear.__init__": ("transformer_engine", "pytorch/module/grouped_linear.py:GroupedLinear.__init__"),
    "GroupedLinear.forward": ("transformer_engine", "pytorch/module/grouped_linear.py:GroupedLinear.forward"),
    "RMSNorm.__init__": (
        "transformer_engine",
        "pytorch/module/rmsnorm.py:RMSNorm.__init__",
        "pytorch/ops/basic/rmsnorm.py:RMSNorm.__init__",
    ),
    "DotProductAttention.__init__": (
        "transformer_engine",
        "pytorch/attention/dot_product_attention/dot_product_attention.py:DotProductAttention.__init__",
    ),
    "DotProductAttention.forward": (
        "transformer_engine",
        "pytorch/attention/dot_product_attention/dot_product_attention.py:DotProductAttention.forward",
    ),
    "Fp8Padding.__init__": ("transformer_engine", "pytorch/module/fp8_padding.py:Fp8Padding.__init__"),
    "Fp8Padding.forward": ("transformer_engine", "pytorch/module/fp8_padding.py:Fp8Padding.forward"),
    "fp8_autocast": ("transformer_engine", "pytorch/quantization.py:fp8_autocast"),
    "fp8_model_init": ("transformer_engine", "pytorch/quantization.py:fp8_model_init"),
    "checkpoint": ("transformer_engine", "pytorch/distributed.py:checkpoint"),
    "rmsnorm_fn": ("mamba_ssm", "ops/triton/layernorm_gated.py:rmsnorm_fn"),
    "mamba_chunk_scan_combined": ("mamba_ssm", "ops/triton/ssd_combined.py:mamba_chunk_scan_combined"),
    "causal_conv1d_fn": ("causal_conv1d", "causal_conv1d_interface.py:causal_conv1d_fn"),
}

RECIPES = "common/recipe/__init__.py"


def sources(package: str) -> Path | None:
    """The folder of a package's Python as `make setup` unpacked it; None: it could not be fetched."""
    found = sorted((Path(sys.prefix) / "gpu_sources").glob(f"{package}-*/{package}"))
    return found[-1] if found else None


def real_signature(name: str, folder: Path | None = None) -> Signature | None:
    """The signature of a stand-in's original; None: its source is not there.

    Args:
        name: a key of ``REAL``.
        folder: of the package; None: where ``make setup`` puts it.

    Raises:
        LookupError: the source has no such function any more.
    """
    package, *places = REAL[name]
    folder = sources(package) if folder is None else folder
    if folder is None:
        return None
    own, *bases = (_signature(_arguments(folder, place)) for place in places)
    for base in bases:
        own = _with_rest(own, base)
    return own


def defined_names(path: Path) -> set[str]:
    """What a module defines or imports at its top level."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def recipe_signature(name: str, folder: Path | None = None) -> Signature | None:
    """What the constructor of an FP8 recipe takes: the annotated fields of its class, by keyword; None: no source.

    Raises:
        LookupError: there is no such recipe any more.
    """
    folder = sources("transformer_engine") if folder is None else folder
    if folder is None:
        return None
    tree = ast.parse((folder / RECIPES).read_text(encoding="utf-8"))
    fields = [node for node in _member(tree, name).body if isinstance(node, ast.AnnAssign)]
    named = [Parameter("self", Parameter.POSITIONAL_ONLY)]
    named += [_parameter(ast.arg(ast.unparse(f.target)), Parameter.KEYWORD_ONLY, f.value) for f in fields]
    # Recipes are pydantic's data classes, which ignore what they do not know; megatron gives one such argument.
    return Signature([*named, Parameter("ignored", Parameter.VAR_KEYWORD)])


def differences(ours: Signature, real: Signature) -> list[str]:
    """What a stand-in takes and the original does not, or takes otherwise; empty: every call of it is one of theirs.

    The original may have more parameters, if they have defaults.
    """
    found = []
    given = [each for each in ours.parameters.values() if each.kind not in _VARIABLE]
    theirs = {name: each for name, each in real.parameters.items() if each.kind not in _VARIABLE}
    rest = {each.kind for each in real.parameters.values()} & _VARIABLE
    for each in given:
        if each.name not in theirs:
            if not rest:
                found.append(f"{each.name} is not there")
        # Who must be given here may have a default there.
        elif each.default is not Parameter.empty and _text(each.default) != _text(theirs[each.name].default):
            found.append(f"{each.name}={_text(each.default)} is {_text(theirs[each.name].default)} there")
    known = [each.name for each in given if each.name in theirs]
    order = [name for name in theirs if name in known]
    if order != known:
        found.append(f"the order there is {' '.join(order)}")
    names = {each.name for each in given}
    missing = [name for name, each in theirs.items() if each.default is Parameter.empty and name not in names]
    return found + [f"{name} must be given there" for name in missing]


def held_to(function: Callable[..., Any], real: Signature, name: str) -> Callable[..., Any]:
    """The same function, for calls that the original would take.

    Raises:
        TypeError: by the returned function; the original has no such parameter, or wants one that is not given.
    """

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            real.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"the real {name} would refuse this call: {error}") from None
        return function(*args, **kwargs)

    return checked


_VARIABLE = {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD}


class _Source(str):
    """The default of a parameter as it stands in the source, which is not run."""


def _text(default: Any) -> str:
    if default is Parameter.empty:
        return "(none)"
    if not isinstance(default, _Source):
        return repr(default)
    try:
        return repr(ast.literal_eval(default.replace("float('inf')", "1e999")))
    except ValueError:
        return str(default)


def _member(tree: ast.Module | ast.ClassDef, name: str) -> Any:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
    raise LookupError(f"no {name}")


def _arguments(folder: Path, place: str) -> ast.arguments:
    file, _, path = place.partition(":")
    node: Any = ast.parse((folder / file).read_text(encoding="utf-8"))
    for name in path.split("."):
        try:
            node = _member(node, name)
        except LookupError:
            raise LookupError(f"{file} has no {path}") from None
    return node.args


def _signature(arguments: ast.arguments) -> Signature:
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    found = [_parameter(arg, Parameter.POSITIONAL_OR_KEYWORD, default) for arg, default in zip(positional, defaults)]
    if arguments.vararg is not None:
        found.append(Parameter(arguments.vararg.arg, Parameter.VAR_POSITIONAL))
    found += [
        _parameter(arg, Parameter.KEYWORD_ONLY, default)
        for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults)
    ]
    if arguments.kwarg is not None:
        found.append(Parameter(arguments.kwarg.arg, Parameter.VAR_KEYWORD))
    return Signature(found)


def _parameter(arg: ast.arg, kind: Any, default: ast.expr | None) -> Parameter:
    return Parameter(arg.arg, kind, default=Parameter.empty if default is None else _Source(ast.unparse(default)))


def _with_rest(own: Signature, base: Signature) -> Signature:
    """A signature whose ``**kwargs`` go to a base class: with the parameters of that one in their place."""
    kept = [each for each in own.parameters.values() if each.kind is not Parameter.VAR_KEYWORD]
    known = {each.name for each in kept}
    more = [each for each in base.parameters.values() if each.name not in known and each.kind not in _VARIABLE]
    return Signature([*kept, *(each.replace(kind=Parameter.KEYWORD_ONLY) for each in more)])
