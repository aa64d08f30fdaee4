import msgspec
import numpy as np
import onnx
import pytest

from edge_quantize.graph import load_onnx
from edge_quantize.levels import assess

RNG = np.random.default_rng(0)


def parsed(text, *, opset=20, domains="", **initializers):
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}{domains}]> ' + text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in initializers.items())
    return model


def matrix(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def pooled(*, batch="N", features=6):
    """A convolution and two dense layers; the latents are called f and r."""
    return parsed(
        f"""g (float[{batch}, 1, 8, 8] image) => (float[{batch}, 3] scores) {{
            c = Conv(image, K)  a = Relu(c)  p = GlobalAveragePool(a)  f = Flatten(p)
            d = Gemm(f, A, b)  r = Relu(d)  l = MatMul(r, B)  scores = Softmax(l)
        }}""",
        K=matrix(features, 1, 3, 3),
        A=matrix(features, 4),
        b=matrix(4),
        B=matrix(4, 3),
    )


def detector():
    return parsed(
        """g (float[N, 1, 8, 8] image) => (float[K, 4] boxes, int64[K] kept) {
            c = Conv(image, W)  flat = Reshape(c, rows)  scores = Reshape(c, classes)
            [nms_3] found = NonMaxSuppression(flat, scores, most)
            kept = Gather<axis = 1>(found, two)  all = Squeeze(flat, zero)  boxes = Gather(all, kept)
        }""",
        W=matrix(4, 1, 8, 8),
        rows=np.array([1, -1, 4], np.int64),
        classes=np.array([1, 1, -1], np.int64),
        most=np.array([2], np.int64),
        two=np.array(2, np.int64),
        zero=np.array([0], np.int64),
    )


def recurrent():
    return parsed(
        """g (float[5, N, 3] x, float[1, N, 2] h, float[1, N, 2] c) => (float[5, 1, N, 2] y, float[1, N, 2] h1,
            float[1, N, 2] c1) { [cell] y, h1, c1 = LSTM<hidden_size = 2>(x, W, R, none, length, h, c) }""",
        W=matrix(1, 8, 3),
        R=matrix(1, 8, 2),
        none=matrix(1, 16),
    )


def test_network_that_ends_in_dense_layers_has_a_head_and_lists_its_cuts():
    facts = assess(pooled())
    assert (facts.level, facts.cut, facts.activation) == ("head", "r", "softmax")
    assert facts.reason.startswith("cut at 'r' into a trunk with 4 latent values and a head of 1 dense layer")
    assert [(cut.tensor, cut.latent, cut.dense_layers, cut.parameters) for cut in facts.cuts] == [
        ("f", 6, 2, 6 * 4 + 4 + 4 * 3 + 3),
        ("r", 4, 1, 4 * 3 + 3),
    ]


def test_facts_name_tensors_operators_weights_and_size():
    model = pooled()
    facts = assess(model)
    (image,), (scores,) = facts.inputs, facts.outputs
    assert (image.name, image.dtype, image.shape) == ("image", "float32", ("N", 1, 8, 8))
    assert (scores.name, scores.shape) == ("scores", ("N", 3))
    assert (facts.ops["Conv"], facts.ops["Relu"], facts.opset) == (1, 2, 20)
    assert facts.parameters == 6 * 9 + 6 * 4 + 4 + 4 * 3
    assert facts.size_bytes == len(model.SerializeToString())
    assert not facts.not_quantizable


def test_assessment_is_text_for_people_and_json():
    facts = assess(pooled())
    lines = facts.lines()
    assert lines[0] == f"adapt       head: {facts.reason}"
    assert "input       image float32 [N, 1, 8, 8]" in lines
    assert "cut         r: 4 values, head of 1 dense layer, 15 parameters  <- automatic" in lines
    assert "int8        possible" in lines
    assert any(line.startswith("activation  softmax") for line in lines)
    read = msgspec.json.decode(msgspec.json.encode(facts))
    assert (read["level"], read["inputs"][0]["shape"], read["cuts"][1]["latent"]) == ("head", ["N", 1, 8, 8], 4)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (detector, "the output 'boxes' ends in NonMaxSuppression 'nms_3': how many rows it has depends on the data"),
        (
            recurrent,
            "the network carries recurrent state from call to call: LSTM 'cell' with inputs 'x', 'h', 'c' and outputs",
        ),
        (lambda: pooled(batch="1"), "the batch dimension of 'image' is fixed at 1"),
        (lambda: pooled(batch="4"), "the batch dimension of 'image' is fixed at 4"),
    ],
)
def test_what_stands_against_a_head_is_a_sentence_with_the_name(model, reason):
    facts = assess(model())
    assert facts.level == "none"
    assert facts.reason.startswith(reason)
    assert (facts.cut, facts.activation) == ("", "")
    assert facts.lines()[0].startswith("adapt       none: ")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            """g (float[N, 4] x) => (float[M, 2] y) {
                [n7] where = NonZero(x)  t = Transpose(where)  g = GatherND(x, t)  c = Reshape(g, column)
                m = MatMul(c, R)  r = Relu(m)  y = MatMul(r, B)
            }""",
            "data-dependent shape at NonZero 'n7' on the way to 'y'",
        ),
        (
            "g (float[N, 4] x) => (float[N, 2] y, float[N, 3] z) { y = MatMul(x, A)  z = MatMul(x, C) }",
            "the network has 2 outputs ('y', 'z')",
        ),
        (
            "g (float[N, 112, 112] x) => (float[N, 2] y) { e = Exp(x)  f = Flatten(e)  y = MatMul(f, H) }",
            "no usable cut: nothing with weights stands before 'f'",
        ),
        (
            """g (float[N, 1, 112, 112] x) => (float[N, 2] y) {
                c = Conv(x, K)  r = Relu(c)  f = Flatten(r)  y = MatMul(f, H)
            }""",
            "no usable cut: the latent 'f' would have 12544 values (4096 allowed)",
        ),
        (
            "g (float[N, 4] x) => (float[N, 4] y) { [up] y = Resize(x, none, none, same) }",
            "the output 'y' ends in Resize 'up'",
        ),
        (
            """g (float[N, 4] x) => (float[N, 4] y) {
                s = ReduceMean<keepdims = 0>(x)  z = Greater(s, nought)
                [gate] y = If (z) <
                    then_branch = t () => (float[N, 4] p) { p = Relu(x) },
                    else_branch = e () => (float[N, 4] q) { q = Neg(x) } >
            }""",
            "control flow that depends on the data at If 'gate' on the way to 'y'",
        ),
        (
            "g (string[N, 4] x) => (string[N, 4] y) { [twice] y = StringConcat(x, x) }",
            "the output 'y' ends in StringConcat 'twice'",
        ),
    ],
)  # fmt: skip
def test_reason_names_the_node_that_stands_in_the_way(text, reason):
    shared = {
        "A": matrix(4, 2), "B": matrix(3, 2), "C": matrix(4, 3), "R": matrix(1, 3), "W": matrix(1),
        "K": matrix(1, 1, 1, 1), "H": matrix(12544, 2), "column": np.array([-1, 1], np.int64),
        "none": np.zeros(0, np.float32), "same": np.array([2, 4], np.int64), "nought": np.array(0, np.float32),
    }  # fmt: skip
    model = parsed(text, **{name: value for name, value in shared.items() if name in text})
    facts = assess(model)
    assert (facts.level, facts.reason[: len(reason)]) == ("none", reason)


def test_shapes_that_follow_from_shapes_alone_do_not_stand_in_the_way():
    model = parsed(
        """g (float[N, 4] x) => (float[N, 2] y) {
            s = Shape(x)  ones = ConstantOfShape<value = float[1] {1.0}>(s)  where = NonZero(ones)
            t = Transpose(where)  g = GatherND(x, t)  shape = Shape(x)  f = Reshape(g, shape)
            m = MatMul(f, A)  r = Relu(m)  y = MatMul(r, B)
        }""",
        A=matrix(4, 3),
        B=matrix(3, 2),
    )
    assert assess(model).cut == "r"


def test_batch_that_loading_can_free_does_not_stand_in_the_way(tmp_path):
    model = pooled(batch="1")
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    assert assess(model).level == "none"
    assert assess(load_onnx(tmp_path / "net.onnx")).level == "head"


def test_operators_inside_branches_are_counted_and_those_of_other_domains_named_with_them():
    model = parsed(
        """g (float[N, 4] x) => (float[N, 4] y) { y = If (flag) <
            then_branch = t () => (float[N, 4] p) { a = MatMul(x, A)  p = com.microsoft.Gelu(a) },
            else_branch = e () => (float[N, 4] q) { q = MatMul(x, A) } > }""",
        domains=', "com.microsoft" : 1',
        flag=np.array(True),
        A=matrix(4, 4),
    )
    facts = assess(model)
    assert facts.ops == {"MatMul": 2, "If": 1, "com.microsoft.Gelu": 1}
    assert facts.not_quantizable.startswith("the layers with weights lie inside If")


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: parsed("g (float[N] x) => (float[N] y) { y = Tanh(x) }"), "it has no Conv, ConvTranspose, Gemm or"),
        (recurrent, "it has no Conv"),
        (
            lambda: parsed(
                "g (float[N, 4] x) => (float[N, 2] y) { y = MatMul(x, A) }", opset=11, A=matrix(4, 2)
            ),
            "opset 11 has no scales for each channel",
        ),
        (
            lambda: parsed(
                """g (float[N, 4] x) => (float[N, 2] y) {
                    [q] a = QuantizeLinear(x, s, z)  d = DequantizeLinear(a, s, z)  y = MatMul(d, A) }""",
                A=matrix(4, 2), s=np.array(0.1, np.float32), z=np.array(0, np.uint8),
            ),
            "the graph is quantized already, see QuantizeLinear 'q'",
        ),
        (
            lambda: parsed(
                "g (float16[N, 4] x) => (float16[N, 2] y) { y = MatMul(x, A) }", A=matrix(4, 2).astype(np.float16)
            ),
            "the weights are in half precision",
        ),
    ],
)  # fmt: skip
def test_what_prevents_quantization_is_said(model, why):
    facts = assess(model())
    assert facts.not_quantizable.startswith(why)
    assert f"int8        impossible: {facts.not_quantizable}" in facts.lines()


def test_operators_that_stay_in_float_are_listed():
    model = parsed(
        """g (float[N, 4] x) => (float[N, 2] y) { a = MatMul(x, A)  e = Erf(a)  r = Relu(e)  y = MatMul(r, B) }""",
        A=matrix(4, 3),
        B=matrix(3, 2),
    )
    assert assess(model).float_ops == {"Erf": 1}


@pytest.mark.torch
def test_exported_recurrent_network_is_level_none_with_its_state_named():
    import torch
    from torch import nn

    from edge_quantize.export import export_onnx

    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.out = nn.GRU(3, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, x, h):
            y, h = self.gru(x, h)
            return torch.softmax(self.out(y[:, -1]), 1), h

    x, h = np.zeros((2, 4, 3), np.float32), np.zeros((1, 2, 5), np.float32)
    proto = export_onnx(
        Cell(), (x, h), input_names=["x", "h"], output_names=["probabilities", "h1"], batch_axes={"h": 1}
    )
    facts = assess(proto)
    assert facts.level == "none"
    assert "GRU" in facts.reason
    assert "with inputs 'x', 'h' and outputs 'probabilities', 'h1'" in facts.reason
    assert [value.shape for value in facts.inputs] == [("batch", 4, 3), (1, "batch", 5)]
