// How things are said on the page: the five words for a state, and numbers as an operator reads them.
//
// A stream has eight states; a row shows one of five words, and beside it, in small, the state itself with its reason. A stream
// that is stopping is still `streaming`: nobody is told how it ended before that is durable.

const WORDS = {
  pending: "idle",
  connecting: "idle",
  streaming: "streaming",
  stopping: "streaming",
  completed: "complete",
  cancelled: "cancelled",
  failed: "error",
  expired: "error",
};

const ENDED = ["complete", "cancelled", "error"];

/** The word for a state, as a row shows it. */
export function wordOf(state) {
  return WORDS[state] ?? "idle";
}

/** The states that a word stands for. */
export function statesOf(word) {
  return Object.keys(WORDS).filter((state) => WORDS[state] === word);
}

/** Whether a stream has ended. */
export function ended(stream) {
  return ENDED.includes(wordOf(stream.state));
}

/** What the word leaves out: `failed(truncated)`, `connecting`; empty where there is nothing to add. */
export function stateDetail(stream) {
  const word = wordOf(stream.state);
  if (ended(stream)) return stream.reason ? `${stream.state}(${stream.reason})` : stream.state;
  return word === stream.state ? "" : stream.state;
}

/** The model that a stream was started with, as far as it is known. */
export function modelOf(stream) {
  const model = stream.meta?.model;
  return typeof model === "string" ? model : "";
}

/** The beginning of what may be long. */
export function shortened(text, characters = 60) {
  return text.length <= characters ? text : `${text.slice(0, characters - 1)}…`;
}

/** What to call a stream in a sentence. */
export function nameOf(stream) {
  return stream.key ?? stream.id;
}

const grouped = new Intl.NumberFormat("en");
const short = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

export const NOTHING = "–";

/** A count in full: 12,345. */
export function count(value) {
  return value == null ? NOTHING : grouped.format(value);
}

/** A count in few characters: 12.3K. */
export function compact(value) {
  if (value == null) return NOTHING;
  return value < 10000 ? grouped.format(Math.round(value)) : short.format(value);
}

/** A rate: 0.4, 12, 1.2K. */
export function rate(value) {
  if (value == null) return NOTHING;
  if (value === 0) return "0";
  return value < 9.95 ? value.toFixed(1) : compact(Math.round(value));
}

/** Seconds as the two units that matter: 350 ms, 4.2 s, 3 m 20 s, 2 h 05 m, 3 d 4 h. No line is broken within. */
export function duration(seconds) {
  return seconds == null ? NOTHING : unbroken(inUnits(seconds));
}

function inUnits(seconds) {
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} m ${two(whole % 60)} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${two(Math.floor(whole / 60) % 60)} m`;
  return `${Math.floor(whole / 86400)} d ${Math.floor(whole / 3600) % 24} h`;
}

/** A duration that was chosen, without what is zero in it: 2 m, 1 h. */
export function limit(seconds) {
  return seconds == null ? "off" : unbroken(inUnits(seconds).replace(/ 00? [smh]$/, ""));
}

function unbroken(text) {
  return text.replaceAll(" ", "\u00a0");
}

function two(value) {
  return String(value).padStart(2, "0");
}

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

/** A size in bytes: 812 B, 4.2 KiB. */
export function bytes(value) {
  if (value == null) return NOTHING;
  let size = value;
  let unit = 0;
  while (size >= 1023.5 && unit < UNITS.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return unbroken(`${unit === 0 || size >= 99.5 ? Math.round(size) : size.toFixed(1)} ${UNITS[unit]}`);
}

/** A share of one as percent; never 100 % unless it is all, never 0 % unless it is none. */
export function percent(share) {
  if (share == null) return NOTHING;
  if (share === 0 || share === 1) return unbroken(`${share * 100} %`);
  return unbroken(`${Math.min(99.9, Math.max(0.1, share * 100)).toFixed(1)} %`);
}

const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
const clockSeconds = new Intl.DateTimeFormat(undefined, {
  hour: "2-digit",
  minute: "2-digit",
  second: "2-digit",
  hourCycle: "h23",
});
const dateAndTime = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium", hourCycle: "h23" });

/** The time of day, to the minute, of seconds since the epoch. */
export function minute(at) {
  return clock.format(at * 1000);
}

/** The time of day, to the second. */
export function second(at) {
  return clockSeconds.format(at * 1000);
}

/** Date and time. */
export function when(at) {
  return at == null ? NOTHING : dateAndTime.format(at * 1000);
}

/** `1 reader`, `2 readers`; said: how the number is told. */
export function plural(value, noun, said = count) {
  const told = said(value);
  return `${told} ${noun}${told === "1" ? "" : "s"}`;
}
