// What the page asks before it does something: stop a stream, start one, sign in.

import * as api from "./api.js";
import { byId, setAttribute, setText } from "./elements.js";
import { duration, modelOf, nameOf, shortened, wordOf } from "./words.js";

/** Ask whether to stop a stream; resolves to the daemon's answer, or to null if it is kept. */
export function confirmStop(stream) {
  const dialog = byId("cancel-dialog");
  const yes = byId("cancel-yes");
  const reason = byId("cancel-reason");
  const from = [stream.upstream, shortened(modelOf(stream))].filter(Boolean).join(" · ");
  setText(byId("cancel-what"), `${nameOf(stream)} — ${from ? `${from}, ` : ""}${wordOf(stream.state)} for ${duration(stream.age_s)}`);
  setText(byId("cancel-wrong"), "");
  reason.value = "";
  return new Promise((resolve) => {
    const listening = new AbortController();
    let answer = null;
    const go = async () => {
      yes.disabled = true;
      try {
        answer = await api.cancel(stream.id, reason.value);
        dialog.close();
      } catch (error) {
        setText(byId("cancel-wrong"), error.message);
      } finally {
        yes.disabled = false;
      }
    };
    yes.addEventListener("click", go, { signal: listening.signal });
    reason.addEventListener(
      "keydown",
      (event) => {
        if (event.key !== "Enter") return;
        event.preventDefault();
        go();
      },
      { signal: listening.signal },
    );
    dialog.addEventListener(
      "close",
      () => {
        listening.abort();
        resolve(answer);
      },
      { signal: listening.signal },
    );
    dialog.showModal();
  });
}

/** What became of a stop, in a sentence. */
export function toldStop(answer) {
  const how = answer.reason ? `${answer.state}(${answer.reason})` : answer.state;
  if (answer.outcome === "won") return "Stopped.";
  if (answer.outcome === "already_terminal") return `It had already ended: ${how}.`;
  return "It is stopping.";
}

/** Ask what to start; resolves to the daemon's answer, or to null if nothing was. */
export function askStart() {
  const dialog = byId("start-dialog");
  const form = byId("start-form");
  setText(byId("start-wrong"), "");
  if (byId("start-upstream").value === "") byId("start-upstream").value = byId("upstreams").firstElementChild?.value ?? "";
  const hint = () => setAttribute(byId("start-model"), "placeholder", byId("start-upstream").value === "simulated" ? "sim/paced" : null);
  hint();
  return new Promise((resolve) => {
    const listening = new AbortController();
    let answer = null;
    byId("start-upstream").addEventListener("input", hint, { signal: listening.signal });
    const submit = async (event) => {
      if (event.submitter?.value === "leave") return;
      event.preventDefault();
      const parameters = { upstream: byId("start-upstream").value, prompt: byId("start-prompt").value };
      for (const name of ["model", "key"]) if (byId(`start-${name}`).value !== "") parameters[name] = byId(`start-${name}`).value;
      try {
        answer = await api.start(parameters);
        dialog.close();
      } catch (error) {
        setText(byId("start-wrong"), error.message);
        if (["upstream", "model", "key"].includes(error.field)) byId(`start-${error.field}`).focus();
      }
    };
    form.addEventListener("submit", submit, { signal: listening.signal });
    dialog.addEventListener(
      "close",
      () => {
        listening.abort();
        resolve(answer);
      },
      { signal: listening.signal },
    );
    dialog.showModal();
    byId("start-upstream").value === "" ? byId("start-upstream").focus() : byId("start-model").focus();
  });
}

let signingIn = null;

/** Ask for the token until it is right; asked again meanwhile, it is the same question. */
export function askToken() {
  signingIn ??= new Promise((resolve) => {
    const dialog = byId("token-dialog");
    const form = byId("token-form");
    const listening = new AbortController();
    const signal = listening.signal;
    dialog.addEventListener("cancel", (event) => event.preventDefault(), { signal }); // without a token there is nothing to see
    form.addEventListener(
      "submit",
      async (event) => {
        event.preventDefault();
        try {
          await api.signIn(byId("token").value);
          byId("token").value = "";
          setText(byId("token-wrong"), "");
          dialog.close();
        } catch (error) {
          setText(byId("token-wrong"), error.unauthenticated ? "This is not the token." : error.message);
        }
      },
      { signal },
    );
    dialog.addEventListener(
      "close",
      () => {
        listening.abort();
        signingIn = null;
        resolve();
      },
      { signal },
    );
    dialog.showModal();
  });
  return signingIn;
}
