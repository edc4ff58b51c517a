"""Properties inherited by a factorized layer, and restoration after a failed run."""

import copy
import sys
import warnings

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn.utils import prune  # noqa: E402

from matfact.torch import (  # noqa: E402
    CompressionWarning,
    FactorizedLinear,
    compress,
    load_network,
    save_network,
)

X = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    layers = nn.Linear(8, 300), nn.ReLU(), nn.Linear(300, 60), nn.ReLU(), nn.Linear(60, 4)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 6), lambda: nn.Conv2d(4, 4, 3, groups=2)])
def test_what_is_frozen_stays_frozen(make, weight, bias, tmp_path):
    model = nn.Sequential(make())
    model[0].weight.requires_grad_(weight)
    model[0].bias.requires_grad_(bias)
    small, _ = compress(model, "magnitude", density=0.5)
    again, _ = compress(small, "magnitude", density=0.25)
    save_network(small, tmp_path / "network")
    loaded = load_network(copy.deepcopy(model), tmp_path / "network")
    for compressed in (small, again, loaded):
        trained = {name: p.requires_grad for name, p in compressed[0].named_parameters()}
        assert trained.pop("bias") is bias
        assert set(trained.values()) == {weight}


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_frozen_parameter_that_is_pruned_stays_frozen(name):
    model = nn.Sequential(nn.Linear(4, 6))
    prune.l1_unstructured(model[0], name, amount=0.5)
    model[0].get_parameter(f"{name}_orig").requires_grad_(False)
    small, _ = compress(model, "magnitude", density=0.5)
    frozen = {own for own, p in small[0].named_parameters() if not p.requires_grad}
    assert frozen == {"bias" if name == "bias" else "factors.0.values"}
    torch.testing.assert_close(small[0].bias, model[0].bias, check_device=False)


class Seen:
    """Counts its calls; as a hook it changes nothing."""

    def __init__(self):
        self.count = 0

    def __call__(self, *args, **kwargs):
        self.count += 1


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "register",
    [
        lambda layer, hook: layer.register_forward_hook(hook),
        lambda layer, hook: layer.register_forward_hook(hook, with_kwargs=True),
        lambda layer, hook: layer.register_forward_pre_hook(hook),
        lambda layer, hook: layer.register_full_backward_hook(hook),
        lambda layer, hook: layer.register_full_backward_pre_hook(hook),
        lambda layer, hook: layer.register_state_dict_pre_hook(hook),
        lambda layer, hook: layer.register_state_dict_post_hook(hook),
        lambda layer, hook: layer.register_load_state_dict_pre_hook(hook),
        lambda layer, hook: layer.register_load_state_dict_post_hook(hook),
    ],
)
def test_hooks_move_to_the_new_layer(register, inplace):
    model, seen = network(), Seen()
    register(model[2], seen)
    small, _ = compress(model, "magnitude", density=0.5, layers=["2"], inplace=inplace)
    (found,) = [
        getattr(hook, "hook", hook)
        for name, hooks in vars(small[2]).items()
        if name.endswith("_hooks")
        for hook in hooks.values()
    ]
    small(X.requires_grad_()).sum().backward()
    small.load_state_dict(small.state_dict())
    assert found.count == 1
    assert inplace == (found is seen)


def test_handles_remove_hooks_that_have_moved():
    model, seen = network(), Seen()
    handle = model[2].register_forward_hook(seen)
    compress(model, "magnitude", density=0.5, inplace=True)
    handle.remove()
    model(X)
    assert seen.count == 0


@pytest.mark.parametrize("feedback", [False, True])
def test_hooks_that_change_values_count_once_in_calibration(feedback):
    torch.manual_seed(0)
    layers = nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 12), nn.ReLU(), nn.Linear(12, 4)
    model, x = nn.Sequential(*layers).eval(), torch.randn(600, 8)
    model[0].register_forward_hook(lambda layer, args, output: 2 * output)
    model[2].register_forward_pre_hook(lambda layer, args: (args[0] + 1,))
    model[2].register_forward_hook(lambda layer, args, output: output - 3)
    small, report = compress(
        model, "magnitude", density=1.0, calibration=x.split(100), feedback=feedback
    )
    assert all(row.relative_error < 1e-3 for row in report)  # nothing was to be made up for
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-4)


def test_hooks_that_cannot_move_are_named():
    model = network()
    model[0].weight.register_hook(lambda gradient: gradient)
    model[2].bias.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.warns(CompressionWarning) as caught:
        compress(model, "magnitude", density=0.5, inplace=True)
    said = [str(warning.message) for warning in caught]
    assert [text[:1] for text in said] == ["0", "2"]
    assert "weight" in said[0]
    assert "bias" in said[1]


class Ended(BaseException):
    """What no ``except Exception`` catches, as ``KeyboardInterrupt``."""


def failing_after(count):
    def progress(row, n_layers):
        nonlocal count
        count -= 1
        if count == 0:
            raise Ended

    return progress


@pytest.mark.parametrize("calibration", [None, [X[:20], X[20:]]])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_a_run_in_place_that_fails_leaves_the_network_as_it_was(
    calibration, offload, count, tmp_path
):
    model = network()
    model[2].eval()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    seen = Seen()
    model[2].register_forward_hook(seen)
    before, layers = copy.deepcopy(model.state_dict()), list(model)
    parameters, modes = list(model.parameters()), [m.training for m in model]
    expected = model(X)
    with pytest.raises(Ended):
        compress(
            model, "magnitude", density=0.5, calibration=calibration, inplace=True,
            offload_folder=tmp_path if offload else None, progress=failing_after(count),
        )  # fmt: skip
    assert list(model) == layers
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert [module.training for module in model] == modes
    assert [type(hook).__name__ for hook in model[0]._forward_pre_hooks.values()] == [
        "L1Unstructured"
    ]
    assert not any("forward" in vars(module) for module in model)
    calls = seen.count
    torch.testing.assert_close(model(X), expected)
    assert seen.count == calls + 1
    assert not list(tmp_path.iterdir())


def test_a_failed_run_leaves_the_statistics_of_normalizations_as_they_were():
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    model(X)
    before, calls = copy.deepcopy(model.state_dict()), 0

    def fail(layer, args):
        nonlocal calls
        calls += 1
        if calls > 3:  # after two calls to calibrate and one to average statistics anew
            raise Ended

    model[0].register_forward_pre_hook(fail)
    with pytest.raises(Ended):
        compress(
            model, "magnitude", density=0.5, calibration=[X, 2 * X], layers=["0"],
            sequential=False, reestimate_batchnorm=True, inplace=True,
        )  # fmt: skip
    assert calls == 4
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def is_mapped(tensor, folder):
    """Whether a tensor is in a file of `folder` that is mapped into memory."""
    with open("/proc/self/maps", encoding="utf-8") as lines:
        for line in lines:
            begin, end = (int(place, 16) for place in line.split()[0].split("-"))
            if begin <= tensor.data_ptr() < end:
                return str(folder) in line
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of processes")
def test_old_weights_wait_in_files_while_a_run_in_place_may_fail(tmp_path):
    model, batches = network(), [torch.randn(20, 8) for _ in range(2)]
    weight, places = model[2].weight, []
    compress(
        model, "magnitude", density=0.5, inplace=True, calibration=batches,
        offload_folder=tmp_path, progress=lambda *_: places.append(is_mapped(weight, tmp_path)),
    )  # fmt: skip
    assert places == [False, True, True]


def test_nothing_is_said_where_everything_moves():
    model = network()
    model[0].register_forward_hook(lambda *args: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small, _ = compress(model, "magnitude", density=0.5)
    assert isinstance(small[0], FactorizedLinear)
