// The streams that the page knows, kept fresh with bounded work: for the daemon, the network and the browser.
//
// A list answers with at most 500 streams, so the live ones are gone through page by page, one a turn, over and over; where they
// take more than one page, every other turn looks at the newest, so that what has just been started shows at once. Ended streams
// change no more: the newest are asked for when more have ended, older ones when somebody asks. A stream that was live and is in the list
// of the live no more has ended: it is asked for by itself, a few a turn, and beyond that it is let go of.

import * as api from "./api.js";
import { ended, statesOf } from "./words.js";

const PAGE = 500;
const ENDED_PAGE = 100;
const OLDER_PAGE = 200;
const ASKED_PER_TURN = 20;
const KEPT = 12_000; // rows; beyond it the ended that were seen longest ago go
const RATE_OVER_S = 4;

export class Streams {
  constructor() {
    this.rows = new Map();
    this.turn = 0;
    this.sweep = null; // one round through the live, under way
    this.long = false; // whether a round takes more than a page
    this.vanished = new Set();
    this.wanted = null; // states of the ended to ask for; null: all
    this.endedDue = true;
    this.endedNumber = 0;
    this.oldest = new Map(); // by what was wanted, where older ones follow
  }

  /** Which ended streams to ask for: the states of a word, or null for all. */
  want(word) {
    const states = ["complete", "cancelled", "error"].includes(word) ? statesOf(word) : null;
    if (String(states) === String(this.wanted)) return;
    this.wanted = states;
    this.endedDue = true;
  }

  /** Take note of how many have ended, by state and reason: when it is another number, the newest are asked for. */
  noteEnded(ended) {
    const number = Object.values(ended).flatMap(Object.values).reduce((sum, one) => sum + one, 0);
    if (number !== this.endedNumber) this.endedDue = true;
    this.endedNumber = number;
  }

  /** Whether older ended streams than those known can be asked for. */
  get hasOlder() {
    return this.oldest.get(String(this.wanted)) !== null;
  }

  /** One turn: a page of the live, the newest of the ended if there are more, those that have just ended. */
  async refresh(visible = []) {
    const jobs = [this.sweepOn()];
    if (this.endedDue) {
      this.endedDue = false;
      jobs.push(this.askEnded());
    }
    this.turn += 1;
    await Promise.all(jobs);
    await this.askVanished(visible);
    this.prune();
  }

  async sweepOn() {
    const sweep = (this.sweep ??= { before: null, seen: new Set(), known: this.live() });
    const newest = this.long && sweep.before !== null && this.turn % 2 === 1;
    const answer = await api.list({ live: true, limit: PAGE, before: newest ? null : sweep.before });
    for (const stream of answer.streams) {
      this.put(stream);
      sweep.seen.add(stream.id);
    }
    if (newest) return;
    this.long = answer.next !== null || sweep.before !== null;
    sweep.before = answer.next;
    if (answer.next !== null) return;
    for (const id of sweep.known) if (!sweep.seen.has(id) && this.isLive(id)) this.vanished.add(id);
    this.sweep = null;
  }

  isLive(id) {
    const row = this.rows.get(id);
    return row !== undefined && !ended(row.stream);
  }

  live() {
    return [...this.rows.values()].filter((row) => !ended(row.stream)).map((row) => row.stream.id);
  }

  async askEnded() {
    const key = String(this.wanted);
    const answer = await api.list({ live: false, state: this.wanted, limit: ENDED_PAGE });
    for (const stream of answer.streams) this.put(stream);
    if (!this.oldest.has(key)) this.oldest.set(key, answer.next);
  }

  /** Ask for ended streams that are older than those known. */
  async askOlder() {
    const key = String(this.wanted);
    const answer = await api.list({ live: false, state: this.wanted, limit: OLDER_PAGE, before: this.oldest.get(key) });
    for (const stream of answer.streams) this.put(stream);
    this.oldest.set(key, answer.next);
  }

  async askVanished(visible) {
    const first = visible.filter((id) => this.vanished.has(id));
    const asked = [...new Set([...first, ...this.vanished])].slice(0, ASKED_PER_TURN);
    for (const id of this.vanished) if (!asked.includes(id)) this.rows.delete(id);
    this.vanished.clear();
    await Promise.all(asked.map((id) => this.ask(id)));
  }

  /** Ask for one stream, by its id or `key:KEY`, and return it; it is forgotten, and null, if there is none. */
  async ask(id) {
    try {
      const stream = await api.get(id);
      this.put(stream);
      return stream;
    } catch (error) {
      if (error.status !== 404) throw error;
      this.rows.delete(id);
      return null;
    }
  }

  /** Take what was told of a stream. */
  put(stream) {
    const now = performance.now() / 1000;
    const row = this.rows.get(stream.id);
    if (!row) {
      this.rows.set(stream.id, { stream, at: now, rate: null, since: { at: now, events: stream.events } });
      return;
    }
    const past = now - row.since.at;
    if (stream.events < row.since.events) row.since = { at: now, events: stream.events };
    else if (past >= RATE_OVER_S / 4) {
      const measured = (stream.events - row.since.events) / past;
      const weight = row.rate === null ? 1 : Math.min(1, past / RATE_OVER_S);
      row.rate = (row.rate ?? 0) * (1 - weight) + measured * weight;
      if (row.rate < 0.01) row.rate = 0;
      row.since = { at: now, events: stream.events };
    }
    if (ended(stream)) row.rate = null;
    row.stream = stream;
    row.at = now;
  }

  /** A live stream's age or silence, now: what was told, and what has passed since. */
  static passed(row) {
    return ended(row.stream) ? 0 : performance.now() / 1000 - row.at;
  }

  prune() {
    if (this.rows.size <= KEPT) return;
    const old = [...this.rows.values()].filter((row) => ended(row.stream)).sort((one, other) => one.at - other.at);
    for (const row of old.slice(0, this.rows.size - KEPT)) this.rows.delete(row.stream.id);
  }
}
