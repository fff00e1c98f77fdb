// What an exhibit's JavaScript computes for many states that a test wrote, in one process.
// node states.mjs <folder>: the folder holds module.mjs (es_module of the exhibit) and job.json; answers.json is written.

import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const folder = process.argv[2];
const js = await import(pathToFileURL(join(folder, "module.mjs")));
const { kind, traits, states } = JSON.parse(readFileSync(join(folder, "job.json"), "utf8"));

const answers = {
  "autocast-microscope": () => (state) => js.texts(js.compute(state, traits), traits),
  "loss-scale-lab": () => {
    const book = js.bookOf({ get: (key) => traits[key] });
    return (state) => {
      const t = book.tensors[state.stage][book.names.indexOf(state.tensor)], edges = book.edges[state.format];
      return { texts: js.texts(state, traits.formats, book), fates: js.fates(t, edges, state.log2_scale),
        bars: js.bars(t, edges, state.log2_scale) };
    };
  },
  "scaler-simulator": () => (state) => {
    const found = js.compute(state, traits.rules), exact = (list) => Array.from(list, (v) => (v === Infinity ? "inf" : v));
    return { texts: js.texts(found, state, traits.rules), stream: exact(found.stream),
      runs: found.runs.map((run) => ({ before: exact(run.before), after: exact(run.after), left: [...run.left],
        overflow: [...run.overflow], endedAt: run.endedAt })) };
  },
  "scale-history": () => (state) => {
    const found = js.compute(state, traits.data, traits.formats), exact = (list) => Array.from(list, String);
    return { texts: js.texts(found, state), amax: exact(found.stream), scale: exact(found.scale), clipped: exact(found.clipped),
      flushed: exact(found.flushed), sqnr: exact(found.sqnr) };
  },
  "sum-over-ranks": () => (state) => {
    const found = js.compute(state, traits.formats);
    return { texts: js.texts(found), values: Array.from(js.contributions(state)) };
  },
  "precision-chooser": () => (state) => js.texts(state, traits),
  regimes: () => (state) => {
    const { gaps, texts } = js.compute(state, traits.data), exact = (gap) => gap && gap.map(String);
    return { texts, gaps: Object.fromEntries(Object.entries(gaps).map(([name, gap]) => [name, exact(gap)])) };
  },
  museum: () => (state) => js.texts(state, traits),
  drill: () => ({ call, args }) => (call === "texts" ? js.texts(args[0], traits) : js[call](...args)),
  clinic: () => (state) => js.texts(state, traits),
  "one-tensor": () => (state) => {
    const { tensor, found, shown, ...rest } = js.compute(state, traits);
    return { texts: js.texts({ tensor, found, shown, ...rest }, state), x: Array.from(tensor.x), hit: Array.from(tensor.hit),
      back: Array.from(shown.trip.back) };
  },
  "same-tensor": () => (state) => js.texts(js.compute(state, traits), state, traits),
  "will-it-be-faster": () => (state) => {
    const found = js.compute(state, traits.tables);
    return { texts: js.texts(found, state, traits.tables), found };
  },
  "memory-calculator": () => (state) => {
    const found = js.compute(state, traits.tables);
    return { texts: js.texts(found, state, traits.tables), bills: found.bills };
  },
};
writeFileSync(join(folder, "answers.json"), JSON.stringify(states.map(answers[kind]())));
