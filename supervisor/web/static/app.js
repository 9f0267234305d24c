// The page: it asks the daemon once a second how things are, and shows it. Where things are is in the address (`#/streams/ID`,
// or `#/streams/key:KEY`, which becomes it).

import * as api from "./api.js";
import { Detail } from "./detail.js";
import { askStart, askToken, confirmStop, toldStop } from "./dialogs.js";
import { byId, setAttribute, setText, show } from "./elements.js";
import { showOverview } from "./overview.js";
import { Streams } from "./streams.js";
import { Table } from "./table.js";
import { second } from "./words.js";

const TURN_MS = 1000;
const OVERVIEW_EVERY = 2; // turns
const WAITS_MS = [500, 1000, 2000, 3000];

const streams = new Streams();
const table = new Table(streams, { onStop: stop, onOpen: open });
const detail = new Detail(streams, { onStop: stop, onNamed: named, announce, onProblem: problem });

let turn = 0;
let failures = 0;
let timer = null;
let turning = false;
let hurried = false; // asked for another turn during this one
let lastGood = null;

/** Sign in first, where that is needed: to be refused is an error in the browser's console. */
async function begun() {
  try {
    const { required, authenticated } = await api.session();
    if (required && !authenticated) await askToken();
  } catch {
    // whatever it is, the first turn says it
  }
  route();
  filter(); // a browser may bring back what was chosen before
  await takeTurn();
}

// --- asking ----------------------------------------------------------------------------------------------------------

async function takeTurn() {
  clearTimeout(timer);
  if (document.hidden) return;
  turning = true;
  hurried = false;
  try {
    const overview = turn % OVERVIEW_EVERY === 0 ? api.overview().then(overviewCame) : Promise.resolve();
    await Promise.all([detail.refresh(), overview.finally(() => streams.refresh(table.visible))]);
    turn += 1;
    good();
  } catch (error) {
    await problem(error);
  }
  table.render();
  empty();
  turning = false;
  schedule(hurried ? 0 : failures ? WAITS_MS[Math.min(failures, WAITS_MS.length) - 1] : TURN_MS);
}

function overviewCame(told) {
  showOverview(told);
  streams.noteEnded(told.total.ended);
}

function schedule(wait) {
  clearTimeout(timer);
  if (turning) {
    hurried = true;
    return;
  }
  timer = setTimeout(takeTurn, wait);
}

function good() {
  failures = 0;
  lastGood = Date.now() / 1000;
  if (document.body.dataset.link !== "live") {
    if (document.body.dataset.link === "lost") setText(byId("link"), "Connected again.");
    document.body.dataset.link = "live";
    show(byId("lost"), false);
  }
}

async function problem(error) {
  if (error.unauthenticated) {
    await askToken();
    turn = 0;
    detail.resume();
    return;
  }
  if (!(error instanceof api.ApiError)) console.error(error);
  failures += 1;
  turn = 0; // once it is back, everything is asked for
  const since = lastGood === null ? "" : ` What is shown is from ${second(lastGood)}.`;
  setText(byId("status-word"), "offline");
  setText(byId("lost"), `${error.message}${since} Trying again.`);
  show(byId("lost"), true);
  if (document.body.dataset.link !== "lost") {
    document.body.dataset.link = "lost";
    setText(byId("link"), "Connection lost.");
  }
}

function empty() {
  const filtered = table.word !== "all" || table.needles.length > 0;
  setText(byId("empty"), lastGood === null ? "Asking…" : filtered ? "No stream is like this." : "No stream yet. Start one here, or let a program start it.");
  show(byId("older"), streams.hasOlder && !["live", "idle", "streaming"].includes(table.word));
}

// --- where we are ----------------------------------------------------------------------------------------------------

function open(id) {
  location.hash = `#/streams/${encodeURIComponent(id)}`;
}

/** The stream that is open by its key is open by its id from here on. */
function named(id) {
  location.replace(`#/streams/${encodeURIComponent(id)}`);
}

function close() {
  const from = detail.id;
  location.hash = "#/";
  if (from !== null) document.querySelector(`#rows a[href="#/streams/${CSS.escape(encodeURIComponent(from))}"]`)?.focus();
}

function route() {
  const match = /^#\/streams\/(.+)$/.exec(location.hash);
  const id = match ? decodeURIComponent(match[1]) : null;
  if (id === null) detail.leave();
  else detail.open(id);
  table.select(id);
  setAttribute(byId("columns"), "data-open", id === null ? null : "");
  show(byId("panels"), id === null);
  document.title = id === null ? "Streams" : `${id} – Streams`;
  if (id !== null) schedule(0);
}

// --- doing -----------------------------------------------------------------------------------------------------------

async function stop(stream) {
  const answer = await confirmStop(stream);
  if (answer === null) return;
  if (answer.outcome !== "won" || stream.id !== detail.id) announce(toldStop(answer)); // how an open one ended is said anyway
  schedule(0);
}

async function begin() {
  const answer = await askStart();
  if (answer === null) return;
  announce(answer.created ? "Started." : "It runs already; joined.");
  open(answer.id);
}

function announce(text) {
  setText(byId("announce"), text);
}

function filter() {
  const word = document.querySelector("input[name=word]:checked").value;
  streams.want(word);
  table.filter(word, byId("needle").value);
  empty();
  if (streams.endedDue) schedule(0);
}

/** Open the stream that has what was typed as its id or key. */
async function find(event) {
  event.preventDefault();
  const text = byId("needle").value.trim();
  if (text === "") return;
  try {
    const byKey = await api.list({ key: text, limit: 1 });
    const found = byKey.streams[0] ?? (await api.get(text));
    streams.put(found);
    open(found.id);
  } catch (error) {
    if (error.status === 404 || error.status === 400) announce("No stream has this id or key.");
    else await problem(error);
  }
}

// --- listening -------------------------------------------------------------------------------------------------------

const THEMES = ["system", "light", "dark"];

function setTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  setText(byId("theme-said"), `Colours: ${theme === "system" ? "as the system" : theme}`);
}

const TYPED_IN = "input:not([type=radio]), textarea, select, dialog";

function keyPressed(event) {
  if (event.key === "Escape" && detail.id !== null && !document.querySelector("dialog[open]")) close();
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
  if (!byId("keys-on").checked || event.target.closest(TYPED_IN)) return;
  const does = { "/": () => byId("needle").focus(), n: begin, "?": () => byId("keys-dialog").showModal() }[event.key];
  if (!does) return;
  event.preventDefault();
  does();
}

byId("new").addEventListener("click", begin);
byId("keys").addEventListener("click", () => byId("keys-dialog").showModal());
byId("keys-on").checked = localStorage.getItem("keys") !== "off";
byId("keys-on").addEventListener("change", () => localStorage.setItem("keys", byId("keys-on").checked ? "on" : "off"));
byId("theme").addEventListener("click", () => {
  const theme = THEMES[(THEMES.indexOf(localStorage.getItem("theme") ?? "system") + 1) % THEMES.length];
  localStorage.setItem("theme", theme);
  setTheme(theme);
});
byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  byId("list").focus();
});
byId("close").addEventListener("click", (event) => {
  event.preventDefault();
  close();
});
byId("words").addEventListener("change", filter);
byId("needle").addEventListener("input", filter);
byId("find").addEventListener("submit", find);
byId("older").addEventListener("click", async () => {
  try {
    await streams.askOlder();
  } catch (error) {
    await problem(error);
  }
  table.reorder();
  empty();
});
document.addEventListener("keydown", keyPressed);
document.addEventListener("visibilitychange", () => {
  if (document.hidden) detail.pause();
  else {
    detail.resume();
    schedule(0);
  }
});
addEventListener("hashchange", route);

setTheme(localStorage.getItem("theme") ?? "system");
empty();
begun();
