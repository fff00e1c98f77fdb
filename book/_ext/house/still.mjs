// The first view of exhibits as HTML that needs no JavaScript: what a page shows where scripts are off.
// node still.mjs < [{state, buffers}, ...] > ["<div ...>", ...].  The exhibits draw themselves, into the small document
// below: it knows what they use and refuses the rest, so that a picture is whole or the build fails.

import { Buffer } from "node:buffer";
import { readFileSync, writeFileSync } from "node:fs";

const WIDE = 640; // pixels of a drawing: as wide as the text of a page, see .mpl-still-drawing in book.css
const HTML = "http://www.w3.org/1999/xhtml";
const VOID = new Set(["area", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"]);
const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll('"', "&quot;");
const dashed = (name) => name.replace(/[A-Z]/g, (c) => "-" + c.toLowerCase());
const nothing = () => {};

class Text {
  constructor(data) { this.data = String(data); this.parentNode = null; Object.seal(this); }
  get textContent() { return this.data; }
  remove() { detach(this); }
  toString() { return escaped(this.data); }
}

function detach(node) {
  if (node.parentNode) node.parentNode.childNodes.splice(node.parentNode.childNodes.indexOf(node), 1);
  node.parentNode = null;
}

function put(parent, at, nodes) {
  for (const given of nodes) {
    const node = given instanceof Element || given instanceof Text ? given : new Text(given);
    detach(node);
    parent.childNodes.splice(at++, 0, node);
    node.parentNode = parent;
  }
}

// tag, .class, #id and [name] or [name=value], in one; anything longer is refused.
function test(selector) {
  const parts = selector.match(/^[a-z*]+|\.[\w-]+|#[\w-]+|\[[\w-]+(?:="?[^"\]]*"?)?\]/g) ?? [];
  if (parts.join("") !== selector) throw new Error(`still.mjs does not know the selector ${selector}`);
  return (node) => parts.every((part) => {
    if (part[0] === ".") return node.classes.has(part.slice(1));
    if (part[0] === "#") return node.getAttribute("id") === part.slice(1);
    if (part[0] !== "[") return part === "*" || node.localName === part;
    const [name, value] = part.slice(1, -1).split(/="?|"$/);
    return value === undefined ? node.hasAttribute(name) : node.getAttribute(name) === value;
  });
}
const anyOf = (selectors) => {
  const tests = selectors.split(",").map((one) => test(one.trim()));
  return (node) => tests.some((t) => t(node));
};

class Element {
  constructor(tag, namespace = HTML) {
    Object.assign(this, { localName: tag, namespaceURI: namespace, parentNode: null, childNodes: [], chosen: null });
    this.attributes = new Map();
    this.dataset = new Proxy(this, {
      get: (node, key) => node.getAttribute("data-" + dashed(key)) ?? undefined,
      set: (node, key, value) => { node.setAttribute("data-" + dashed(key), value); return true; },
      deleteProperty: (node, key) => { node.removeAttribute("data-" + dashed(key)); return true; },
    });
    const setProperty = (name, value) => {
      const kept = (this.getAttribute("style") ?? "").split("; ").filter((rule) => rule && !rule.startsWith(name + ": "));
      const rules = value === "" ? kept : [...kept, `${name}: ${value}`];
      if (rules.length) this.setAttribute("style", rules.join("; "));
      else this.removeAttribute("style");
    };
    this.style = new Proxy({ setProperty }, {
      set: (_, key, value) => { setProperty(dashed(key), value); return true; },
    });
    this.classList = {
      add: (...names) => { this.className = [...new Set([...this.classes, ...names])].join(" "); },
      remove: (...names) => { this.className = [...this.classes].filter((name) => !names.includes(name)).join(" "); },
      toggle: (name, on = !this.classes.has(name)) => { this.classList[on ? "add" : "remove"](name); return on; },
      contains: (name) => this.classes.has(name),
    };
    Object.seal(this); // what this document does not know cannot be set unnoticed
  }

  get classes() { return new Set((this.getAttribute("class") ?? "").split(/\s+/).filter(Boolean)); }
  get className() { return this.getAttribute("class") ?? ""; }
  set className(value) { this.setAttribute("class", value); }
  get tagName() { return this.namespaceURI === HTML ? this.localName.toUpperCase() : this.localName; }
  get children() { return this.childNodes.filter((node) => node instanceof Element); }
  get firstChild() { return this.childNodes[0] ?? null; }
  get lastChild() { return this.childNodes.at(-1) ?? null; }
  get firstElementChild() { return this.children[0] ?? null; }
  get lastElementChild() { return this.children.at(-1) ?? null; }
  get parentElement() { return this.parentNode; }
  get isConnected() { return true; }
  get all() { return this.children.flatMap((node) => [node, ...node.all]); }
  get textContent() { return this.childNodes.map((node) => node.textContent).join(""); }
  set textContent(text) { this.replaceChildren(...(text === "" ? [] : [text])); }

  getAttribute(name) { return this.attributes.get(name) ?? null; }
  setAttribute(name, value) { this.attributes.set(name, String(value)); }
  removeAttribute(name) { this.attributes.delete(name); }
  hasAttribute(name) { return this.attributes.has(name); }
  toggleAttribute(name, on = !this.hasAttribute(name)) { if (on) this.setAttribute(name, ""); else this.removeAttribute(name); }

  append(...nodes) { put(this, this.childNodes.length, nodes); }
  prepend(...nodes) { put(this, 0, nodes); }
  before(...nodes) { put(this.parentNode, this.parentNode.childNodes.indexOf(this), nodes); }
  after(...nodes) { put(this.parentNode, this.parentNode.childNodes.indexOf(this) + 1, nodes); }
  replaceChildren(...nodes) { [...this.childNodes].forEach(detach); this.append(...nodes); }
  replaceWith(...nodes) { this.before(...nodes); this.remove(); }
  remove() { detach(this); }
  contains(node) { return node === this || this.all.includes(node); }
  matches(selectors) { return anyOf(selectors)(this); }
  closest(selectors) { return this.matches(selectors) ? this : this.parentNode?.closest(selectors) ?? null; }
  querySelectorAll(selectors) { return this.all.filter(anyOf(selectors)); }
  querySelector(selectors) { return this.querySelectorAll(selectors)[0] ?? null; }

  // Controls
  get options() { return this.querySelectorAll("option"); }
  get selectedOptions() {
    const found = this.options.filter((o) => o.value === this.chosen);
    return (found.length ? found : this.options).slice(0, 1);
  }
  get selectedIndex() { return this.options.indexOf(this.selectedOptions[0]); }
  get value() {
    if (this.localName === "select") return this.selectedOptions[0]?.value ?? "";
    if (this.localName === "textarea") return this.chosen ?? this.textContent;
    return this.chosen ?? this.getAttribute("value") ?? (this.localName === "option" ? this.textContent : "");
  }
  set value(value) { this.chosen = String(value); }

  // No layout and nobody to answer to
  get viewBox() {
    const [x, y, width, height] = (this.getAttribute("viewBox") ?? "0 0 0 0").split(" ").map(Number);
    return { baseVal: { x, y, width, height } };
  }
  get clientWidth() { return this.localName === "svg" ? WIDE : 0; }
  get clientHeight() { return 0; }
  get offsetWidth() { return 0; }
  getBoundingClientRect() { return { left: 0, top: 0, right: 0, bottom: 0, width: 0, height: 0, x: 0, y: 0 }; }

  toString() {
    const attributes = [...this.attributes].map(([name, value]) => (value === "" ? ` ${name}` : ` ${name}="${escaped(value)}"`));
    const open = `<${this.localName}${attributes.join("")}>`;
    return VOID.has(this.localName) ? open : `${open}${this.childNodes.join("")}</${this.localName}>`;
  }
}
for (const name of ["addEventListener", "removeEventListener", "dispatchEvent", "focus", "blur", "select", "click",
  "scrollIntoView", "setPointerCapture", "setSelectionRange", "showModal"]) Element.prototype[name] = nothing;
for (const name of ["hidden", "disabled", "checked", "open", "readOnly", "required", "multiple"]) {
  Object.defineProperty(Element.prototype, name, {
    get() { return this.hasAttribute(name.toLowerCase()); },
    set(on) { this.toggleAttribute(name.toLowerCase(), Boolean(on)); },
  });
}
for (const [name, attribute] of Object.entries({ id: "id", href: "href", title: "title", name: "name", type: "type", min: "min",
  max: "max", step: "step", rows: "rows", role: "role", htmlFor: "for", tabIndex: "tabindex", download: "download",
  placeholder: "placeholder", ariaLabel: "aria-label" })) {
  Object.defineProperty(Element.prototype, name, {
    get() { return this.getAttribute(attribute) ?? ""; },
    set(value) { this.setAttribute(attribute, value); },
  });
}

// The page around it: a built page at its plain address, seen for the first time.
let drawn = 0;
const page = {
  document: {
    createElement: (tag) => new Element(tag),
    createElementNS: (namespace, tag) => new Element(tag, namespace),
    createTextNode: (text) => new Text(text),
    querySelector: (selector) => (selector.startsWith('script[type="application/vnd.jupyter.widget-state') ? new Element("script") : null),
    addEventListener: nothing, removeEventListener: nothing, activeElement: null, hidden: false,
  },
  location: { href: "", hash: "", search: "", protocol: "file:" },
  localStorage: { getItem: () => null, setItem: nothing, removeItem: nothing },
  ResizeObserver: class { observe() {} disconnect() {} },
  addEventListener: nothing, removeEventListener: nothing,
  setInterval: () => 0, setTimeout: () => 0, requestAnimationFrame: () => 0,
};
for (const [name, value] of Object.entries(page)) Object.defineProperty(globalThis, name, { value, configurable: true });
Math.random = () => 0.5 + ++drawn / 2 ** 32; // ids of exhibits start with it: the same in every build, and no two alike

class Model {
  constructor(state) { this.state = state; }
  get(key) { return this.state[key]; }
  set(key, value) { this.state[key] = value; }
  save_changes() {}
  send() { throw new Error("this page has no kernel to send a message to"); }
  on() {}
  off() {}
}

function unpack({ state, buffers }) {
  for (const { data, path } of buffers ?? []) {
    const owner = path.slice(0, -1).reduce((node, key) => node[key], state);
    owner[path.at(-1)] = new DataView(Uint8Array.from(Buffer.from(data, "base64")).buffer);
  }
  return state;
}

// A control becomes the words it stands at.
function words(text) {
  const node = new Element("span");
  node.className = "mpl-still-value";
  node.append(text);
  return node;
}

function settle(root) {
  for (const node of root.all) {
    if (node.hidden || node.matches(".mpl-foot, button.mpl-button, input[type=range], input[type=file], .mpl-error")) node.remove();
    else if (node.localName === "select") node.replaceWith(words(node.selectedOptions[0]?.textContent ?? ""));
    else if (node.localName === "textarea" || node.matches("input[type=text], input[type=number]")) node.replaceWith(words(node.value));
    else if (node.localName === "input") node.disabled = true;
    else if (node.localName === "svg" && node.viewBox.baseVal.width >= 480) node.classList.add("mpl-still-drawing");
    else if (["button", "label", "output"].includes(node.localName)) {
      node.classList.add(`mpl-still-${node.localName}`);
      node.localName = "span";
    }
  }
  for (const node of [root, ...root.all]) {
    for (const name of [...node.attributes.keys()]) {
      const idle = ["tabindex", "for", "type", "aria-live", "aria-pressed", "aria-controls", "aria-describedby"].includes(name);
      if ((idle && node.localName !== "input") || (name.startsWith("data-") && !["data-field", "data-exhibit"].includes(name))) {
        node.removeAttribute(name);
      }
    }
  }
  return root;
}

const modules = new Map();
async function still(entry) {
  const state = unpack(entry), source = state._esm;
  if (!modules.has(source)) modules.set(source, await import("data:text/javascript;base64," + Buffer.from(source).toString("base64")));
  const el = new Element("div"), widget = modules.get(source).default;
  await widget.render({ model: new Model(state), el });
  if (el.childNodes.length !== 1) throw new Error(`expected one element of ${state.name ?? "an exhibit"}, got ${el.childNodes.length}`);
  return String(settle(el.firstChild));
}

const pictures = [];
for (const entry of JSON.parse(readFileSync(0, "utf8"))) {
  try {
    pictures.push(await still(entry));
  } catch (error) {
    const stack = String(error.stack).replaceAll(/data:text\/javascript;base64,[\w+/=]*/g, "module");
    writeFileSync(2, `${entry.state._anywidget_id ?? entry.state.name}: ${stack}\n`);
    process.exit(1);
  }
}
writeFileSync(1, JSON.stringify(pictures));
