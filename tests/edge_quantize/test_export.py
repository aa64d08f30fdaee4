import numpy as np
import pytest

from edge_quantize import ExportError, ParityError, Split, export_onnx, split
from edge_quantize.export import check_parity, load_model
from edge_quantize.graph import run
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
    [("pooled", 1, 64), ("flattened", 1, 64), ("averaged", 1, 256), ("deep_head", 2, 64), ("mlp", 1, 48)],
)
def test_trunk_and_numpy_head_equal_torch_for_any_batch(trained, digits, spec, kind, depth, dim):
    net, x = trained(kind), spec.apply(digits.holdout_x[:33])
    parts = split(export_onnx(net, x))
    assert (len(parts.weights) // 2, parts.latent_dim, parts.outputs) == (depth, dim, 8)
    head = Head(parts.weights, tuple("01234567"))
    for batch in (1, 7, 33):
        got = head.logits(run(parts.trunk, x[:batch]))
        np.testing.assert_allclose(got, torch_logits(net, x[:batch]), rtol=1e-4, atol=1e-4)


def test_named_cut_leaves_the_earlier_dense_layer_in_the_trunk(trained, digits, spec):
    net, x = trained("deep_head"), spec.apply(digits.holdout_x[:5])
    model = export_onnx(net, x)
    later = model.graph.node[-1].input[0]
    parts = split(model, cut=later)
    assert (parts.cut, parts.latent_dim, len(parts.weights)) == (later, 32, 2)
    check_parity(net, parts, x)


def test_export_leaves_the_network_in_training_mode_and_its_state_alone(make_net, digits, spec):
    net = make_net("pooled").train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    export_onnx(net, spec.apply(digits.train_x[:2]))
    assert net.training
    assert all(value.equal(before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "found"), [("no_head", "Reshape"), ("softmax", "Softmax"), ("linear", "no usable cut")]
)
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
