import itertools

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from edge_quantize.errors import ExportError
from edge_quantize.graph import canonical_bytes, find_cuts, load_onnx, opset_of, run, split
from edge_sdk.errors import RuntimeUnavailableError
from edge_sdk.head import Head

RNG = np.random.default_rng(0)


def parsed(text, *, opset=20, ir=10, domains="", **initializers):
    model = onnx.parser.parse_model(f'<ir_version: {ir}, opset_import: ["" : {opset}{domains}]> ' + text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in initializers.items())
    return model


def matrix(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def positive(*shape):
    return RNG.uniform(0.5, 1.5, shape).astype(np.float32)


def ints(*values):
    return np.array(values, np.int64)


def head_of(parts):
    return Head(parts.weights, tuple(map(str, range(parts.outputs))))


def head_logits(parts, x):
    return head_of(parts).logits(run(parts.trunk, x))


def saved(model, path):
    path.write_bytes(model.SerializeToString())
    return path


def session(data, threads):
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


# ---- split


def test_head_of_matmul_and_add_equals_the_graph_in_either_order_of_operands():
    model = parsed(
        """g (float[N, 5] x) => (float[N, 3] y) {
            h = MatMul(x, A)  r = Relu(h)  p = MatMul(r, B)  q = Add(b, p)  s = Relu(q)
            t = MatMul(s, C)  y = Add(t, c)
        }""",
        A=matrix(5, 4),
        B=matrix(4, 6),
        b=matrix(6),
        C=matrix(6, 3),
        c=matrix(1, 3),
    )
    parts = split(model)
    assert parts.cut == "r"  # of a plain MLP the first layer stays in the trunk
    x = matrix(9, 5)
    np.testing.assert_allclose(head_logits(parts, x), run(model, x), atol=1e-5)


def test_gemm_factors_and_missing_bias_are_folded_into_the_weights():
    model = parsed(
        """g (float[N, 5] x) => (float[N, 3] y) {
            h = MatMul(x, A)  r = Relu(h)
            s = Gemm<alpha = 0.5, transB = 0>(r, B)  t = Relu(s)  y = Gemm<beta = 2.0, transB = 1>(t, C, c)
        }""",
        A=matrix(5, 4),
        B=matrix(4, 6),
        C=matrix(3, 6),
        c=matrix(3),
    )
    parts = split(model)
    assert not parts.weights["b0"].any()
    x = matrix(9, 5)
    np.testing.assert_allclose(head_logits(parts, x), run(model, x), atol=1e-5)


def test_what_scales_and_shifts_columns_between_dense_layers_is_folded_into_them():
    model = parsed(
        """g (float[N, 5] x) => (float[N, 3] y) {
            h = MatMul(x, A)  r = Relu(h)
            p = Gemm(r, B, b)  q = BatchNormalization(p, scale, shift, mean, variance)  s = Relu(q)
            w = Transpose(C)  t = MatMul(s, w)  u = Sub(c, t)  v = Div(u, temperature)  y = Mul(factors, v)
        }""",
        A=matrix(5, 4),
        B=matrix(4, 6),
        b=matrix(6),
        scale=matrix(6),
        shift=matrix(6),
        mean=matrix(6),
        variance=positive(6),
        C=matrix(3, 6),
        c=matrix(3),
        temperature=np.array(1.7, np.float32),
        factors=matrix(1, 3),
    )
    parts = split(model)
    assert (parts.cut, len(parts.weights)) == ("r", 4)
    x = matrix(9, 5)
    np.testing.assert_allclose(head_logits(parts, x), run(model, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "between",
    [
        "f = Flatten(p)",
        "f = Reshape(p, flat)",
        "f = Squeeze(p, axes)",
        "t = Transpose<perm = [0, 2, 3, 1]>(p)  f = Reshape(t, flat)",
        "i = Identity(p)  d, mask = Dropout(i)  f = Flatten(d)",
        "s = Squeeze(p, axes)  f = Identity(s)",
    ],
)
def test_latent_is_the_vector_behind_whatever_reshapes_the_pooled_features(between):
    model = parsed(
        f"""g (float[N, 3, 6, 6] x) => (float[N, 2] y) {{
            c = Conv(x, K)  r = Relu(c)  p = GlobalAveragePool(r)  {between}
            h = Gemm(f, A, a)  e = Dropout(h)  k = Relu(e)  l = Reshape(k, flat4)
            z = Gemm(l, B)  y = Identity(z)
        }}""",
        K=matrix(5, 3, 3, 3),
        flat=ints(-1, 5),
        flat4=ints(0, -1),
        axes=ints(2, 3),
        A=matrix(5, 8),
        a=matrix(8),
        B=matrix(8, 2),
    )
    parts = split(model)
    assert (parts.cut, parts.latent_dim, len(parts.weights)) == ("f", 5, 4)
    x = matrix(4, 3, 6, 6)
    np.testing.assert_allclose(head_logits(parts, x), run(model, x), atol=1e-5)


def test_gemm_that_undoes_a_transpose_is_a_dense_layer_and_any_other_transposed_input_is_refused():
    weights = {"A": matrix(5, 4), "B": matrix(4, 3)}
    text = "g (float[N, 5] x) => (float[N, 3] y) { h = MatMul(x, A)  r = Relu(h)  %s  y = Gemm<transA = 1>(t, B) }"
    model = parsed(text % "t = Transpose(r)", **weights)
    x = matrix(6, 5)
    np.testing.assert_allclose(head_logits(split(model), x), run(model, x), atol=1e-5)
    with pytest.raises(ExportError, match=r"Gemm .*reads its input transposed"):
        split(parsed(text % "t = Identity(r)", **weights))


def test_dense_layer_on_a_tensor_of_three_dimensions_is_refused_with_its_shape():
    model = parsed(
        "g (float[N, 7, 5] x) => (float[N, 7, 3] y) { h = MatMul(x, A)  r = Relu(h)  [last] y = MatMul(r, B) }",
        A=matrix(5, 4),
        B=matrix(4, 3),
    )
    with pytest.raises(ExportError, match=r"MatMul 'last' on a 3-D tensor \['N', 7, 4\].*average or flatten"):
        split(model)


@pytest.mark.parametrize(
    ("op", "activation", "task"),
    [
        ("Softmax<axis = 1>", "softmax", "classification"),
        ("LogSoftmax", "log_softmax", "classification"),
        ("Sigmoid", "sigmoid", "multilabel"),
        ("Identity", "", ""),
    ],
)
def test_final_activation_is_left_out_and_named(op, activation, task):
    text = "g (float[N, 5] x) => (float[N, 3] y) { h = MatMul(x, A)  r = Relu(h)  l = Gemm(r, B)  y = %s(l) }"
    weights = {"A": matrix(5, 4), "B": matrix(4, 3)}
    parts = split(parsed(text % op, **weights))
    assert (parts.activation, parts.task) == (activation, task)
    x = matrix(6, 5)
    np.testing.assert_allclose(head_logits(parts, x), run(parsed(text % "Identity", **weights), x), atol=1e-5)


def test_regression_that_drops_the_dimension_of_its_one_output_is_split():
    model = parsed(
        """g (float[N, 5] x) => (float[N] y) {
            h = MatMul(x, A)  r = Relu(h)  l = Gemm(r, B, b)  y = Squeeze(l, axis)
        }""",
        A=matrix(5, 4),
        B=matrix(4, 1),
        b=matrix(1),
        axis=ints(1),
    )
    parts = split(model)
    assert (parts.outputs, parts.activation) == (1, "")
    x = matrix(6, 5)
    np.testing.assert_allclose(head_logits(parts, x)[:, 0], run(model, x), atol=1e-5)


def test_a_latent_that_is_read_elsewhere_is_not_inside_the_head():
    model = parsed(
        """g (float[N, 4] x) => (float[N, 4] y) {
            a = MatMul(x, A)  r = Relu(a)  k = MatMul(r, B)  s = Relu(k)  d = Add(s, r)  y = MatMul(d, C)
        }""",
        A=matrix(4, 4),
        B=matrix(4, 4),
        C=matrix(4, 4),
    )
    assert [cut.tensor for cut in find_cuts(model)] == ["d"]
    assert split(model).cut == "d"


def chain(*widths):
    """A plain MLP: its latents are called r0, r1, …"""
    layers = "".join(
        f"h{i} = MatMul({f'r{i - 1}' if i else 'x'}, W{i})  r{i} = Relu(h{i})  " for i in range(len(widths))
    )
    sizes = [4, *widths, 2]
    return parsed(
        f"g (float[N, 4] x) => (float[N, 2] y) {{ {layers} y = MatMul(r{len(widths) - 1}, W{len(widths)}) }}",
        **{f"W{i}": matrix(*pair) for i, pair in enumerate(itertools.pairwise(sizes))},
    )


@pytest.mark.parametrize(
    ("widths", "cut"),
    [((8, 6, 5), "r2"), ((5, 6, 8), "r0"), ((6, 5, 5, 9), "r2"), ((5000, 8), "r1"), ((6,), "r0")],
)
def test_automatic_cut_is_the_narrowest_and_of_equal_ones_the_last(widths, cut):
    assert split(chain(*widths)).cut == cut


def test_cuts_state_width_layers_parameters_and_what_stands_against_them():
    cuts = find_cuts(chain(5000, 8))
    assert [(cut.tensor, cut.latent, cut.dense_layers, cut.parameters) for cut in cuts] == [
        ("x", 4, 3, 4 * 5000 + 5000 + 5000 * 8 + 8 + 8 * 2 + 2),
        ("r0", 5000, 2, 5000 * 8 + 8 + 8 * 2 + 2),
        ("r1", 8, 1, 8 * 2 + 2),
    ]
    assert "nothing with weights stands before 'x'" in cuts[0].obstacle
    assert "'r0' would have 5000 values (4096 allowed)" in cuts[1].obstacle
    assert not cuts[2].obstacle


def test_named_cut_may_be_wider_than_the_automatic_choice_allows():
    assert split(chain(5000, 8), cut="r0").latent_dim == 5000


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ("h0", r"cannot cut at 'h0'.*possible are x, r0"),
        ("x", "cannot cut at 'x': nothing with weights stands before"),
    ],
)
def test_cut_that_cannot_be_is_refused_with_the_reason(cut, message):
    with pytest.raises(ExportError, match=message):
        split(chain(5), cut=cut)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("g (float[N, 4] x) => (float[N, 4] y) { [act] y = Tanh(x) }", "output 'y' ends in Tanh 'act'"),
        ("g (float[N, 4] x) => (float[N, 4] y) { t = Tanh(x)  y = Sigmoid(t) }", "before its sigmoid in Tanh .*'t'"),
        ("g (float[N, 4] x) => (float[N, 4] y) { y = Identity(x) }", "the input 'x' itself"),
        ("g (float[N, 4] x, float[N, 4] z) => (float[N, 4] y) { y = Add(x, z) }", r"2 inputs \('x', 'z'\)"),
        ("g (float[N, 4] x) => (float[N, 4] y, float[N, 4] z) { y = Relu(x)  z = Tanh(x) }", r"2 outputs \('y', 'z'\)"),
        ("g (float[N, 4] x) => (float[N, 2] y) { y = MatMul(x, A) }", "no usable cut: nothing with weights"),
        ("g (float[N, 4] x) => (float[N, N] y) { t = Transpose(x)  y = MatMul(x, t) }", "computed, not fixed"),
        (
            "g (float[3, 4] x) => (float[3, 2] y) { a = MatMul(x, S)  r = Relu(a)  y = MatMul(r, A) }",
            "batch dimension of 'x' is fixed at 3",
        ),
    ],
)
def test_network_without_a_usable_cut_is_refused_with_what_was_found(text, message):
    with pytest.raises(ExportError, match=message):
        split(parsed(text, A=matrix(4, 2), S=matrix(4, 4)))


def test_softmax_over_positions_is_not_taken_for_the_final_activation():
    model = parsed(
        "g (float[N, 4, 5] x) => (float[N, 2, 5] y) { c = Conv(x, K)  [last] y = Softmax<axis = 1>(c) }",
        K=matrix(2, 4, 1),
    )
    with pytest.raises(ExportError, match="ends in Softmax 'last'"):
        split(model)


def test_trunk_whose_rows_change_each_other_is_refused():
    model = parsed(
        """g (float[N, 4] x) => (float[N, 2] y) {
            m = ReduceMean<keepdims = 1>(x, zero)  d = Sub(x, m)  a = MatMul(d, A)  r = Relu(a)  y = MatMul(r, B)
        }""",
        zero=ints(0),
        A=matrix(4, 3),
        B=matrix(3, 2),
    )
    with pytest.raises(ExportError, match="rows of a batch change each other's latent 'r'"):
        split(model)


def test_trunk_that_runs_with_one_row_alone_is_refused():
    model = parsed(
        """g (float[N, 4] x) => (float[N, 2] y) {
            s = Reshape(x, one)  a = MatMul(s, A)  r = Relu(a)  y = MatMul(r, B)
        }""",
        one=ints(1, 4),
        A=matrix(4, 3),
        B=matrix(3, 2),
    )
    with pytest.raises(ExportError, match=r"up to 'r' does not run with \(1, 2, 7\) rows"):
        split(model)


@pytest.mark.parametrize("opset", [11, 17, 20, 23])
def test_trunk_has_the_batch_free_and_the_common_opset(opset):
    model = chain(8, 6)
    model.opset_import[0].version = opset
    trunk = split(model).trunk
    assert opset_of(trunk) == 20
    for value in (*trunk.graph.input, *trunk.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [tensor.name for tensor in trunk.graph.initializer] == ["W0", "W1"]


def test_what_a_branch_takes_from_around_it_stays_in_the_trunk():
    model = parsed(
        """g (float[N, 4] x) => (float[N, 2] y) {
            b = MatMul(x, A)
            i = If (flag) <
                then_branch = t () => (float[N, 3] p) { p = Relu(b) },
                else_branch = e () => (float[N, 3] q) { q = Neg(b) }
            >
            y = MatMul(i, B)
        }""",
        flag=np.array(True),
        A=matrix(4, 3),
        B=matrix(3, 2),
    )
    x = matrix(5, 4)
    np.testing.assert_allclose(head_logits(split(model), x), run(model, x), atol=1e-5)


# ---- two sessions and one


@pytest.fixture(scope="module")
def torch_nets():
    import torch
    from torch import nn

    torch.set_num_threads(1)

    class Residual(nn.Module):
        """Normalised before the convolution, so that the BatchNormalization cannot be folded away."""

        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(1, 8, 3, padding=1)
            self.body = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
            self.end = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

        def forward(self, x):
            x = self.stem(x)
            return self.end(x + self.body(x))

    class SqueezeExcite(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(1, 8, 1), nn.BatchNorm2d(8), nn.ReLU6())
            self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.SiLU())
            self.excite = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 2, 1), nn.ReLU(), nn.Conv2d(2, 8, 1), nn.Sigmoid()
            )
            self.out = nn.Linear(8, 4)

        def forward(self, x):
            x = self.depthwise(self.stem(x))
            return self.out((x * self.excite(x)).mean((2, 3)))

    def conv():
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        )

    def conv1d():
        return nn.Sequential(
            nn.Conv1d(3, 8, 5, stride=2), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 6, 3), nn.ReLU(),
            nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(6, 4),
        )  # fmt: skip

    def mlp():
        return nn.Sequential(
            nn.Linear(10, 16),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(16, 24),
            nn.ReLU(),
            nn.Linear(24, 4),
        )

    kinds = {
        "conv": (conv, (1, 8, 8), 8),
        "residual": (Residual, (1, 8, 8), 8),
        "squeeze_excite": (SqueezeExcite, (1, 8, 8), 8),
        "conv1d": (conv1d, (3, 40), 6),
        "mlp": (mlp, (10,), 16),
    }
    cache = {}

    def make(kind, exporter):
        from edge_quantize.export import export_onnx

        if (kind, exporter) not in cache:
            torch.manual_seed(0)
            make_net, shape, latent = kinds[kind]
            net, x = make_net(), np.random.default_rng(0).normal(size=(64, *shape)).astype(np.float32)
            net.train()(torch.from_numpy(x))  # so that BatchNorm has seen something
            cache[kind, exporter] = export_onnx(net, x, exporter=exporter), x, latent
        return cache[kind, exporter]

    return make


@pytest.mark.torch
@pytest.mark.parametrize("exporter", ["dynamo", "classic"])
@pytest.mark.parametrize("kind", ["conv", "residual", "squeeze_excite", "conv1d", "mlp"])
def test_two_sessions_equal_the_fused_graph_bit_for_bit(torch_nets, kind, exporter):
    from edge_quantize.quantize import head_graph, quantize_trunk

    model, x, latent = torch_nets(kind, exporter)
    parts = split(model)
    assert (parts.latent_dim, parts.outputs) == (latent, 4)
    np.testing.assert_allclose(head_logits(parts, x), run(model, x), rtol=1e-4, atol=1e-4)
    trunks = quantize_trunk(parts.trunk, x)
    head = head_graph(head_of(parts), trunks.latent)
    for variant in (trunks.int8, trunks.fp32):
        fused = onnx.compose.merge_models(
            onnx.load_model_from_string(variant),
            onnx.compose.add_prefix(onnx.load_model_from_string(head), "head_"),
            io_map=[("latent", "head_latent")],
        ).SerializeToString()
        for threads in (1, 2):
            first, second, whole = (session(data, threads) for data in (variant, head, fused))
            for batch in (1, 7, 32):
                latents = first.run(["latent"], {"input": x[:batch]})[0]
                apart = second.run(["probabilities"], {"latent": latents})[0]
                at_once = whole.run(["head_probabilities"], {"input": x[:batch]})[0]
                assert np.array_equal(apart, at_once), (threads, batch)


# ---- load


@pytest.fixture
def net():
    return chain(8, 6)


def with_external(model, location):
    tensor = model.graph.initializer[0]
    data = tensor.raw_data
    onnx.external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    return data


def test_weights_beside_the_file_come_into_the_graph(net, tmp_path):
    x = matrix(3, 4)
    expected = run(net, x)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "w.bin").write_bytes(with_external(net, "parts/w.bin"))
    loaded = load_onnx(saved(net, tmp_path / "net.onnx"))
    assert np.array_equal(run(loaded, x), expected)
    assert not loaded.graph.initializer[0].external_data


def test_weights_that_share_a_file_are_told_apart_by_offset_and_length(net, tmp_path):
    x = matrix(3, 4)
    expected = run(net, x)
    onnx.save(net, tmp_path / "net.onnx", save_as_external_data=True, location="all.bin", size_threshold=0)
    assert np.array_equal(run(load_onnx(tmp_path / "net.onnx"), x), expected)


@pytest.mark.parametrize("location", ["../w.bin", "{root}/w.bin", "link.bin", "inside/../../w.bin"])
def test_weights_outside_the_folder_are_refused_with_tensor_and_layer(net, tmp_path, location):
    folder = tmp_path / "models"
    (folder / "inside").mkdir(parents=True)
    (folder / "link.bin").symlink_to(tmp_path / "w.bin")
    (tmp_path / "w.bin").write_bytes(with_external(net, location.format(root=tmp_path)))
    net.graph.node[0].name = "first"
    with pytest.raises(
        ExportError, match=r"tensor 'W0' of MatMul 'first' has its data outside .* put that file beside"
    ):
        load_onnx(saved(net, folder / "net.onnx"))


def test_missing_or_short_weights_are_refused_with_the_tensor(net, tmp_path):
    data = with_external(net, "w.bin")
    path = saved(net, tmp_path / "net.onnx")
    with pytest.raises(ExportError, match=r"'W0'.* in 'w\.bin', which is not there; copy it"):
        load_onnx(path)
    (tmp_path / "w.bin").write_bytes(data[:-4])
    with pytest.raises(ExportError, match=rf"has {len(data) - 4} bytes .*expected {len(data)}; the file is damaged"):
        load_onnx(path)


def test_operator_of_a_custom_domain_is_refused_by_the_name_of_its_node(tmp_path):
    model = parsed("g (float[N, 4] x) => (float[N, 4] y) { [odd] y = acme.Blur(x) }", domains=', "acme" : 1')
    with pytest.raises(ExportError, match=r"acme\.Blur 'odd' is an operator of the custom domain 'acme'.*library"):
        load_onnx(saved(model, tmp_path / "net.onnx"))


def test_custom_operator_inside_a_branch_is_found(tmp_path):
    model = parsed(
        """g (float[N, 4] x) => (float[N, 4] y) { y = If (flag) <
            then_branch = t () => (float[N, 4] p) { [odd] p = acme.Blur(x) },
            else_branch = e () => (float[N, 4] q) { q = Neg(x) } > }""",
        domains=', "acme" : 1',
        flag=np.array(True),
    )
    with pytest.raises(ExportError, match=r"acme\.Blur 'odd'"):
        load_onnx(saved(model, tmp_path / "net.onnx"))


def test_operator_that_the_engine_does_not_know_is_refused_by_the_name_of_its_node(tmp_path):
    model = parsed(
        "g (float[N, 4] x) => (float[N, 4] y) { [odd] y = com.microsoft.NoSuchThing(x) }",
        domains=', "com.microsoft" : 1',
    )
    with pytest.raises(ExportError, match=r"cannot run net\.onnx at com\.microsoft\.NoSuchThing 'odd'.*NoSuchThing"):
        load_onnx(saved(model, tmp_path / "net.onnx"))


def test_operators_that_the_engine_brings_are_served(tmp_path):
    model = parsed(
        """g (float[N, 4] x) => (float[N, 4] y) {
            a = com.microsoft.Gelu(x)  y = ai.onnx.ml.Scaler<offset = [1.0], scale = [2.0]>(a)
        }""",
        domains=', "com.microsoft" : 1, "ai.onnx.ml" : 3',
    )
    assert run(load_onnx(saved(model, tmp_path / "net.onnx")), np.zeros((2, 4), np.float32))[0, 0] == -2


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "holds no graph"), (b"not a model at all", "no ONNX file"), (None, r"net\.onnx cannot be read")],
)
def test_file_that_is_no_model_is_refused(tmp_path, data, message):
    if data is not None:
        (tmp_path / "net.onnx").write_bytes(data)
    with pytest.raises(ExportError, match=message):
        load_onnx(tmp_path / "net.onnx")


def test_truncated_file_is_refused(net, tmp_path):
    path = saved(net, tmp_path / "net.onnx")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ExportError, match="damaged"):
        load_onnx(path)


def test_graph_that_breaks_the_rules_is_refused_with_the_node(net, tmp_path):
    net.graph.node[0].input.append("nowhere")
    net.graph.node[0].name = "first"
    with pytest.raises(ExportError, match=r"net\.onnx breaks the rules of ONNX: .*first"):
        load_onnx(saved(net, tmp_path / "net.onnx"))


def test_functions_are_expanded_and_the_other_name_of_the_standard_domain_is_understood(tmp_path):
    model = parsed(
        """g (float[N, 4] x) => (float[N, 2] y) { h = MatMul(x, A)  r = own.Twice(h)  y = MatMul(r, B) }
        <domain: "own", opset_import: ["" : 20]> Twice (a) => (b) { s = Relu(a)  b = Add(s, s) }""",
        domains=', "own" : 1',
        A=matrix(4, 3),
        B=matrix(3, 2),
    )
    model.opset_import[0].domain = "ai.onnx"
    loaded = load_onnx(saved(model, tmp_path / "net.onnx"))
    assert not loaded.functions
    assert split(loaded).latent_dim == 3


def test_old_file_that_lists_its_weights_as_inputs_is_brought_to_the_common_opset(tmp_path):
    model = parsed(
        """g (float[N, 4] x, float[4, 3] A, float[3, 2] B) => (float[N, 2] y) {
            h = MatMul(x, A)  r = Relu(h)  l = MatMul(r, B)  y = Softmax(l)
        }""",
        opset=9,
        ir=3,
        A=matrix(4, 3),
        B=matrix(3, 2),
    )
    x = matrix(3, 4)
    loaded = load_onnx(saved(model, tmp_path / "net.onnx"))
    assert [value.name for value in loaded.graph.input] == ["x"]
    assert opset_of(loaded) == 20
    np.testing.assert_allclose(run(loaded, x).sum(axis=1), 1, atol=1e-6)
    assert split(loaded).activation == "softmax"


def fixed_batch(reshape, mixing="Identity(c)"):
    return parsed(
        f"""g (float[1, 1, 6, 6] x) => (float[1, 2] y) {{
            c = Conv(x, K)  m = {mixing}  r = Relu(m)  f = Reshape(r, shape)  y = MatMul(f, A)
        }}""",
        K=matrix(3, 1, 6, 6),
        shape=ints(*reshape),
        zero=ints(0),
        A=matrix(3, 2),
    )


@pytest.mark.parametrize("reshape", [(1, -1), (1, 3), (-1, 3), (0, 3)])
def test_batch_fixed_at_one_is_freed_when_rows_stay_apart(tmp_path, reshape):
    model = fixed_batch(reshape)
    loaded = load_onnx(saved(model, tmp_path / "net.onnx"))
    x = matrix(5, 1, 6, 6)
    expected = np.concatenate([run(model, row[None]) for row in x])
    np.testing.assert_allclose(run(loaded, x), expected, atol=1e-5)
    assert split(loaded).latent_dim == 3


@pytest.mark.parametrize("mixing", ["ReduceSum<keepdims = 1>(c, zero)", "Softmax<axis = 0>(c)"])
def test_batch_fixed_at_one_stays_when_rows_would_mix(tmp_path, mixing):
    model = fixed_batch((1, 3), mixing)
    loaded = load_onnx(saved(model, tmp_path / "net.onnx"))
    assert loaded.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    with pytest.raises(ExportError, match="fixed at 1"):
        split(loaded)


def test_loading_leaves_the_file_and_its_folder_alone(net, tmp_path):
    path = saved(net, tmp_path / "net.onnx")
    before = path.read_bytes()
    load_onnx(path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


# ---- run and write


def test_engine_failure_names_the_graph():
    model = parsed("g (float[N, 4] x) => (float[N, 2] y) { y = MatMul(x, A) }", A=matrix(4, 2))
    with pytest.raises(RuntimeUnavailableError, match="fails on 'g'"):
        run(model, matrix(3, 5))


def test_canonical_bytes_do_not_depend_on_metadata_or_order_of_initializers():
    text = "g (float[N, 4] x) => (float[N, 2] y) { a = MatMul(x, A)  y = MatMul(a, B) }"
    a, b = matrix(4, 3), matrix(3, 2)
    first, second = parsed(text, A=a, B=b), parsed(text, B=b, A=a)
    second.doc_string = second.graph.doc_string = "made in /some/folder"
    second.producer_name, second.producer_version = "a tool", "9"
    second.graph.node[0].doc_string = "File /some/folder/net.py, line 3"
    second.graph.node[0].metadata_props.add(key="stack_trace", value="/some/folder/net.py")
    second.metadata_props.add(key="path", value="/some/folder")
    second.opset_import.add(domain="com.microsoft", version=1)
    assert canonical_bytes(first) == canonical_bytes(second)
    assert b"/some/folder" not in canonical_bytes(second)
