// What happened when in a stream: its attempts as bars, its silences, the events as they came, and the same in words.
//
// The drawing is for the eye and tells nothing that the list under it does not; a screen reader reads the list.

import { draw, make } from "./elements.js";
import { bytes, count, duration, limit, plural } from "./words.js";

const ROW = 16;
const GAP = 5;
const BARS = 44;
const AXIS = 18;
const LISTED = 60;

/** Fill a box with a stream's trace. */
export function showTimeline(box, trace) {
  const width = Math.max(240, Math.floor(box.clientWidth));
  box.replaceChildren(drawing(trace, width), clocks(trace), figures(trace), moments(trace));
}

function drawing(trace, width) {
  const total = Math.max(trace.duration_ms, 1);
  const x = (ms) => (Math.min(Math.max(ms, 0), total) / total) * width;
  const rows = trace.attempts.length;
  const foot = rows * (ROW + GAP) + GAP;
  const svg = draw("svg", { class: "drawing", viewBox: `0 0 ${width} ${foot + BARS + AXIS}`, width, height: foot + BARS + AXIS, "aria-hidden": "true" });
  svg.append(...ticks(total, width, foot + BARS));
  trace.attempts.forEach((attempt, index) => svg.append(attemptRow(attempt, index, x, width)));
  for (const stall of trace.stalls) svg.append(stallBar(stall, trace, x));
  for (const mark of trace.marks) svg.append(draw("path", { class: "mark", "data-kind": mark.kind, d: `M${x(mark.at_ms)} ${foot - 5}l3.5 6h-7z` }));
  svg.append(eventBars(trace, x, foot, width));
  if (trace.ended) svg.append(draw("line", { class: "end", x1: width - 0.75, x2: width - 0.75, y1: 0, y2: foot + BARS, "data-state": trace.state }));
  return svg;
}

function attemptRow(attempt, index, x, width) {
  const y = GAP + index * (ROW + GAP);
  const [from, to] = [x(attempt.from_ms), x(attempt.to_ms)];
  const first = attempt.first_event_ms == null ? to : x(attempt.first_event_ms);
  const row = draw("g", { class: "attempt", "data-withdrawn": attempt.withdrawn });
  const bar = (name, left, right) => draw("rect", { class: name, x: left, y, width: Math.max(right - left, 1), height: ROW, rx: 2 });
  if (attempt.delay_ms > 0) {
    row.append(draw("line", { class: "delay", x1: x(attempt.from_ms - attempt.delay_ms), x2: from, y1: y + ROW / 2, y2: y + ROW / 2 }));
  }
  row.append(bar("waiting", from, first));
  if (attempt.first_event_ms != null) row.append(bar("answering", first, to));
  const label = `${attempt.attempt}${attempt.rung ? ` ${attempt.rung}` : ""}`;
  const right = from > width * 0.75;
  row.append(draw("text", { x: right ? from - 4 : from + 4, y: y + ROW - 4, "text-anchor": right ? "end" : "start" }, label));
  return row;
}

function stallBar(stall, trace, x) {
  const index = trace.attempts.findIndex(({ attempt }) => attempt === stall.attempt);
  const y = GAP + Math.max(index, 0) * (ROW + GAP);
  return draw("rect", { class: "stall", x: x(stall.from_ms), y: y + ROW - 4, width: Math.max(x(stall.to_ms) - x(stall.from_ms), 1), height: 4 });
}

function eventBars(trace, x, top, width) {
  const { step_ms: step, events } = trace.timeline;
  const most = Math.max(...events, 1);
  let path = "";
  events.forEach((number, index) => {
    if (!number) return;
    const left = x(index * step);
    const wide = Math.max(Math.min(x((index + 1) * step), width) - left - 0.5, 0.75);
    const height = Math.max((number / most) * (BARS - 4), 1.5);
    path += `M${left.toFixed(1)} ${top + BARS}v${(-height).toFixed(1)}h${wide.toFixed(1)}v${height.toFixed(1)}z`;
  });
  return draw("path", { class: "events", d: path });
}

function ticks(total, width, bottom) {
  const step = niceStep(total / Math.max(2, width / 110));
  const lines = [];
  for (let at = 0; at <= total; at += step) {
    const x = (at / total) * width;
    lines.push(draw("line", { class: "tick", x1: x, x2: x, y1: 0, y2: bottom }));
    const last = x > width - 44;
    lines.push(draw("text", { class: "time", x: last ? width : x, y: bottom + 13, "text-anchor": last ? "end" : at === 0 ? "start" : "middle" }, moment(at, step)));
  }
  return lines;
}

/** A step of 1, 2 or 5 (and of minutes: 1, 2, 5, 10, 15, 30, 60) that is no less than this, in ms. */
function niceStep(least) {
  const steps = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 10e3, 15e3, 30e3, 60e3, 120e3, 300e3, 600e3, 900e3, 1.8e6, 3.6e6];
  return steps.find((step) => step >= least) ?? Math.ceil(least / 3.6e6) * 3.6e6;
}

/** A moment since the start, in ms, as fine as its neighbours need. */
function moment(ms, step = 0) {
  if (ms === 0) return "0";
  if (step >= 1000 || ms >= 60e3) return ms < 60e3 ? `${+(ms / 1000).toFixed(1)} s` : limit(ms / 1000);
  if (ms < 1000) return `${Math.round(ms)} ms`;
  return `${(ms / 1000).toFixed(step >= 100 ? 1 : 2)} s`;
}

function clocks({ deadlines }) {
  const named = { connect_s: "connect", first_event_s: "first event", idle_s: "idle", total_s: "total" };
  const told = Object.entries(named).map(([field, name]) => `${name} ${limit(deadlines[field])}`);
  return make("p", { class: "line" }, make("b", {}, "Clocks "), told.join(" · "));
}

function figures({ events, arrivals, bytes: size, gap_ms: gap, event_bytes: chunk, skipped }) {
  const told = [`${plural(events, "event")} in ${plural(arrivals, "read")}`, bytes(size)];
  if (skipped) told.push(`${count(skipped)} unreadable`);
  if (gap.count) told.push(`gap ${duration(gap.p50 / 1000)}, 95 % under ${duration(gap.p95 / 1000)}, longest ${duration(gap.max / 1000)}`);
  if (chunk.count) told.push(`event ${bytes(chunk.p50)}, largest ${bytes(chunk.max)}`);
  return make("p", { class: "line" }, make("b", {}, "Chunks "), told.join(" · "));
}

function moments(trace) {
  const told = [];
  for (const attempt of trace.attempts) {
    const what = [`attempt ${attempt.attempt}`, attempt.rung && `(${attempt.rung})`, attempt.upstream && `to ${attempt.upstream}`];
    if (attempt.delay_ms > 0) what.push(`after a wait of ${duration(attempt.delay_ms / 1000)}`);
    if (attempt.cause) what.push(`— ${attempt.cause}`);
    told.push([attempt.from_ms, "attempt", what.filter(Boolean).join(" ")]);
    if (attempt.first_event_ms != null) told.push([attempt.first_event_ms, "first", `first event, after ${duration((attempt.first_event_ms - attempt.from_ms) / 1000)}`]);
    if (attempt.withdrawn) told.push([attempt.to_ms, "withdrawn", `what attempt ${attempt.attempt} had sent was withdrawn`]);
  }
  for (const stall of trace.stalls) told.push([stall.from_ms, "stall", `silent for ${duration(stall.ms / 1000)}`]);
  for (const mark of trace.marks) if (mark.kind !== "withdrawn") told.push([mark.at_ms, mark.kind, noted(mark)]);
  if (trace.ended) told.push([trace.duration_ms, "end", `${trace.state}(${trace.reason})`]);
  told.sort((one, other) => one[0] - other[0]);
  const left = told.length - LISTED + trace.attempts_left_out + trace.stalls_left_out + trace.marks_left_out;
  const items = told.slice(0, LISTED).map(([at, kind, what]) => make("li", { "data-kind": kind }, make("time", {}, moment(at)), make("span", {}, what)));
  if (left > 0) items.push(make("li", {}, make("time"), make("span", {}, `and ${count(left)} more`)));
  for (const { first, last } of trace.left_out) items.push(make("li", {}, make("time"), make("span", {}, `events ${count(first)} to ${count(last)} were not looked at`)));
  return make("ol", { class: "moments" }, ...items);
}

function noted(mark) {
  const details = JSON.stringify(mark.details);
  return `${mark.kind}${details === "{}" || details === undefined ? "" : `: ${details.slice(0, 160)}`}`;
}
