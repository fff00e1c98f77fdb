// Runs float.js and text.js over the numbers that tests/test_exhibits.py wrote; doubles in, doubles out, in binary.
// node numerics.mjs <folder>: the folder holds module.mjs (the joined shared files), job.json and <format>.x.

import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const folder = process.argv[2];
const js = await import(pathToFileURL(join(folder, "module.mjs")));
const { formats, modes, policies, texts } = JSON.parse(readFileSync(join(folder, "job.json"), "utf8"));

function doubles(name) {
  const bytes = readFileSync(join(folder, name));
  return new Float64Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
}
const keep = (name, values) => writeFileSync(join(folder, name), new Uint8Array(Float64Array.from(values).buffer));
const absent = (v) => (v === null ? NaN : v);

for (const f of Object.values(formats)) {
  const x = doubles(`${f.name}.x`);
  keep(`${f.name}.codes`, x.map((v) => absent(js.encode(v, f))));
  for (const mode of modes) {
    for (const policy of policies) {
      keep(`${f.name}.${mode}.${policy}`, x.map((v) => js.quantize(v, f, mode, policy)));
    }
  }
  keep(`${f.name}.stochastic`, x.map((v, i) => js.quantize(v, f, "stochastic", "saturate", (i % 8) / 8)));
  if (f.bits > 16) continue;
  const values = Float64Array.from({ length: 2 ** f.bits }, (_, code) => js.decode(code, f));
  keep(`${f.name}.values`, values);
  keep(`${f.name}.again`, values.map((v) => absent(js.encode(v, f))));
  keep(`${f.name}.below`, values.map((v) => (v === v ? absent(js.neighbours(v, f)[0]) : NaN)));
  keep(`${f.name}.above`, values.map((v) => (v === v ? absent(js.neighbours(v, f)[1]) : NaN)));
  keep(`${f.name}.ulp`, values.map((v) => js.ulp(v, f)));
}

const numbers = doubles("numbers"), draw = js.mulberry32(7);
writeFileSync(join(folder, "answers.json"), JSON.stringify({
  parsed: texts.map((text) => js.parseNumber(text)).map(({ value, error }) => error ?? js.shortest(value)),
  shortest: Array.from(numbers, js.shortest),
  significant: Array.from(numbers, (v) => js.significant(v, 7)),
  power: Array.from(numbers, js.powerForm),
  exact: Array.from(numbers, js.exactDecimal),
  percent: Array.from(numbers, (v) => js.percent(Math.abs(v) % 1)),
  draws: Array.from({ length: 1000 }, draw),
}));
