"""Write names.json from an installed CuPy: the functions it has, and the arguments they take.

CuPy can be imported without a GPU. Run ``python tests/cupy_double/generate.py``.
"""

import inspect
import json
import re
from pathlib import Path

import cupy
import numpy as np

#: Modules of CuPy with those of NumPy that the double is made from.
MODULES = {
    "cupy": (cupy, np),
    "cupy.linalg": (cupy.linalg, np.linalg),
    "cupy.fft": (cupy.fft, np.fft),
}


def arguments(function) -> str | None:
    """Return the arguments of `function`, with an ellipsis for each default."""
    doc = (inspect.getdoc(function) or "").splitlines()[:1]
    found = re.search(r"\((.*)\)", doc[0].replace("\\", "")) if doc else None
    if isinstance(function, cupy.ufunc) and found:
        text = f"({found[1]})"
    else:
        try:
            text = str(inspect.signature(function))
        except (TypeError, ValueError):  # compiled: its documentation begins with the arguments
            text = f"({found[1]})" if found else "(*args, **kwargs)"
    text = re.sub(r" ->.*|\[[^\]]*\]", "", text)  # results, and options in brackets
    text = re.sub(r"=<[^>]*>", "=...", text)
    text = re.sub(r"\s*=\s*[^,()]+(\([^()]*\))?", "=...", text)
    return re.sub(r"\b\w+ (\w+)", r"\1", text)  # types of compiled functions


def table(module, like) -> dict[str, str]:
    """Return the arguments of each function of `module` whose name NumPy knows too."""
    names = [name for name in dir(module) if not name.startswith("_") and hasattr(like, name)]
    found = {name: getattr(module, name) for name in names}
    return {
        name: arguments(function)
        for name, function in found.items()
        if callable(function) and not isinstance(function, type)
    }


if __name__ == "__main__":
    tables = {name: table(*modules) for name, modules in MODULES.items()}
    methods = table(cupy.ndarray, np.ndarray)
    tables["ndarray"] = methods | {"get": arguments(cupy.ndarray.get)}
    target = Path(__file__).with_name("names.json")
    target.write_text(json.dumps({"version": cupy.__version__, **tables}, indent=1) + "\n")
