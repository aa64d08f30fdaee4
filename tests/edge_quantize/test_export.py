import numpy as np
import pytest

from edge_quantize import ExportError, ParityError, Split, export_onnx, split
from edge_quantize.export import check_parity, load_model
from edge_quantize.graph import find_cuts, run
from edge_quantize.rewrite import session_of
from edge_sdk.errors import ConfigError
from edge_sdk.head import Head

pytestmark = pytest.mark.torch


def torch_logits(net, x):
    import torch

    net.eval()
    with torch.no_grad():
        return net(torch.from_numpy(x)).numpy()


@pytest.mark.parametrize(
    ("kind", "depth", "dim"),
    [("pooled", 1, 64), ("flattened", 1, 64), ("averaged", 1, 256), ("deep_head", 1, 32), ("mlp", 1, 48)],
)
def test_trunk_and_numpy_head_equal_torch_for_any_batch(trained, digits, spec, kind, depth, dim):
    net, x = trained(kind), spec.apply(digits.holdout_x[:33])
    parts = split(export_onnx(net, x))
    assert (len(parts.weights) // 2, parts.latent_dim, parts.outputs) == (depth, dim, 8)
    head = Head(parts.weights, tuple("01234567"))
    for batch in (1, 7, 33):
        got = head.logits(run(parts.trunk, x[:batch]))
        np.testing.assert_allclose(got, torch_logits(net, x[:batch]), rtol=1e-4, atol=1e-4)


def test_named_cut_takes_earlier_dense_layers_into_the_head(trained, digits, spec):
    net, x = trained("deep_head"), spec.apply(digits.holdout_x[:5])
    model = export_onnx(net, x)
    earlier = find_cuts(model)[0].tensor
    parts = split(model, cut=earlier)
    assert (parts.cut, parts.latent_dim, len(parts.weights)) == (earlier, 64, 4)
    check_parity(net, parts, x)


def test_export_leaves_the_network_in_training_mode_and_its_state_alone(make_net, digits, spec):
    net = make_net("pooled").train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    export_onnx(net, spec.apply(digits.train_x[:2]))
    assert net.training
    assert all(value.equal(before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize(("kind", "found"), [("no_head", "ends in Reshape"), ("linear", "no usable cut")])
def test_network_without_dense_head_is_refused_by_the_name_of_its_last_node(make_net, digits, spec, kind, found):
    model = export_onnx(make_net(kind), spec.apply(digits.train_x[:2]))
    with pytest.raises(ExportError, match=found):
        split(model)


def test_network_that_fixes_the_batch_size_is_refused_with_the_reason(spec, digits):
    from torch import nn

    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(2, 64)

    with pytest.raises(ExportError, match=r"Fixed does not keep the batch dimension free: 'input' has shape \[2, 1"):
        export_onnx(Fixed(), spec.apply(digits.train_x[:2]))


def test_network_that_fails_in_its_own_code_is_refused_with_its_error(spec, digits):
    from torch import nn

    class Broken(nn.Module):
        def forward(self, x):
            raise LookupError("no such table")

    with pytest.raises(ExportError, match="torch cannot export Broken: LookupError: no such table"):
        export_onnx(Broken(), spec.apply(digits.train_x[:2]))


class Activated:
    """Networks whose last layer is no dense one."""

    @staticmethod
    def make(kind):
        import torch
        from torch import nn

        class Flat(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))

            def forward(self, x):
                return self.body(x).squeeze(1)

        torch.manual_seed(0)
        ends = {"softmax": nn.Softmax(1), "log_softmax": nn.LogSoftmax(1), "sigmoid": nn.Sigmoid()}
        if kind == "squeeze":
            return Flat()
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3), ends[kind])


@pytest.mark.parametrize("exporter", ["dynamo", "classic"])
@pytest.mark.parametrize("kind", ["softmax", "log_softmax", "sigmoid", "squeeze"])
def test_parity_holds_for_networks_that_end_in_an_activation_or_without_a_class_dimension(kind, exporter):
    net, x = Activated.make(kind), np.random.default_rng(0).normal(size=(9, 6)).astype(np.float32)
    parts = split(export_onnx(net, x, exporter=exporter))
    assert parts.activation == ("" if kind == "squeeze" else kind)
    check_parity(net, parts, x)
    wrong = {**parts.weights, "W0": parts.weights["W0"] * 1.5}
    with pytest.raises(ParityError, match="differ from torch's"):
        check_parity(net, Split(parts.trunk, wrong, parts.cut, parts.activation), x)


def test_both_exporters_give_the_same_trunk_and_head(trained, digits, spec):
    net, x = trained("pooled"), spec.apply(digits.holdout_x[:33])
    dynamo, classic = (split(export_onnx(net, x, exporter=exporter)) for exporter in ("dynamo", "classic"))
    np.testing.assert_array_equal(classic.weights["W0"], dynamo.weights["W0"])
    np.testing.assert_allclose(run(classic.trunk, x), run(dynamo.trunk, x), atol=1e-5)


def recurrent():
    """Keeps its state outside: x [N, T, 3] and h, c [1, N, 5] to y [N, 2] and the new h, c."""
    import torch
    from torch import nn

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(3, 5, batch_first=True)
            self.out = nn.Linear(5, 2)

        def forward(self, x, h, c):
            y, (h, c) = self.lstm(x, (h, c))
            return self.out(y[:, -1]), h, c

    torch.manual_seed(0)
    return Recurrent().eval()


@pytest.mark.parametrize("exporter", ["dynamo", "classic"])
@pytest.mark.parametrize("rows", [1, 2])
def test_recurrent_network_is_exported_with_its_state_as_inputs_and_outputs(rows, exporter):
    import torch

    net, rng = recurrent(), np.random.default_rng(0)
    x, h, c = (rng.normal(size=shape).astype(np.float32) for shape in ((rows, 4, 3), (1, rows, 5), (1, rows, 5)))
    names = ["x", "h", "c"]
    axes = {"h": 1, "c": 1} if rows > 1 else dict.fromkeys(names)  # one stream has no batch to free
    proto = export_onnx(
        net, (x, h, c), input_names=names, output_names=["y", "h_next", "c_next"], batch_axes=axes, exporter=exporter
    )
    assert [value.name for value in proto.graph.input] == names
    assert [value.name for value in proto.graph.output] == ["y", "h_next", "c_next"]
    session = session_of(proto)
    for n in (1, 3) if rows > 1 else (1,):
        h, c = np.zeros((1, n, 5), np.float32), np.zeros((1, n, 5), np.float32)
        state = torch.from_numpy(h), torch.from_numpy(c)
        for _ in range(3):
            x = rng.normal(size=(n, 4, 3)).astype(np.float32)
            with torch.no_grad():
                expected, *state = net(torch.from_numpy(x), *state)
            got, h, c = session.run(None, {"x": x, "h": h, "c": c})
            np.testing.assert_allclose(got, expected, atol=1e-5)
            np.testing.assert_allclose(h, state[0], atol=1e-5)


def test_names_that_do_not_match_the_examples_are_refused():
    x = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"2 example inputs, but names \['x'\]"):
        export_onnx(recurrent(), (x, x), input_names=["x"])
    with pytest.raises(ValueError, match="batch axes"):
        export_onnx(recurrent(), x, batch_axes={"z": 1})


def awkward(kind):
    """Networks that ONNX cannot express, each in its own way."""
    import torch
    from torch import nn

    class Branches(nn.Module):
        def forward(self, x):
            if x.sum() > 0:
                return x
            return -x

    class Picks(nn.Module):
        def forward(self, x):
            return x[x > 0]

    class Bessel(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.odd = Bessel()

        def forward(self, x):
            return self.odd(self.first(x))

    return {"branches": Branches, "picks": Picks, "nested": Nested}[kind]().eval()


@pytest.mark.parametrize(
    ("kind", "exporter", "message"),
    [
        (
            "branches",
            "dynamo",
            r"cannot export Branches \(test_export.py line \d+: if x.sum\(\) > 0:\): .*data-dependent",
        ),
        ("picks", "dynamo", r"NonZero '\w+' lets the data decide \(test_export.py line \d+: return x\[x > 0\]\)"),
        ("picks", "classic", r"NonZero '/NonZero' lets the data decide"),
        ("nested", "dynamo", r"cannot export Nested in 'odd' \(Bessel\): .*bessel_j0"),
        ("nested", "classic", r"cannot export Nested in 'odd' \(Bessel\): .*bessel_j0' to ONNX opset version 20"),
    ],
)
def test_what_onnx_cannot_express_is_refused_in_one_line_with_its_place(kind, exporter, message):
    with pytest.raises(ExportError, match=message) as caught:
        export_onnx(awkward(kind), np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32), exporter=exporter)
    assert "\n" not in str(caught.value)


def test_classic_exporter_warns_with_the_line_whose_branch_it_keeps():
    import torch

    with pytest.warns(torch.jit.TracerWarning, match="Python boolean") as caught:
        export_onnx(awkward("branches"), np.ones((2, 4), np.float32), exporter="classic")
    assert caught[0].filename == __file__


def test_refused_network_leaves_nothing_on_the_error_stream(capsys):
    with pytest.raises(ExportError):
        export_onnx(awkward("branches"), np.ones((2, 4), np.float32))
    assert capsys.readouterr().err == ""


def test_altered_weights_are_noticed(trained, digits, spec):
    net, x = trained("pooled"), spec.apply(digits.holdout_x[:5])
    parts = split(export_onnx(net, x))
    wrong = {**parts.weights, "b0": parts.weights["b0"] + 1}
    with pytest.raises(ParityError, match="differ from torch's by up to 1"):
        check_parity(net, Split(parts.trunk, wrong, parts.cut), x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("net", "must look like"),
        ("absent_module_of_nobody:f", "ModuleNotFoundError"),
        ("net:absent", "has no attribute"),
        ("net:number", "gave int"),
    ],
)
def test_model_that_cannot_be_made_is_refused_with_the_reason(tmp_path, call, message):
    (tmp_path / "net.py").write_text("def number():\n    return 1\n")
    with pytest.raises(ConfigError, match=message):
        load_model(call, folder=tmp_path)


def test_model_file_may_import_its_neighbours_and_state_must_fit(tmp_path):
    import torch

    (tmp_path / "width_of_net.py").write_text("WIDTH = 3\n")
    (tmp_path / "net.py").write_text(
        "import torch\nfrom width_of_net import WIDTH\n\n\ndef make():\n    return torch.nn.Linear(2, WIDTH)\n"
    )
    torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / "fits.pt")
    torch.save(torch.nn.Linear(2, 4).state_dict(), tmp_path / "other.pt")
    assert load_model("net:make", folder=tmp_path, state=tmp_path / "fits.pt").out_features == 3
    with pytest.raises(ConfigError, match=r"model\.state other\.pt"):
        load_model("net:make", folder=tmp_path, state=tmp_path / "other.pt")
