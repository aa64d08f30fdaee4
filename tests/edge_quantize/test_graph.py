import numpy as np
import onnx
import pytest

from edge_quantize.errors import ExportError
from edge_quantize.graph import canonical_bytes, run, split
from edge_sdk.head import Head

RNG = np.random.default_rng(0)


def parsed(text, **initializers):
    model = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 20]> ' + text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in initializers.items())
    return model


def matrix(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def head_logits(parts, x):
    head = Head(parts.weights, tuple(map(str, range(parts.outputs))))
    return head.logits(run(parts.trunk, x))


def test_head_of_matmul_and_add_equals_the_graph_in_either_order_of_operands():
    model = parsed(
        """g (float[N, 5] x) => (float[N, 3] y) {
            h = MatMul(x, A)  r = Relu(h)  p = MatMul(r, B)  q = Add(b, p)  s = Relu(q)
            t = MatMul(s, C)  y = Add(t, c)
        }""",
        A=matrix(5, 6),
        B=matrix(6, 4),
        b=matrix(4),
        C=matrix(4, 3),
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
        A=matrix(5, 6),
        B=matrix(6, 4),
        C=matrix(3, 4),
        c=matrix(3),
    )
    parts = split(model)
    assert not parts.weights["b0"].any()
    x = matrix(9, 5)
    np.testing.assert_allclose(head_logits(parts, x), run(model, x), atol=1e-5)


def test_a_latent_that_is_read_elsewhere_is_not_inside_the_head():
    model = parsed(
        """g (float[N, 4] x) => (float[N, 4] y) {
            a = MatMul(x, A)  r = Relu(a)  k = MatMul(r, B)  s = Relu(k)  d = Add(s, r)  y = MatMul(d, C)
        }""",
        A=matrix(4, 4),
        B=matrix(4, 4),
        C=matrix(4, 4),
    )
    assert split(model).cut == "d"


def test_latents_wider_than_the_buffer_can_hold_are_passed_over():
    model = parsed(
        """g (float[N, 4] x) => (float[N, 2] y) {
            a = MatMul(x, A)  r = Relu(a)  b = MatMul(r, B)  s = Relu(b)  y = MatMul(s, C)
        }""",
        A=matrix(4, 5000),
        B=matrix(5000, 8),
        C=matrix(8, 2),
    )
    assert split(model).cut == "s"
    assert split(model, cut="r").latent_dim == 5000  # whoever names the cut may


def test_cut_that_is_not_before_dense_layers_is_refused_with_the_possible_ones():
    model = parsed(
        "g (float[N, 4] x) => (float[N, 2] y) { a = MatMul(x, A)  r = Relu(a)  y = MatMul(r, B) }",
        A=matrix(4, 5),
        B=matrix(5, 2),
    )
    with pytest.raises(ExportError, match=r"cannot cut at 'a'.*possible are x, r"):
        split(model, cut="a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("g (float[N, 4] x) => (float[N, 4] y) { y = Sigmoid(x) }", "ends in Sigmoid"),
        ("g (float[N, 4] x, float[N, 4] z) => (float[N, 4] y) { y = Add(x, z) }", "it has 2 and 1"),
        ("g (float[N, 4] x) => (float[N, 2] y) { y = MatMul(x, A) }", r"no usable cut.*'x' \(4 values\)"),
    ],
)
def test_network_without_a_usable_cut_is_refused_with_what_was_found(text, message):
    with pytest.raises(ExportError, match=message):
        split(parsed(text, A=matrix(4, 2)))


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
