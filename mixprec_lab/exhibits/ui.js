// What the exhibits share in the page: elements, labelled controls, state, links.  Text always goes in as text.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

export const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
export const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

// Ids of one page must differ although every exhibit brings its own copy of this module.
const instance = Math.random().toString(36).slice(2, 8);
let counter = 0;
export const uid = (stem) => `mpl-${stem}-${instance}-${++counter}`;

// Write text into a node; "2^-12" is shown raised but stays "2^-12" for copying and for assistive technology.
export function write(node, text) {
  if (node.dataset.text === text) return;
  node.dataset.text = text;
  const parts = text.split(/\^(-?\d+(?:\.\d+)?)/);
  if (parts.length === 1) { node.textContent = text; return; }
  node.replaceChildren(...parts.map((part, i) =>
    i % 2 ? h("span", {}, h("span", { class: "mpl-hidden" }, "^"), h("sup", {}, part)) : part));
}

// The colour of a format, light and dark, for anything of class mpl-fc inside the node.
export function paintFormat(node, f) {
  node.classList.add("mpl-fc");
  node.style.setProperty("--mpl-light", f.colours[0]);
  node.style.setProperty("--mpl-dark", f.colours[1]);
  return node;
}

export function select(label, options, onchange) {
  const id = uid("select");
  const field = h("select", { id, onchange: () => onchange(field.value) },
    ...options.map(([value, text]) => h("option", { value }, text)));
  return {
    node: h("div", { class: "mpl-field" }, h("label", { for: id }, label), field),
    field,
    show: (value) => { field.value = value; },
  };
}

// A native slider with its value in words.
export function slider(label, { min, max, step = 1, name }, text, oninput) {
  const id = uid("range"), value = h("span", { class: "mpl-value", "data-value": name });
  const field = h("input", { id, type: "range", min, max, step, name, oninput: () => oninput(Number(field.value)) });
  return {
    node: h("div", { class: "mpl-field mpl-range" }, h("label", { for: id }, label), value, field),
    field,
    show: (number) => {
      field.value = number;
      const words = text(number);
      field.setAttribute("aria-valuetext", words);
      write(value, words);
    },
  };
}

// A text field that acts while one types; text that parse() refuses changes nothing and is named when one leaves it.
export function textField(label, name, parse, accept) {
  const id = uid("text"), complaint = h("p", { class: "mpl-error", id: id + "-error", role: "alert" });
  const read = (complain) => {
    const { error } = parse(field.value);
    const shown = error && (complain || complaint.textContent) ? error : "";
    complaint.textContent = shown;
    field.setAttribute("aria-invalid", shown ? "true" : "false");
    if (!error) accept(field.value.trim());
  };
  const field = h("input", {
    id, name, type: "text", autocomplete: "off", spellcheck: "false", "aria-describedby": id + "-error",
    oninput: () => read(false), onchange: () => read(true),
  });
  return {
    node: h("div", { class: "mpl-field" }, h("label", { for: id }, label), field, complaint),
    field,
    show: (text) => {
      if (field.value.trim() === text) return;
      field.value = text;
      complaint.textContent = "";
      field.setAttribute("aria-invalid", "false");
    },
    complain: (words) => { complaint.textContent = words; },
  };
}

export const button = (label, onclick, attributes = {}) =>
  h("button", { type: "button", class: "mpl-button", onclick, ...attributes }, label);

// A table row of cells whose text is found again by data-field.
export function cells(names) {
  const found = {}, row = h("tr", {});
  for (const name of names) row.append(found[name] = h("td", { "data-field": name }));
  return { row, found };
}

// The formats in the order Python gave them; the built page hands them over sorted by name.
export const formatsOf = (model) =>
  Object.fromEntries(Object.entries(model.get("formats")).sort((a, b) => a[1].rank - b[1].rank));

// A list of terms and values; returns the node and the values' nodes by name.
export function facts(entries) {
  const values = {}, node = h("dl", { class: "mpl-facts" });
  for (const [name, term] of entries) {
    values[name] = h("dd", { "data-field": name });
    node.append(h("div", {}, h("dt", {}, term), values[name]));
  }
  return { node, values };
}

// The root element, its title and hint, and the "copy link" row at its end.
export function frame({ model, el, kind, title, hint }, ...content) {
  const id = uid("title");
  const root = h("div", { class: "mpl-exhibit", "data-exhibit": kind, role: "group", "aria-labelledby": id },
    h("div", { class: "mpl-body" },
      h("p", { class: "mpl-title", id }, title), h("p", { class: "mpl-hint" }, hint), ...content));
  el.append(root);
  return root;
}

// The state of an exhibit: read it, change several traits with one repaint, follow changes made elsewhere.
export function follow(model, keys, paint) {
  let busy = false;
  const heard = () => { if (!busy) paint(); };
  for (const key of keys) model.on("change:" + key, heard);
  return {
    update(changes) {
      busy = true;
      for (const [key, value] of Object.entries(changes)) model.set(key, value);
      busy = false;
      model.save_changes();
      paint();
    },
    stop() { for (const key of keys) model.off("change:" + key, heard); },
  };
}

// Questions one at a time, for the newest version only: what changes before the answer is asked after it, once.
export function newestOnly(ask) {
  let version = 0, asked = 0;
  const next = () => { asked = version; ask(version); };
  return {
    changed() { version += 1; if (!asked) next(); },
    // Whether the answer with this number is awaited and still about the present state.
    answered(number) {
      if (number !== asked) return false;
      asked = 0;
      if (number === version) return true;
      next();
      return false;
    },
  };
}

const tookText = (ms) => (ms < 0.1 ? "less than 0.1 ms" : `${ms.toFixed(1)} ms`);
const ALONE = "Computed in your browser; no kernel has answered yet.";
const WAITING = "Computed in your browser; the kernel is still at work on this state.";
const PATIENCE = 400; // milliseconds for which the last answer may stay beside a newer state
const FAILED = "The kernel could not compute this state; the numbers come from your browser.";

// The kernel behind an exhibit.  It is asked after every change, `show` gets the texts of its answers, and what it says
// stands behind the node `after`.  A page without a kernel refuses the first question: then nothing is added.
export function live({ model, after, keys, show }) {
  const view = uid("view"), stateOf = () => Object.fromEntries(keys.map((key) => [key, model.get(key)]));
  const line = h("p", { class: "mpl-muted mpl-source", "data-live": "line" }, ALONE);
  const said = h("output", { class: "mpl-say", "data-live": "said", "aria-live": "polite", hidden: true });
  const alert = h("p", { class: "mpl-error", role: "alert", "data-live": "error" });
  const questions = newestOnly((id) => model.send({ kind: "compute", view, id, state: stateOf() }));
  let state = null, texts = null, timer = 0, known = false;
  const late = () => {
    line.textContent = known ? WAITING : ALONE;
    if (!said.hidden) write(said, "\u2026");
  };
  const heard = (content) => {
    if (content.kind !== "answer" || content.view !== view || !questions.answered(content.id)) return;
    clearTimeout(timer);
    [timer, known] = [0, true];
    alert.textContent = content.error ?? "";
    texts = content.error ? null : content.texts;
    line.textContent = content.error ? FAILED : `Computed by the kernel on ${content.device}, ${content.path.replace(/^\w+: /, "")}: `
      + `${content.elements ? `${content.elements} values in ` : ""}${tookText(content.milliseconds)}.`;
    write(said, content.error ? "" : content.said);
    said.hidden = !said.textContent;
    if (texts) show(texts);
  };
  const changed = (data = false) => {
    const now = JSON.stringify(stateOf());
    if (now === state && !data) { // repainted, as after a change of width
      if (texts) show(texts);
      return;
    }
    [state, texts] = [now, null];
    questions.changed();
    timer ||= setTimeout(late, PATIENCE);
  };
  const leave = () => {
    clearTimeout(timer);
    model.off("msg:custom", heard);
    try { model.send({ kind: "gone", view }); } catch { /* a kernel that has gone needs no goodbye */ }
  };
  model.on("msg:custom", heard);
  try {
    changed();
  } catch {
    model.off("msg:custom", heard);
    return { changed() {}, stop() {} };
  }
  after.after(said, alert, line);
  return { changed, stop: leave };
}

// A table that scrolls in its own box where the page is narrow.
export function table(caption, heads, rows) {
  return h("div", { class: "mpl-scroll", role: "group", tabindex: 0, "aria-label": caption },
    h("table", {}, h("caption", {}, caption),
      h("thead", {}, h("tr", {}, ...heads.map((text) => h("th", { scope: "col" }, text)))), h("tbody", {}, ...rows)));
}

// The row header of a format, with its colour.
export const rowHead = (f, ...more) =>
  h("th", { scope: "row" }, paintFormat(h("span", { class: "mpl-name" }, f.title), f), ...more);

// A link that restores the state: #<name>:key=value&...; `restore` gets a plain object of strings and checks it.
export function links({ model, keys, root, restore }) {
  const prefix = "#" + model.get("name") + ":";
  const said = h("span", { role: "status", class: "mpl-muted", "data-field": "link-status" });
  const id = uid("link"), field = h("input", { id, type: "text", readonly: true, class: "mpl-link" });
  const shown = h("div", { class: "mpl-field", hidden: true }, h("label", { for: id }, "Link to this state"), field);
  const address = () => {
    const state = new URLSearchParams(keys.map((key) => [key, String(model.get(key))]));
    return location.href.split("#")[0] + prefix + state;
  };
  const copyLink = async () => {
    const link = address();
    try {
      await navigator.clipboard.writeText(link);
      said.textContent = "Link copied.";
      shown.hidden = true;
    } catch {
      said.textContent = "The clipboard is not available: copy the link from the field.";
      shown.hidden = false;
      field.value = link;
      field.focus();
      field.select();
    }
  };
  const read = () => {
    if (!location.hash.startsWith(prefix)) return;
    restore(Object.fromEntries(new URLSearchParams(location.hash.slice(prefix.length))));
    root.scrollIntoView({ block: "center" });
  };
  root.firstChild.append(h("div", { class: "mpl-foot" }, button("Copy link", copyLink, { "data-action": "copy-link" }), said,
    shown));
  addEventListener("hashchange", read);
  return { read, stop: () => removeEventListener("hashchange", read) };
}

// Keep from `raw` what the checks accept: { key: (text) => value or undefined }.
export function checked(raw, checks) {
  const state = {};
  for (const [key, check] of Object.entries(checks)) {
    const value = raw[key] === undefined ? undefined : check(raw[key]);
    if (value !== undefined) state[key] = value;
  }
  return state;
}

export const oneOf = (values) => (text) => (values.includes(text) ? text : undefined);
export const finite = (text) => (text.trim() !== "" && Number.isFinite(Number(text)) ? Number(text) : undefined);
export const whole = (low, high) => (text) => {
  const n = Number(text);
  return text !== "" && Number.isInteger(n) && n >= low && n <= high ? n : undefined;
};

const NARROWEST = 240; // pixels

// A drawing as wide as its place, redrawn when that changes, so that its text keeps its size on a phone.
// Its height is a number, or a function of the width.
export function drawing(height, draw) {
  let width = 0;
  const heightAt = typeof height === "function" ? height : () => height, node = svg("svg", { role: "img" });
  // While a page is being laid out a drawing can be a few pixels wide, too few for its margins: then it is scaled down.
  const measured = () => node.clientWidth && Math.max(NARROWEST, Math.round(node.clientWidth));
  const observer = new ResizeObserver(() => {
    const now = measured();
    if (now && now !== width) { width = now; draw(); }
  });
  observer.observe(node);
  return {
    node,
    stop: () => observer.disconnect(),
    // Replace the picture: `make(width, height)` returns its parts; `label` says in words what it shows.
    show(label, make) {
      width = measured() || width || 680;
      const tall = heightAt(width);
      node.setAttribute("height", tall);
      node.setAttribute("viewBox", `0 0 ${width} ${tall}`);
      node.setAttribute("aria-label", label);
      node.replaceChildren(...make(width, tall));
    },
  };
}

export const MODES = [
  ["nearest_even", "nearest, ties to even"], ["nearest_away", "nearest, ties away"],
  ["toward_zero", "toward zero"], ["up", "up (to +inf)"], ["down", "down (to \u2212inf)"],
];
