// Predict with an exported model, and compare with what the device said: node predict.mjs model.onnx samples.json
import { readFileSync } from "node:fs";
import ort from "onnxruntime-node";

// The model's metadata. ONNX Runtime's JavaScript API does not give them, but they are plain fields of the file:
// field 14 of a ModelProto is a pair of strings, key in field 1 and value in field 2.
function metadata(model) {
  const pairs = [...fields(model)].filter(([number]) => number === 14).map(([, pair]) => new Map(fields(pair)));
  return Object.fromEntries(pairs.map((pair) => [String(pair.get(1)), String(pair.get(2) ?? "")]));
}

function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const tag = varint();
    const kind = tag % 8;
    if (kind === 0) varint();
    else if (kind === 1) at += 8;
    else if (kind === 5) at += 4;
    else {
      const length = varint();
      yield [Math.floor(tag / 8), bytes.subarray(at, (at += length))];
    }
  }
}

const [modelPath, samplesPath] = process.argv.slice(2);
const model = readFileSync(modelPath);
const facts = metadata(model);
const labels = JSON.parse(facts.labels);
const samples = JSON.parse(readFileSync(samplesPath, "utf8"));

const session = await ort.InferenceSession.create(model, { intraOpNumThreads: 1, executionProviders: ["cpu"] });
const x = new ort.Tensor("float32", Float32Array.from(samples.x), samples.shape);
const { probabilities } = await session.run({ [session.inputNames[0]]: x });

let sameLabel = 0;
let difference = 0;
samples.probabilities.forEach((row, i) => {
  const here = probabilities.data.subarray(i * labels.length, (i + 1) * labels.length);
  if (row.length !== labels.length) throw new Error(`the device knows ${row.length} labels, the file ${labels.length}`);
  sameLabel += labels[here.indexOf(Math.max(...here))] === samples.labels[i];
  row.forEach((p, j) => (difference = Math.max(difference, Math.abs(p - here[j]))));
});
const count = samples.labels.length;
console.log(JSON.stringify({ release: facts.release, head: facts.head, labels, count, sameLabel, difference }));
process.exitCode = count > 0 && sameLabel === count && difference <= 1e-6 ? 0 : 1;
