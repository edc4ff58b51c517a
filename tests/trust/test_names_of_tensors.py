"""Names from files are harmless wherever they are displayed."""

import re

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn
from typer.testing import CliRunner

from matfact import checkpoint
from matfact.cli import app
from matfact.torch import load_network

#: Clears a screen, ends a line, and turns the order of what follows around.
NAMES = ["\x1b[2J", "a\nError: b", "\u202edlrow", "\x9b31m"]
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]")


def run(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert not CONTROL.search(result.output)
    assert not result.exception or isinstance(result.exception, SystemExit)
    return result.output


@pytest.mark.parametrize("name", NAMES)
def test_commands_and_pages_show_no_control_characters(name, tmp_path):
    content = {f"{name}.weight": np.ones((6, 6), np.float32), f"{name}x": np.ones(3, np.float32)}
    save_file(content, tmp_path / "m.safetensors")
    said = run("compress", tmp_path / "m.safetensors", tmp_path / "out", "--method", "magnitude")
    run("inspect", tmp_path / "out", "--html", tmp_path / "page.html")
    assert repr(name)[1:-1] in said
    assert not CONTROL.search((tmp_path / "page.html").read_text())
    asked = ("--layers", "none of them")
    run("compress", tmp_path / "m.safetensors", tmp_path / "other", *asked)
    sizes = ("--sizes", "4", "--methods", "magnitude", "--jobs", "1")
    said = run("compare", tmp_path / "m.safetensors", *sizes, "--output", tmp_path / "study")
    assert "Written to" in said, said
    assert not CONTROL.search((tmp_path / "study" / "comparison.html").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_errors_show_no_control_characters(name, tmp_path):
    checkpoint.save(tmp_path / "network", {name: torch.ones(3), "weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="it also has") as caught:
        load_network(nn.Linear(2, 2, bias=False), tmp_path / "network")
    assert not CONTROL.search(str(caught.value))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_a_terminal_cannot_show_is_escaped(encoding, tmp_path):
    checkpoint.save(tmp_path / "network", {"größe.€": np.ones((2, 3)), "fc": np.ones(2)})
    runner = CliRunner(charset=encoding)
    result = runner.invoke(app, ["inspect", str(tmp_path / "network")])
    assert result.exit_code == 0, result.output
    assert "\\u20ac" in result.output
    result = runner.invoke(app, ["inspect", str(tmp_path / "größe")])
    assert result.exit_code == 2
    assert "there is none" in result.output
