// Flash cards that this browser remembers, and an exam against the clock; the twin of drill.py.

import {
  answer, begin, draw, exportProgress, gradeExam, importProgress, isOver, merge, queue, repeats, review, score, secondsLeft, stateOf,
} from "./drill_rules.js";
import { button, checked, follow, frame, h, links, oneOf, select, uid, write } from "./ui.js";

const KEYS = ["mode", "theme", "level", "order", "pile", "card", "side", "count", "minutes"];
const ALL = "all", STORE = "mixprec-lab:drill", KEPT_ASIDE = STORE + ":unreadable";
const BACK = [["short", "In short"], ["full", "In full"], ["mistake", "The usual mistake"], ["follow_up", "The next question"],
  ["follow_up_answer", "Its answer"]];
// What is on the table, and every text by data-field: the twin of Drill.result().

const cardsOf = ({ bank }) => Object.fromEntries(bank.map((card) => [card.id, card]));
const examOf = ({ exam }) => (Object.keys(exam).length ? exam : null);

export function clock(now) {
  if (now) return { today: now.slice(0, 10), second: Date.parse(now + "Z") / 1000 };
  const here = new Date();
  return { today: new Date(here - here.getTimezoneOffset() * 60_000).toISOString().slice(0, 10), second: Math.floor(here / 1000) };
}

export function passing({ theme, level, order }, { bank }) {
  const shown = bank.filter((card) => [ALL, card.theme].includes(theme) && [ALL, card.level].includes(level));
  if (order !== "mixed") return shown.map((card) => card.id);
  const piles = new Map();
  for (const card of shown) piles.set(card.theme, [...(piles.get(card.theme) ?? []), card.id]);
  const longest = Math.max(0, ...[...piles.values()].map((pile) => pile.length));
  return Array.from({ length: longest }, (_, n) => [...piles.values()].filter((pile) => n < pile.length).map((pile) => pile[n])).flat();
}

function tableOf(state, data) {
  const { today, second } = clock(state.now), ids = passing(state, data), order = queue(state.progress, ids, state.pile, today);
  const exam = examOf(state), cards = data.cards ?? cardsOf(data);
  const id = state.mode !== "exam" ? state.card || order[0] : exam && !isOver(exam, second) ? exam.ids[exam.grades.length] : undefined;
  return { today, second, ids, order, exam, cards, shown: cards[id] };
}

const LOOK = "Answer aloud, then look.";

function cardVerdict(state, { today, ids, order, shown }) {
  if (!shown) {
    if (!ids.length) return "No question passes the filters.";
    if (state.pile === "weak") return "No card scored below 4 at its last answer.";
    const following = ids.map((id) => state.progress[id].due).sort()[0];
    return `Nothing is due among ${ids.length === 1 ? "this one card" : `these ${ids.length} cards`}; the next one is on ${following}.`;
  }
  const states = ids.map((id) => stateOf(state.progress, id)), count = (test) => states.filter(test).length;
  const at = order.indexOf(shown.id), place = at < 0 ? "A card from elsewhere" : `Card ${at + 1} of ${order.length}`;
  return `${place}: ${count((s) => s.due !== null && s.due <= today)} due, ${count((s) => s.due === null)} new, `
    + `${count((s) => s.again)} to repeat. ${state.side === "front" ? LOOK : "Grade yourself."}`;
}

function examVerdict(state, { second, ids, exam, cards }) {
  if (!exam) {
    if (!ids.length) return "No question passes the filters.";
    return `An exam of ${Math.min(state.count, ids.length)} of ${ids.length} questions in ${state.minutes} minutes.`;
  }
  const n = exam.ids.length, done = exam.grades.length;
  if (!isOver(exam, second)) return `Question ${done + 1} of ${n}. ${state.side === "front" ? LOOK : "Grade yourself: 3 and more passes."}`;
  const rows = [...score(exam, cards).values()], sum = (key) => rows.reduce((total, row) => total + row[key], 0);
  const missing = n > done ? ` ${n - done} not answered${exam.ended === null ? ": time was up" : ""}.` : "";
  return `${sum("passed")} of ${n} passed with 3 or more, ${sum("points")} of ${5 * n} points.${missing}`;
}

export function leftOf(state) {
  if (state.mode !== "exam") return "";
  const exam = examOf(state), seconds = exam ? secondsLeft(exam, clock(state.now).second) : 60 * state.minutes;
  return `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
}

function metaOf(state, shown, titles) {
  const said = `${titles[shown.theme]}, ${shown.level}`, { due, interval, ease } = stateOf(state.progress, shown.id);
  if (state.mode === "exam") return said;
  if (due === null) return `${said}; never seen`;
  return `${said}; due ${due}, interval ${interval} d, ease ${Math.floor(ease / 100)}.${String(ease % 100).padStart(2, "0")}`;
}

function nextOf(state, shown, quality, today) {
  if (!shown || state.mode === "exam") return "";
  const { interval, again } = answer(state.progress, shown.id, quality, today)[shown.id];
  if (repeats(stateOf(state.progress, shown.id), today)) return again ? "today" : "done";
  return again ? `today, ${interval} d` : `${interval} d`;
}

const plain = (text) => text.replaceAll("`", "");

function placeOf(proof) {
  const [page, anchor] = proof.split("#");
  return `${page}: ${anchor.replaceAll("-", " ")}`;
}

// With the backticks left in where `raw` is set: the page shows what they enclose as code.
export function texts(state, data, raw = false) {
  const table = tableOf(state, data), { shown, exam } = table, open = shown && state.side === "back", words = raw ? (x) => x : plain;
  const out = { verdict: state.mode === "exam" ? examVerdict(state, table) : cardVerdict(state, table), left: leftOf(state),
    meta: shown ? metaOf(state, shown, Object.fromEntries(data.themes)) : "", question: shown ? words(shown.question) : "",
    idle: shown || (state.mode === "exam" && exam) ? "" : data.choices.idle[state.mode], stub: shown?.stub ?? "", solution: (open && shown.solution) || "", proof: open ? placeOf(shown.proof) : "" };
  for (const [key] of BACK) out[key] = open ? words(shown[key]) : "";
  for (let q = 0; q < 6; q++) out[`next-${q}`] = nextOf(state, shown, q, table.today);
  if (state.mode === "exam" && exam && isOver(exam, table.second)) {
    for (const [theme, { asked, passed, points }] of score(exam, table.cards)) {
      out[`score-${theme}`] = `${passed} of ${asked} passed, ${points} of ${5 * asked} points`;
    }
  }
  return out;
}

// What this browser remembers.  A page that may not store anything works without, and says so.

function stored() {
  const text = localStorage.getItem(STORE);
  if (text === null) return {};
  try {
    return importProgress(text);
  } catch (error) {
    localStorage.setItem(KEPT_ASIDE, text);
    localStorage.removeItem(STORE);
    throw new Error(`What this browser kept cannot be read (${error.message}); it now lies under ${KEPT_ASIDE}.`);
  }
}

const NOT_KEPT = "This browser keeps no progress: export it before you leave the page.";

// The text with what stands between backticks as code.
function rich(node, text) {
  if (node.dataset.rich === text) return;
  node.dataset.rich = text;
  node.replaceChildren(...text.split("`").map((part, i) => {
    const piece = h(i % 2 ? "code" : "span", {});
    write(piece, part);
    return piece;
  }));
}

// The place in the book: a link in the built book, words in JupyterLab, where pages are notebooks.
function proofLink(node, proof) {
  if (!proof) return node.replaceChildren();
  const built = document.querySelector('script[type="application/vnd.jupyter.widget-state+json"]');
  const [page, anchor] = proof.split("#"), words = placeOf(proof);
  node.replaceChildren(built ? h("a", { href: `${page}.html#${anchor}` }, words) : words);
}

// The progress as a file or as text, in and out; `told` says what happened.
function keeping({ current, add, forget, told }) {
  const id = uid("progress"), text = h("textarea", { id, class: "mpl-text", rows: 6, spellcheck: "false" });
  const take = (content, from) => {
    try {
      const read = importProgress(content);
      add(read);
      told(`${Object.keys(read).length} cards read from ${from}.`);
    } catch (error) {
      told(`Nothing was read from ${from}, and nothing is lost: ${error.message}.`);
    }
  };
  const file = h("input", { id: uid("file"), type: "file", accept: ".json,application/json", class: "mpl-file",
    onchange: async () => {
      if (file.files.length) take(await file.files[0].text(), file.files[0].name);
      file.value = "";
    } });
  const save = () => {
    const href = URL.createObjectURL(new Blob([exportProgress(current())], { type: "application/json" }));
    h("a", { href, download: "mixprec-drill.json" }).click();
    setTimeout(() => URL.revokeObjectURL(href), 1000);
    told(`${Object.keys(current()).length} cards saved as mixprec-drill.json.`);
  };
  const show = () => {
    text.value = exportProgress(current());
    text.focus();
    text.select();
  };
  let sure = false;
  const erase = button("Forget everything", () => {
    if (sure) forget();
    else told("Press again to forget the progress of every card in this browser.");
    sure = !sure;
  }, { "data-action": "forget", onblur: () => { sure = false; } });
  return h("details", { class: "mpl-more" }, h("summary", {}, "Progress: export, import, forget"),
    h("div", { class: "mpl-field" }, h("label", { for: id }, "Progress as text"), text),
    h("div", { class: "mpl-row" }, button("Show as text", show, { "data-action": "show-text" }),
      button("Read this text", () => take(text.value, "the text"), { "data-action": "read-text" }),
      button("Save as a file", save, { "data-action": "save-file" }), erase),
    h("div", { class: "mpl-field" }, h("label", { for: file.id }, "Read a file"), file));
}

const HINT = "Click the card or tab to it; then Space shows the answer, 0 to 5 grade it, and the arrows → and ← skip.";
const pairs = (list, words) => list.map((value) => [String(value), words(value)]);

function controls({ themes, choices }, set) {
  const fresh = (key, convert = String) => (value) => set({ [key]: convert(value), card: "", side: "front" });
  return {
    mode: select("What", choices.modes, fresh("mode")),
    theme: select("Theme", [[ALL, "all themes"], ...themes], fresh("theme")),
    level: select("Level", [[ALL, "all levels"], ...choices.levels], fresh("level")),
    order: select("Order", choices.orders, fresh("order")),
    pile: select("Pile", choices.piles, fresh("pile")),
    count: select("Questions", pairs(choices.counts, String), fresh("count", Number)),
    minutes: select("Time", pairs(choices.minutes, (n) => `${n} minutes`), fresh("minutes", Number)),
  };
}

const CHECKS = ({ themes, choices, bank }) => {
  const first = (list) => list.map(([key]) => key), number = (list) => (text) => list.find((n) => String(n) === text);
  return { mode: oneOf(first(choices.modes)), theme: oneOf([ALL, ...first(themes)]), level: oneOf([ALL, ...first(choices.levels)]),
    order: oneOf(first(choices.orders)), pile: oneOf(first(choices.piles)), card: oneOf(["", ...bank.map((card) => card.id)]),
    side: oneOf(["front", "back"]), count: number(choices.counts), minutes: number(choices.minutes) };
};

// The card: every text in its place; parts that are empty do not show.
function cardBox(data) {
  const fields = {}, sections = {};
  const part = (key, title, tag = "p") => {
    fields[key] = h(tag, { "data-field": key });
    return (sections[key] = h("div", { hidden: true }, title && h("p", { class: "mpl-part-name" }, title), fields[key]));
  };
  const scores = h("dl", { class: "mpl-facts" });
  const node = h("div", { class: "mpl-scroll mpl-card", role: "group", tabindex: 0, "aria-label": "The card" },
    part("idle", ""), part("meta", ""), part("question", ""), part("stub", "Write this", "pre"), ...BACK.slice(0, 1).map(([key, title]) => part(key, title)),
    part("solution", "A solution", "pre"), ...BACK.slice(1).map(([key, title]) => part(key, title)), part("proof", "Proof"), scores);
  const titles = Object.fromEntries(data.themes);
  return { node, show(said, shown) {
    for (const [key, field] of Object.entries(fields)) {
      sections[key].hidden = said[key] === "";
      if (key === "proof") proofLink(field, said.proof && shown.proof);
      else if (["idle", "stub", "solution", "meta"].includes(key)) field.textContent = said[key];
      else rich(field, said[key]);
    }
    const rows = Object.entries(said).filter(([key]) => key.startsWith("score-"));
    scores.replaceChildren(...rows.map(([key, text]) => h("div", {}, h("dt", {}, titles[key.slice(6)]), h("dd", { "data-field": key }, text))));
  } };
}

function gradeRow(words, grade) {
  const rows = words.map((word, q) => {
    const next = h("span", { class: "mpl-muted", "data-field": `next-${q}` });
    return { next, node: h("button", { type: "button", class: "mpl-button", "data-grade": q, onclick: () => grade(q) },
      h("span", {}, `${q} ${word}`), next) };
  });
  return { node: h("div", { class: "mpl-grades", role: "group", "aria-label": "Grades" }, ...rows.map((row) => row.node)),
    show(said, open) {
      rows.forEach(({ node, next }, q) => {
        node.disabled = !open;
        write(next, said[`next-${q}`]);
      });
    } };
}

function render({ model, el }) {
  const data = { bank: model.get("bank"), themes: model.get("themes"), choices: model.get("choices") };
  data.cards = cardsOf(data);
  const state = () => Object.fromEntries([...KEYS, "progress", "exam", "now"].map((key) => [key, model.get(key)]));
  const told = (words) => write(status, words);
  const complain = (error) => told(error instanceof DOMException ? NOT_KEPT : error.message);
  const remember = (progress) => {
    try {
      const all = merge(stored(), progress); // another page may have learned meanwhile
      localStorage.setItem(STORE, exportProgress(all));
      return all;
    } catch (error) {
      complain(error);
      return progress;
    }
  };
  const keep = (changes) => {
    set(changes.progress ? { ...changes, progress: remember(changes.progress) } : changes);
    box.node.scrollTop = 0;
    box.node.focus({ preventScroll: true });
  };
  const paint = () => {
    const now = state(), said = texts(now, data, true), { shown, exam, second, ids } = tableOf(now, data), taken = now.mode === "exam";
    const runs = taken && exam && !isOver(exam, second);
    for (const [key, control] of Object.entries(lists)) {
      control.show(String(now[key]));
      control.field.disabled = Boolean(runs) && key !== "mode";
      control.node.hidden = taken ? ["order", "pile"].includes(key) : ["count", "minutes"].includes(key);
    }
    write(verdict, said.verdict);
    write(timer, said.left);
    box.show(said, shown);
    grades.show(said, shown && now.side === "back");
    look.disabled = !shown || now.side === "back";
    for (const node of [back, skip]) node.hidden = taken;
    act.hidden = !taken;
    act.disabled = !runs && !ids.length;
    write(act, runs ? "Stop the exam" : "Begin an exam");
  };
  const { update: set, stop } = follow(model, [...KEYS, "progress", "exam", "now"], paint);
  const grade = (quality) => {
    const now = state(), { shown, order, today, exam, second } = tableOf(now, data);
    if (!shown || now.side !== "back") return;
    if (now.mode === "exam") return keep({ exam: gradeExam(exam, quality, second), side: "front" });
    const at = order.indexOf(shown.id) + 1;
    keep({ progress: answer(now.progress, shown.id, quality, today), card: (at && order[at]) || "", side: "front" });
  };
  const turn = () => { if (tableOf(state(), data).shown) keep({ side: "back" }); };
  const move = (by) => {
    const { shown, order } = tableOf(state(), data), at = shown ? order.indexOf(shown.id) : -1;
    if (state().mode === "exam" || !shown || !order.length) return;
    keep({ card: order[((at < 0 && by < 0 ? 0 : at) + by + order.length) % order.length], side: "front" });
  };
  const beginOrStop = () => {
    const now = state(), { exam, second, ids } = tableOf(now, data);
    if (exam && !isOver(exam, second)) return keep({ exam: { ...exam, ended: second } });
    keep({ exam: begin(ids, now.count, now.minutes, second, second), side: "front" });
  };
  const pressed = (event) => {
    const keys = { " ": turn, ArrowRight: () => move(1), ArrowLeft: () => move(-1), ...Object.fromEntries([0, 1, 2, 3, 4, 5].map((q) => [q, () => grade(q)])) };
    if (event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(keys, event.key)) return;
    if (event.target.closest("input, select, textarea")) return;
    if (event.key === " " && (state().side === "back" || event.target.closest("button, summary, a"))) return;
    event.preventDefault();
    keys[event.key]();
  };
  const lists = controls(data, (changes) => set(changes)), box = cardBox(data), grades = gradeRow(data.choices.grades, grade);
  const verdict = h("output", { class: "mpl-say", "data-field": "verdict", "aria-live": "polite" });
  const timer = h("strong", { role: "timer", "aria-label": "Time left", "data-field": "left" }), status = h("p", { class: "mpl-muted", role: "status" });
  const look = button("Show the answer", turn, { "data-action": "show" }), act = button("Begin an exam", beginOrStop, { "data-action": "exam" });
  const back = button("← Back", () => move(-1), { "data-action": "back" }), skip = button("Skip →", () => move(1), { "data-action": "skip" });
  const more = keeping({ current: () => state().progress, told, add: (read) => keep({ progress: merge(state().progress, read), card: "", side: "front" }),
    forget: () => {
      try {
        localStorage.removeItem(STORE);
      } catch (error) { complain(error); }
      set({ progress: {}, card: "", side: "front" });
      told("Forgotten.");
    } });
  const root = frame({ model, el, kind: "drill", title: "The drill", hint: HINT },
    h("div", { class: "mpl-controls" }, ...Object.values(lists).map((control) => control.node)), verdict, box.node,
    h("div", { class: "mpl-row" }, back, look, skip, act, timer), grades.node, more, status);
  root.addEventListener("keydown", pressed);
  try {
    set({ progress: merge(model.get("progress"), stored()) });
  } catch (error) { complain(error); }
  paint();
  const tick = setInterval(() => { if (!state().now && leftOf(state()) !== timer.dataset.text) paint(); }, 250);
  const link = links({ model, keys: KEYS, root, restore: (raw) => set(checked(raw, CHECKS(data))) });
  link.read();
  return () => { stop(); link.stop(); clearInterval(tick); };
}

export { answer, begin, draw, exportProgress, importProgress, merge, queue, review };
export default { render };
