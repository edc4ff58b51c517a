"""Deeply nested JSON, even with a raised recursion limit."""

import subprocess
import sys

import pytest

from matfact._json import parse_json

NESTED = ['{"a":' + "[" * 100_000 + "]" * 100_000 + "}", '{"a":' * 5000 + "1" + "}" * 5000]


@pytest.mark.parametrize("text", NESTED)
def test_deep_nesting_is_refused(text):
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(text)


def test_a_raised_limit_on_recursion_does_not_end_the_process():
    code = (
        "import sys\nfrom matfact._json import parse_json\nsys.setrecursionlimit(10**6)\n"
        "try:\n    parse_json('{\"a\":' + '[' * 10**6 + ']' * 10**6 + '}')\n"
        "except ValueError as error:\n    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "nested too deeply\n")


def test_brackets_in_names_are_not_nested():
    assert parse_json('{"' + "[" * 1000 + '": "{{\\"[", "b": [[1]]}')["b"] == [[1]]
