// Runs anywidget front-end modules in a page that has no kernel.
// MyST-NB writes the widgets' state into the page; this host reads it, gives each widget a model that lives in the
// page, and renders its views.  Traits work as in Jupyter; custom messages need a kernel and are refused.
(function () {
  "use strict";
  const STATE = 'script[type="application/vnd.jupyter.widget-state+json"]';
  const VIEW = 'script[type="application/vnd.jupyter.widget-view+json"]';

  // Binary traits travel as base64 beside the state; put them where they belong.
  function unpack(entry) {
    const state = entry.state;
    for (const { data, path } of entry.buffers || []) {
      const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
      const owner = path.slice(0, -1).reduce((node, key) => node[key], state);
      owner[path.at(-1)] = new DataView(bytes.buffer);
    }
    return state;
  }

  class Model {
    constructor(state) {
      this.state = state;
      this.handlers = new Map();
    }
    get(key) {
      return this.state[key];
    }
    set(key, value) {
      if (typeof key === "object") {
        for (const [k, v] of Object.entries(key)) this.set(k, v);
        return;
      }
      if (Object.is(this.state[key], value)) return;
      this.state[key] = value;
      this.emit("change:" + key, value);
      this.emit("change", value);
    }
    emit(event, value) {
      for (const handler of [...(this.handlers.get(event) || [])]) handler(this, value);
    }
    save_changes() {} // there is nowhere to save to
    send() {
      throw new Error("this page has no kernel to send a message to");
    }
    on(events, handler) {
      for (const event of events.split(" ")) {
        if (!this.handlers.has(event)) this.handlers.set(event, new Set());
        this.handlers.get(event).add(handler);
      }
    }
    off(events, handler) {
      if (!events) return this.handlers.clear();
      for (const event of events.split(" ")) {
        if (handler) this.handlers.get(event)?.delete(handler);
        else this.handlers.delete(event);
      }
    }
  }

  const once = (map, key, make) => (map.has(key) ? map : map.set(key, make())).get(key);

  // One module per source text, one style element per style sheet, one model per widget (its views share it).
  const modules = new Map();
  const styles = new Map();
  const models = new Map();

  async function importSource(source) {
    const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
    try {
      const module = await import(url);
      const widget = module.default || module;
      return typeof widget === "function" ? await widget() : widget;
    } finally {
      URL.revokeObjectURL(url);
    }
  }

  function addStyle(text) {
    const style = document.createElement("style");
    style.textContent = text;
    document.head.append(style);
    return style;
  }

  async function open(entry) {
    const model = new Model(unpack(entry));
    if (model.get("_css")) once(styles, model.get("_css"), () => addStyle(model.get("_css")));
    const widget = await once(modules, model.get("_esm"), () => importSource(model.get("_esm")));
    await widget.initialize?.({ model, signal: new AbortController().signal });
    return { widget, model };
  }

  async function show(tag, states, el) {
    const id = JSON.parse(tag.textContent).model_id;
    const entry = states[id];
    if (!entry) throw new Error("its state is not in the page");
    if (entry.model_module !== "anywidget") throw new Error(entry.model_module + " needs a kernel");
    const { widget, model } = await once(models, id, () => open(entry));
    await widget.render?.({ model, el, signal: new AbortController().signal });
  }

  function start() {
    const states = JSON.parse(document.querySelector(STATE)?.textContent || '{"state":{}}').state;
    for (const tag of document.querySelectorAll(VIEW)) {
      const el = document.createElement("div");
      el.className = "afm-widget";
      el.dataset.widget = "loading";
      tag.after(el);
      show(tag, states, el).then(
        () => (el.dataset.widget = "ready"),
        (error) => {
          console.error(error);
          el.dataset.widget = "error";
          el.setAttribute("role", "alert");
          el.textContent = "This exhibit could not start: " + error.message + ".";
        },
      );
    }
  }

  if (document.readyState === "loading") addEventListener("DOMContentLoaded", start, { once: true });
  else start();
})();
