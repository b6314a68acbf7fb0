// What TensorFlow.js finds with the CenterNet of @vladmandic/human: cells of its outputs and the boxes of its own graph.
//
//     npm pack @vladmandic/human@3.3.6 && tar xzf vladmandic-human-3.3.6.tgz
//     npm install @tensorflow/tfjs-core @tensorflow/tfjs-converter @tensorflow/tfjs-backend-wasm
//     node centernet.mjs package/models node_modules PHOTO.ppm...       (binary PPM files)
//
// Prints the JSON that stands beside it; the photographs were scikit-image's astronaut, coffee, chelsea and
// stereo_motorcycle (left). `tower_0/detections` is the graph's own choice of boxes, which the Rust decoder must match.

import fs from "fs";
import path from "path";
import { createRequire } from "module";

const [models, modules, ...photos] = process.argv.slice(2);
const require = createRequire(path.resolve(modules) + "/");
const tf = require("@tensorflow/tfjs-core");
const { loadGraphModel } = require("@tensorflow/tfjs-converter");
const wasm = require("@tensorflow/tfjs-backend-wasm");
const KEPT = 12;

function readPpm(file) {
  const bytes = fs.readFileSync(file);
  const head = bytes.subarray(0, 32).toString("latin1").match(/^P6\s(\d+)\s(\d+)\s255\s/);
  const [width, height] = [Number(head[1]), Number(head[2])];
  return { width, height, pixels: new Float32Array(bytes.subarray(head[0].length)) };
}

async function loadModel() {
  const graph = JSON.parse(fs.readFileSync(path.join(models, "centernet.json")));
  const data = fs.readFileSync(path.join(models, "centernet.bin"));
  const weightData = data.buffer.slice(data.byteOffset, data.byteOffset + data.length);
  const weightSpecs = graph.weightsManifest[0].weights;
  return loadGraphModel({ load: async () => ({ modelTopology: graph.modelTopology, weightSpecs, weightData }) });
}

wasm.setWasmPaths(path.resolve(modules, "@tensorflow/tfjs-backend-wasm/dist") + "/");
await tf.setBackend("wasm");
const model = await loadModel();
const found = [];
for (const photo of photos) {
  const { width, height, pixels } = readPpm(photo);
  const input = tf.image.resizeBilinear(tf.tensor(pixels, [1, height, width, 3]), [512, 512]);
  const names = ["tower_0/mul_1", "tower_0/wh", "tower_0/detections"];
  const [heat, reach, boxes] = model.execute(input, names);
  const [values, reaches] = [await heat.data(), await reach.data()];
  const best = [...values.keys()].filter((at) => values[at] > 0.05).sort((a, b) => values[b] - values[a]).slice(0, KEPT);
  const cells = best.map((at) => {
    const [cell, channel] = [Math.floor(at / 80), at % 80];
    return [channel, Math.floor(cell / 128), cell % 128, values[at], ...reaches.subarray(4 * cell, 4 * cell + 4)];
  });
  const detections = (await boxes.array())[0].slice(0, cells.length);
  found.push({ photo: path.parse(photo).name, width, height, cells, detections });
}
const version = (name) => JSON.parse(fs.readFileSync(path.join(modules, "@tensorflow", name, "package.json"))).version;
const versions = { node: process.version, "tfjs-core": version("tfjs-core"), "tfjs-backend-wasm": version("tfjs-backend-wasm") };
process.stdout.write(JSON.stringify({ model: "@vladmandic/human 3.3.6", versions, photos: found }) + "\n");
