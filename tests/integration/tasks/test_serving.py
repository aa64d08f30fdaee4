"""Every kind of model on a device: packed, verified, served, observed, watched, asked over HTTP."""

from __future__ import annotations

import asyncio
import shutil

import httpx
import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

import edge_quantize.cli
import edge_sdk.cli
from edge_sdk.errors import InputError, LabelError
from edge_sdk.http import create_app
from edge_sdk.manifest import (
    MODEL_INT8,
    verify_checkpoint,
)
from edge_sdk.messages import (
    Envelope,
    Report,
    Topics,
    decode,
    unpack,
)
from edge_sdk.transport import MemoryBroker, MemoryTransport

pytestmark = pytest.mark.torch


def same(one, other):
    """Whether two predictions say the same numbers."""
    return (
        one.label == other.label
        and np.array_equal(one.probabilities, other.probabilities)
        and np.array_equal(one.values, other.values)
        and one.outputs.keys() == other.outputs.keys()
        and all(np.array_equal(one.outputs[name], other.outputs[name]) for name in one.outputs)
    )


# ---- packing


def test_checkpoint_passes_both_programs_checks(packed):
    for program, command in ((edge_quantize.cli.main, "verify"), (edge_sdk.cli.main, "verify")):
        result = CliRunner().invoke(program, [command, str(packed.folder)])
        assert result.exit_code == 0, result.output
        assert "release 1" in result.output
    facts = CliRunner().invoke(edge_quantize.cli.main, ["inspect", str(packed.folder)])
    assert facts.exit_code == 0, facts.output


def test_same_inputs_give_the_same_bytes(packed, tmp_path):
    packed.kind.build(tmp_path / "again")
    first, again = ({p.name: p.read_bytes() for p in sorted(f.iterdir())} for f in (packed.folder, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert [name for name in first if first[name] != again[name]] == []


def test_int8_stays_near_float(packed):
    comparison, manifest = packed.result.comparison, packed.result.manifest
    if packed.name == "float_only":
        assert MODEL_INT8 not in manifest.files
        assert comparison.contrasts == []
        assert "float alone" in (packed.folder / "card.md").read_text()
        return
    (contrast,) = comparison.contrasts
    found = [output.sqnr_db for output in contrast.outputs.values() if output.sqnr_db is not None]
    assert found
    assert min(found) > 15, contrast.outputs
    if manifest.task != "raw":
        assert comparison.int8.accuracy.value >= comparison.fp32.accuracy.value - 0.05
        assert comparison.fp32.accuracy.value >= 0.75


def test_damaged_file_of_any_kind_is_found(packed, tmp_path):
    folder = shutil.copytree(packed.folder, tmp_path / "copy")
    name = next(iter(packed.result.manifest.model_files.values()))
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert CliRunner().invoke(edge_quantize.cli.main, ["verify", str(folder)]).exit_code == 3
    assert verify_checkpoint(packed.folder) == packed.result.manifest


# ---- on a device


def test_device_predicts_takes_truths_and_counts_what_was_right(packed, make_device, ask):
    device = make_device(checkpoint=packed.folder, variant="auto")
    rows, kind = packed.rows(120), packed.kind
    said = ask(device, rows)
    manifest = packed.result.manifest
    for prediction in said[:5]:
        assert prediction.release == 1
        assert prediction.labels == tuple(manifest.labels)
        assert bool(prediction.outputs) == (manifest.task == "raw")
        assert bool(prediction.state) == bool(manifest.state)
        assert prediction.values.shape == ((len(manifest.labels),) if manifest.task == "regression" else (0,))
    for truth in kind.wrong:
        with pytest.raises(LabelError):
            device.observe(said[0].id, truth)
    if kind.truth is None:
        device.step()
        assert device.status().accuracy is None
        assert device.status().counters.predictions == 120
        return
    for prediction, y in zip(said, kind.data.holdout_y, strict=False):
        device.observe(prediction.id, kind.truth(y))
    if manifest.task != "classification":
        with pytest.raises(LabelError, match="needs a classification"):
            device.reward(said[0].id, 1.0)
    report = device.step()
    assert (report.predictions, report.labelled, report.problem) == (120, 120, "")
    status = device.status()
    variant = packed.result.comparison.variants[status.variant]
    assert status.accuracy == pytest.approx(variant.accuracy.value, abs=0.12)
    assert status.counters.labelled == 120
    if kind.learns:
        assert status.fresh_rows + status.judge_rows == 120
    else:
        assert "served, not learned on" in status.waits
        assert (status.fresh_rows, status.replay_rows) == (0, 0)


def test_report_tells_the_coordinator_what_was_right(packed, make_device, clock, ask):
    broker, topics = MemoryBroker(), Topics()
    listener = MemoryTransport(broker)
    listener.subscribe(topics.up("+", "report"))
    listener.connect()
    device = make_device(checkpoint=packed.folder, variant="auto", transport=MemoryTransport(broker))
    device.connect()
    device.step()
    kind = packed.kind
    for prediction, y in zip(
        ask(device, packed.rows()), [] if kind.truth is None else kind.data.holdout_y, strict=False
    ):
        device.observe(prediction.id, kind.truth(y))
    device.step()
    clock.advance(600)
    device.step()
    sent = [decode(message.payload, Envelope) for message in listener.receive()]
    report = unpack(sent[-1].body, Report)
    assert report.predictions == len(packed.rows())
    latent = ["latent"] if packed.result.manifest.adapt == "head" else []
    assert [monitor.name for monitor in report.monitors] == ["input", "quality", *latent, "output", "accuracy"]
    if kind.truth is None:
        assert (report.labelled, report.correct) == (0, 0)
        return
    assert report.labelled == len(packed.rows())
    variant = packed.result.comparison.variants[device.status().variant]
    assert report.correct / len(packed.rows()) == pytest.approx(variant.accuracy.value, abs=0.01)


def test_a_batch_says_what_single_rows_say(packed, make_device, ask):
    device = make_device(checkpoint=packed.folder, variant="auto")
    rows, manifest = packed.rows(40), packed.result.manifest
    if manifest.state or manifest.more_inputs:
        with pytest.raises(InputError, match="one sample at a time"):
            device.predict_batch(rows)
        return
    batch = device.predict_batch(rows if isinstance(rows[0], dict) else np.stack(rows))
    assert all(same(one, other) for one, other in zip(batch, ask(device, rows), strict=True))


def test_restart_keeps_serving_the_same_and_counts_on(packed, make_device, ask):
    device = make_device(checkpoint=packed.folder, variant="auto")
    rows = packed.rows(40)
    before = ask(device, rows)
    device.stop()
    device = make_device(checkpoint=None, variant="auto")
    assert all(same(one, other) for one, other in zip(before, ask(device, rows), strict=True))
    if packed.kind.truth is not None:
        device.observe(before[0].id, packed.kind.truth(packed.kind.data.holdout_y[0]))
        assert device.step().labelled == 1
    assert device.status().counters.predictions in (40, 80)
    device.step()
    assert device.status().counters.predictions == 80


def test_monitors_stay_calm_on_usual_rows_and_raise_the_alarm_on_changed_ones(packed, make_device, clock, ask):
    device = make_device(checkpoint=packed.folder, variant="auto", mode="monitor")
    rng, rows = np.random.default_rng(0), packed.rows()
    for _ in range(3):
        # one label after the other would be a change, again and again; but a recording stays in its order
        usual = rows if packed.result.manifest.state else [rows[i] for i in rng.permutation(len(rows))]
        ask(device, usual)
        clock.advance(60)
        assert device.step().problem == ""
    assert device.status().alarms == []
    for _ in range(3):
        ask(device, [packed.kind.drift(row) for row in packed.rows()])
        clock.advance(60)
        device.step()
    assert "input" in device.status().alarms
    assert [entry.detail["monitor"] for entry in device.history(limit=500) if entry.name == "drift_alarm"]


# ---- what each kind says


def test_regression_head_is_standardised_and_its_values_are_the_networks(pack):
    import torch

    packed = pack("regression")
    kind, manifest = packed.kind, packed.result.manifest
    assert manifest.adapt == "head"
    assert [target.mean for target in manifest.targets] == pytest.approx([20, 101_300], rel=0.02)
    assert all(target.tolerance > 0 for target in manifest.targets)
    assert packed.result.comparison.int8.accuracy.value >= 0.8
    with torch.no_grad():
        expected = kind.model(torch.from_numpy(kind.data.holdout_x)).numpy()
    from edge_quantize import encode
    from edge_quantize.compare import predict

    latents = encode(packed.folder, kind.data.holdout_x, spec=manifest.input, variant="fp32")
    off = np.abs(predict(packed.folder, latents) - expected) / [target.std for target in manifest.targets]
    assert off.mean() < 0.02


def test_device_says_regression_values_within_their_tolerance(pack, make_device, ask):
    packed = pack("regression")
    device = make_device(checkpoint=packed.folder)
    said = np.stack([p.values for p in ask(device, packed.rows())])
    tolerance = [target.tolerance for target in packed.result.manifest.targets]
    right = (np.abs(said - packed.kind.data.holdout_y) <= tolerance).all(axis=1).mean()
    assert right == pytest.approx(packed.result.comparison.int8.accuracy.value)


def test_multilabel_thresholds_decide_what_is_present(pack, make_device, ask):
    packed = pack("multilabel")
    device = make_device(checkpoint=packed.folder)
    for prediction in ask(device, packed.rows(60)):
        thresholds = zip(prediction.labels, prediction.probabilities, [0.4, 0.5, 0.6], strict=True)
        assert prediction.present == tuple(label for label, p, at in thresholds if p >= at)
    assert packed.result.manifest.thresholds == [0.4, 0.5, 0.6]


def test_rows_of_a_table_may_lack_values_and_hold_unseen_ones(pack, make_device):
    device = make_device(checkpoint=pack("table").folder)
    assert device.predict({"age": 80, "site": "nowhere", "note": "words nobody has seen"}).label in device.labels
    assert device.predict({}).label in device.labels
    with pytest.raises(InputError, match="no column 'weight'"):
        device.predict({"age": 80, "weight": 70})
    with pytest.raises(InputError, match="'age'"):
        device.predict({"age": "old"})


def test_images_of_any_size_are_resized_as_in_training(pack, make_device):
    packed = pack("image")
    device = make_device(checkpoint=packed.folder)
    picture = np.full((50, 33, 3), 60, np.uint8)
    picture[..., 2] = 180
    assert device.predict(picture).label == "blue"
    with pytest.raises(InputError, match="any"):
        device.predict(picture[..., :2])


def test_recording_of_any_length_is_cut_to_the_latest_steps(pack, make_device):
    packed = pack("sensor")
    device = make_device(checkpoint=packed.folder)
    long, short = packed.kind.data.holdout_x[0], packed.kind.data.holdout_x[0][-32:]
    assert np.array_equal(device.predict(long).probabilities, device.predict(short).probabilities)


def stored(packed, name):
    """A tensor of the kind's graph."""
    (found,) = [tensor for tensor in packed.kind.model.graph.initializer if tensor.name == name]
    return numpy_helper.to_array(found)


def test_detector_puts_out_as_many_rows_as_it_finds(pack, make_device, ask):
    packed = pack("detector")
    device = make_device(checkpoint=packed.folder, variant="fp32")
    found = {len(p.outputs["scores"]) for p in ask(device, packed.rows())}
    assert {0, 1} < found
    row = packed.kind.data.holdout_x[0]
    scores = row @ stored(packed, "w")
    assert device.predict(row).outputs["scores"] == pytest.approx(scores[scores > 2], abs=1e-5)


def test_recurrent_device_equals_torch_step_by_step(pack, make_device, ask):
    import torch

    packed = pack("recurrent")
    device = make_device(checkpoint=packed.folder, variant="fp32")
    rows = packed.rows(50)
    said = np.stack([p.probabilities for p in ask(device, rows)])
    hidden, cell = torch.zeros(1, 1, 8), torch.zeros(1, 1, 8)
    expected = []
    with torch.no_grad():
        for row in rows:
            logits, hidden, cell = packed.kind.model(torch.from_numpy(row[None]), hidden, cell)
            expected.append(logits.softmax(1).numpy()[0])
    assert np.allclose(said, expected, atol=1e-5)
    anew = device.predict(rows[-1]).probabilities
    assert not np.allclose(anew, said[-1], atol=1e-3)
    with pytest.raises(InputError, match="a state has"):
        device.predict(rows[0], state={"hidden": np.zeros((1, 1, 8), np.float32)})


def test_fixed_input_is_no_longer_asked_for(pack, make_device):
    packed = pack("fixed_input")
    device = make_device(checkpoint=packed.folder, variant="fp32")
    row = packed.kind.data.holdout_x[0]
    assert device.predict(row).outputs["score"] == pytest.approx(row @ stored(packed, "w") - 0.25, abs=1e-5)


def test_model_with_several_inputs_takes_them_by_name(pack, make_device):
    packed = pack("several_inputs")
    device = make_device(checkpoint=packed.folder)
    row = packed.rows(1)[0]
    assert device.predict(row).values.shape == (1,)
    with pytest.raises(InputError, match="picture, readings, by name"):
        device.predict(row["picture"])
    with pytest.raises(InputError, match="readings"):
        device.predict({**row, "readings": np.zeros(3, np.float32)})


# ---- over HTTP


@pytest.mark.parametrize("name", ["multilabel", "regression", "raw", "recurrent", "table", "several_inputs"])
def test_app_in_another_language_predicts_and_observes_over_http(pack, make_device, name):
    packed = pack(name)
    kind, manifest = packed.kind, packed.result.manifest
    device = make_device(checkpoint=packed.folder)
    row = packed.rows(1)[0]
    sample = msgspec.to_builtins(row, enc_hook=lambda value: value.tolist())

    async def talk(client):
        reply = await client.post("/predict", json={"x": sample})
        assert reply.status_code == 200, reply.text
        said, direct = reply.json(), device.predict(row)
        match manifest.task:
            case "multilabel":
                assert list(said["probabilities"].values()) == pytest.approx(direct.probabilities.tolist())
                assert said["present"] == list(direct.present)
            case "regression":
                assert list(said["values"].values()) == pytest.approx(direct.values.tolist())
            case "raw":
                assert said["outputs"]["map"] == pytest.approx(direct.outputs["map"].tolist())
            case "classification":
                assert said["label"] == direct.label
        if manifest.state:
            second = await client.post("/predict", json={"x": sample, "state": said["state"]})
            assert second.status_code == 200, second.text
            expected = device.predict(row, state=direct.state)
            found = second.json()["probabilities"]
            assert list(found.values()) == pytest.approx(expected.probabilities.tolist(), abs=1e-6)
        truth = "anything" if kind.truth is None else kind.truth(kind.data.holdout_y[0])
        observed = await client.post("/observe", json={"id": said["id"], "truth": truth})
        assert observed.status_code == (422 if kind.truth is None else 202), observed.text
        wrong = await client.post("/observe", json={"id": said["id"], "truth": kind.wrong[-1]})
        assert wrong.status_code in (400, 422)

    async def connected():
        transport = httpx.ASGITransport(create_app(device))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            await talk(client)

    asyncio.run(connected())
    assert device.step().labelled == (kind.truth is not None)
