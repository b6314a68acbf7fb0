// TensorFlow.js's resize of pictures by a formula, as CenterNet's own program calls it before the network.
//
//     npm install @tensorflow/tfjs-core @tensorflow/tfjs-backend-wasm
//     node centernet_input.mjs node_modules > centernet_input.json
//
// Of each picture [height, width] the sum of each channel of its 512 x 512 pixels and every 4999th value of them.

import path from "path";
import { createRequire } from "module";

const modules = process.argv[2];
const require = createRequire(path.resolve(modules) + "/");
const tf = require("@tensorflow/tfjs-core");
const wasm = require("@tensorflow/tfjs-backend-wasm");
wasm.setWasmPaths(path.resolve(modules, "@tensorflow/tfjs-backend-wasm/dist") + "/");
await tf.setBackend("wasm");

const value = (x, y, c) => (x * x + Math.floor((3 * x * y) / 7) + 11 * y + 85 * c + ((x * y) % 251)) % 256;
const pictures = [];
for (const [height, width] of [[61, 97], [512, 512], [700, 301]]) {
  const pixels = new Float32Array(height * width * 3);
  pixels.forEach((_, at) => (pixels[at] = value(Math.floor(at / 3) % width, Math.floor(at / 3 / width), at % 3)));
  const resized = await tf.image.resizeBilinear(tf.tensor(pixels, [1, height, width, 3]), [512, 512]).data();
  const sums = [0, 0, 0];
  resized.forEach((pixel, at) => (sums[at % 3] += pixel));
  const values = [...resized].filter((_, at) => at % 4999 === 0);
  pictures.push({ size: [height, width], sums, values });
}
const versions = { "tfjs-core": tf.version_core, node: process.version };
console.log(JSON.stringify({ versions, pictures }));
