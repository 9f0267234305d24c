// The daemon, as the page speaks to it: JSON over HTTP, from where the page came from and nowhere else.
//
// Every URL is relative to the page, so that the page works behind a proxy that serves it under a path. What fails is an
// `ApiError`: `status` 0 means that the daemon could not be reached, 401 that it wants a token.

const TIMEOUT_MS = 10_000;

export class ApiError extends Error {
  constructor(status, { kind = "", field = "", message = "", temporary = false, retry_after_s = null } = {}) {
    super(message || `HTTP ${status}`);
    this.status = status;
    this.field = field;
    this.kind = kind;
    this.temporary = temporary;
    this.retryAfter = retry_after_s;
  }

  get unreachable() {
    return this.status === 0;
  }

  get unauthenticated() {
    return this.status === 401;
  }
}

async function ask(method, path, body) {
  const options = { method, signal: AbortSignal.timeout(TIMEOUT_MS), headers: { Accept: "application/json" } };
  if (body !== undefined) {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let response;
  let text;
  try {
    response = await fetch(path, options);
    text = await response.text();
  } catch {
    throw new ApiError(0, { kind: "unreachable", message: "The daemon cannot be reached." });
  }
  let answer;
  try {
    answer = JSON.parse(text);
  } catch {
    answer = null; // a proxy's page, say
  }
  if (!response.ok) throw new ApiError(response.status, answer?.error ?? { message: `HTTP ${response.status}` });
  return answer;
}

function query(parameters) {
  const given = Object.entries(parameters).flatMap(([name, value]) => [value].flat().map((one) => [name, one]));
  const told = given.filter(([, value]) => value != null && value !== "").map(([name, value]) => [name, String(value)]);
  return told.length ? `?${new URLSearchParams(told)}` : "";
}

const path = (id) => `streams/${encodeURIComponent(id)}`;

export const overview = () => ask("GET", "overview");
export const list = (parameters) => ask("GET", `streams${query(parameters)}`);
export const get = (id) => ask("GET", path(id));
export const snapshot = (id) => ask("GET", `${path(id)}/snapshot`);
export const trace = (id) => ask("GET", `${path(id)}/trace`);
export const start = (parameters) => ask("POST", "streams", parameters);
export const cancel = (id, reason) => ask("POST", `${path(id)}/cancel`, { reason, actor: "dashboard", wait_s: 5 });
export const session = () => ask("GET", "session");
export const signIn = (token) => ask("POST", "session", { token });

/** Where a stream's events are read, as text. after: `start`, `snapshot`, or a position. */
export function eventsUrl(id, after, maxBehind) {
  return `${path(id)}/events${query({ view: "text", after, max_behind: maxBehind })}`;
}
