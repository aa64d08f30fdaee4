// A client of `edge serve` in plain Node (18 or later), without dependencies. Use the class in an app:
//
//     import { EdgeClient } from "./client.mjs";
//     const edge = new EdgeClient("unix:/run/edge.sock");        // or "http://127.0.0.1:8000"
//     const { id, label } = await edge.predict([[0.1, 0.2]]);
//     await edge.observe(id, "7", { durable: true });
//
// or run it: node client.mjs ADDRESS sample.json [TRUE_LABEL]

import { existsSync, realpathSync } from "node:fs";
import { readFile } from "node:fs/promises";
import http from "node:http";
import { endianness } from "node:os";
import { setTimeout as pause } from "node:timers/promises";
import { pathToFileURL } from "node:url";

const DTYPES = new Map([
  [Float32Array, "float32"],
  [Uint8Array, "uint8"],
  [Int32Array, "int32"],
  [BigInt64Array, "int64"],
]);

/** What the device refused, and why: `type` as in "ShapeError", `status` as in 422. */
export class EdgeError extends Error {
  constructor(status, { type, message }) {
    super(message);
    Object.assign(this, { name: type, type, status });
  }
}

export class EdgeClient {
  /** @param {string} address "unix:/path" or "http://127.0.0.1:port"; @param retries after 429 and 503 */
  constructor(address, { retries = 5, timeoutMs = 30_000 } = {}) {
    const unix = address.startsWith("unix:");
    const url = new URL(unix ? "http://localhost" : address);
    this.target = unix
      ? { socketPath: address.slice("unix:".length) }
      : { host: url.hostname.replace(/^\[|\]$/g, ""), port: url.port };
    this.agent = new http.Agent({ keepAlive: true });
    Object.assign(this, { retries, timeoutMs });
  }

  /**
   * Predict one sample: nested arrays, or an object of columns. `state`: of the prediction before. `slice`: your name for
   * the part of the world that it comes from.
   */
  predict(x, { id, state, slice } = {}) {
    return this.#json("POST", "/predict", { x, id, state, slice });
  }

  /** Predict several samples, in one call. */
  async predictBatch(rows, { slice } = {}) {
    return (await this.#json("POST", "/predict", { rows, slice })).predictions;
  }

  /** Predict one sample given as its bytes: the fast way for images. `array`: a typed array; `shape`: its sizes. */
  predictBytes(array, shape, { id, slice } = {}) {
    if (endianness() !== "LE") throw new Error("binary bodies are little-endian: use predict on this machine");
    const query = new URLSearchParams({ shape: shape.join(","), dtype: DTYPES.get(array.constructor) });
    for (const [name, value] of Object.entries({ id, slice })) if (value !== undefined) query.set(name, value);
    const bytes = Buffer.from(array.buffer, array.byteOffset, array.byteLength);
    return this.#send("POST", `/predict?${query}`, bytes, "application/octet-stream");
  }

  /** Tell the truth about a prediction. `durable`: resolve once it is on disk. `source`: where the truth comes from. */
  observe(id, truth, { durable = false, source } = {}) {
    return this.#json("POST", "/observe", { id, truth, durable, source });
  }

  /** Say how right a prediction proved, 0 (wrong) to 1 (right), without knowing the truth. */
  reward(id, value, { source } = {}) {
    return this.#json("POST", "/reward", { id, value, source });
  }

  /** Ask which predictions to label: `{ id, predicted, uncertainty, expires }`, answered with `observe`. */
  async labelRequests(count) {
    return (await this.#json("POST", "/label-requests", { count })).requests;
  }

  status() {
    return this.#json("GET", "/status");
  }

  /** Let the connections go, so that the process can end. */
  close() {
    this.agent.destroy();
  }

  #json(method, path, body) {
    return this.#send(method, path, body === undefined ? undefined : Buffer.from(JSON.stringify(body)), "application/json");
  }

  async #send(method, path, body, type) {
    for (let attempt = 0; ; attempt++) {
      const { status, headers, text } = await this.#once(method, path, body, type);
      if (status < 400) return text ? JSON.parse(text) : undefined;
      // refused for want of room, or not ready yet; a label that could not be written in time (StoreError) is kept
      const { error } = JSON.parse(text);
      const passes = error.type === "BusyError" || error.type === "NotReadyError";
      if (!passes || attempt >= this.retries) throw new EdgeError(status, error);
      await pause(1000 * Number(headers["retry-after"] ?? 1));
    }
  }

  #once(method, path, body, type) {
    return new Promise((resolve, reject) => {
      const headers = body === undefined ? {} : { "content-type": type, "content-length": body.length };
      const options = { ...this.target, agent: this.agent, method, path, headers, timeout: this.timeoutMs };
      const request = http.request(options, (response) => {
        const chunks = [];
        response.on("data", (chunk) => chunks.push(chunk));
        response.on("error", reject);
        response.on("end", () => {
          resolve({ status: response.statusCode, headers: response.headers, text: Buffer.concat(chunks).toString() });
        });
      });
      request.on("timeout", () => request.destroy(new Error(`no answer within ${this.timeoutMs} ms`)));
      request.on("error", reject);
      request.end(body);
    });
  }
}

async function main([address, file, truth]) {
  if (!file) throw new Error("usage: node client.mjs ADDRESS sample.json [TRUE_LABEL]");
  const sample = JSON.parse(await readFile(file, "utf8"));
  const edge = new EdgeClient(address);
  try {
    const prediction = await edge.predict(sample);
    if (truth !== undefined) await edge.observe(prediction.id, truth, { durable: true });
    console.log(JSON.stringify({ prediction, counters: (await edge.status()).counters }));
  } finally {
    edge.close();
  }
}

const started = process.argv[1] ?? "";
if (existsSync(started) && import.meta.url === pathToFileURL(realpathSync(started)).href) {
  await main(process.argv.slice(2)).catch((error) => {
    console.error(`${error.name}: ${error.message}`);
    process.exitCode = 1;
  });
}
