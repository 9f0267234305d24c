// The pane that an answer is written into. It follows the end until it is scrolled away from it.
//
// Text arrives many times a second; it is gathered and written a few times a second, into blocks of bounded length, since a
// browser lays out the whole of a text node that has changed. Of a very long answer the beginning is let go of, and this is said.

import { count } from "./words.js";
import { make, setText, show } from "./elements.js";

const WRITE_EVERY_MS = 50;
const BLOCK_CHARS = 4000;
const SHOWN_CHARS = 400_000;

export class TextPane {
  constructor({ pane, note, latest }) {
    this.pane = pane;
    this.note = note;
    this.latest = latest;
    this.timer = null;
    this.clear();
    pane.addEventListener("scroll", () => this.scrolled());
    latest.addEventListener("click", () => {
      this.toEnd();
      pane.focus();
    });
  }

  /** Whether there is no text. */
  get empty() {
    return this.chars === 0 && this.waiting === "";
  }

  /** Forget everything. */
  clear() {
    clearTimeout(this.timer);
    this.timer = null;
    this.waiting = "";
    this.left = 0;
    this.chars = 0;
    this.following = true;
    this.pane.replaceChildren();
    show(this.note, false);
    show(this.latest, false);
  }

  /** Show this text in place of what there is; joins: where, in characters, an attempt went on. */
  replace(text, joins = []) {
    const following = this.following;
    this.clear();
    this.following = following;
    // Positions count characters as Python does, and JavaScript counts some as two.
    const all = joins.length ? [...text] : null;
    let from = 0;
    for (const at of joins) {
      this.add(all.slice(from, at).join(""));
      this.seam();
      from = at;
    }
    this.add(all ? all.slice(from).join("") : text);
    this.trim();
    this.scrollOn();
  }

  /** Write more text, soon. With `joined` it goes on from an earlier attempt, `dropped` characters of which are not kept. */
  append(text, dropped = 0, joined = false) {
    if (joined) {
      this.write();
      this.drop(dropped);
      this.seam();
    }
    this.waiting += text;
    this.timer ??= setTimeout(() => this.write(), WRITE_EVERY_MS);
  }

  /** Write what waits. */
  write() {
    clearTimeout(this.timer);
    this.timer = null;
    if (this.waiting === "") return;
    this.add(this.waiting);
    this.waiting = "";
    this.trim();
    this.scrollOn();
  }

  add(text) {
    let rest = text;
    while (rest !== "") {
      let block = this.pane.lastChild;
      if (block?.nodeType !== Node.TEXT_NODE || block.length >= BLOCK_CHARS) block = this.pane.appendChild(document.createTextNode(""));
      const part = rest.slice(0, BLOCK_CHARS);
      block.appendData(part);
      this.chars += part.length;
      rest = rest.slice(part.length);
    }
  }

  drop(characters) {
    let left = characters;
    while (left > 0 && this.pane.lastChild?.nodeType === Node.TEXT_NODE) {
      const block = this.pane.lastChild;
      const part = Math.min(left, block.length);
      block.deleteData(block.length - part, part);
      this.chars -= part;
      left -= part;
      if (block.length === 0) block.remove();
    }
  }

  /** Mark where another attempt went on. The mark is no text. */
  seam() {
    this.pane.append(make("span", { class: "seam", title: "another attempt went on from here", role: "img", "aria-label": "(another attempt went on from here)" }));
  }

  trim() {
    while (this.chars > SHOWN_CHARS && this.pane.firstChild !== this.pane.lastChild) {
      const first = this.pane.firstChild;
      if (first.nodeType === Node.TEXT_NODE) {
        this.left += first.length;
        this.chars -= first.length;
      }
      first.remove();
    }
    if (this.left > 0) {
      setText(this.note, `The first ${count(this.left)} characters are not shown.`);
      show(this.note, true);
    }
  }

  scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.pane;
    this.following = scrollHeight - scrollTop - clientHeight < 24;
    if (this.following) show(this.latest, false);
  }

  scrollOn() {
    if (this.following) this.toEnd();
    else show(this.latest, true);
  }

  toEnd() {
    this.following = true;
    this.pane.scrollTop = this.pane.scrollHeight;
    show(this.latest, false);
  }
}
