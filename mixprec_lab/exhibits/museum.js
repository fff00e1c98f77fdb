// The museum's list of rooms: two filters, links to the rooms, and ticks that this browser remembers.

import { checked, follow, frame, h, links, oneOf, select, uid, write } from "./ui.js";

const KEYS = ["theme", "level"];
const ALL = "all";
const STORE = "mixprec-lab:museum";

export const shownOf = ({ theme, level }, { rooms }) =>
  rooms.filter((r) => [ALL, r.theme].includes(theme) && [ALL, r.level].includes(level));

// Every text, by data-field; the twin of Museum.result().
export function texts(state, data) {
  const shown = shownOf(state, data), titles = Object.fromEntries([...data.themes, ...data.levels]);
  const done = shown.filter((r) => state.solved.includes(r.name)).length;
  const out = { verdict: `${shown.length} of ${data.rooms.length} rooms; ${done} of them solved.` };
  for (const { name, title, theme, level } of shown) {
    Object.assign(out, { [name]: title, [`${name}-level`]: titles[level], [`${name}-theme`]: titles[theme] });
  }
  return out;
}

// The ticks that this browser remembers; a page that may not store anything starts without.
function remembered(names) {
  try {
    const kept = JSON.parse(localStorage.getItem(STORE) ?? "[]");
    return Array.isArray(kept) ? kept.filter((name) => names.includes(name)) : [];
  } catch { return []; }
}

function remember(solved) {
  try { localStorage.setItem(STORE, JSON.stringify(solved)); } catch { return false; }
  return true;
}

function roomRow({ name, anchor }, words, toggle) {
  const id = uid("room"), box = h("input", { id, type: "checkbox", class: "mpl-tick", "data-room": name, onchange: () => toggle(name) });
  const part = (key, attributes) => h("span", { "data-field": key, ...attributes }, words[key]);
  const label = h("label", { for: id }, h("span", { class: "mpl-hidden" }, `solved: ${words[name]}`));
  return { box, node: h("li", {}, h("span", { class: "mpl-tick-place" }, box, label),
    h("a", { href: `#${anchor}`, "data-field": name }, words[name]),
    part(`${name}-level`, { class: "mpl-muted" }), part(`${name}-theme`, { class: "mpl-muted" })) };
}

function render({ model, el }) {
  const data = { rooms: model.get("rooms"), themes: model.get("themes"), levels: model.get("levels") };
  const names = data.rooms.map((r) => r.name);
  const state = () => ({ theme: model.get("theme"), level: model.get("level"), solved: model.get("solved") });
  const lists = {
    theme: select("Theme", [[ALL, "all themes"], ...data.themes], (v) => set({ theme: v })),
    level: select("Difficulty", [[ALL, "all"], ...data.levels], (v) => set({ level: v })),
  };
  const said = h("output", { class: "mpl-say", "aria-live": "polite" }), verdict = h("strong", { "data-field": "verdict" });
  said.append(verdict);
  const list = h("ul", { class: "mpl-rooms" }), failed = h("span", { class: "mpl-muted", role: "status" });
  const root = frame({ model, el, kind: "museum", title: "The rooms",
    hint: "Filter, follow a title to its room, and tick it when it is solved." },
  h("div", { class: "mpl-controls" }, ...Object.values(lists).map((control) => control.node)), said,
  h("div", { class: "mpl-scroll mpl-tall", role: "group", tabindex: 0, "aria-label": "The rooms that pass the filters" }, list), failed);
  const toggle = (name) => {
    const { solved } = state(), next = solved.includes(name) ? solved.filter((n) => n !== name) : [...solved, name];
    write(failed, remember(next) ? "" : "This browser keeps no ticks: they are gone with the page.");
    set({ solved: next });
  };
  let drawn = null, boxes = [];
  const paint = () => {
    const now = state(), words = texts(now, data), filter = `${now.theme} ${now.level}`;
    for (const key of KEYS) lists[key].show(now[key]);
    write(verdict, words.verdict);
    if (drawn !== filter) {
      const rows = shownOf(now, data).map((room) => roomRow(room, words, toggle));
      list.replaceChildren(...rows.map((row) => row.node));
      boxes = rows.map((row) => row.box);
      drawn = filter;
    }
    for (const box of boxes) box.checked = now.solved.includes(box.dataset.room);
  };
  const { update: set, stop } = follow(model, [...KEYS, "solved"], paint);
  const kept = remembered(names).filter((name) => !model.get("solved").includes(name));
  if (kept.length) set({ solved: [...model.get("solved"), ...kept] });
  paint();
  const link = links({ model, keys: KEYS, root, restore: (raw) => set(checked(raw, {
    theme: oneOf([ALL, ...data.themes.map(([name]) => name)]), level: oneOf([ALL, ...data.levels.map(([name]) => name)]) })) });
  link.read();
  return () => { stop(); link.stop(); };
}

export default { render };
