// SM-2, the pile of cards and the exam: the twin of the modules schedule and session of mixprec_lab.interview.

const DAY = 86_400_000, LONGEST = 36_500, EASE_FLOOR = 130, PASSED = 3, WELL_KNOWN = 4;
const NEW = Object.freeze({ repetitions: 0, interval: 0, ease: 250, due: null, again: false });

// The schedule: SM-2.

const plus = (date, days) => new Date(Date.parse(date) + days * DAY).toISOString().slice(0, 10);
const nextEase = (ease, quality) => Math.max(ease + 10 - (5 - quality) * (8 + 2 * (5 - quality)), EASE_FLOOR);
const nextInterval = (repetitions, interval, ease) =>
  repetitions <= 2 ? (repetitions === 2 ? 6 : 1) : Math.min(Math.ceil((interval * ease) / 100), LONGEST);

export function review(state, quality, today) {
  const known = quality >= PASSED, repetitions = known ? state.repetitions + 1 : 0;
  const ease = known ? nextEase(state.ease, quality) : state.ease, interval = nextInterval(repetitions, state.interval, ease);
  return { repetitions, interval, ease, due: plus(today, interval), again: quality < WELL_KNOWN };
}

export const stateOf = (progress, id) => (Object.hasOwn(progress, id) ? progress[id] : NEW);
export const repeats = (state, today) => state.again && state.due !== null && state.due > today;

export function answer(progress, id, quality, today) {
  const state = stateOf(progress, id);
  const after = repeats(state, today) ? { ...state, again: quality < WELL_KNOWN } : review(state, quality, today);
  return { ...progress, [id]: after };
}

export function queue(progress, ids, pile, today) {
  if (pile === "all") return ids;
  const weak = ids.filter((id) => stateOf(progress, id).again);
  if (pile === "weak") return weak;
  const date = (id) => stateOf(progress, id).due, compare = (a, b) => (date(a) < date(b) ? -1 : date(a) > date(b) ? 1 : 0);
  const first = [...ids.filter((id) => date(id) !== null && date(id) <= today).sort(compare), ...ids.filter((id) => date(id) === null)];
  return [...first, ...weak.filter((id) => !first.includes(id))];
}

const reviewed = ({ due, interval }) => (due === null ? "" : plus(due, -interval));

export function merge(kept, read) {
  const newer = Object.entries(read).filter(([id, state]) => !Object.hasOwn(kept, id) || reviewed(state) >= reviewed(kept[id]));
  return { ...kept, ...Object.fromEntries(newer) };
}

// Progress as text.

export function exportProgress(progress) {
  const sorted = (x) => Object.fromEntries(Object.keys(x).sort().map((key) => [key, x[key]]));
  const cards = Object.fromEntries(Object.keys(progress).sort().map((id) => [id, sorted(progress[id])]));
  return JSON.stringify({ algorithm: "SM-2", cards, version: 1 }, null, 1);
}

const isObject = (x) => typeof x === "object" && x !== null && !Array.isArray(x);
const sameKeys = (x, keys) => isObject(x) && Object.keys(x).sort().join() === [...keys].sort().join();

function isDate(text) {
  if (typeof text !== "string" || !/^\d{4}-\d\d-\d\d$/.test(text) || text < "1900") return false;
  const time = Date.parse(text);
  return Number.isFinite(time) && new Date(time).toISOString().slice(0, 10) === text;
}

function readState(id, state) {
  const stop = (words) => { throw new Error(`${id}: expected ${words}`); }, shown = (x) => JSON.stringify(x);
  if (!sameKeys(state, Object.keys(NEW))) stop(`a state with the keys ${Object.keys(NEW).join(", ")}, got ${shown(state).slice(0, 80)}`);
  for (const [key, least] of [["repetitions", 0], ["interval", 0], ["ease", EASE_FLOOR]]) {
    if (!Number.isSafeInteger(state[key]) || state[key] < least) stop(`${key} to be a whole number of at least ${least}, got ${shown(state[key])}`);
  }
  if (state.interval > LONGEST) stop(`interval to be at most ${LONGEST} days, got ${state.interval}`);
  if (typeof state.again !== "boolean") stop(`again to be true or false, got ${shown(state.again)}`);
  if (state.due !== null && !isDate(state.due)) stop(`due to be a date like '2026-11-26' or null, got ${shown(state.due)}`);
  return state;
}

// Throws, saying what is wrong, for any text that exportProgress did not write.
export function importProgress(text) {
  let content;
  try {
    content = JSON.parse(text);
  } catch (error) {
    throw new Error(`expected progress as JSON, got ${error.message}; choose a file that this page exported`);
  }
  if (!sameKeys(content, ["algorithm", "version", "cards"]) || content.algorithm !== "SM-2" || content.version !== 1) {
    throw new Error(`expected progress of SM-2, version 1, with cards, got ${text.trim().slice(0, 60)}`);
  }
  if (!isObject(content.cards)) throw new Error(`expected cards to be a mapping from ids to states, got ${JSON.stringify(content.cards).slice(0, 60)}`);
  return Object.fromEntries(Object.entries(content.cards).map(([id, state]) => [id, readState(id, state)]));
}

// The exam.

export function draw(ids, count, seed) {
  const drawn = [...ids];
  let state = seed >>> 0;
  for (let last = drawn.length - 1; last > 0; last--) {
    state = (Math.imul(1664525, state) + 1013904223) >>> 0;
    const other = Math.floor((state * (last + 1)) / 2 ** 32);
    [drawn[last], drawn[other]] = [drawn[other], drawn[last]];
  }
  return drawn.slice(0, count);
}

export const begin = (ids, count, minutes, seed, second) => ({ ids: draw(ids, count, seed), minutes, start: second, grades: [], ended: null });
export const secondsLeft = (exam, second) => Math.min(Math.max(60 * exam.minutes - ((exam.ended ?? second) - exam.start), 0), 60 * exam.minutes);
export const isOver = (exam, second) => exam.ended !== null || secondsLeft(exam, second) === 0;

export function gradeExam(exam, quality, second) {
  const grades = [...exam.grades, quality];
  return { ...exam, grades, ended: grades.length === exam.ids.length ? second : null };
}

export function score(exam, cards) {
  const found = new Map();
  exam.ids.forEach((id, i) => {
    const { theme } = cards[id], row = found.get(theme) ?? { asked: 0, passed: 0, points: 0 }, quality = exam.grades[i] ?? 0;
    found.set(theme, { asked: row.asked + 1, passed: row.passed + (quality >= PASSED), points: row.points + quality });
  });
  return found;
}
