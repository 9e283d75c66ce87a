"""Everything public in flowlib says what it takes, what it gives and what it is."""

import importlib
import inspect
import pkgutil
import re

import pytest

import flowlib

MODULES = [
    importlib.import_module(f"flowlib.{module.name}") for module in pkgutil.iter_modules(flowlib.__path__)
]


def public_functions(module):
    """(name, function, class it belongs to or None) of all that this module defines itself."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value):
            for method, member in vars(value).items():
                function = getattr(member, "__func__", member)
                function = function.fget if isinstance(function, property) else function
                generated = (
                    not hasattr(function, "__code__") or function.__code__.co_filename != module.__file__
                )
                if (
                    (not method.startswith("_") or method == "__init__")
                    and inspect.isfunction(function)
                    and not generated
                ):
                    yield f"{name}.{method}", inspect.unwrap(function), value
        elif inspect.isfunction(value):
            yield name, inspect.unwrap(value), None


FUNCTIONS = {f"{m.__name__}.{name}": found for m in MODULES for name, *found in public_functions(m)}


def test_the_functions_are_found():
    assert {
        "flowlib.glow.Glow.forward",
        "flowlib.prox.Prox.from_config",
        "flowlib.solver.UnfoldedPGD.num_folds",
    } <= set(FUNCTIONS)
    assert len(FUNCTIONS) > 80


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_and_returns_are_annotated(name):
    function, owner = FUNCTIONS[name]
    parameters = list(inspect.signature(function).parameters.values())[owner is not None :]
    missing = [p.name for p in parameters if p.annotation is p.empty]
    assert not missing, f"{name}: no annotation of {', '.join(missing)}"
    assert "return" in function.__annotations__, f"{name}: no annotation of what it returns"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_everything_is_described(name):
    """A method may inherit its description. A class says what each of its arguments is."""
    function, owner = FUNCTIONS[name]
    if not name.endswith("__init__"):
        inherited = owner and inspect.getdoc(getattr(owner, function.__name__))
        assert function.__doc__ or (inherited and "performed at every call" not in inherited), (
            f"{name}: no docstring"
        )
        return
    assert owner.__doc__, f"{name}: no docstring of the class"
    parameters = [p for p in inspect.signature(function).parameters if p != "self"]
    missing = [p for p in parameters if not re.search(rf"\b{p}\b", owner.__doc__)]
    assert not missing, f"{name}: {', '.join(missing)} not described"


def test_modules_and_names():
    assert all(module.__doc__ for module in MODULES)
    assert sorted(flowlib.__all__) == list(flowlib.__all__) and all(
        hasattr(flowlib, name) for name in flowlib.__all__
    )
