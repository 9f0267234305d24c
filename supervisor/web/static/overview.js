// How things are: the tiles with the last hour, what goes wrong, the upstreams.

import { Chart } from "./charts.js";
import { arrange, byId, make, setAttribute, setText, show } from "./elements.js";
import { bytes, compact, count, duration, percent, plural, rate, second } from "./words.js";

const ERRORS = 6; // as many as fit beside the table

const charts = {};

function chart(name, kind, names, foot) {
  charts[name] = new Chart(byId(`${name}-chart`), { kind, names, foot: byId(foot) });
}

chart("live", "line", ["live"], "live-foot");
chart("endings", "bars", ["complete", "cancelled", "error"], "success-foot");
chart("first", "line", ["p95", "p50"], "first-foot");
chart("took", "line", ["p95", "p50"], "took-foot");
chart("events", "line", ["events"], "events-foot");
chart("memory", "line", ["process", "held"], "memory-foot");

/** Show an answer of GET /overview. */
export function showOverview(told) {
  showStatus(told);
  showLive(told);
  showEndings(told);
  showTimes(told, "first", told.hour.first_event_s, "first_event", "Time to the first token");
  showTimes(told, "took", told.hour.duration_s, "duration", "Duration");
  showEvents(told);
  showMemory(told);
  showErrors(told.hour.errors.slice(0, ERRORS));
  showCircuits(told.circuits);
  showTotals(told.total);
}

function showStatus({ status, problems, store }) {
  setAttribute(byId("status"), "data-status", status);
  setText(byId("status-word"), status);
  const told = [...problems];
  if (store.state !== "ok" && told.length === 0) told.push(`The store is ${store.state}${store.error ? `: ${store.error}` : "."}`);
  const list = byId("problems");
  show(list, told.length > 0);
  if (changed(list, told)) list.replaceChildren(...told.map((problem) => make("li", {}, problem)));
}

function columns({ minutes }, ...names) {
  return { first: minutes.first, step_s: minutes.step_s, series: names.map((name) => minutes[name]) };
}

function showLive(told) {
  const { active, minutes } = told;
  setText(byId("live"), compact(active.live));
  setText(byId("live-of"), `of ${compact(active.max_live)}`);
  setText(byId("live-foot"), `${compact(active.waiting)} idle · ${compact(active.answering)} streaming · ${plural(active.readers, "reader")}`);
  setAttribute(byId("tile-live"), "data-alarm", active.live >= 0.9 * active.max_live ? "high" : null);
  charts.live.update(columns(told, "live"), {
    said: (index) => `${count(minutes.live[index])} live · ${count(minutes.started[index])} started`,
    label: `Live streams over the last hour: now ${count(active.live)}, at most ${count(most(minutes.live))}.`,
  });
}

function showEndings(told) {
  const { hour, minutes } = told;
  const { completed, cancelled, failed, expired } = hour.ended;
  const errors = minutes.failed.map((value, index) => add(value, minutes.expired[index]));
  setText(byId("success"), percent(hour.success_rate));
  setText(byId("success-of"), hour.success_rate == null ? "none ended" : plural(failed + expired, "error"));
  setText(byId("success-foot"), `of ${compact(completed + failed + expired)} · ${compact(cancelled)} cancelled, not counted · ${compact(hour.retried)} retried`);
  setAttribute(byId("tile-success"), "data-alarm", hour.success_rate != null && hour.success_rate < 0.95 ? "high" : null);
  charts.endings.update(
    { ...columns(told, "completed", "cancelled"), series: [minutes.completed, minutes.cancelled, errors] },
    {
      said: (index) => `${count(minutes.completed[index])} complete · ${count(minutes.cancelled[index])} cancelled · ${plural(errors[index] ?? 0, "error")}`,
      label: `Endings over the last hour: ${completed} complete, ${failed + expired} in error, ${cancelled} cancelled.`,
    },
  );
}

function showTimes(told, tile, figures, column, title) {
  const p50 = told.minutes[`${column}_p50_s`];
  const p95 = told.minutes[`${column}_p95_s`];
  setText(byId(tile), duration(figures.p50));
  setText(byId(`${tile}-foot`), figures.count ? `95 % within ${duration(figures.p95)} · longest ${duration(figures.max)}` : "none in the last hour");
  charts[tile].update(columns(told, `${column}_p95_s`, `${column}_p50_s`), {
    said: (index) => `median ${duration(p50[index])} · 95 % within ${duration(p95[index])}`,
    label: `${title} over the last hour: median ${duration(figures.p50)}, 95 percent within ${duration(figures.p95)}.`,
  });
}

function showEvents(told) {
  const { hour, minutes } = told;
  const records = minutes.records;
  const step = minutes.step_s;
  const now = told.at - (minutes.first + (records.length - 1) * step);
  // The current minute has only begun: it is stretched, once there is enough of it, else the one before speaks.
  const rates = records.map((value) => (value == null ? null : value / step));
  if (rates.at(-1) != null) rates[rates.length - 1] = now >= 10 ? records.at(-1) / now : (rates.at(-2) ?? null);
  setText(byId("events"), rate(rates.at(-1)));
  setText(byId("events-foot"), hour.bytes.count ? `a stream: ${plural(hour.events.p50, "event", compact)}, ${bytes(hour.bytes.p50)} · 95 % under ${bytes(hour.bytes.p95)}` : "no stream has ended in the last hour");
  charts.events.update(
    { ...columns(told, "records"), series: [rates] },
    {
      said: (index) => `${rate(rates[index])} a second`,
      label: `Events per second over the last hour: now ${rate(rates.at(-1))}, at most ${rate(most(rates))}.`,
    },
  );
}

function showMemory(told) {
  const { memory, minutes } = told;
  const share = memory.total_bytes / memory.max_bytes;
  const ofProcess = memory.process_bytes != null && memory.process_limit_bytes != null ? memory.process_bytes / memory.process_limit_bytes : 0;
  setText(byId("memory"), bytes(memory.total_bytes));
  setText(byId("memory-of"), `of ${bytes(memory.max_bytes)}`);
  const process = memory.process_bytes == null ? "" : ` · process ${bytes(memory.process_bytes)}${memory.process_limit_bytes == null ? "" : ` of ${bytes(memory.process_limit_bytes)}`}`;
  setText(byId("memory-foot"), `${memory.pressure ? "short of memory · " : ""}live ${bytes(memory.bytes_held)}${process}`);
  setAttribute(byId("tile-memory"), "data-alarm", memory.pressure || Math.max(share, ofProcess) >= 0.9 ? "high" : null);
  charts.memory.update(columns(told, "process_bytes", "bytes_held"), {
    said: (index) => `live ${bytes(minutes.bytes_held[index])} · process ${bytes(minutes.process_bytes[index])}`,
    label: `Memory over the last hour: now ${bytes(memory.total_bytes)} of ${bytes(memory.max_bytes)}.`,
  });
}

function showErrors(errors) {
  const box = byId("errors");
  if (changed(box, errors.map((error) => [error.state, error.reason, error.kind, error.upstream, error.count, error.last_id]))) {
    box.replaceChildren(errors.length ? make("ul", { class: "errors" }, ...errors.map(errorItem)) : make("p", { class: "none" }, "None."));
  }
}

function errorItem(error) {
  const what = `${error.state}(${error.reason})`;
  const rest = [error.kind !== error.reason && error.kind, error.upstream].filter(Boolean).join(" · ");
  return make(
    "li",
    {},
    make("b", {}, count(error.count)),
    make("span", {}, make("a", { href: `#/streams/${encodeURIComponent(error.last_id)}` }, what), rest && ` ${rest}`),
    make("small", {}, `${second(error.last_at)}  ${error.last_message}`),
  );
}

function showCircuits(circuits) {
  const rank = (name) => ["open", "half_open", "closed"].indexOf(circuits[name].state);
  const names = Object.keys(circuits).sort((one, other) => rank(one) - rank(other) || (one < other ? -1 : 1));
  const box = byId("circuits");
  if (!changed(box, circuits)) return;
  const items = names.map((name) => {
    const { state, failures, successes, opened, refused, trial_in_s: trial } = circuits[name];
    const told = [`of late ${compact(successes)} good, ${compact(failures)} failed`];
    if (opened) told.push(`opened ${count(opened)}×`);
    if (refused) told.push(`refused ${count(refused)}`);
    if (trial != null) told.push(`tried again in ${duration(trial)}`);
    return make(
      "li",
      {},
      make("b", {}, name),
      make("span", { class: "circuit", "data-state": state }, state === "closed" ? "well" : `circuit ${state.replace("_", " ")}`),
      make("small", {}, told.join(" · ")),
    );
  });
  box.replaceChildren(names.length ? make("ul", { class: "circuits" }, ...items) : make("p", { class: "none" }, "None has been asked yet."));
  const wellFirst = names.toReversed();
  arrange(byId("upstreams"), wellFirst.map((name) => make("option", { value: name })));
}

function showTotals({ started, attached, rejected, ended }) {
  const box = byId("endings");
  if (!changed(box, { started, attached, rejected, ended })) return;
  const rows = [];
  for (const [state, reasons] of Object.entries(ended)) {
    for (const [reason, number] of Object.entries(reasons)) rows.push([number, `${state}(${reason})`]);
  }
  rows.sort((one, other) => other[0] - one[0]);
  for (const [limit, number] of Object.entries(rejected)) rows.push([number, `not started: ${limit.replaceAll("_", " ")}`]);
  const items = rows.map(([number, what]) => make("li", {}, make("b", {}, count(number)), make("span", {}, what)));
  box.replaceChildren(
    make("p", { class: "none" }, `${plural(started, "stream")} started${attached ? `, ${count(attached)} joined by key` : ""}.`),
    make("ul", { class: "totals" }, ...items),
  );
}

const shown = new WeakMap();

/** Whether something is not what it was when it was last shown in a box. */
function changed(box, told) {
  const now = JSON.stringify(told);
  if (shown.get(box) === now) return false;
  shown.set(box, now);
  return true;
}

function most(values) {
  const known = values.filter((value) => value != null);
  return known.length ? Math.max(...known) : null;
}

function add(one, other) {
  return one == null && other == null ? null : (one ?? 0) + (other ?? 0);
}
