// Vercel's AI SDK, with its providers for OpenAI and Anthropic.

import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, streamText } from "ai";
import { run, told } from "./seen.mjs";

globalThis.AI_SDK_LOG_WARNINGS = false;

const common = { prompt: "Hi", maxRetries: 0, onError() {} };

/** The parts of an answer, without what is made up anew each time. */
async function* parts(model, more = {}) {
  for await (const part of streamText({ model, ...common, ...more }).fullStream) {
    yield plain(part.type === "error" ? { type: "error", error: told(part.error) } : part);
  }
}

function plain(part) {
  return JSON.parse(
    JSON.stringify(part, (name, value) => {
      if (["headers", "performance", "request", "timestamp"].includes(name)) return undefined;
      return typeof value === "string" ? value.replace(/^(aitxt-)?[A-Za-z0-9]{16,24}$/, "made up") : value;
    }),
  );
}

function ways(url) {
  const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: "key-of-a-client" });
  const anthropic = createAnthropic({ baseURL: `${url}/v1`, apiKey: "key-of-a-client" });
  return {
    "openai-chat": (model) => parts(openai.chat(model)),
    "openai-responses": (model) => parts(openai.responses(model)),
    anthropic: (model) => parts(anthropic(model)),
    whole: async (model) => [(await generateText({ model: anthropic(model), ...common })).text],
  };
}

async function abort(url, model) {
  const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: "key-of-a-client" });
  const controller = new AbortController();
  for await (const part of parts(openai.chat(model), { abortSignal: controller.signal })) {
    if (part.type === "text-delta") controller.abort();
    if (part.type === "abort") return part.type;
  }
}

await run(ways, abort);
