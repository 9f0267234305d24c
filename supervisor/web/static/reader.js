// One stream's answer, as it comes: nothing lost, nothing twice, whatever happens to the connection.
//
// The answer is read from a snapshot on, and its place is kept: `(epoch, seq)` of the last event taken. A lost connection is made
// again after that place, and what lies before it is not taken again. Where the place is no longer there (`gap`: a crash took what
// was not durable, or retention the history), what can be read follows, from its beginning, and replaces what was shown.
//
// What an attempt does to what was received before it is done here as the daemon does it (its `attempt` events say so): `withdrawn`
// begins the answer anew, and a `continuation` joins its first text, with `dropped` characters of white space not kept. A snapshot
// does not say whether an attempt is about to join; one that may be is taken again once there is more text.
//
// A browser's EventSource would reconnect by itself, but not after an HTTP error, and without saying why; so it is closed at the
// first error, and a look at the stream decides whether there is more to come.

import * as api from "./api.js";
import { ended } from "./words.js";

const MAX_BEHIND = 2000; // events: further behind, one snapshot is sent in their place
const WAITS_MS = [250, 500, 1000, 2000, 3000];
const TOLD = ["attempt", "withdrawn", "note", "skipped"];

export class Reader {
  /**
   * sink: replace(snapshot), gap(error), append(text), event(kind, event), over(outcome), lost(), found(), failed(error).
   */
  constructor(id, sink) {
    this.id = id;
    this.sink = sink;
    this.position = null;
    this.source = null;
    this.timer = null;
    this.failures = 0;
    this.joins = null;
    this.unsure = false; // whether the next text may join what a snapshot gave
    this.closed = false;
  }

  /** Begin, or go on where it was. */
  open() {
    if (this.source || this.closed) return;
    clearTimeout(this.timer);
    const { position } = this;
    // A snapshot needs the whole history. If none can be had, what there is of it is read instead.
    const from = position ? `${position.epoch}-${position.seq}` : this.failures > 1 ? "start" : "snapshot";
    const source = new EventSource(api.eventsUrl(this.id, from, MAX_BEHIND));
    this.source = source;
    source.addEventListener("open", () => {
      this.failures = 0;
      if (from === "start") this.sink.replace(null);
      this.sink.found();
    });
    for (const kind of ["text", "snapshot", "outcome", ...TOLD]) {
      source.addEventListener(kind, (message) => this.take(message, kind));
    }
    source.addEventListener("gap", (message) => this.anew(message));
    source.addEventListener("error", () => this.broken(source));
  }

  /** Let go of the connection, and keep the place. */
  pause() {
    clearTimeout(this.timer);
    this.source?.close();
    this.source = null;
  }

  /** End for good. */
  close() {
    this.closed = true;
    this.pause();
  }

  take(message, kind) {
    const place = placeOf(message.lastEventId);
    if (place && this.position && !after(place, this.position)) return;
    const event = JSON.parse(message.data);
    if (kind === "text" && this.unsure) {
      this.pause();
      this.position = null;
      this.open();
      return;
    }
    if (place) this.position = place;
    if (kind === "snapshot") {
      const { snapshot } = event;
      this.joins = null;
      this.unsure = snapshot.state === "connecting" && snapshot.text !== "";
      this.sink.replace(snapshot);
    } else if (kind === "text") {
      this.sink.append(event.text, this.joins?.dropped ?? 0, this.joins !== null);
      this.joins = null;
    } else if (kind === "outcome") {
      this.over(event.outcome);
    } else {
      if (kind === "withdrawn") this.sink.replace(null);
      if (kind === "attempt" || kind === "withdrawn") this.unsure = false;
      if (kind === "attempt") this.joins = event.details?.rung === "continuation" ? { dropped: event.details.dropped ?? 0 } : null;
      this.sink.event(kind, event);
    }
  }

  /** The place is gone: the answer follows from where it can still be read, in the epochs that it had there. */
  anew(message) {
    this.position = null;
    this.joins = null;
    this.sink.replace(null);
    this.sink.gap(JSON.parse(message.data));
  }

  over(outcome) {
    this.close();
    this.sink.over(outcome);
  }

  broken(source) {
    if (this.source !== source) return;
    this.pause();
    this.later();
  }

  later() {
    const wait = WAITS_MS[Math.min(this.failures, WAITS_MS.length - 1)];
    this.failures += 1;
    if (this.failures > 1) this.sink.lost();
    this.timer = setTimeout(() => this.again(), wait);
  }

  /** Look whether there is more to come, and if so read on. */
  async again() {
    let stream;
    try {
      stream = await api.get(this.id);
    } catch (error) {
      if (this.closed || this.source) return;
      if (error.status === 404 || error.unauthenticated) this.sink.failed(error);
      if (error.status === 404) this.close();
      else this.later();
      return;
    }
    if (this.closed || this.source) return;
    const read = this.position && !after({ epoch: stream.epoch, seq: stream.tail_seq }, this.position);
    if (read && ended(stream) && stream.outcome) this.over(stream.outcome);
    else this.open();
  }
}

/** The place that an id `epoch-seq` names; null for no id. */
function placeOf(id) {
  const match = /^(\d+)-(\d+)$/.exec(id ?? "");
  return match ? { epoch: Number(match[1]), seq: Number(match[2]) } : null;
}

/** Whether one place comes after another. */
function after(one, other) {
  return one.epoch > other.epoch || (one.epoch === other.epoch && one.seq > other.seq);
}
