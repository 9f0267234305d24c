// One stream: its text as it comes, Stop, its timeline, what is known of it.

import * as api from "./api.js";
import { byId, make, pill, setAttribute, setText, show } from "./elements.js";
import { Reader } from "./reader.js";
import { Streams } from "./streams.js";
import { TextPane } from "./text.js";
import { showTimeline } from "./timeline.js";
import { bytes, count, duration, ended, modelOf, nameOf, shortened, stateDetail, when, wordOf } from "./words.js";

const TRACE_EVERY_MS = 2000;
const TRACE_SHARE = 20; // a trace that takes long to make is asked for less often: at most so much of the time

export class Detail {
  /** streams: where rows are; onStop(stream); onNamed(id): the one shown, by its key, has this id; announce(text): say something to a screen reader. */
  constructor(streams, { onStop, onNamed, announce, onProblem }) {
    this.streams = streams;
    this.onNamed = onNamed;
    this.announce = announce;
    this.onProblem = onProblem;
    this.id = null;
    this.reader = null;
    this.element = byId("detail");
    this.pill = pill();
    byId("detail-pill").append(this.pill.element);
    this.text = new TextPane({ pane: byId("text"), note: byId("text-note"), latest: byId("latest") });
    byId("stop").addEventListener("click", () => {
      const row = this.streams.rows.get(this.id);
      if (row) onStop(row.stream);
    });
    new ResizeObserver(() => this.redraw()).observe(byId("timeline"));
  }

  /** Show a stream. */
  open(id) {
    if (this.id === id) return;
    this.leave();
    this.id = id;
    this.gone = false;
    this.trace = null;
    this.traceDue = 0;
    this.outcomeTold = false;
    this.factsTold = null;
    show(this.element, true);
    setText(byId("detail-title"), id);
    setText(byId("detail-line"), "");
    this.say("");
    this.text.clear();
    for (const name of ["thoughts", "calls"]) show(byId(name), false);
    byId("timeline").replaceChildren();
    byId("facts").replaceChildren();
    this.reader = new Reader(id, this.sink(id));
    if (!document.hidden) this.reader.open();
    this.update();
    this.element.focus({ preventScroll: true });
    if (getComputedStyle(this.element).position !== "sticky") this.element.scrollIntoView({ block: "start" });
  }

  /** Show nothing. */
  leave() {
    this.reader?.close();
    this.reader = null;
    this.id = null;
    this.text.clear();
    show(this.element, false);
  }

  /** A hidden page reads nothing: a browser allows few connections, and somebody else's page may want them. */
  pause() {
    this.reader?.pause();
  }

  resume() {
    this.reader?.open();
  }

  sink(id) {
    return {
      replace: (snapshot) => {
        this.text.replace(snapshot?.text ?? "", snapshot?.joined_at ?? []);
        this.asides(snapshot);
      },
      gap: () => this.announce("The text was read anew: part of what was shown had not been kept."),
      append: (text, dropped, joined) => this.text.append(text, dropped, joined),
      event: () => {
        this.traceDue = 0;
      },
      over: () => this.over(id),
      lost: () => this.say("The connection is lost; the text goes on where it was once it is back."),
      found: () => this.say(""),
      failed: (error) => {
        this.gone = error.status === 404;
        this.say(error.status === 404 ? "There is no such stream: it has been removed." : error.message);
        this.onProblem(error);
      },
    };
  }

  async over(id) {
    this.text.write();
    this.traceDue = 0;
    try {
      await this.streams.ask(id);
      await this.askAsides(id);
    } catch (error) {
      this.onProblem(error);
    }
    if (this.id === id) {
      this.update();
      await this.refreshTrace();
    }
  }

  /** Whether it is not known to have ended. */
  isLive() {
    const row = this.streams.rows.get(this.id);
    return !row || !ended(row.stream);
  }

  /** Show what is no text as it is now: reasoning and tool calls. */
  async askAsides(id) {
    try {
      const snapshot = await api.snapshot(id);
      if (this.id === id) this.asides(snapshot);
    } catch (error) {
      if (error.unreachable || error.unauthenticated) throw error;
    }
  }

  asides(snapshot) {
    this.aside("thoughts", snapshot?.reasoning ?? "");
    this.aside("calls", (snapshot?.tool_calls ?? []).map((call) => `${call.name}(${call.arguments})`).join("\n"));
  }

  aside(name, text) {
    if (text !== "" && byId(name).hidden) byId(name).open = this.text.empty;
    show(byId(name), text !== "");
    setText(byId(`${name}-text`), text);
  }

  say(text) {
    show(byId("detail-said"), text !== "");
    setText(byId("detail-said"), text);
  }

  /** One turn: what is known of the stream, and now and then its trace. */
  async refresh() {
    const id = this.id;
    if (id === null || this.gone) return;
    const stream = this.isLive() ? await this.streams.ask(id) : null;
    if (this.id !== id) return;
    if (stream && stream.id !== id) {
      this.onNamed(stream.id);
      return;
    }
    this.update();
    await this.refreshTrace();
    // Reasoning does not come as it is made; while there is nothing else to see, it is asked for.
    if (this.id === id && this.isLive() && this.text.empty && this.streams.rows.get(id)?.stream.events > 0) await this.askAsides(id);
  }

  async refreshTrace() {
    const { id, trace } = this;
    if (trace?.ended || performance.now() < this.traceDue) return;
    this.traceDue = Infinity; // one at a time
    const from = performance.now();
    let told = null;
    try {
      told = await api.trace(id);
    } catch (error) {
      if (error.unreachable || error.unauthenticated) throw error;
      if (this.id === id && !trace) byId("timeline").replaceChildren(make("p", { class: "line" }, `There is no timeline: ${error.message}`));
    } finally {
      const now = performance.now();
      if (this.id === id) this.traceDue = now + Math.max(TRACE_EVERY_MS, (now - from) * TRACE_SHARE);
    }
    if (this.id !== id || told === null) return;
    this.trace = told;
    this.redraw();
  }

  redraw() {
    const box = byId("timeline");
    if (this.id !== null && this.trace && box.clientWidth > 0) showTimeline(box, this.trace);
  }

  /** Show what is known. */
  update() {
    const row = this.streams.rows.get(this.id);
    if (!row) {
      // not known yet, or there is none: nothing is said of it, and nothing can be done
      this.pill.set(null);
      setAttribute(this.element, "data-word", null);
      show(byId("stop"), false);
      return;
    }
    const { stream } = row;
    const over = ended(stream);
    const word = wordOf(stream.state);
    this.pill.set(word);
    setAttribute(this.element, "data-word", word);
    setText(byId("detail-title"), nameOf(stream));
    setText(byId("detail-line"), this.line(row));
    const stop = byId("stop");
    show(stop, !over);
    stop.disabled = stream.state === "stopping";
    setText(stop, stream.state === "stopping" ? "Stopping…" : "Stop");
    if (over && !this.outcomeTold) {
      this.outcomeTold = true;
      this.announce(`${nameOf(stream)} has ended: ${word}, ${stateDetail(stream)}.`);
    }
    this.facts(stream);
  }

  line(row) {
    const { stream } = row;
    const told = [stateDetail(stream), stream.upstream, shortened(modelOf(stream))].filter(Boolean);
    told.push(ended(stream) ? `took ${duration(stream.age_s)}` : `since ${duration(stream.age_s + Streams.passed(row))}`);
    if (stream.idle_s >= 1) told.push(`silent ${duration(stream.idle_s)}`);
    if (stream.outcome?.message) told.push(stream.outcome.message);
    return told.join(" · ");
  }

  facts(stream) {
    const { outcome } = stream;
    const told = {
      Id: stream.id,
      Key: stream.key,
      Tenant: stream.tenant,
      Labels: Object.entries(stream.labels ?? {}).map(([name, value]) => `${name}=${value}`).join(", "),
      Model: shortened(modelOf(stream), 300),
      Dialect: stream.dialect,
      Started: when(stream.created_at),
      Ended: stream.ended_at == null ? null : when(stream.ended_at),
      "First token": this.trace?.first_event_ms == null ? null : duration(this.trace.first_event_ms / 1000),
      Attempts: count(stream.attempts) + (outcome?.rungs?.length ? ` (${outcome.rungs.join(", ")})` : ""),
      Events: count(stream.events) + (stream.skipped ? `, ${count(stream.skipped)} unreadable` : ""),
      Readers: count(stream.readers),
      Memory: ended(stream) ? null : bytes(stream.bytes_held),
      Delivery: stream.delivery + (stream.durable_seq < stream.tail_seq ? `, ${count(stream.tail_seq - stream.durable_seq)} not durable yet` : ""),
      Usage: usage(outcome),
      "Ended by": outcome?.actor,
      Fault: fault(outcome?.fault),
      Cleanup: outcome?.cleanup_error,
    };
    const pairs = Object.entries(told).filter(([, value]) => value);
    const now = JSON.stringify(pairs);
    if (this.factsTold === now) return;
    this.factsTold = now;
    byId("facts").replaceChildren(...pairs.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  }
}

function usage(outcome) {
  if (!outcome?.usage) return null;
  const told = Object.entries(outcome.usage).filter(([, value]) => typeof value === "number").map(([name, value]) => `${name} ${count(value)}`);
  return told.length ? `${told.join(", ")} (${outcome.usage_quality})` : null;
}

function fault(told) {
  if (!told) return null;
  return [told.status && `HTTP ${told.status}`, told.kind, told.message].filter(Boolean).join(" · ");
}
