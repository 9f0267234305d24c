// The table of streams: which are shown, in which order, and a row for each.
//
// Rows are made once and changed in place. While somebody points at the table or has just moved in it by keyboard, its order is
// held, so that a row does not move away from under the click that would stop it.

import { arrange, byId, make, pill, setAttribute, setText, show } from "./elements.js";
import { Streams } from "./streams.js";
import { NOTHING, bytes, compact, count, duration, ended, modelOf, nameOf, rate, stateDetail, wordOf } from "./words.js";

const PAGE = 100;
const HELD_MS = 3000;
const QUIET_S = 10; // from here on a live stream's silence is worth a colour

const RANK = ["error", "idle", "streaming", "cancelled", "complete"];

const silence = (row) => row.stream.idle_s; // as it was when last looked at: since then it may have spoken
const age = (row) => row.stream.age_s + Streams.passed(row);

// by: what is sorted by; down: whether the first click sorts from the largest.
const COLUMNS = [
  { name: "state", title: "State", by: (row) => RANK.indexOf(wordOf(row.stream.state)), down: false },
  { name: "name", title: "Stream", by: (row) => nameOf(row.stream).toLowerCase(), down: false },
  { name: "upstream", title: "Upstream", by: (row) => `${row.stream.upstream ?? ""} ${modelOf(row.stream)}`, down: false },
  { name: "age", title: "Age", by: age, down: true },
  { name: "silence", title: "Silent", hint: "since its last event", by: silence, down: true },
  { name: "rate", title: "Events/s", by: (row) => row.rate, down: true },
  { name: "events", title: "Events", by: (row) => row.stream.events, down: true },
  { name: "held", title: "Memory", hint: "held for it", by: (row) => row.stream.bytes_held, down: true },
  { name: "readers", title: "Readers", by: (row) => row.stream.readers, down: true },
  { name: "attempts", title: "Attempts", by: (row) => row.stream.attempts, down: true },
];
const NEWEST = { name: "newest", by: (row) => row.stream.created_at, down: true };

export class Table {
  /** onStop(stream): somebody wants it stopped; onOpen(id): somebody wants to see it. */
  constructor(streams, { onStop, onOpen }) {
    this.streams = streams;
    this.onStop = onStop;
    this.onOpen = onOpen;
    this.views = new Map();
    this.word = "all";
    this.needles = [];
    this.column = NEWEST;
    this.down = true;
    this.page = 0;
    this.order = [];
    this.heldUntil = 0;
    this.selected = null;
    this.body = byId("rows");
    this.headings();
    this.listen();
  }

  headings() {
    const cells = COLUMNS.map((column) => {
      const button = make("button", { type: "button", title: column.hint }, column.title);
      button.addEventListener("click", () => this.sortBy(column));
      column.cell = make("th", { role: "columnheader", scope: "col", class: `c-${column.name}` }, button);
      return column.cell;
    });
    cells.push(make("th", { role: "columnheader", scope: "col", class: "c-stop" }, make("span", { class: "said" }, "Stop")));
    byId("headings").append(...cells);
    const order = byId("order");
    order.append(make("option", { value: "newest" }, "Newest"), ...COLUMNS.map(({ name, title, hint }) => make("option", { value: name }, hint ? `${title} ${hint}` : title)));
    order.addEventListener("change", () => this.sort(COLUMNS.find(({ name }) => name === order.value) ?? NEWEST));
  }

  listen() {
    const hold = () => {
      this.heldUntil = performance.now() + HELD_MS;
    };
    this.body.addEventListener("pointermove", hold);
    this.body.addEventListener("pointerleave", () => {
      this.heldUntil = 0;
    });
    this.body.addEventListener("keydown", (event) => {
      hold();
      this.key(event);
    });
    this.body.addEventListener("click", (event) => {
      const row = event.target.closest("tr");
      if (!row || event.target.closest("a, button") || !document.getSelection().isCollapsed) return;
      this.onOpen(row.dataset.id);
    });
    for (const [id, step] of [["previous", -1], ["following", 1]]) {
      byId(id).addEventListener("click", () => {
        this.page += step;
        this.reorder();
        byId("list").scrollIntoView({ block: "start" });
      });
    }
  }

  key(event) {
    const here = event.target.closest("tr");
    if (!here || event.altKey || event.ctrlKey || event.metaKey) return;
    const rows = [...this.body.children];
    const at = rows.indexOf(here);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1 }[event.key];
    if (to !== undefined && rows[to]) {
      const kind = event.target.closest("button") ? "button" : "a";
      (rows[to].querySelector(`${kind}:not([hidden])`) ?? rows[to].querySelector("a")).focus();
      event.preventDefault();
    } else if (event.key === "Delete") {
      const stream = this.streams.rows.get(here.dataset.id)?.stream;
      if (stream && !ended(stream)) this.onStop(stream);
      event.preventDefault();
    }
  }

  /** A click on a heading: sort by it, then the other way round, then by age again. */
  sortBy(column) {
    if (this.column !== column) this.sort(column);
    else if (this.down === column.down) this.sort(column, !column.down);
    else this.sort(NEWEST);
  }

  sort(column, down = column.down) {
    this.column = column;
    this.down = down;
    this.page = 0;
    byId("order").value = column.name;
    for (const { cell, name } of COLUMNS) setAttribute(cell, "aria-sort", name === column.name ? (down ? "descending" : "ascending") : null);
    this.reorder();
  }

  /** Show streams of a word, that have all of these words in what they are called or marked with. */
  filter(word, text) {
    this.word = word;
    this.needles = text.toLowerCase().split(/\s+/).filter(Boolean);
    this.page = 0;
    this.reorder();
  }

  select(id) {
    this.selected = id;
    for (const [key, view] of this.views) setAttribute(view.element, "data-selected", key === id ? "" : null);
  }

  /** Put everything in order at once, held or not. */
  reorder() {
    this.heldUntil = 0;
    this.render();
  }

  matches(row) {
    const word = wordOf(row.stream.state);
    if (this.word === "live" ? ended(row.stream) : this.word !== "all" && this.word !== word) return false;
    return this.needles.every((needle) => haystack(row).includes(needle));
  }

  /** The ids on this page. */
  get visible() {
    return this.order;
  }

  render() {
    const rows = [...this.streams.rows.values()].filter((row) => this.matches(row));
    const pages = Math.max(1, Math.ceil(rows.length / PAGE));
    this.page = Math.min(Math.max(0, this.page), pages - 1);
    if (performance.now() >= this.heldUntil) {
      this.inOrder(rows);
      this.order = rows.slice(this.page * PAGE, (this.page + 1) * PAGE).map((row) => row.stream.id);
    } else {
      this.order = this.order.filter((id) => this.streams.rows.has(id));
    }
    this.place();
    const first = this.page * PAGE;
    setText(byId("counted"), rows.length === 0 ? "" : pages === 1 ? `${count(rows.length)} shown` : `${count(first + 1)}–${count(first + this.order.length)} of ${count(rows.length)}`);
    show(byId("previous"), pages > 1);
    show(byId("following"), pages > 1);
    byId("previous").disabled = this.page === 0;
    byId("following").disabled = this.page === pages - 1;
    show(byId("empty"), rows.length === 0);
  }

  inOrder(rows) {
    const sign = this.down ? -1 : 1;
    const by = this.column.by;
    const keys = new Map(rows.map((row) => [row, by(row)]));
    rows.sort((one, other) => {
      const [a, b] = [keys.get(one), keys.get(other)];
      if (a === b) return other.stream.created_at - one.stream.created_at;
      if (a == null) return 1;
      if (b == null) return -1;
      return (a < b ? -1 : 1) * sign;
    });
  }

  place() {
    const focused = this.body.contains(document.activeElement) ? document.activeElement : null;
    const views = new Map();
    for (const id of this.order) {
      const view = this.views.get(id) ?? new RowView(id, this);
      view.update(this.streams.rows.get(id));
      setAttribute(view.element, "data-selected", id === this.selected ? "" : null);
      views.set(id, view);
    }
    this.views = views;
    arrange(this.body, [...views.values()].map((view) => view.element));
    if (focused?.isConnected && document.activeElement !== focused) focused.focus({ preventScroll: true });
  }
}

function haystack(row) {
  const { stream } = row;
  row.words ??= [stream.id, stream.key, stream.upstream, stream.dialect, modelOf(stream), stream.tenant, ...Object.entries(stream.labels ?? {}).map(([name, value]) => `${name}=${value}`)].filter(Boolean).join("\n").toLowerCase();
  return stream.reason ? `${row.words}\n${stream.state}(${stream.reason})` : row.words;
}

class RowView {
  constructor(id, table) {
    this.pill = pill();
    this.detail = make("small");
    this.link = make("a", { href: `#/streams/${encodeURIComponent(id)}` });
    this.marks = make("small");
    this.upstream = make("span");
    this.model = make("small");
    this.button = make("button", { type: "button", class: "quiet" }, "Stop");
    this.button.addEventListener("click", () => {
      const row = table.streams.rows.get(id);
      if (row) table.onStop(row.stream);
    });
    const cell = (name, label, ...children) => make("td", { role: "cell", class: `c-${name}`, "data-label": label }, ...children);
    this.cells = Object.fromEntries(COLUMNS.slice(3).map(({ name, title }) => [name, cell(name, title)]));
    this.element = make(
      "tr",
      { role: "row", "data-id": id },
      cell("state", null, this.pill.element, this.detail),
      make("th", { role: "rowheader", scope: "row", class: "c-name" }, this.link, this.marks),
      cell("upstream", null, this.upstream, this.model),
      ...Object.values(this.cells),
      cell("stop", null, this.button),
    );
  }

  update(row) {
    const { stream } = row;
    const over = ended(stream);
    const word = wordOf(stream.state);
    setAttribute(this.element, "data-word", word);
    this.pill.set(word);
    setText(this.detail, stateDetail(stream));
    setText(this.link, nameOf(stream));
    setText(this.marks, marks(stream));
    setText(this.upstream, stream.upstream ?? NOTHING);
    setText(this.model, modelOf(stream));
    const quiet = silence(row);
    const figures = {
      age: duration(age(row)),
      silence: over ? "" : quiet < 1 ? "< 1 s" : duration(quiet),
      rate: over ? "" : rate(row.rate),
      events: compact(stream.events),
      held: over ? "" : bytes(stream.bytes_held),
      readers: over && stream.readers === 0 ? "" : count(stream.readers),
      attempts: count(stream.attempts),
    };
    for (const [name, text] of Object.entries(figures)) setText(this.cells[name], text);
    setAttribute(this.cells.silence, "data-alarm", !over && quiet >= QUIET_S ? "high" : null);
    setAttribute(this.cells.attempts, "data-alarm", stream.attempts > 1 ? "high" : null);
    show(this.button, !over);
    setAttribute(this.button, "aria-label", `Stop ${nameOf(stream)}`);
  }
}

function marks(stream) {
  const told = stream.key == null ? [] : [stream.id];
  if (stream.tenant) told.push(stream.tenant);
  told.push(...Object.entries(stream.labels ?? {}).map(([name, value]) => `${name}=${value}`));
  return told.join(" · ");
}
